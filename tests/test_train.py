"""Training as a user starts it: whole processes, their signals, and what they leave on disk."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dit_jax import train, training
from dit_jax.config import load_config, to_dict
from dit_jax.files import local_copy
from dit_jax.sampling.media import read_video
from tests import runs
from tests.runs import CONFIG, Run, Verbs, end, scalars, steps

TINY = to_dict(load_config(str(CONFIG)))
LAST = TINY["steps"]
EVERY = TINY["checkpoint"]["every"]
SAVED = list(range(EVERY, LAST + 1, EVERY))
QUICK = ("--log.draw-every", 0, "--evaluators.1.prompts", 0)
"""No pictures: sampling need not be compiled."""
TOLERANCE = 1e-5
"""Relative, of losses: the same sums in another order, carried through twenty steps of Adam."""


# A run from beginning to end.


def test_run_saves_logs_draws_and_reports(whole: Run):
    (ended,), directory = whole.ended, whole.directory
    assert ended.status == 0
    assert steps(directory) == SAVED
    assert json.loads((directory / "config.json").read_text()) == TINY | {"output": str(directory)}

    assert re.search(r"text_to_video: 0\.\d M parameters, 1 x cpu, mesh .*'data': 1", ended.text)
    assert re.search(r"20/20 .*loss=\d\.\d{4}, tok/s=\d+, packed=\d+%", ended.text)
    losses = scalars(directory, "loss")
    assert sorted(losses) == list(range(1, LAST + 1))
    assert np.isfinite(list(losses.values())).all()
    # Predicting zero, as a fresh model does, has the loss of noise and pixels; training lowers it.
    assert np.mean([losses[i] for i in range(LAST - 3, LAST + 1)]) < 0.97 * losses[1]
    packed = scalars(directory, "packing_efficiency")
    assert all(0.5 < share <= 1 for share in packed.values()) and len(packed) == LAST

    report = json.loads((directory / "report.json").read_text())
    levels = [f"held_out_loss/{(2 * i + 1) / 16:.2f}" for i in range(8)]
    judged = {"color", "shape", "direction", "size", "all", "n"}
    assert set(report) == {*judged, *levels, "held_out_loss/mean"} and report["n"] == 3
    assert np.mean([report[name] for name in levels]) == pytest.approx(report["held_out_loss/mean"])
    assert scalars(directory, levels[0]) == {LAST: pytest.approx(report[levels[0]])}
    assert "text_to_video report: " in ended.text and "samples.png" in ended.text
    assert scalars(directory, "report/n") == {LAST: 3}
    for picture in ("samples.png", f"samples_{LAST // 2:07d}.png", f"samples_{LAST:07d}.png"):
        assert read_video(directory / picture)[0].std() > 0


@pytest.mark.slow
def test_resuming_what_is_complete_only_reports(whole: Run, verbs: Verbs, tmp_path: Path):
    again = tmp_path / "run"
    shutil.copytree(whole.directory, again)
    (again / "report.json").unlink()
    (ended,) = end(verbs.train(again))
    assert ended.status == 0 and f"resumed at step {LAST}" in ended.text
    runs.assert_same_run(whole.directory, again, [LAST])
    assert (again / "report.json").read_bytes() == (whole.directory / "report.json").read_bytes()


# Interruptions.


def test_a_run_that_is_killed_at_a_random_moment_ends_like_one_that_is_not(
    whole: Run, verbs: Verbs, tmp_path: Path
):
    seed = int(os.environ.get("DIT_JAX_TEST_SEED", time.time_ns() % 10**6))
    rng = random.Random(seed)
    stop = ("SIGKILL", rng.randint(1, 18), rng.uniform(0, 0.05))
    print(f"DIT_JAX_TEST_SEED={seed}: {stop}")
    run = tmp_path / "run"
    (killed,) = end(verbs.train(run, *QUICK, stop=stop))
    assert killed.status == -9
    print("checkpoints:", sorted(p.name for p in run.glob("checkpoints/*")))
    (resumed,) = end(verbs.train(run, *QUICK))
    assert resumed.status == 0
    assert re.search(r"resumed at step (4|8|12|16)\b|compiling the step", resumed.text)
    assert steps(run) == SAVED
    runs.assert_same_run(whole.directory, run, [EVERY, LAST])
    for name in ("gradient_norm", "packing_efficiency"):
        assert scalars(run, name) == scalars(whole.directory, name)
    one, two = (json.loads((d / "report.json").read_text()) for d in (whole.directory, run))
    assert len(two) == 9 and two.items() <= one.items()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_a_second_stops_at_once(number: signal.Signals):
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = training.StopSignal()
        assert not stop.asked(1)
        signal.raise_signal(number)
        assert stop.asked(2) and stop.name == number.name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)


# Several processes.


@pytest.fixture(scope="module")
def pair(verbs: Verbs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two processes, of which the second gets SIGTERM at its eleventh step, up to then."""
    directory, port = tmp_path_factory.mktemp("pair") / "run", runs.free_port()
    arguments, stop = (*QUICK, "--evaluators.0.every", LAST // 2), ("SIGTERM", 11, 0)
    started = [
        verbs.train(directory, *arguments, place=(0, 2, port)),
        verbs.train(directory, *arguments, place=(1, 2, port), stop=stop),
    ]
    return Run(directory, started, end(*started))


def test_two_processes_train_as_one_does(whole: Run, pair: Run):
    losses, alone = (scalars(run.directory, "loss") for run in (pair, whole))
    assert len(losses) >= 10
    assert losses == pytest.approx({step: alone[step] for step in losses}, rel=TOLERANCE)
    assert "2 x cpu" in pair.ended[0].text
    # Both evaluate what is due; that they draw as one does is in test_sample.
    assert list(scalars(pair.directory, "held_out_loss/mean")) == [LAST // 2]


def test_sigterm_to_one_process_stops_both_at_one_step(pair: Run):
    assert [ended.status for ended in pair.ended] == [143, 143]
    first, second = (ended.text for ended in pair.ended)
    said = re.search(r"SIGTERM: saving step (\d+); the same command resumes there\.", first)
    assert said and 11 <= (last := int(said[1])) < LAST
    assert steps(pair.directory) == sorted({*(step for step in SAVED if step < last), last})
    # Nothing is told or written twice.
    assert "loss=" not in second and "saving" not in second
    assert len(list(pair.directory.glob("logs/events*"))) == 1


def test_one_process_resumes_a_run_of_two_on_cloud_storage(
    whole: Run, pair: Run, verbs: Verbs, bucket: str
):
    last, items = steps(pair.directory)[-1], ("params", "ema", "opt", "data", "config")
    run = runs.upload_checkpoint(pair.directory, last, f"{bucket}/resumed", items)
    (ended,) = end(verbs.train(run, *QUICK))
    assert ended.status == 0 and f"resumed at step {last}" in ended.text
    copy, later = local_copy(run), [step for step in SAVED if step > last]
    assert steps(copy) == [last, *later]
    for step in later:
        assert runs.data_state(copy, step) == runs.data_state(whole.directory, step)
    losses, alone = (scalars(directory, "loss") for directory in (copy, whole.directory))
    assert sorted(losses) == list(range(last + 1, LAST + 1))
    assert losses == pytest.approx({step: alone[step] for step in losses}, rel=TOLERANCE)
    assert "held_out_loss/mean" in json.loads((copy / "report.json").read_text())


# Bad input: refused at once, with the value, the constraint and the remedy.


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--steps 0", "steps is 0: it is at least 1"),
        ("--mesh.context 3", "context 3 .* does not divide 8 device"),
        ("", "4 rows .*= 8.* a multiple"),
        (
            "--mesh.data 1 --mesh.context 8 --data.packing.row-tokens 60",
            "row_tokens 60.*mesh.context 8.*a multiple",
        ),
        ("--output /proc/run", "--output '/proc/run' cannot be written"),
        ("JAX_NUM_PROCESSES=2", "--coordinator None, --num-processes 2, --process-id None"),
        ("JAX_NUM_PROCESSES=two", "'two'"),
    ],
)
def test_bad_value_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: str,
    part: str,
):
    """In this process, of eight devices, and without a traceback."""
    if "=" in arguments:
        monkeypatch.setenv(*arguments.split("="))
        arguments = ""
    given, clock = ["--config", CONFIG, "--output", tmp_path / "run"], time.process_time()
    try:
        status = train.main([*map(str, given), *arguments.split()])
    except SystemExit as error:
        status = error.code
    text = capfd.readouterr().err
    assert status == 2 and "Traceback" not in text
    assert time.process_time() - clock < 20
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert re.search(part, " ".join(re.sub("[╭─╮│╰╯]", " ", text).split()))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model.dit.width", "64"], "model.dit.width = 32, and not 64"),
        (["--optimizer.kind", "muon"], "optimizer.kind = 'adamw', and not 'muon'"),
        (["--data.source.num-examples", "61"], "data.source.num_examples = 60, and not 61"),
    ],
)
def test_run_of_another_config_is_not_resumed(
    whole: Run, capfd: pytest.CaptureFixture[str], arguments: list[str], part: str
):
    before = (whole.directory / "config.json").read_bytes()
    run = ["--config", str(CONFIG), "--output", str(whole.directory), *arguments]
    assert train.main(run) == 2
    message = capfd.readouterr().err
    assert f"holds a run with {part}: give a new --output, or the config" in message
    assert (whole.directory / "config.json").read_bytes() == before
