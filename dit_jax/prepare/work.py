"""The work folder: what every stage leaves behind for a file, so that nothing is done twice.

Reports of files are lines of JSON. Every process appends to a log of its own, which no other writes
to, so that machines share a folder without locks and a million reports are some files. A line is whole
or not counted, whenever a run is killed. Larger results are files of their own, in 256 folders, written
beside their place and then moved there.

Every result has a key, a digest of all that it depends on, so that a changed file or setting is worked
on anew and the old result is left alone.
"""

from __future__ import annotations

import base64
import collections
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from dit_jax.files import json_bytes
from dit_jax.prepare.clips import Geometry, Rect
from dit_jax.prepare.examining import Clip, FileReport
from dit_jax.prepare.measuring import Rejection
from dit_jax.prepare.media import Probe

_START = b'{"key": "'
_KEY = slice(len(_START), len(_START) + 16)
_OPEN = 32
"""Logs that are kept open for reading."""


def digest(*values: Any) -> str:
    """Sixteen hex digits of JSON values and dataclasses of them."""
    plain = [dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for v in values]  # pyright: ignore[reportArgumentType]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def file_name(name: str, key: str, suffix: str) -> str:
    """Where a result of a file is, below its folder: readable, and told apart by ``key``."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:]
    return f"{key[:2]}/{plain}-{key}{suffix}"


def pack(key: str, report: FileReport, thumbnails: bool) -> bytes:
    """A report as a line of a log; thumbnails are left out unless they are asked for."""
    values = dataclasses.asdict(report)
    for clip in values["clips"]:
        clip["thumbnail"] = base64.b64encode(clip["thumbnail"] if thumbnails else b"").decode()
    return json_bytes({"key": key, **values}) + b"\n"


def unpack(line: bytes) -> FileReport:
    """What ``pack`` wrote as a line."""
    values = json.loads(line)
    del values["key"]
    kinds = {"probe": Probe, "clips": Clip, "geometry": Geometry, "rejection": Rejection}
    kinds |= {"crop": Rect, "source": Rect}

    def restored(name: str, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, list):
            return tuple(restored(name, one) for one in value)
        if name in kinds:
            return kinds[name](**{field: restored(field, inner) for field, inner in value.items()})
        return base64.b64decode(value) if name == "thumbnail" else value

    return FileReport(**{name: restored(name, value) for name, value in values.items()})


class Logs:
    """The logs of a folder. Which line is where is held in memory, 20 bytes a line."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[Path, int] = {}
        """How far each log was looked through."""
        self._logs: list[Path] = []
        # Sorted by key: lines of one key are in the order in which they were found.
        self._keys, self._log = np.empty(0, np.uint64), np.empty(0, np.int32)
        self._offset = np.empty(0, np.int64)
        self._open: collections.OrderedDict[int, BinaryIO] = collections.OrderedDict()
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
        """Ends this process's log, so that other machines see all of it, and what was read."""
        for file in (*self._open.values(), *filter(None, [self._mine])):
            file.close()
        self._open.clear()
        self._mine = None

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()

    def refresh(self) -> None:
        """Looks through what was written since the last time, by any process."""
        keys, offsets, logs = [self._keys], [self._offset], [self._log]
        for path in sorted(self.folder.glob("*.jsonl")):
            if path not in self._read:
                self._read[path] = 0
                self._logs.append(path)
            fresh, places, at = [], [], self._read[path]
            if path.stat().st_size == at:
                continue
            with path.open("rb") as file:
                file.seek(at)
                for line in file:
                    if not line.endswith(b"}\n"):
                        break  # It is being written, or its process was killed.
                    if line.startswith(_START):
                        fresh.append(int(line[_KEY], 16))
                        places.append(at)
                    at += len(line)
            self._read[path] = at
            keys.append(np.array(fresh, np.uint64))
            offsets.append(np.array(places, np.int64))
            logs.append(np.full(len(fresh), self._logs.index(path), np.int32))
        if len(keys) > 1:
            every = np.concatenate(keys)
            order = np.argsort(every, kind="stable")
            self._keys = every[order]
            self._offset = np.concatenate(offsets)[order]
            self._log = np.concatenate(logs)[order]

    def count(self, keys: Iterable[int]) -> np.ndarray:
        """How many lines there are of each key."""
        wanted = np.fromiter(keys, np.uint64)
        first, last = (np.searchsorted(self._keys, wanted, side) for side in ("left", "right"))
        return last - first

    def latest(self, key: int) -> bytes | None:
        """The line of a key that was found last."""
        at = int(np.searchsorted(self._keys, np.uint64(key), "right")) - 1
        if at < 0 or int(self._keys[at]) != key:
            return None
        log = int(self._log[at])
        if log not in self._open:
            self._open[log] = self._logs[log].open("rb")
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(log)
        self._open[log].seek(int(self._offset[at]))
        return self._open[log].readline()


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
