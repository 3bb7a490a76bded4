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
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import Pipe
from typing import Any

import av.logging

from dit_jax.files import refuse_if
from dit_jax.prepare.refusals import Refused

_CHILD = "from dit_jax.prepare.workers import work; work()"
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
        sound = (
            self.count >= 0 and self.time_limit > 0 and min(self.items_per_child, self.ahead) >= 1
        )
        message = "count is at least 0, time_limit above 0, items_per_child and ahead at least 1"
        refuse_if([(not sound, f"workers: {self}: {message}")])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an item: a value, or a reason of `refusals.REASONS` why there is none."""

    index: int
    """Which item, from 0."""
    value: Any = None
    reason: str = ""
    """`timed out`, `decoder crashed`, `out of memory` or `failed`; empty if there is a value."""
    detail: str = ""
    seconds: float = 0.0


def run(
    function: Callable[[Any], Any], items: Iterable[Any], config: WorkersConfig | None = None
) -> Iterator[Outcome]:
    """Yields function(item) of every item in order, whatever happens to the children.

    `function`, items and values are pickled; the function by its name, so it stands in a module. Items
    are taken as they are needed, and some more, so that one slow item does not stop the rest. Closing
    the iterator, an exception or Ctrl-C kills all children.
    """
    config = config or WorkersConfig()
    called = b"__main__"
    with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):
        called = pickle.dumps(function)
    refuse_if(
        [(b"__main__" in called, f"{function!r}: define it in a module, for children to import")]
    )
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
            wait = min(child.deadline for child in busy) - time.monotonic()
            spoke = connections.wait([child.pipe for child in busy], min(max(wait, 0.0), 60.0))
            now = time.monotonic()
            for child in busy:
                if child.pipe not in spoke and child.deadline > now:
                    continue
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


class _Child:
    """A process, and the item that it works on."""

    def __init__(self, called: bytes, config: WorkersConfig):
        self.pipe, theirs = Pipe()
        self.config, self.index, self.spent = config, None, False
        self._given, self._begun, self.deadline = 0, 0.0, 0.0
        path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": path},
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
        """What became of the item, once the child answered, died, or ran out of time; None if it has
        only started."""
        if not self._started:
            if not self.pipe.poll() or not self._received():
                message = "a child process did not start ({}); what it said is on stderr"
                raise ChildProcessError(message.format(self._death()))
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
        with contextlib.suppress(EOFError, OSError):
            return self.pipe.recv_bytes()
        return b""

    def _death(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return f"silent for {_STARTING:g} s"
        if code >= 0:
            return f"its process ended with status {code}"
        names = {int(one): one.name for one in signal.Signals}
        return f"its process was ended by {names.get(-code, f'signal {-code}')}"


def work() -> None:
    """What a child runs: answers (value, reason, detail) to every item, until its pipe is closed."""
    parent = int(sys.argv[2])

    def die_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    av.logging.set_level(av.logging.PANIC)  # What is wrong with a file is in its report.
    pipe = connections.Connection(int(sys.argv[1]))
    function = pickle.loads(pipe.recv_bytes())
    limit = pickle.loads(pipe.recv_bytes())
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send_bytes(b"started")
    while True:
        try:
            item = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((function(item), "", ""))
        except Refused as refused:
            answer = pickle.dumps((None, refused.reason, refused.detail))
        except MemoryError:
            answer = pickle.dumps((None, "out of memory", "its process may have no more"))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(place.filename)}:{place.lineno}"
            answer = pickle.dumps((None, "failed", f"{type(error).__name__}: {error} ({where})"))
        pipe.send_bytes(answer)
