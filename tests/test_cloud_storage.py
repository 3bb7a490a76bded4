"""Runs whose output is on Cloud Storage, against an emulator on loopback."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from dit_jax.files import as_path, local_copy
from tests.runs import Started, Verbs, arrays, data_state, end, free_port, scalars, steps

LAST, EVERY, DIES = 6, 2, 5
"""Steps of a run, from one save to the next, and the one in which it is killed."""


def start(
    verbs: Verbs, output: Path | str, processes: int, stop: tuple[str, int, float] | None = None
) -> list[Started]:
    """Starts so many processes with two devices in all; ``stop`` is for the last of them."""
    port = free_port()
    if processes > 1:  # the cache serves process 0 alone, and the others would be late
        verbs = dataclasses.replace(verbs, cache=verbs.cache / str(port))
    return [
        verbs.train(
            output,  # pyright: ignore[reportArgumentType]
            *("--steps", LAST, "--checkpoint.every", EVERY, "--model.dit.depth", 1),
            *("--log.draw-every", 0, "--evaluators.1.prompts", 0, "--mesh.fsdp", 2),
            devices=2 // processes,
            place=(index, processes, port) if processes > 1 else None,
            stop=stop if index == processes - 1 else None,
        )
        for index in range(processes)
    ]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_bit_by_bit(
    verbs: Verbs, tmp_path: Path, bucket: str, processes: int
):
    whole, output = tmp_path / "run", f"{bucket}/{processes}/run"
    assert {one.status for one in end(*start(verbs, whole, processes))} == {0}
    ended = end(*start(verbs, output, processes, ("SIGKILL", DIES, 0)))
    assert ended[-1].status == -signal.SIGKILL
    saved = {int(one.name) for one in as_path(f"{output}/checkpoints").iterdir()}
    assert saved <= {2, 4} and min(saved) == 2
    ended = end(*start(verbs, output, processes))
    assert {one.status for one in ended} == {0}
    assert "resumed at step" in "".join(one.text for one in ended)

    copy = local_copy(output)
    assert steps(copy) == steps(whole)
    first, second = arrays(whole, LAST), arrays(copy, LAST)
    assert first.keys() == second.keys() and len(first) > 50
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
    assert data_state(whole, LAST) == data_state(copy, LAST)
    assert scalars(whole, "loss") == scalars(copy, "loss")
