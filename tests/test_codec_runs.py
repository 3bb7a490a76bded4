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
from dit_jax.codec.folders import load_codec
from dit_jax.codec.run import CodecRun
from dit_jax.config import load_config, to_dict
from dit_jax.evaluate import __main__ as evaluate
from dit_jax.plan import __main__ as plan
from dit_jax.sampling.media import read_video
from tests.codecs import SMALL
from tests.runs import CONFIG, Ended, Verbs, arrays, data_state, end, item_arrays, scalars, steps
from tests.test_convert_codecs import run_with

CODEC = CONFIG.with_name("tiny_codec_config.py")
TINY = to_dict(load_config(str(CODEC), CodecRun))


def train_here(*arguments: object) -> Ended:
    """Trains in this process, on one device."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = train.main([str(one) for one in arguments])
    return Ended(status, text.getvalue())


@pytest.fixture(scope="module")
def runs(cached: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Ended]]:
    """A run that nothing stopped, and one that SIGTERM did at its third step and that was resumed."""
    whole, stopped = (tmp_path_factory.mktemp(name) / "run" for name in ("whole", "stopped"))
    arguments = {run: ["--config", CODEC, "--output", run] for run in (whole, stopped)}
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


def test_run_saves_logs_draws_and_reports(runs: tuple[Path, Path, list[Ended]]):
    run, _, (ended, *_) = runs
    assert ended.status == 0 and steps(run) == [4, 8]
    assert json.loads((run / "config.json").read_text()) == TINY | {"output": str(run)}
    assert "codec: 0.0 M parameters" in ended.text and "codec report: psnr" in ended.text
    losses = scalars(run, "loss")
    assert sorted(losses) == list(range(1, 9)) and losses[8] < losses[1]
    assert sorted(scalars(run, "l1")) == sorted(scalars(run, "kl")) == sorted(losses)
    report = json.loads((run / "report.json").read_text())
    assert set(report) == {
        "psnr",
        "ssim",
        "flicker",
        "resize_psnr",
        "count",
        "held_out_loss/mean",
    }
    assert report["count"] == 6
    for picture in ("samples.png", "samples_0000004.png", "samples_0000008.png"):
        assert read_video(run / picture)[0].std() > 0
    assert load_codec(run / "codec").strides == (4, 4, 4)


def test_a_stopped_run_ends_like_one_that_was_not(runs: tuple[Path, Path, list[Ended]]):
    whole, stopped, (_, first, second) = runs
    assert first.status == 143 and "SIGTERM: saving step 3" in first.text
    assert second.status == 0 and "resumed at step 3" in second.text
    one, two = arrays(whole, 8), arrays(stopped, 8)
    assert one.keys() == two.keys() and len(one) > 50
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name
    assert data_state(whole, 8) == data_state(stopped, 8)
    for name in ("report.json", "samples.png", "codec.json", "codec/config.json"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()


@pytest.mark.slow
def test_another_run_begins_with_its_averages(
    runs: tuple[Path, Path, list[Ended]], verbs: Verbs, tmp_path: Path, capsys
):
    whole, given = runs[0], ["--config", CODEC, "--checkpoint.initial", runs[0]]
    quick = ["--steps", 1, "--log.draw-every", 0, "--evaluation.clips", 0]
    still = ["--optimizer.learning-rate", 1e-12, "--optimizer.weight-decay", 0]
    run = tmp_path / "run"
    (ended,) = end(verbs.start("train", [*given, *quick, *still, "--output", run]))
    assert ended.status == 0
    before, after = item_arrays(whole, 8, "ema"), item_arrays(run, 1, "params")
    for name in ("encoder", "decoder"):
        kernel = after["params"]["autoencoder"][name]["conv_out"]["kernel"]
        np.testing.assert_allclose(
            kernel, before["params"]["autoencoder"][name]["conv_out"]["kernel"], atol=1e-9
        )
    assert (run / "codec" / "config.json").exists()
    # Parameters of another model, and of another kind of run.
    wrong = [*given, "--output", tmp_path / "b", "--model.shortcuts", "True"]
    assert train.main([str(one) for one in wrong]) == 2
    assert "is a run with model.shortcuts = False, and not True" in capsys.readouterr().err
    wrong = ["--config", CONFIG, "--checkpoint.initial", whole, "--output", tmp_path / "c"]
    wrong += ["--data.packing.rows", 8]
    assert train.main([str(one) for one in wrong]) == 2
    assert "is a run with model." in capsys.readouterr().err


def test_a_codecs_run_is_not_resumed_as_another(runs: tuple[Path, Path, list[Ended]], capsys):
    for config, more, said in (
        (CODEC, ["--model.patch", 2], "holds a run with model.patch = 4, and not 2"),
        (CODEC, ["--data.crop.rows", 16], "holds a run with data.crop.rows = 8, and not 16"),
        (CONFIG, [], "holds a run with data."),
    ):
        given = ["--config", config, "--output", runs[0], *more]
        assert train.main([str(one) for one in given]) == 2
        assert said in capsys.readouterr().err


def test_verbs_of_models_refuse_a_codecs_run(tmp_path: Path, capsys):
    run = run_with(SMALL, tmp_path / "run")
    said = "is a CodecRun: give a VideoRun"
    given = ["--checkpoint", run, "--prompt", "a", "--output", tmp_path / "a.png"]
    assert sample.main([str(one) for one in given]) == 2
    assert said in capsys.readouterr().err
    given = ["--checkpoint", run, "--output", tmp_path / "e", "--num", 2]
    assert evaluate.main([str(one) for one in given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, what, said",
    [
        (CONFIG, "encode", "--what encode is of codecs, and the config is a model's"),
        (CODEC, "sample", "--what sample is of models, and the config is a codec's"),
    ],
)
def test_plans_are_of_what_the_config_is_of(
    config: Path, what: str, said: str, monkeypatch, capsys
):
    """Refused before anything is compiled; no TPU's compiler is needed."""
    monkeypatch.setattr(plan, "prepare_environment", lambda: None)
    monkeypatch.setattr(plan, "topology_devices", lambda _: jax.devices()[:4])
    given = ["--config", config, "--topology", "v5e:2x2", "--what", what, "--mesh.data", 4]
    assert plan.main([str(one) for one in given]) == 2
    assert said in capsys.readouterr().err
