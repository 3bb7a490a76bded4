"""Where one shot ends and the next begins, from the lightness I_i of small frames.

    c_i = mean |I_i - I_{i-1}|                          (1) the change from one frame to the next
    o_i = correlation of the outlines of I_{i-1}, I_i   (2) about 1 within a shot, 0 between two scenes
    s_i = c_i (1 - o_i)                                 (3) the change of structure

A cut stands out from the frames around it, as motion, shaking and dissolves do not, which change all of
them alike: by c, many times over, for two takes before one wall have the same outlines; or else by s
and less, with outlines that differ. There frames are shifted against each other by phase correlation,
if that makes them alike, so that a camera that pans changes little, and the greatest neighbour is left
out, which may be another cut or a flash. Where the frames around do not change at all (held drawings,
slides), everything stands out, and the outlines must be others. What comes back within `FLASH` frames
is no cut.

Black between shots is cut off on both sides, and so are fades to and from it. No shot is too short to
be found here; what is too short to be used is for the clips to say.

The numbers were chosen on real clips joined at random points, in all pairs; `benchmarks/cuts.py`
measures this and PySceneDetect's detectors, which find less and invent more.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

import cv2
import numpy as np

from dit_jax.files import refuse_if

WINDOW = 4  # So many frames on either side are around a cut.
STRUCTURE = 2.5  # A cut's structure changes so many times as much as on either side.
LIKENESS = 0.69  # And its outlines correlate at most so much.
HELD = 0.2  # Frames that change less, at the median of a side, are held drawings.
HELD_LIKENESS = 0.4  # Between those a correlation of outlines above this is no cut.
FLASH = 2  # Frames that a flash lasts, at most.
BLACK = 3  # Frames in a row that black lasts, at least.
LAG = WINDOW + BLACK  # Before so many of the latest frames nothing changes any more.
# Response of the phase correlation, 0 to 1, from which on one frame is the other, shifted: it is above
# 0.47 in 99 % of the frames of fast pans, and under 0.32 in 95 % of cuts.
SURE = 0.4


@dataclasses.dataclass(frozen=True)
class ShotConfig:
    """What counts as a cut. Levels are of pixels, 0 to 255."""

    ratio: float = 5.0
    """A cut changes so many times as much as the frames around it, on average."""
    change: float = 3.0
    """And at least so much."""
    black: float | None = 16.0
    """Frames with 98 % of their pixels under this are black, and so are shots of their own, from
    three in a row; None: they are as others."""

    def __post_init__(self) -> None:
        known = self.ratio > 1 and self.change >= 0
        refuse_if([(not known, f"{self}: ratio is above 1 and change at least 0.")])


class ShotFinder:
    """Finds the cuts of frames that are fed in order; one for each run without gaps."""

    def __init__(self, config: ShotConfig):
        self.config = config
        self._recent = collections.deque[np.ndarray](maxlen=2 * WINDOW + 2)
        self.changes: list[float] = []  # Of every frame, 0..255.
        self._black = bytearray()
        self._structures: dict[int, tuple[float, float]] = {}
        self._found: set[int] = set()

    def feed(self, light: np.ndarray) -> None:
        """The next frame's lightness, uint8 [h, w] of one size throughout."""
        self.changes.append(_difference(self._recent[-1], light) if self.changes else 0.0)
        self._recent.append(light)
        bright = np.count_nonzero(light >= (self.config.black or 0))
        self._black.append(int(bright <= 0.02 * light.size))
        self._check(len(self.changes) - 1 - WINDOW)

    def cuts(self, ended: bool = True) -> list[int]:
        """The first frames of all shots but the first, counted from the first frame fed; before the
        last frame those within `LAG` of the latest are provisional."""
        count = len(self.changes)
        for at in range(count - WINDOW, count if ended else 0):
            self._check(at)
        black = np.frombuffer(b"\0" + self._black + b"\0", np.int8)
        edges = np.flatnonzero(np.diff(black)).reshape(-1, 2)
        black = edges[edges[:, 1] - edges[:, 0] >= BLACK]
        return sorted({cut for cut in (*self._found, *black.ravel().tolist()) if 0 < cut < count})

    def _check(self, at: int) -> None:
        """Adds frame `at` to the cuts if it is one; up to `WINDOW` frames after it are known."""
        changes = self.changes
        if at < 1 or changes[at] < self.config.change:
            return
        last = len(changes) - 1
        sides = range(max(at - WINDOW, 1), at), range(at + 1, min(at + WINDOW, last) + 1)
        around = [changes[i] for side in sides for i in side]
        stands_out = not around or changes[at] >= self.config.ratio * np.mean(around)
        held = any(side and np.median([changes[i] for i in side]) < HELD for side in sides)
        if held or not stands_out:
            if not self._breaks(at, sides, HELD_LIKENESS if held else LIKENESS):
                return
        # A flash: the picture before, or this one, is seen again beyond it.
        pairs = [(at - 1, i) for i in range(at + 1, min(at + FLASH, last) + 1)]
        pairs += [(i, at) for i in range(max(at - 1 - FLASH, 0), at - 1)]
        if all(_difference(*self._frames(*pair)) >= 0.4 * changes[at] for pair in pairs):
            self._found.add(at)

    def _breaks(self, at: int, sides: tuple[range, range], likeness: float) -> bool:
        """Whether outlines are unlike, and structure changes more than on either side."""
        changes = self.changes
        structure, outlines = self._structure(at)
        if outlines > likeness:
            return False
        if any(side and changes[at] < min(changes[i] for i in side) for side in sides):
            return False  # The frame at an end of a fade, where there are no outlines.
        moving = [[i for i in side if changes[i] >= HELD] for side in sides]
        greatest = max((i for side in moving for i in side), key=self._structure, default=at)
        for side in moving:
            # Another cut, or a flash, which changes twice.
            rest = [i for i in side if greatest not in side or abs(i - greatest) > FLASH]
            around = [self._structure(i)[0] for i in rest]
            if around and structure < STRUCTURE * np.mean(around):
                return False
        return True

    def _frames(self, *indices: int) -> list[np.ndarray]:
        return [self._recent[i - len(self.changes)] for i in indices]

    def _structure(self, at: int) -> tuple[float, float]:
        """Equations 3 and 2 of a frame."""
        if at not in self._structures:
            pair = self._frames(at - 1, at)
            change, outlines = self.changes[at], _likeness(*pair)
            best = change * (1 - outlines), outlines
            shifted = _aligned(*pair) if outlines <= LIKENESS else None
            if shifted is not None:
                change, outlines = _difference(*shifted), _likeness(*shifted)
                best = min(best, (change * (1 - outlines), outlines))
            self._structures[at] = best
        return self._structures[at]


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """Equation 1."""
    return cv2.mean(cv2.absdiff(one, other))[0]


def _aligned(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """What two frames both show, if one is the other shifted, as far as phase correlation tells."""
    height, width = one.shape
    window = cv2.createHanningWindow((width, height), cv2.CV_32F)
    (x, y), sure = cv2.phaseCorrelate(one.astype(np.float32), other.astype(np.float32), window)
    x, y = round(x), round(y)
    if sure < SURE or not (x or y):
        return None
    first = one[max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)]
    second = other[max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)]
    return np.ascontiguousarray(first), np.ascontiguousarray(second)


def _likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Equation 2, -1..1; flat pictures are unlike all others."""
    first, second = _outlines(one), _outlines(other)
    scale = float(np.sqrt((first**2).mean() * (second**2).mean()))
    return float((first * second).mean()) / scale if scale else 0.0


def _outlines(light: np.ndarray) -> np.ndarray:
    """Where lightness changes: float32 [h, w], its mean subtracted; flat areas give zeros."""
    x, y = (cv2.Sobel(light, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1)))
    edges = np.minimum(cv2.magnitude(x, y), 128.0)  # The outline, and not how strong it is.
    return edges - edges.mean()


def shot_cuts(frames: Iterable[np.ndarray], config: ShotConfig | None = None) -> list[int]:
    """The indices at which shots begin, 0 not among them.

    `frames`: lightness, uint8 [h, w] of one size, best about 128 pixels wide.
    """
    finder = ShotFinder(config or ShotConfig())
    for frame in frames:
        finder.feed(frame)
    return finder.cuts()
