"""What is measured of a run of frames in one pass: of each one small, of one a second in full size."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
from av.video.reformatter import Interpolation

from dit_jax.prepare import filters
from dit_jax.prepare.clips import Rect, shots_of
from dit_jax.prepare.decoding import Picture
from dit_jax.prepare.duplicates import hash_square, hashed_frames, perceptual_hash
from dit_jax.prepare.shots import ShotConfig, ShotFinder

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
        rows, columns = filters.profiles(grey)
        return cls(
            filters.sharpness(grey, area),
            filters.text_part(grey) if text else None,
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
            self._black.append(filters.black_part(small))
            square = hash_square(small)
            late = len(self._squares) >= UNHASHED
            self._squares.append(perceptual_hash(square) if late else square)
        self._changes.append(self._finder.feed(small))
        if latest is not None and at % self._pairs == 1 % self._pairs:
            self._motion[at] = filters.motion(latest[1], small, self._fps)
        if not at or self._is_regular(at):
            self._samples[at] = Sample.of(picture, self._area, self._text)
        self._latest = picture, small

    def shots(self) -> list[tuple[int, int]]:
        """(first, last + 1) of every shot, in grid indices."""
        return shots_of(self.start, self.stop, [self.start + cut for cut in self._finder.cuts()])

    def scores(self, start: int, count: int) -> dict[str, float]:
        """Measures of `count` frames from a grid index on, by the names in `filters.REJECTIONS`."""
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
        found = filters.picture_within(rows, columns)
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
