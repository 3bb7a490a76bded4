"""Work by several threads whose results come in order, without holding all of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def ordered(
    function: Callable[[A], B], items: Iterable[A], threads: int, stop: Callable[[], object]
) -> Iterator[B]:
    """``function`` of every item, as soon as those before it are done; items are drawn as needed.

    At most four results a thread wait for an earlier one. Where something goes wrong (an error in
    ``function``, a keyboard interrupt) no further items begin, ``stop`` is called, and what had begun
    is waited for.
    """
    waiting: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            while waiting and (len(waiting) > 4 * threads or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (Exception, KeyboardInterrupt):
        stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
