"""How far a stage is: clips a second, hours of video an hour, time left; and what took longest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from tqdm import tqdm


class Progress:
    """The progress bars of the stages, one after the other, and the seconds that each took."""

    def __init__(self, shown: bool = True):
        self.seconds: dict[str, float] = {}
        self.clips: dict[str, int] = {}
        self._shown = shown

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        """A stage of ``total`` files, captions or clips (``unit``)."""
        begun = time.monotonic()
        bar = Bar(name, total, unit, self._shown)
        try:
            yield bar
        finally:
            bar.close()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
            self.clips[name] = self.clips.get(name, 0) + bar.clips

    @property
    def bottleneck(self) -> tuple[str, float] | None:
        """The stage that took the most of all the time so far, and which part of it."""
        total = sum(self.seconds.values())
        if not total:
            return None
        longest = max(self.seconds, key=lambda name: self.seconds[name])
        return longest, self.seconds[longest] / total


class Bar:
    """One stage's bar."""

    def __init__(self, name: str, total: int, unit: str, shown: bool):
        self.clips, self._video, self._begun = 0, 0.0, time.monotonic()
        self._bar = tqdm(total=total, desc=name, unit=" " + unit, disable=not shown or not total)

    def add(self, count: int, clips: int, seconds: float) -> None:
        """So many files or clips more are done, with so many clips of ``seconds`` of video in all."""
        self.clips += clips
        self._video += seconds
        passed = max(time.monotonic() - self._begun, 1e-6)
        video = f", {self._video / passed:.2f} h of video/h" if self._video else ""
        self._bar.set_postfix_str(f"{self.clips / passed:.2f} clips/s{video}", refresh=False)
        self._bar.update(count)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()
