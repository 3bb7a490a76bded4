"""Time stamps to a constant rate: which frame is shown at t0, t0 + 1/fps, t0 + 2/fps, ...

Everything downstream counts in *grid indices*: index k is the frame nearest in time to t0 + k/fps.
At a constant rate that is every frame once, however its time stamps were rounded; at a variable rate
frames are repeated or left out so that motion keeps its speed. Where frames are missing (damage, a
pause in the time stamps, or stamps that begin anew) the indices of the gap do not exist, at least one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

# Frames per second that time stamps in milliseconds are taken to mean.
STANDARD = (1, 2, 5, 6, 8, 10, 12, 12.5, 15, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120, 144, 240)
STANDARD += tuple(n * 1000 / 1001 for n in (12, 15, 24, 30, 48, 60, 120))
MAX_RATE = 240.0
LONGEST_GAP = 2.0  # Seconds without a frame that are a pause, where frames are denser.
# Seconds before and after the latest time stamp from which on a stamp begins anew: frames out of order
# and slow rates are nearer. (FFmpeg takes the wrap of MPEG's stamps for a new beginning.)
BACK, FAR = 0.5, 3600.0


class Clock:
    """Time stamps to one time that goes on where they begin anew, as in files joined to one.

    The parts follow one another, with room for one frame between them, that no clip may fill.
    """

    def __init__(self, step: float, offset: float = 0.0):
        """`step`: seconds a frame; `offset`: by how much time is ahead of the first stamps."""
        self.offset, self._step = offset, step
        self._latest: float | None = None

    def read(self, stamp: float) -> tuple[float, bool]:
        """(seconds, whether a part begins with it) of the next stamp, in seconds."""
        latest = stamp + self.offset if self._latest is None else self._latest
        anew = not -BACK <= stamp + self.offset - latest <= FAR
        if anew:
            self.offset = latest + 2 * self._step - stamp
        self._latest = max(latest, stamp + self.offset)
        return stamp + self.offset, anew


def native_rate(times: np.ndarray, hint: float | None = None) -> tuple[float, bool]:
    """(frames per second, whether it is constant) of sorted time stamps, float [n] in seconds.

    The rate is that of the steps near the median one, rounded to `hint` (what the file says) or to a
    `STANDARD` rate within 0.5 % of it. It is constant if all stamps lie on its grid, at most a tenth of
    which is empty. Fewer than two frames have no rate: `hint`, or 1, and constant.
    """
    times = np.unique(times)
    hint = hint if hint and 0 < hint <= MAX_RATE else None
    if len(times) < 2:
        return hint or 1.0, True
    steps = np.diff(times)
    usual = steps[np.abs(steps / np.median(steps) - 1) < 0.25]
    typical = min(1 / float((usual if len(usual) else steps).mean()), MAX_RATE)
    nearby = sorted(STANDARD, key=lambda rate: abs(rate - typical))[:3]
    rates = [r for r in (hint, *nearby, typical) if r and abs(r / typical - 1) < 5e-3]
    for rate in rates:
        places = (times - times[0]) * rate
        points = np.rint(places)
        missing = points[-1] + 1 - len(times)
        one_each = np.ptp(places - points) < 0.6 and np.diff(points).min() >= 1
        if one_each and missing <= len(times) / 10:
            return float(rate), True
    return float(rates[0]), False


def on_grid(
    frames: Iterable[Any], fps: float, origin: float, end: float = math.inf
) -> Iterator[tuple[int, Any]]:
    """(k, frame) for every grid index k >= 0 with a frame: the one nearest to origin + k/fps.

    `frames`, in order of time, have a `time` in seconds and say `after_gap` if some before them were
    lost; of those with one time stamp the first counts. Stops after the grid points before `end`
    seconds, having read one frame beyond.
    """

    def first_after(time: float) -> int:
        return math.ceil((time - origin) * fps - 1e-6)

    pause = max(LONGEST_GAP, 4 / fps)
    index, before = 0, None
    for frame in frames:
        if before is None:
            index = max(0, first_after(frame.time - 0.5 / fps))
        elif frame.time <= before.time:
            continue
        else:
            gap = frame.after_gap or frame.time - before.time > pause
            middle = before.time + 0.5 / fps if gap else (before.time + frame.time) / 2
            stop = first_after(min(middle, end))
            for k in range(index, stop):
                yield k, before
            index = max(index, stop)
            if gap:
                index = max(index + 1, first_after(frame.time - 0.5 / fps))
            if before.time >= end:
                return
        before = frame
    if before is not None:
        for k in range(index, first_after(min(before.time + 0.5 / fps, end))):
            yield k, before
