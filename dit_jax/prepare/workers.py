"""A function over many items in child processes that may hang, crash or eat all memory.

Each child works on one item at a time. One that takes too long is killed, one that dies is replaced,
and both are reported of their item; the others go on. Results come in the order of the items.

The children are new Python processes and not forks (JAX runs threads, which a fork would break), and
they import nothing but what the function's module imports: not the program's main module either, as
`multiprocessing` (and pebble, on top of it) would, for that is a verb, and imports JAX.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
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
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import av.logging

from dit_jax.files import refuse_if
from dit_jax.prepare.refusals import Refused

_CHILD = "from dit_jax.prepare.workers import work; work()"
_STARTING = 120.0  # Seconds: for importing, from a slow disk.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


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

    def __post_init__(self) -> None:
        sound = self.count >= 0 < self.time_limit and self.items_per_child >= 1
        message = "count is at least 0, time_limit above 0, items_per_child at least 1"
        refuse_if([(not sound, f"workers: {self}: {message}")])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an item: a value, or a reason of `refusals.REASONS` why there is none."""

    value: Any = None
    reason: str = ""
    """Empty if there is a value."""
    detail: str = ""
    seconds: float = 0.0


def run(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    config: WorkersConfig = WorkersConfig(),
    ahead: int = 16,
) -> Iterator[Outcome]:
    """Yields the outcome of function(item) for every item in order, whatever happens to the children.

    `function`, items and values are pickled; the function by its name, so it stands in a module. So
    that a slow item does not stop the rest, up to `ahead` for each child are taken before it is done.
    Closing the iterator, an exception or Ctrl-C kills all children.
    """
    called = b"__main__"
    with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):
        called = pickle.dumps((function, config.memory_limit))
    message = f"{function!r}: define it in a module, for children to import"
    refuse_if([(b"__main__" in called, message)])
    count = config.count or len(os.sched_getaffinity(0))
    children = [_Child(called, config) for _ in range(count)]
    idle = children.copy()  # As many as there are threads, so that none finds it empty.

    def outcome(item: Any) -> Outcome:
        child = idle.pop()
        try:
            return child.outcome(item)
        finally:
            idle.append(child)

    waiting: collections.deque[Future[Outcome]] = collections.deque()
    threads = ThreadPoolExecutor(count)  # Each waits for a child.
    try:
        for item in items:
            waiting.append(threads.submit(outcome, item))
            while waiting and (waiting[0].done() or len(waiting) >= ahead * count):
                yield waiting[0].result()
                waiting.popleft()
        while waiting:
            yield waiting[0].result()
            waiting.popleft()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in waiting):
            for child in children:  # It may just be starting a process, and is killed after that.
                child.kill()
            time.sleep(0.02)
        for child in children:
            child.end(0)


class _Child:
    """A process that is started when there is work, and again after it has ended."""

    def __init__(self, called: bytes, config: WorkersConfig):
        self._called, self._config = called, config
        self._process: subprocess.Popen | None = None

    def kill(self) -> None:
        """Ends the process at once; the thread that serves notices."""
        if (process := self._process) is not None:
            process.kill()

    def _start(self) -> None:
        self._pipe, theirs = connections.Pipe()
        path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for us.
            )
        self._given, started = 0, False
        with contextlib.suppress(EOFError, OSError):
            self._pipe.send_bytes(self._called)
            started = self._pipe.poll(_STARTING) and self._pipe.recv()
        if not started:
            message = f"a child process did not start ({self.end()}); what it said is on stderr"
            raise ChildProcessError(message)

    def outcome(self, item: Any) -> Outcome:
        """What becomes of an item."""
        if self._process is None:
            self._start()
        begun, value, limit = time.monotonic(), None, self._config.time_limit
        self._given += 1
        try:
            self._pipe.send(item)
            if self._pipe.poll(limit):
                value, reason, detail = self._pipe.recv()
                if self._given >= self._config.items_per_child or reason == "out of memory":
                    self.end()
            else:
                reason, detail = "timed out", f"killed after {limit:g} s"
                self.end(0)
        except (EOFError, OSError):
            reason, detail = "decoder crashed", self.end()
        return Outcome(value, reason, detail, time.monotonic() - begun)

    def end(self, grace: float = 0.5) -> str:
        """Kills the process if it does not end by itself within `grace`; returns how it ended."""
        process, self._process = self._process, None
        if process is None:
            return ""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        process.kill()
        code = process.wait()
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
    function, limit = pipe.recv()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send(True)
    with contextlib.suppress(EOFError):
        while True:
            item = pipe.recv()
            try:
                pipe.send((function(item), "", ""))
            except Refused as refused:
                pipe.send((None, refused.reason, refused.detail))
            except MemoryError:
                pipe.send((None, "out of memory", "its process may have no more"))
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{os.path.basename(place.filename)}:{place.lineno}"
                pipe.send((None, "failed", f"{type(error).__name__}: {error} ({where})"))
