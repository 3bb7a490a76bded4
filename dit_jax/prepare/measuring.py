"""What a clip is measured by, in one pass over its frames, and the bounds it must keep.

Pixels are 0..255. Most measures are of frames shrunk to 128 pixels a side; sharpness and bars are of
pictures of full size, one a second. Every measure is a number that is kept with the clip.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import cv2
import numpy as np
from av.video.reformatter import Interpolation

from dit_jax.prepare.clips import Rect
from dit_jax.prepare.duplicates import hashed_frames, perceptual_hash
from dit_jax.prepare.media import Picture
from dit_jax.prepare.shots import LAG, ShotConfig, ShotFinder

DARK = 16  # Pixels up to this are black.
# Bars are nowhere brighter than the first; the picture begins with a step of at least the other.
BAR, EDGE = 24, 24
SMALL, THUMBNAIL = 128, 192  # The longer side of frames that are measured; of thumbnails, at most.


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


def picture_within(rows: np.ndarray, columns: np.ndarray) -> Rect:
    """The picture within black bars, by the brightest pixel of every row and column of all samples.

    A bar is black all along and ends sharply: a night sky does not. Single dark lines are no bars.
    """
    edges = []
    for profile in (rows, columns):
        length, bright = len(profile), np.flatnonzero(profile > BAR)
        first, last = (int(bright[0]), int(bright[-1]) + 1) if len(bright) else (0, length)
        least = max(2, length // 100)
        if first < least or profile[first : first + 4].max() < BAR + EDGE:
            first = 0
        if length - last < least or profile[max(last - 4, 0) : last].max() < BAR + EDGE:
            last = length
        edges.append((first, last - first))
    (top, height), (left, width) = edges
    return Rect(top, left, height, width)


def small_frame(picture: Picture) -> np.ndarray:
    """A picture as it is measured: its lightness, uint8 [h, w], the longer side `SMALL`."""
    sides = picture.renderer.height, picture.renderer.width
    return picture.lightness(*(max(round(side * SMALL / max(sides)), 4) for side in sides))


class Sample(NamedTuple):
    """What is measured of a picture in full size."""

    sharpness: float
    rows: np.ndarray  # The brightest pixel of every row.
    columns: np.ndarray
    thumbnail: bytes


def sample(picture: Picture, area: int | None) -> Sample:
    """Measures a picture; `area`: pixels of a clip's frame."""
    grey = picture.lightness()
    scale = min(THUMBNAIL / max(grey.shape), 1.0)
    size = [max(round(side * scale), 1) for side in grey.shape]
    shown = picture.renderer.pixels(picture.frame, size, Interpolation.BILINEAR)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 80]
    jpeg = cv2.imencode(".jpg", np.ascontiguousarray(shown[..., ::-1]), quality)[1].tobytes()
    return Sample(sharpness(grey, area), grey.max(1), grey.max(0), jpeg)


class Run:
    """Frames without a gap, from grid index `start` on, and what is measured of them."""

    def __init__(self, start: int, fps: float, shots: ShotConfig, step: int, area: int | None):
        """`step`: so many frames apart are those that are measured in full size."""
        # The grid indices of the first frame and after the last one.
        self.start, self.stop, self.fps = start, start, fps
        self._step, self._area, self._given = step, area, start
        self._finder = ShotFinder(shots)
        self._frames: list[tuple[float, int]] = []  # Black part and hash of every frame.
        # Of some frames, by their place.
        self._motion: dict[int, float] = {}
        self._samples: dict[int, Sample] = {}
        self._latest: tuple[Picture, np.ndarray] | None = None

    def add(self, picture: Picture) -> None:
        """Measures the next frame; one that is shown again is not drawn again."""
        at, latest, pairs = self.stop - self.start, self._latest, max(self._step // 2, 1)
        if latest is not None and latest[0] is picture:
            small = latest[1]
            self._frames.append(self._frames[-1])
        else:
            small = small_frame(picture)
            self._frames.append((black_part(small), perceptual_hash(small)))
        self._finder.feed(small)
        if latest is not None and at % pairs == 1 % pairs:
            self._motion[at] = motion(latest[1], small, self.fps)
        if not at or self._is_regular(at):
            self._samples[at] = sample(picture, self._area)
        self._latest, self.stop = (picture, small), self.stop + 1

    def shots(self, ended: bool = True) -> list[tuple[int, int]]:
        """(first, last + 1) of every shot that was not given yet, in grid indices; until the run has
        ended, of those that no further frame changes, nor what is measured of them."""
        last = self.stop if ended else self.stop - self._step - LAG
        cuts = [self.start + cut for cut in self._finder.cuts(ended)]
        edges = [*(cut for cut in cuts if self._given < cut <= last), *[self.stop] * ended]
        shots = list(itertools.pairwise([self._given, *edges]))
        self._given = edges[-1] if edges else self._given
        return shots

    def measured(
        self, start: int, count: int
    ) -> tuple[dict[str, float], Rect, tuple[int, ...], bytes]:
        """Of `count` frames from a grid index on: scores by their names in `REJECTIONS`, the picture
        within black bars, hashes, and the JPEG of the sample nearest to their middle."""
        first, last = start - self.start, start - self.start + count

        def nearest(place: float) -> Sample:
            return self._samples[min(self._samples, key=lambda at: abs(at - place))]

        regular = [at for at in self._samples if first <= at < last and self._is_regular(at)]
        samples = [self._samples[at] for at in regular] or [nearest((first + last) / 2)]
        sharpnesses, rows, columns, _ = zip(*samples, strict=True)
        black, hashes = zip(*self._frames[first:last], strict=True)
        motion = [value for at, value in self._motion.items() if first < at < last]
        scores = {"black": float(np.mean(black)), "sharpness": float(np.median(sharpnesses))}
        if count > 1:  # The first frame's change is from another clip.
            scores["change"] = float(np.mean(self._finder.changes[first + 1 : last]))
        if motion:
            scores["motion"] = float(np.mean(motion))
        part = picture_within(np.max(rows, axis=0), np.max(columns, axis=0))
        hashes = tuple(hashes[i] for i in hashed_frames(count))
        return scores, part, hashes, nearest(first + count // 2).thumbnail

    def _is_regular(self, at: int) -> bool:
        """Whether this frame, counted from the first, is one to be measured in full size: from the
        middle of the first step on, for beginnings are often black."""
        return at % self._step == self._step // 2
