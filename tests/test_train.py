"""Training as a user starts it: whole processes, their signals, and what they leave on disk."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dit_jax import train
from dit_jax.config import load_config, to_dict
from dit_jax.prepare.writing import write_records
from dit_jax.sampling.media import read_video
from tests.runs import CONFIG, Run, Verbs, arrays, data_state, end, scalars, steps

TINY = to_dict(load_config(str(CONFIG)))
LAST = TINY["steps"]
EVERY = TINY["checkpoint"]["every"]
SAVED = list(range(EVERY, LAST + 1, EVERY))


def assert_same_checkpoints(run: Path, other: Path, at: list[int]) -> None:
    """Bit by bit: parameters, averages, moments, counters, and where the data stands."""
    for step in at:
        one, two = arrays(run, step), arrays(other, step)
        assert one.keys() == two.keys() and len(one) > 100
        for name in one:
            assert one[name].dtype == two[name].dtype, name
            assert one[name].tobytes() == two[name].tobytes(), f"{name} at step {step}"
        assert data_state(run, step) == data_state(other, step)


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
    assert_same_checkpoints(whole.directory, again, [LAST])
    assert (again / "report.json").read_bytes() == (whole.directory / "report.json").read_bytes()


# Interruptions.


@pytest.fixture(scope="module")
def interrupted(whole: Run, verbs: Verbs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run killed at a random moment, and resumed to its end by the same command."""
    seed = int(os.environ.get("DIT_JAX_TEST_SEED", time.time_ns() % 10**6))
    rng = random.Random(seed)
    killed = ("SIGKILL", rng.randint(1, 18), rng.uniform(0, 0.05))
    print(f"DIT_JAX_TEST_SEED={seed}: {killed}")
    run = Run(tmp_path_factory.mktemp("interrupted") / "run")
    for stop in (killed, None):
        run.ended += end(verbs.train(run.directory, stop=stop))
        print("checkpoints:", sorted(p.name for p in run.directory.glob("checkpoints/*")))
    return run


def test_killed_run_resumes_from_its_last_checkpoint(interrupted: Run):
    killed, resumed = interrupted.ended
    assert killed.status == -9
    assert re.search(r"resumed at step (4|8|12|16)\b|compiling the step", resumed.text)


@pytest.mark.slow  # SIGTERM does the same, to a run of two processes below
def test_signal_saves_the_very_step(whole: Run, verbs: Verbs, tmp_path: Path):
    run = Run(tmp_path / "run")
    for stop in (("SIGINT", 7, 0), None):
        run.ended += end(verbs.train(run.directory, stop=stop))
    ended, resumed = run.ended
    assert ended.status == 130
    said = re.search(r"SIGINT: saving step (\d+); the same command resumes there\.", ended.text)
    assert said and "report" not in ended.text and "Traceback" not in ended.text
    assert int(said[1]) in steps(run.directory)
    assert f"resumed at step {said[1]}" in resumed.text
    assert_same_checkpoints(whole.directory, run.directory, SAVED)


def test_interrupted_run_ends_like_an_uninterrupted_one(whole: Run, interrupted: Run):
    assert interrupted.ended[-1].status == 0
    assert steps(interrupted.directory) == SAVED
    assert_same_checkpoints(whole.directory, interrupted.directory, SAVED)
    # What was lost and made again was logged again, with the same value: `scalars` checks it.
    for name in ("loss", "gradient_norm", "packing_efficiency"):
        assert scalars(interrupted.directory, name) == scalars(whole.directory, name)
    for name in ("report.json", "samples.png", f"samples_{LAST:07d}.png"):
        files = (run.directory / name for run in (whole, interrupted))
        assert next(files).read_bytes() == next(files).read_bytes()


# Several processes.

TOLERANCE = 1e-5
"""Relative, of losses: the same sums in another order, carried through twenty steps of Adam."""


def test_two_processes_train_as_one_does(whole: Run, pair: Run):
    alone, shared = scalars(whole.directory, "loss"), scalars(pair.directory, "loss")
    assert len(shared) >= 10
    np.testing.assert_allclose(
        [shared[step] for step in sorted(shared)],
        [alone[step] for step in sorted(shared)],
        rtol=TOLERANCE,
    )
    assert "2 x cpu" in pair.ended[0].text
    assert (pair.directory / f"samples_{LAST // 2:07d}.png").is_file()


def test_sigterm_to_one_process_stops_both_at_one_step(pair: Run):
    assert [ended.status for ended in pair.ended] == [143, 143]
    first, second = (ended.text for ended in pair.ended)
    said = re.search(r"SIGTERM: saving step (\d+); the same command resumes there\.", first)
    assert said and 11 <= int(said[1]) < LAST
    assert sorted({*(step for step in SAVED if step < int(said[1])), int(said[1])}) == steps(
        pair.directory
    )
    # Nothing is told or written twice.
    assert "loss=" not in second and "saving" not in second
    assert len(list(pair.directory.glob("logs/events*"))) == 1


def test_one_process_resumes_a_run_of_two(whole: Run, pair: Run, verbs: Verbs, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(pair.directory, run)
    (ended,) = end(verbs.train(run))
    assert ended.status == 0 and f"resumed at step {steps(pair.directory)[-1]}" in ended.text
    for step in SAVED:
        assert data_state(run, step) == data_state(whole.directory, step)
    alone, resumed = scalars(whole.directory, "loss"), scalars(run, "loss")
    assert alone.keys() == resumed.keys()
    np.testing.assert_allclose(
        [resumed[step] for step in sorted(alone)],
        [alone[step] for step in sorted(alone)],
        rtol=TOLERANCE,
    )


# Bad input: refused at once, with the value, the constraint and the remedy.

Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs the verb in this process (of eight devices) and gives its message, without the frame."""

    def run(*arguments: object, config: Path = CONFIG) -> str:
        given = ["--config", config, "--output", tmp_path / "run", *arguments]
        clock = time.perf_counter()
        try:
            status = train.main([str(one) for one in given])
        except SystemExit as error:
            status = error.code
        text = capfd.readouterr().err
        assert status == 2 and "Traceback" not in text
        assert time.perf_counter() - clock < 20
        assert not list(tmp_path.glob("run/checkpoints/*"))
        return " ".join(re.sub("[╭─╮│╰╯]", " ", text).split())

    return run


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--steps", "0"], ["steps is 0: it is at least 1"]),
        (
            ["--mesh.context", "3"],
            ["context 3", "does not divide 8 device(s)", "Change mesh.*"],
        ),
        (["--mesh.data", "0"], ["mesh.data is 0", "at least 1"]),
        ([], ["4 rows", "= 8", "a multiple"]),
        (
            ["--mesh.data", "1", "--mesh.context", "8", "--data.packing.row-tokens", "60"],
            ["row_tokens 60", "mesh.context 8", "a multiple"],
        ),
        (["--output", "/proc/run"], ["'/proc/run' cannot be written", "--output"]),
        (["--output", f"{CONFIG}/run"], ["cannot be written (Not a directory)", "--output"]),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
)
def test_bad_value_is_refused(refused: Refused, arguments: list[str], parts: list[str]):
    message = refused(*arguments)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "--coordinator None, --num-processes 2, --process-id None"),
        ({"JAX_NUM_PROCESSES": "two"}, "'two'"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "--process-id 2",
        ),
    ],
)
def test_incomplete_environment_is_refused(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], part: str
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert part in refused()


RECORDED = """
import dataclasses
from dit_jax.config import load_config
from dit_jax.data import RecordsConfig

def get_config():
    config = load_config({tiny!r})
    source = RecordsConfig(path={path!r}, split={split!r})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
"""


def test_data_that_cannot_be_used_is_refused(refused: Refused, tmp_path: Path):
    def clip(frames: int, height: int = 24) -> dict:
        return {"video": np.zeros((frames, height, 24, 3), np.uint8), "caption": "x", "fps": 8.0}

    splits = {"train": [clip(5)], "long": [clip(33)], "odd": [clip(5, 28)]}
    path = write_records(tmp_path, "clips", splits, description="Black.")
    config = tmp_path / "config.py"

    def message(split: str, path: Path = path) -> str:
        config.write_text(RECORDED.format(tiny=str(CONFIG), path=str(path), split=split))
        return refused("--mesh.data", 4, "--mesh.context", 2, config=config)

    for split in ("train[:0]", "validation"):
        assert f"split {split!r} is not in" in (told := message(split)) and "choose of" in told
    assert "153 tokens and a row holds 64: raise data.packing.row_tokens" in message("long")
    assert "height 28 is not a multiple of the patch's 8" in message("odd")
    assert "nothing' is neither" in message("train", tmp_path / "nothing")


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


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is no JSON"),
        ('{"model": 5}', "holds no config that this version"),
        ('{"speed": 1}', "'speed'"),
    ],
)
def test_corrupt_config_is_refused(refused: Refused, tmp_path: Path, text: str, part: str):
    # A checkpoint elsewhere than `refused` looks for those that should not be there.
    run = tmp_path / "old"
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "config.json").write_text(text)
    message = refused("--output", run)
    assert part in message and f"{str(run / 'config.json')!r}" in message and "restore" in message


def test_checkpoint_that_does_not_fit_is_refused(
    whole: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(whole.directory, run)
    mesh = ["--mesh.data", "4", "--mesh.context", "2"]
    command = ["--config", str(CONFIG), "--output", str(run), *mesh]

    stored = json.loads((run / "config.json").read_text())
    stored["model"]["dit"]["width"] = 64
    (run / "config.json").write_text(json.dumps(stored))
    assert train.main([*command, "--model.dit.width", "64"]) == 2
    message = capfd.readouterr().err
    assert "checkpoints/20' cannot be read" in message and "Traceback" not in message
    # Arrays are read at once; of which the message is, is left to chance.
    expected, stored = re.findall(r"shape: (\([\d, ]+\))", message)
    assert expected != stored

    (run / "config.json").unlink()
    (run / "checkpoints" / "20" / "data" / "metadata").write_text("{")
    assert train.main(command) == 2
    message = capfd.readouterr().err
    assert "checkpoints/20' cannot be read" in message and "[4, 8, 12, 16, 20]" in message
