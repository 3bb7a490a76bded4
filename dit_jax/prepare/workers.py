"""A function over many items in child processes that may hang, crash or eat all memory.

Each child works on one item at a time. One that takes too long is killed, one that dies is replaced,
and both are reported of their item; the others go on. Results come in the order of the items.

The children are new Python processes and not forks (JAX runs threads, which a fork would break), and
they import nothing but what the function's module imports: not the program's main module either, as
`multiprocessing` (and pebble, on top of it) would, for that is a verb, and imports JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing.connection as connections
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import Pipe
from typing import Any

_CHILD = "from dit_jax.prepare.child import main; main()"
_STARTING = 120.0  # Seconds: for importing, from a slow disk.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class WorkersConfig:
    """How many children, and what each item may take."""

    count: int = 0
    """Children at a time; 0: one for each CPU that this process may use."""
    time_limit: float = 600.0
    """Seconds for an item, the start of a child not counted."""
    memory_limit: int | None = None
    """Bytes of address space of a child (RLIMIT_AS)."""
    items_per_child: int = 1000
    """After so many a child is replaced by a new one, and what leaked is given back."""
    ahead: int = 16
    """Results for each child, at most, that wait for that of a slow item before them."""

    def __post_init__(self) -> None:
        least = min(self.items_per_child, self.ahead)
        if not (self.count >= 0 and self.time_limit > 0 and least >= 1):
            raise ValueError(
                f"workers: count {self.count}, time_limit {self.time_limit}, items_per_child "
                f"{self.items_per_child}, ahead {self.ahead}: they are at least 0, above 0, at least 1 "
                "and at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an item: a value, or a reason of `refusals.REASONS` why there is none."""

    index: int
    """Which item, from 0."""
    value: Any = None
    reason: str = ""
    """`timed out`, `decoder crashed`, `out of memory` or `failed`; empty where there is a value."""
    detail: str = ""
    seconds: float = 0.0


def run(
    function: Callable[[Any], Any], items: Iterable[Any], config: WorkersConfig | None = None
) -> Iterator[Outcome]:
    """Yields function(item) of every item in order, whatever happens to the children.

    `function`, items and values are pickled; the function by its name, so it stands in a module. Items
    are taken as they are needed, and some more, so that one slow item does not stop the rest. Closing
    the iterator, an exception or Ctrl-C kills all children.
    Errors: ValueError for a function that children cannot find by name.
    """
    config = config or WorkersConfig()
    called = _by_name(function)
    count = config.count or len(os.sched_getaffinity(0))
    waiting = enumerate(items)
    children: list[_Child] = []
    done: dict[int, Outcome] = {}
    following, taken = 0, 0
    try:
        while True:
            idle = [child for child in children if child.index is None]
            room = count - len(children) + len(idle)
            ahead = max(config.ahead * count - (taken - following), 0)
            for index, item in itertools.islice(waiting, min(room, ahead)):
                child = idle.pop() if idle else _Child(called, config)
                if child not in children:
                    children.append(child)
                child.give(index, item)
                taken = index + 1
            busy = [child for child in children if child.index is not None]
            if not busy:
                return
            for child in _ready(busy):
                outcome = child.heard()
                if outcome is not None:
                    done[outcome.index] = outcome
                if child.spent:
                    child.kill()
                    children.remove(child)
            while following in done:
                yield done.pop(following)
                following += 1
    finally:
        for child in children:
            child.kill()


def _ready(busy: list[_Child]) -> list[_Child]:
    """The children that have answered, died or run out of time; waits for the first of them."""
    while True:
        now = time.monotonic()
        late = [child for child in busy if child.deadline <= now]
        wait = 0.0 if late else min(min(child.deadline for child in busy) - now, 60.0)
        spoke = connections.wait([child.pipe for child in busy], max(wait, 0.0))
        if late or spoke:
            return [child for child in busy if child in late or child.pipe in spoke]


class _Child:
    """A process, and the item that it works on."""

    def __init__(self, called: bytes, config: WorkersConfig):
        self.pipe, theirs = Pipe()
        self.config, self.index, self.spent = config, None, False
        self._given, self._begun, self.deadline = 0, 0.0, 0.0
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": _path()},
                start_new_session=True,  # Ctrl-C is for us; and what it starts dies with it.
            )
        self._to_send = [called, pickle.dumps(config.memory_limit)]
        self._started = False

    def give(self, index: int, item: Any) -> None:
        """Begins an item; its time begins once the child has started."""
        self.index, self._given = index, self._given + 1
        self._begin(self.config.time_limit if self._started else _STARTING)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # Its death is seen later.
            for message in (*self._to_send, pickle.dumps(item)):
                self.pipe.send_bytes(message)
        self._to_send = []

    def _begin(self, limit: float) -> None:
        self._begun = time.monotonic()
        self.deadline = self._begun + limit

    def heard(self) -> Outcome | None:
        """What became of the item, once the child answered, died, or ran out of time; None: it has
        only started. Errors: ChildProcessError if it did not even start."""
        if not self._started:
            if not self.pipe.poll() or not self._received():
                raise ChildProcessError(
                    f"a child process did not start ({self._death()}); what it said is on stderr"
                )
            self._started = True
            self._begin(self.config.time_limit)
            return None
        index, self.index = self.index, None
        assert index is not None
        seconds = time.monotonic() - self._begun
        if not self.pipe.poll():
            self.kill()
            detail = f"killed after {self.config.time_limit:g} s"
            return Outcome(index, None, "timed out", detail, seconds)
        answer = self._received()
        if not answer:
            self.spent = True
            return Outcome(index, None, "decoder crashed", self._death(), seconds)
        value, reason, detail = pickle.loads(answer)
        self.spent = self._given >= self.config.items_per_child or reason == "out of memory"
        return Outcome(index, value, reason, detail, seconds)

    def kill(self) -> None:
        """Ends the process and what it started, and waits for it."""
        self.spent = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.pipe.close()

    def _received(self) -> bytes:
        """The child's message; empty if it is dead."""
        try:
            return self.pipe.recv_bytes()
        except (EOFError, OSError):
            return b""

    def _death(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return f"silent for {_STARTING:g} s"
        if code >= 0:
            return f"its process ended with status {code}"
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process was ended by signal {-code}"


def _by_name(function: Callable[[Any], Any]) -> bytes:
    """The function, pickled; ValueError unless a child can import it."""
    try:
        called = pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{function!r} cannot be pickled ({error}): define it in a module"
        ) from error
    if b"__main__" in called:
        raise ValueError(
            f"{function!r} is in the main module, which children do not import: move it"
        )
    return called


def _path() -> str:
    """This process's module search path, for a child."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
