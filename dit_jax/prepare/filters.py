"""What a clip is measured by, and the bounds it must keep. Pixels are 0..255 throughout.

Most measures are of frames shrunk to about 128 pixels a side; sharpness, bars and text are of
pictures of full size, one a second. Every measure is a number that is kept with the clip, so that
bounds can be chosen anew without decoding anything again.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from dit_jax.prepare.clips import Rect

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
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
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
