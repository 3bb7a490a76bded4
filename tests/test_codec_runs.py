"""Training a codec as a user starts it: stopped and resumed, begun with another's, and refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dit_jax import sample, train, training
from dit_jax.codec.codec import VideoCodec
from dit_jax.codec.folders import load_codec
from dit_jax.codec.measures import reconstruction_report
from dit_jax.codec.run import held_out, windows
from dit_jax.config import to_dict
from dit_jax.data import open_source
from dit_jax.evaluate import __main__ as evaluate
from dit_jax.plan import __main__ as plan
from dit_jax.sampling import to_float, to_uint8
from dit_jax.sampling.media import read_video
from tests.codecs import SMALL
from tests.runs import CONFIG as MODEL
from tests.runs import Ended, arrays, data_state, item_arrays, scalars, steps
from tests.test_convert_codecs import run_with
from tests.tiny_codec_config import get_config

CODEC = MODEL.with_name("tiny_codec_config.py")
CONFIG = get_config()
TINY = to_dict(CONFIG)


def train_here(*arguments: object) -> Ended:
    """Trains in this process, on one device."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = train.main([str(one) for one in arguments])
    return Ended(status, text.getvalue())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Ended]]:
    """A run that nothing stopped, and one, not measured, that SIGTERM did at its third step and that
    was resumed."""
    whole, stopped = (tmp_path_factory.mktemp(name) / "run" for name in ("whole", "stopped"))
    arguments = {run: ["--config", CODEC, "--output", run] for run in (whole, stopped)}
    arguments[stopped] += ["--evaluation.clips", 0, "--log.draw-every", 0]
    advance, done, first = training.Progress.advance, [], jax.devices()[:1]

    def advance_and_send(*given: Any) -> None:
        done.append(advance(*given))
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_, **__: first)
        patch.setattr(jax, "local_devices", lambda *_, **__: first)
        ended = [train_here(*arguments[whole])]
        patch.setattr(training.Progress, "advance", advance_and_send)
        ended += [train_here(*arguments[stopped]) for _ in range(2)]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return whole, stopped, ended


def test_run_learns_saves_logs_and_draws(runs: tuple[Path, Path, list[Ended]]):
    run, _, (ended, *_) = runs
    assert ended.status == 0 and steps(run) == [8, 16]
    assert json.loads((run / "config.json").read_text()) == TINY | {"output": str(run)}
    assert "codec: 0.0 M parameters" in ended.text and "codec report: psnr" in ended.text
    losses = scalars(run, "loss")
    assert sorted(losses) == list(range(1, 17)) and losses[16] < 0.7 * losses[1]
    assert sorted(scalars(run, "l1")) == sorted(scalars(run, "kl")) == sorted(losses)
    for picture in ("samples.png", "samples_0000016.png"):
        assert read_video(run / picture)[0].std() > 0


def test_the_codec_that_is_left_is_the_one_that_was_measured(runs):
    """Its latents have unit variance."""
    run = runs[0]
    codec = load_codec(run / "codec")
    assert isinstance(codec, VideoCodec)
    assert (codec.strides, codec.channels) == ((2, 4, 4), 3)
    training = windows(CONFIG, open_source(CONFIG.data.source), 8, 2)
    latents = np.concatenate([codec.encode(to_float(w)).reshape(-1, 3) for w in training])
    # The very windows that were measured: float32 sums in another order.
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std(0), 1, atol=1e-4)
    report = json.loads((run / "report.json").read_text())
    said = {name: value for name, value in report.items() if name != "held_out_loss/mean"}
    assert set(said) == {"psnr", "ssim", "flicker", "resize_psnr", "count"} < set(report)
    assert json.loads((run / "codec.json").read_text()) == said | {"hash": codec.hash}
    assert said["count"] == 6 and 5 < said["psnr"] < 50 and 0 < said["flicker"] < 255
    clips = windows(CONFIG, open_source(held_out(CONFIG)), 6, 1)
    back = [to_uint8(codec.decode(codec.encode(to_float(clip)))) for clip in clips]
    found = reconstruction_report(clips, back)
    assert {name: said[name] for name in found} == pytest.approx(found, rel=1e-3)


def test_a_stopped_run_ends_like_one_that_was_not(runs: tuple[Path, Path, list[Ended]]):
    whole, stopped, (_, first, second) = runs
    assert first.status == 143 and "SIGTERM: saving step 3" in first.text
    assert second.status == 0 and "resumed at step 3" in second.text
    one, two = arrays(whole, 16), arrays(stopped, 16)
    assert one.keys() == two.keys() and len(one) > 50
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name
    assert data_state(whole, 16) == data_state(stopped, 16)
    # A run that measures nothing leaves its codec too.
    assert not (stopped / "codec.json").exists()
    for name in ("codec/config.json", "codec/diffusion_pytorch_model.safetensors"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()


@pytest.mark.slow
def test_another_run_begins_with_its_averages(runs, one_device, tmp_path: Path):
    given, run = ["--config", CODEC, "--checkpoint.initial", runs[0]], tmp_path / "run"
    quick = ["--steps", 1, "--log.draw-every", 0, "--evaluation.clips", 0]
    quick += ["--optimizer.learning-rate", 1e-12, "--optimizer.weight-decay", 0]
    assert train_here(*given, *quick, "--output", run).status == 0
    before, after = (
        item_arrays(*of)["params"]["autoencoder"]
        for of in ((runs[0], 16, "ema"), (run, 1, "params"))
    )
    for name in ("encoder", "decoder"):
        kernels = (one[name]["conv_out"]["kernel"] for one in (after, before))
        np.testing.assert_allclose(*kernels, atol=1e-9)
    # Parameters of another model, and of another kind of run.
    ended = train_here(*given, "--output", tmp_path / "b", "--model.shortcuts", "True")
    assert "is a run with model.shortcuts = False, and not True" in ended.text
    wrong = ["--config", MODEL, "--data.packing.rows", 8, *given[2:], "--output", tmp_path / "c"]
    assert "is a run with " in train_here(*wrong).text


def test_a_codecs_run_is_not_resumed_as_another(runs: tuple[Path, Path, list[Ended]]):
    for config, more, said in (
        (CODEC, ["--data.crop.rows", 16], "holds a run with data.crop.rows = 8, and not 16"),
        (MODEL, [], "holds a run with data."),
    ):
        ended = train_here("--config", config, "--output", runs[0], *more)
        assert ended.status == 2 and said in ended.text


def test_verbs_of_models_refuse_a_codecs_run(tmp_path: Path, capsys):
    run = run_with(SMALL, tmp_path / "run")
    for verb, more in (
        (sample, ["--prompt", "a", "--output", tmp_path / "a.png"]),
        (evaluate, ["--output", tmp_path / "e", "--num", 2]),
    ):
        assert verb.main([str(one) for one in ["--checkpoint", run, *more]]) == 2
        assert "is a CodecRun: give a VideoRun" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, what, said",
    [
        (MODEL, "encode", "--what encode is of codecs, and the config is a model's"),
        (CODEC, "sample", "--what sample is of models, and the config is a codec's"),
    ],
)
def test_plans_are_of_what_the_config_is_of(config, what, said, monkeypatch, capsys):
    """Refused before anything is compiled; no TPU's compiler is needed."""
    monkeypatch.setattr(plan, "prepare_environment", lambda: None)
    monkeypatch.setattr(plan, "topology_devices", lambda _: jax.devices()[:4])
    given = ["--config", config, "--topology", "v5e:2x2", "--what", what, "--mesh.data", 4]
    assert plan.main([str(one) for one in given]) == 2
    assert said in capsys.readouterr().err
