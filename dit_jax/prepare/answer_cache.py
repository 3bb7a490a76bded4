"""Answers that were paid for, on disk: no request is ever sent, and paid, a second time.

A SQLite file (or memory, for a session that keeps nothing). An answer is committed as soon as it is
there, so a process that is killed loses none; several threads and processes may share a file. While
one asks, others that want the same wait for its answer: threads on a lock of this module, processes on
a lock of the operating system, which a killed process cannot leave behind.

The key is a hash of the whole request: model, messages with their images, and parameters. The server's
address is not in it: the same model served elsewhere would say the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_jax.files import InputError, as_path, is_remote

POLL = 0.1
"""Seconds between looks at a lock that another process holds."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    finish_reason: str = "stop"
    """``stop``, ``length`` (cut at the limit of tokens), ``content_filter``, or what else was sent."""
    refusal: bool = False
    """The message was marked by the server as a refusal."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the server counts them; 0 where it does not say."""


def request_key(request: Mapping[str, Any]) -> str:
    """The hash of a request's JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def default_cache() -> Path:
    """``dit_jax/answers.sqlite`` in the user's cache directory (``XDG_CACHE_HOME``)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dit_jax" / "answers.sqlite"


class AnswerCache:
    """Answers by key; ``path`` None keeps them in memory.

    Raises:
        ValueError: where the file cannot be opened, or is something else.
    """

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        if path is not None and is_remote(path):
            raise InputError(
                f"{os.fspath(path)!r} cannot keep answers: they are in a SQLite file, which is local. "
                "Name one on this machine."
            )
        self.path = None if path is None else as_path(path)
        self._lock = threading.Lock()
        self._waiting: dict[str, threading.Lock] = {}
        self._locks: int | None = None
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                locks = self.path.with_name(self.path.name + ".lock")
                self._locks = os.open(locks, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._database = sqlite3.connect(
                self.path or ":memory:", timeout=60, isolation_level=None, check_same_thread=False
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, answer TEXT)"
            )
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"cannot keep answers in {str(self.path)!r} ({error}): name a file in a writable "
                "directory, or one that an earlier run made"
            ) from error

    def get(self, key: str) -> Answer | None:
        """The answer to a request, if it was given."""
        with self._lock:
            row = self._database.execute(
                "SELECT answer FROM answers WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else Answer(**json.loads(row[0]))

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Keeps an answer; it is on disk when this returns. ``OSError`` where it cannot be."""
        stored = json.dumps(dataclasses.asdict(answer))
        try:
            with self._lock:
                self._database.execute(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, model, stored)
                )
        except sqlite3.Error as error:
            raise OSError(
                f"an answer cannot be kept in {str(self.path)!r} ({error}): make room there, or name "
                "another file"
            ) from error

    @contextlib.contextmanager
    def asking(self, key: str) -> Iterator[Answer | None]:
        """Gives the answer, or None to the one that shall ask now; others wait until it is done."""
        with self._lock:
            mine = self._waiting.setdefault(key, threading.Lock())
        with mine:
            answer = self.get(key)
            if answer is not None or self._locks is None:
                yield answer
                return
            # One byte of the lock file for each key. Not the blocking call: the kernel takes threads
            # of one process for one holder, and sees deadlocks where there are none.
            place = int(key[:15], 16)
            while True:
                try:
                    fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                    break
                except OSError:
                    time.sleep(POLL)
            try:
                yield self.get(key)
            finally:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    def __len__(self) -> int:
        with self._lock:
            return self._database.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file; waits for nothing."""
        with self._lock:
            self._database.close()
            if self._locks is not None:
                os.close(self._locks)
                self._locks = None
