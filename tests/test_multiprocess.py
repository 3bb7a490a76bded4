"""Real processes on loopback: they train as one does, and the death of one is the end of all."""

from __future__ import annotations

import dataclasses
import functools
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_jax.files import local_copy
from tests import runs
from tests.runs import Run, Verbs, end, scalars, steps

LAST, EVERY = 20, 5
# Little to compile, for every process does: one block, neither pictures nor report.
GIVEN = (
    *("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.context", 2, "--checkpoint.every", EVERY),
    *("--model.dit.depth", 1, "--log.draw-every", 0, "--evaluators.1.prompts", 0),
)
LIMIT = 60
"""Seconds after a death in which the other processes have to end."""


def start(
    verbs: Verbs,
    directory: Path | str,
    processes: int,
    stops: dict[int, tuple[str, int, float]] | None = None,
) -> list[runs.Started]:
    """Starts so many processes with eight devices in all, joined by flags."""
    port = runs.free_port()
    # JAX's compilation cache serves process 0 alone; the others would come to the first collective
    # later than it by a compilation, and gloo waits for 30 s.
    alike = dataclasses.replace(verbs, cache=verbs.logs / str(port))
    joined = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", processes, "--process-id")
    how = [{"devices": 8 // processes, "stop": (stops or {}).get(i)} for i in range(processes)]
    return [alike.train(directory, *GIVEN, *joined, i, **one) for i, one in enumerate(how)]


def finish(verbs: Verbs, directory: Path | str, processes: int) -> list[runs.Ended]:
    """Runs them to their end."""
    ended = end(*start(verbs, directory, processes))
    assert [one.status for one in ended] == [0] * processes
    return ended


def kill(verbs: Verbs, directory: Path | str, processes: int, victim: int, step: int) -> None:
    """Kills one of them in its ``step``-th step: the others end in time, and name it."""
    started = start(verbs, directory, processes, {victim: ("SIGKILL", step, 0)})
    others = [one for i, one in enumerate(started) if i != victim]
    try:
        assert started[victim].process.wait() == -signal.SIGKILL
        clock = time.perf_counter()
        for one in others:
            assert one.process.wait(LIMIT - (time.perf_counter() - clock)) == -signal.SIGABRT
    finally:
        for one in started:  # those that the test's failure leaves
            one.process.kill()
        end(*started)
    for one in others:
        assert_named(victim, one.log.read_text())


def assert_named(victim: int, text: str) -> None:
    """A survivor says what JAX knows of it: a number, or that it misses the leader, process 0."""
    beats = rf"stopped sending heartbeats\):\n{victim}\n"
    assert re.search(beats if victim else "[Tt]he leader", text), text


@pytest.fixture(scope="module")
def whole(verbs: Verbs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """Uninterrupted runs of so many processes, each made once."""

    @functools.cache
    def make(processes: int) -> Run:
        directory = tmp_path_factory.mktemp(f"of{processes}") / "run"
        return Run(directory, ended=finish(verbs, directory, processes))

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "deaths", "storage"),
    [
        # Process 0 takes JAX's coordination service along.
        (2, [(1, 8), (0, 3)], False),
        (2, [(1, 8)], True),
        (4, [(0, 8)], False),
        (4, [(2, 8)], False),
    ],
)
def test_death_ends_all_and_the_relaunch_ends_as_if_nothing_had_been(
    whole: Callable[[int], Run],
    verbs: Verbs,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    processes: int,
    deaths: list[tuple[int, int]],
    storage: bool,
):
    directory = f"{request.getfixturevalue('bucket') if storage else tmp_path}/killed/run"
    for victim, step in deaths:
        kill(verbs, directory, processes, victim, step)
    first, *_ = finish(verbs, directory, processes)
    assert re.search(r"resumed at step 5\b", first.text)
    run = whole(processes)
    runs.assert_same_run(run.directory, local_copy(directory), [LAST])
    # As one process does: the same sums in another order, carried through twenty steps of Adam.
    alone = scalars(whole(1).directory, "loss")
    assert scalars(run.directory, "loss") == pytest.approx(alone, rel=1e-5) and len(alone) == LAST
    # Nothing is told or written twice.
    assert "8 x cpu" in run.ended[0].text and f"{LAST}/{LAST}" in run.ended[0].text
    assert not any("cpu" in other.text or "loss" in other.text for other in run.ended[1:])
    assert len(list(run.directory.glob("logs/events*"))) == 1
    assert steps(run.directory) == list(range(EVERY, LAST + 1, EVERY))


@pytest.mark.slow
def test_process_that_hangs_is_dead(verbs: Verbs, tmp_path: Path):
    """Nothing closes its connection, as when a host loses its network: its heartbeats are missed."""
    started = start(verbs, tmp_path / "run", 2, {1: ("SIGSTOP", 6, 0)})
    try:
        assert started[0].process.wait() == -signal.SIGABRT
    finally:
        started[1].process.kill()
    first, second = end(*started)
    assert_named(1, first.text)
    assert second.status == -signal.SIGKILL


# Without a model: what `joined` does, by itself.

PROGRAM = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
from dit_jax.files import InputError
from dit_jax.parallel import joined

what, actor = sys.argv[1], int(sys.argv[2])
with joined(None, "prog", InputError):
    if jax.process_index() == 0:
        time.sleep(1)
    for step in range(1000):
        multihost_utils.process_allgather(jnp.ones(2))
        if step == 2 and jax.process_index() == actor:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("no rows") if what == "wrong" else OSError("disk full")
        time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("what", "actor"),
    [
        ("kill", 0),
        ("wrong", 0),
        pytest.param("kill", 1, marks=pytest.mark.slow),
        pytest.param("fail", 1, marks=pytest.mark.slow),
    ],
)
def test_death_or_error_of_one_ends_the_other(verbs: Verbs, what: str, actor: int):
    """After an error at once, and with the status that says whether starting again is of use."""
    port, given = runs.free_port(), [what, actor]
    started = [verbs.start("joined", given, place=(i, 2, port), code=PROGRAM) for i in range(2)]
    try:
        started[actor].process.wait(timeout=200)
        started[1 - actor].process.wait(timeout=LIMIT if what == "kill" else 15)
    finally:
        for one in started:
            one.process.kill()
        first, second = end(started[actor], started[1 - actor])
    if what == "kill":
        assert (first.status, second.status) == (-signal.SIGKILL, -signal.SIGABRT), second.text
        assert_named(actor, second.text)
    else:
        status, error = (2, "InputError: no rows") if what == "wrong" else (1, "OSError: disk full")
        assert (first.status, second.status) == (status, status), first.text
        assert f"process {actor} of 2 failed ({error})" in second.text
        assert ("prog: error: no rows" if what == "wrong" else "Traceback") in first.text
