"""What a clip is measured by, in one pass over its frames, and the bounds it must keep.

Pixels are 0..255. Most measures are of frames shrunk to about 128 pixels a side; sharpness, bars and
text are of pictures of full size, one a second. Every measure is a number that is kept with the clip.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import cv2
import numpy as np
from av.video.reformatter import Interpolation

from dit_jax.prepare.clips import Rect
from dit_jax.prepare.decoding import Picture
from dit_jax.prepare.duplicates import hash_square, hashed_frames, perceptual_hash
from dit_jax.prepare.shots import ShotConfig, ShotFinder

DARK = 16
"""Pixels up to this are black."""
BAR, EDGE = 24, 24
"""Bars are nowhere brighter than the first; the picture begins with a step of at least the other."""


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Bounds of what is kept; None turns a filter off. Images have no change and no motion."""

    min_side: int | None = 64
    """Pixels of the shorter side, bars cropped, before anything is shrunk."""
    max_aspect: float | None = 4.0
    """The longer side over the shorter one."""
    max_black: float | None = 0.97
    """Part of a clip's pixels that are black, on average over its frames."""
    min_change: float | None = 0.05
    """Mean change of lightness from frame to frame: less is static."""
    min_motion: float | None = 0.0005
    """Optical flow, in frame diagonals a second, on average over the picture."""
    max_motion: float | None = 1.5
    min_sharpness: float | None = 8.0
    """Variance of the Laplacian of lightness at the size of the clip, the median over its samples."""
    max_text: float | None = None
    """Part of the picture that looks like lines of text (`text_part`): a rough guess, and off."""
    crop_bars: bool = True
    """Black bars around the picture are cropped."""
    max_bars: float | None = 0.5
    """Part of the picture that bars may take."""


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Why a clip is left out: the filter, what was measured, and what is allowed."""

    reason: str
    score: float
    bound: float

    def __str__(self) -> str:
        return f"{self.reason}: {self.score:.4g}, bound {self.bound:.4g}"


REJECTIONS = {
    "resolution": ("side", "min_side"),
    "aspect ratio": ("aspect", "max_aspect"),
    "letterbox": ("bars", "max_bars"),
    "black": ("black", "max_black"),
    "static": ("change", "min_change"),
    "no motion": ("motion", "min_motion"),
    "too much motion": ("motion", "max_motion"),
    "blur": ("sharpness", "min_sharpness"),
    "text": ("text", "max_text"),
}
"""The reasons in the order in which they are looked for: each its score and its bound. Beside them a
clip can be rejected for its "duration", as an "image", and as a "near-duplicate"."""


def verdict(scores: dict[str, float], config: FilterConfig) -> Rejection | None:
    """The first bound that a clip's scores break; a score that is missing breaks none."""
    for reason, (score, name) in REJECTIONS.items():
        bound, value = getattr(config, name), scores.get(score)
        if bound is None or value is None:
            continue
        if value < bound if name.startswith("min") else value > bound:
            return Rejection(reason, value, float(bound))
    return None


def black_part(lightness: np.ndarray) -> float:
    """Part of the pixels of uint8 [h, w] that are black."""
    return float(np.count_nonzero(lightness <= DARK)) / lightness.size


def sharpness(grey: np.ndarray, area: int | None) -> float:
    """Variance of the Laplacian of uint8 [h, w], shrunk to `area` pixels first where it is larger:
    as sharp as the clip will be, and comparable between sizes (Pech-Pacheco et al. 2000)."""
    h, w = grey.shape
    if area is not None and h * w > area:
        scale = (area / (h * w)) ** 0.5
        size = max(int(w * scale), 1), max(int(h * scale), 1)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return float(cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1][0, 0]) ** 2


def motion(before: np.ndarray, after: np.ndarray, fps: float) -> float:
    """Mean length of the optical flow between uint8 [h, w] and the next frame, in diagonals a second
    (DIS flow, Kroeger et al. 2016)."""
    if min(before.shape) < 12:
        return 0.0
    scale = 1 if min(before.shape) >= 32 else 32 / min(before.shape)
    if scale != 1:
        before, after = (cv2.resize(x, None, fx=scale, fy=scale) for x in (before, after))
    flow: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    moved = flow.calc(np.ascontiguousarray(before), np.ascontiguousarray(after), None)
    return float(np.hypot(moved[..., 0], moved[..., 1]).mean() / np.hypot(*before.shape) * fps)


def profiles(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The brightest pixel of every row [h] and of every column [w] of uint8 [h, w]."""
    return grey.max(1), grey.max(0)


def picture_within(rows: np.ndarray, columns: np.ndarray) -> Rect:
    """The picture within black bars, by the brightest of every row and column over all samples.

    A bar is black all along and ends sharply: a night sky does not. Single dark lines are no bars.
    """
    (top, bottom), (left, right) = _span(rows), _span(columns)
    return Rect(top, left, bottom - top, right - left)


def _span(profile: np.ndarray) -> tuple[int, int]:
    """Where the picture begins and ends along one axis."""
    bright = np.flatnonzero(profile > BAR)
    if not len(bright):
        return 0, len(profile)
    least = max(2, len(profile) // 100)
    first, last = int(bright[0]), int(bright[-1]) + 1
    if first < least or profile[first : first + 4].max() < BAR + EDGE:
        first = 0
    if len(profile) - last < least or profile[max(last - 4, 0) : last].max() < BAR + EDGE:
        last = len(profile)
    return first, last


def text_part(grey: np.ndarray) -> float:
    """Part of uint8 [h, w] within what looks like lines of text: boxes much wider than high, full of
    strong vertical edges, after joining those across the gaps between letters.

    A rough guess: fences and blinds look like text as well, and single large letters do not.
    """
    if grey.shape[1] > 640:
        size = 640, max(round(grey.shape[0] * 640 / grey.shape[1]), 1)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    edges = (np.abs(cv2.Sobel(grey, cv2.CV_16S, 1, 0)) > 160).astype(np.uint8)
    joined = cv2.morphologyEx(edges, cv2.MORPH_CLOSE, np.ones((3, 13), np.uint8))
    joined = cv2.morphologyEx(joined, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    _, _, boxes, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    found = 0
    for x, y, w, h, area in boxes[1:]:
        density = edges[y : y + h, x : x + w].mean()
        line = 6 <= h <= grey.shape[0] * 0.2 and w >= 2.5 * h
        if line and area >= 0.6 * w * h and 0.15 <= density <= 0.7:
            found += w * h
    return found / grey.size


SMALL = 128
"""Pixels of the longer side of the frames that are measured."""
UNHASHED = 1 << 16
"""Frames of a run whose squares are kept until it is known which of them are hashed: 64 MiB."""
THUMBNAIL = 192
"""The same of thumbnails, at most."""


def small_frame(picture: Picture) -> np.ndarray:
    """A picture as it is measured: its lightness, uint8 [h, w], the longer side `SMALL`.

    Every n-th row and column, down to a little more than that, then averages.
    """
    height, width = picture.renderer.height, picture.renderer.width
    light = picture.lightness(max(round(max(height, width) / (1.25 * SMALL)), 1))
    scale = SMALL / max(height, width)
    size = max(round(width * scale), 4), max(round(height * scale), 4)
    return cv2.resize(light, size, interpolation=cv2.INTER_AREA)


@dataclasses.dataclass
class Sample:
    """What is measured of a picture in full size."""

    sharpness: float
    text: float | None
    rows: np.ndarray
    columns: np.ndarray
    thumbnail: bytes

    @classmethod
    def of(cls, picture: Picture, area: int | None, text: bool) -> Sample:
        """Measures a picture; `area`: pixels of a clip's frame."""
        grey = picture.lightness()
        height, width = picture.renderer.height, picture.renderer.width
        scale = min(THUMBNAIL / max(height, width), 1.0)
        size = [max(round(side * scale), 1) for side in (height, width)]
        shrunk = picture.pixels(size[0], size[1], Interpolation.BILINEAR)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 80]
        rows, columns = profiles(grey)
        return cls(
            sharpness(grey, area),
            text_part(grey) if text else None,
            rows,
            columns,
            cv2.imencode(".jpg", np.ascontiguousarray(shrunk[..., ::-1]), quality)[1].tobytes(),
        )


class Run:
    """Frames without a gap, from grid index `start` on."""

    def __init__(
        self, start: int, fps: float, shots: ShotConfig, step: int, area: int | None, text: bool
    ):
        """`step`: so many frames apart are those that are measured in full size."""
        self.start, self._fps, self._step, self._area, self._text = start, fps, step, area, text
        self._finder = ShotFinder(shots)
        self._changes: list[float] = []
        self._black: list[float] = []
        self._squares: list[np.ndarray | int] = []
        self._motion: dict[int, float] = {}
        self._samples: dict[int, Sample] = {}
        self._pairs = max(step // 2, 1)
        self._latest: tuple[Picture, np.ndarray] | None = None

    @property
    def stop(self) -> int:
        """The grid index after the last frame."""
        return self.start + len(self._changes)

    def add(self, picture: Picture) -> None:
        """Measures the next frame; one that is shown again is not drawn again."""
        at, latest = len(self._changes), self._latest
        if latest is not None and latest[0] is picture:
            small = latest[1]
            self._black.append(self._black[-1])
            self._squares.append(self._squares[-1])
        else:
            small = small_frame(picture)
            self._black.append(black_part(small))
            square = hash_square(small)
            late = len(self._squares) >= UNHASHED
            self._squares.append(perceptual_hash(square) if late else square)
        self._changes.append(self._finder.feed(small))
        if latest is not None and at % self._pairs == 1 % self._pairs:
            self._motion[at] = motion(latest[1], small, self._fps)
        if not at or self._is_regular(at):
            self._samples[at] = Sample.of(picture, self._area, self._text)
        self._latest = picture, small

    def shots(self) -> list[tuple[int, int]]:
        """(first, last + 1) of every shot, in grid indices."""
        cuts = [self.start + cut for cut in self._finder.cuts()]
        return list(itertools.pairwise([self.start, *cuts, self.stop]))

    def scores(self, start: int, count: int) -> dict[str, float]:
        """Measures of `count` frames from a grid index on, by the names in `REJECTIONS`."""
        first, last = start - self.start, start - self.start + count
        samples = self._within(start, count)
        texts = [sample.text for sample in samples if sample.text is not None]
        motion = [value for at, value in self._motion.items() if first < at < last]
        found = {
            "black": float(np.mean(self._black[first:last])),
            "sharpness": float(np.median([sample.sharpness for sample in samples])),
        }
        if texts:
            found["text"] = float(np.median(texts))
        if count > 1:  # The first frame's change is from another clip.
            found["change"] = float(np.mean(self._changes[first + 1 : last]))
        if motion:
            found["motion"] = float(np.mean(motion))
        return found

    def picture(self, start: int, count: int, whole: Rect) -> Rect:
        """Where the picture is within black bars, over these frames; `whole`: as displayed."""
        samples = self._within(start, count)
        rows = np.max([sample.rows for sample in samples], axis=0)
        columns = np.max([sample.columns for sample in samples], axis=0)
        found = picture_within(rows, columns)
        down, across = whole.height / len(rows), whole.width / len(columns)
        top, left = math.ceil(found.top * down), math.ceil(found.left * across)
        bottom = math.floor((found.top + found.height) * down)
        return Rect(top, left, bottom - top, math.floor((found.left + found.width) * across) - left)

    def hashes(self, start: int, count: int) -> tuple[int, ...]:
        """Perceptual hashes of these frames."""
        squares = (self._squares[start - self.start + i] for i in hashed_frames(count))
        return tuple(one if isinstance(one, int) else perceptual_hash(one) for one in squares)

    def thumbnail(self, start: int, count: int) -> bytes:
        """JPEG of the sample nearest to the middle of these frames."""
        middle = start - self.start + count // 2
        return self._samples[min(self._samples, key=lambda at: abs(at - middle))].thumbnail

    def _is_regular(self, at: int) -> bool:
        """Whether this frame, counted from the first, is one to be measured in full size: from the
        middle of the first step on, for beginnings are often black."""
        return at % self._step == self._step // 2

    def _within(self, start: int, count: int) -> list[Sample]:
        """The regular samples of these frames, or the nearest one where there is none."""
        first, last = start - self.start, start - self.start + count
        inside = [at for at in self._samples if first <= at < last and self._is_regular(at)]
        found = [self._samples[at] for at in inside]
        nearest = min(self._samples, key=lambda at: abs(at - (first + last) / 2))
        return found or [self._samples[nearest]]
