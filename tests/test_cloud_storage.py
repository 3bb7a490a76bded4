"""Runs whose output is on Cloud Storage, against an emulator on loopback."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest

from dit_jax.files import as_path, local_copy
from tests.runs import Run, Started, Verbs, arrays, data_state, end, free_port, scalars, steps

LAST, EVERY, DIES = 6, 2, 5
"""Steps of a run, from one save to the next, and the one in which it is killed."""


def start(
    verbs: Verbs, output: Path | str, stop: tuple[str, int, float] | None = None
) -> list[Started]:
    """Starts two processes with a device each; ``stop`` is for the second."""
    port = free_port()
    # The cache serves process 0 alone, and the other would be late.
    verbs = dataclasses.replace(verbs, cache=verbs.logs / str(port))
    return [
        verbs.train(
            output,  # pyright: ignore[reportArgumentType]
            *("--steps", LAST, "--checkpoint.every", EVERY, "--model.dit.depth", 1),
            *("--log.draw-every", 0, "--evaluators.1.prompts", 0, "--mesh.fsdp", 2),
            place=(index, 2, port),
            stop=stop if index == 1 else None,
        )
        for index in range(2)
    ]


def assert_same_end(whole: Path, output: str, last: int) -> None:
    """Bit by bit, of runs on a disk and on Cloud Storage."""
    copy = local_copy(output)
    assert steps(copy) == steps(whole)
    first, second = arrays(whole, last), arrays(copy, last)
    assert first.keys() == second.keys() and len(first) > 50
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
    assert data_state(whole, last) == data_state(copy, last)
    assert scalars(whole, "loss") == scalars(copy, "loss")


def test_a_run_that_is_killed_goes_on_bit_by_bit(whole: Run, verbs: Verbs, bucket: str):
    output: Any = f"{bucket}/1/run"
    (ended,) = end(verbs.train(output, stop=("SIGKILL", 10, 0)))
    assert ended.status == -signal.SIGKILL
    saved = {int(one.name) for one in as_path(f"{output}/checkpoints").iterdir()}
    assert saved <= {4, 8} and min(saved) == 4
    (ended,) = end(verbs.train(output))
    assert ended.status == 0 and "resumed at step" in ended.text
    assert_same_end(whole.directory, output, 20)


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_go_on_bit_by_bit(
    verbs: Verbs, tmp_path: Path, bucket: str
):
    whole, output = tmp_path / "run", f"{bucket}/2/run"
    assert {one.status for one in end(*start(verbs, whole))} == {0}
    ended = end(*start(verbs, output, ("SIGKILL", DIES, 0)))
    assert ended[-1].status == -signal.SIGKILL
    saved = {int(one.name) for one in as_path(f"{output}/checkpoints").iterdir()}
    assert saved <= {2, 4} and min(saved) == 2
    ended = end(*start(verbs, output))
    assert {one.status for one in ended} == {0}
    assert "resumed at step" in "".join(one.text for one in ended)
    assert_same_end(whole, output, LAST)
