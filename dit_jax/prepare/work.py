"""The work folder: what every stage leaves behind for a file, so that nothing is done twice.

Reports of files are lines of JSON. Every process appends to a log of its own, which no other writes
to, so that machines share a folder without locks and a million reports are some files. A line is whole
or not counted, whenever a run is killed. Larger results are files of their own, in 256 folders, written
beside their place and then moved there.

Every result has a key, a digest of all that it depends on, so that a changed file or setting is worked
on anew and the old result is left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

START = b'{"key": "'
"""How a line of a log begins, before its key."""


def digest(*values: Any) -> str:
    """Sixteen hex digits of JSON values and dataclasses of them."""
    plain = [dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for v in values]  # pyright: ignore[reportArgumentType]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def file_name(name: str, key: str, suffix: str) -> str:
    """Where a result of a file is, below its folder: readable, and told apart by ``key``."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:]
    return f"{key[:2]}/{plain}-{key}{suffix}"


class Logs:
    """The logs of a folder. Which line is where is held in memory, some 300 bytes a key."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: Counter[Path] = Counter()
        """How far each log was looked through."""
        self._lines: dict[str, tuple[Path, int, int]] = {}
        """By keys: log and place of the line that was found last, and how many there are."""
        self._mine: BinaryIO | None = None

    def append(self, line: bytes) -> None:
        """Adds a line; it is with the operating system when this returns, and found by ``refresh``."""
        if self._mine is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            prefix = f"{socket.gethostname()}-{os.getpid()}-"
            handle, _ = tempfile.mkstemp(".jsonl", prefix, self.folder)
            self._mine = os.fdopen(handle, "wb")
        self._mine.write(line)
        self._mine.flush()

    def close(self) -> None:
        """Ends this process's log, so that other machines see all of it."""
        if self._mine is not None:
            self._mine.close()
            self._mine = None

    def refresh(self) -> None:
        """Looks through what was written since the last time, by any process."""
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.stat().st_size == self._read[path]:
                continue
            with path.open("rb") as file:
                file.seek(self._read[path])
                for line in file:
                    if not line.endswith(b"}\n"):
                        break  # It is being written, or its process was killed.
                    if line.startswith(START):
                        key = line[len(START) : line.index(b'"', len(START))].decode()
                        self._lines[key] = path, self._read[path], self.count(key) + 1
                    self._read[path] += len(line)

    def count(self, key: str) -> int:
        """How many lines of a key were found."""
        return self._lines[key][2] if key in self._lines else 0

    def latest(self, key: str) -> bytes | None:
        """The line of a key that was found last."""
        if key not in self._lines:
            return None
        path, start, _ = self._lines[key]
        with path.open("rb", 1 << 16) as file:  # A network disk's own buffer is a megabyte.
            file.seek(start)
            return file.readline()


class Progress:
    """The progress bars of the stages, one after the other, and the seconds that each took."""

    def __init__(self, shown: bool = True):
        self.seconds: dict[str, float] = {}
        self.clips: Counter[str] = Counter()
        self._shown = shown

    @contextlib.contextmanager
    def stage(
        self, name: str, total: int, unit: str
    ) -> Iterator[Callable[[int, int, float], None]]:
        """A stage of ``total`` files, captions or clips (``unit``). Yields what counts so many of them
        as done, with so many clips of so many seconds of video in all."""
        begun, video, clips = time.monotonic(), 0.0, 0
        bar = tqdm(total=total, desc=name, unit=f" {unit}", disable=not self._shown or not total)

        def add(count: int, more: int, seconds: float) -> None:
            nonlocal video, clips
            video, clips = video + seconds, clips + more
            passed = max(time.monotonic() - begun, 1e-6)
            rate = f", {video / passed:.2f} h of video/h" if video else ""
            bar.set_postfix_str(f"{clips / passed:.2f} clips/s{rate}", refresh=False)
            bar.update(count)

        try:
            yield add
        finally:
            bar.close()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
            self.clips[name] += clips

    @property
    def bottleneck(self) -> tuple[str, float] | None:
        """The stage that took the most of all the time so far, and which part of it."""
        total = sum(self.seconds.values())
        longest = max(self.seconds, key=self.seconds.__getitem__, default="")
        return (longest, self.seconds[longest] / total) if total else None
