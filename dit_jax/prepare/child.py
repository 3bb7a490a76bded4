"""What a child of `workers.py` runs: items from a pipe, one at a time, answers back."""

from __future__ import annotations

import os
import pickle
import resource
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import av.logging

from dit_jax.prepare.refusals import Refused

_LOOK = 1.0  # Seconds.


def main() -> None:
    """Answers (value, reason, detail) to every item, until the pipe is closed."""
    threading.Thread(target=_die_with, args=(int(sys.argv[2]),), daemon=True).start()
    av.logging.set_level(av.logging.PANIC)  # What is wrong with a file is in its report.
    pipe = Connection(int(sys.argv[1]))
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
        pipe.send_bytes(_answer(function, item))


def _answer(function: Any, item: Any) -> bytes:
    try:
        return pickle.dumps((function(item), "", ""))
    except Refused as refused:
        return pickle.dumps((None, refused.reason, refused.detail))
    except MemoryError:
        return pickle.dumps((None, "out of memory", "its process may have no more"))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        return pickle.dumps((None, "failed", f"{type(error).__name__}: {error} ({where})"))


def _die_with(parent: int) -> None:
    """Ends this process when its parent has ended without ending it."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)
