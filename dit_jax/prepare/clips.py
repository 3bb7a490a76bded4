"""Shots to clips of the lengths and sizes that are asked for: arithmetic only, no pixels.

A clip's length is 1 + stride·n frames, as causal video autoencoders take them. A shot that is too
long is split evenly, so that no tail is left; what does not fill a stride is lost. Pictures keep their
shape: shrunk to an area if they are larger, never enlarged, and the centre cropped to multiples.
"""

from __future__ import annotations

import dataclasses
import math

from dit_jax.files import refuse_if


@dataclasses.dataclass(frozen=True)
class Rect:
    """A part of a picture, in its pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """How long and how large clips are."""

    min_seconds: float = 1.0
    """Shorter shots are rejected."""
    max_seconds: float = 10.0
    """Longer shots are split."""
    stride: int = 4
    """Frames of a clip are 1 + stride·n: the codec's factor in time."""
    fps: float | None = None
    """Files of a higher rate are sampled at this one; None: every file keeps its own."""
    images: bool = True
    """Still images and files of a single frame become clips of one frame."""
    area: int | None = 512 * 512
    """The most pixels of a frame: larger ones are shrunk; None: none is."""
    multiple: int = 16
    """Heights and widths are multiples of this."""

    def __post_init__(self) -> None:
        rules = {
            "0 < min_seconds <= max_seconds": 0 < self.min_seconds <= self.max_seconds,
            "stride and multiple are at least 1": min(self.stride, self.multiple) >= 1,
            "fps is above 0": self.fps is None or 0 < self.fps < math.inf,
            "area is at least a square of multiple": (self.area or math.inf) >= self.multiple**2,
        }
        refuse_if((not kept, f"{self}: {rule}.") for rule, kept in rules.items())


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a displayed picture becomes a clip's: scaled as a whole, then cropped."""

    scaled_height: int
    scaled_width: int
    crop: Rect  # Of the scaled picture: what the clip shows.
    source: Rect  # The same in the displayed picture, to the nearest pixel.


def bounds(fps: float, config: ClipConfig) -> tuple[int, int]:
    """The least and most frames of a clip at this rate, both 1 + stride·n; a frame lasts 1/fps.

    A shot of the shortest length is long enough, though a stride may leave a little less of it.
    """
    shortest = _whole(math.ceil(config.min_seconds * fps - 1e-3), config.stride)
    longest = _whole(math.floor(config.max_seconds * fps + 1e-3), config.stride)
    return max(shortest, 1), max(longest, 1)


def spans(count: int, fps: float, config: ClipConfig) -> list[tuple[int, int]]:
    """(first frame, number of frames) of the clips of a shot of `count` frames, in order.

    Equally long, as few as their longest length allows, spread evenly over the shot; none if the
    shot, or what a stride leaves of it, is shorter than the shortest.
    """
    shortest, longest = bounds(fps, config)
    if count < shortest or longest < shortest:
        return []
    pieces = math.ceil(count / (longest + config.stride - 1))
    length = min(_whole(count // pieces, config.stride), longest)
    if length < shortest:
        return []
    room = count - pieces * length
    return [(i * length + room * (2 * i + 1) // (2 * pieces), length) for i in range(pieces)]


def _whole(count: int, stride: int) -> int:
    """The most frames up to `count` that are 1 + stride·n."""
    return 1 + (count - 1) // stride * stride


def fit(height: int, width: int, part: Rect, config: ClipConfig) -> Geometry | None:
    """How a part of a displayed picture [height, width] becomes a clip's picture; None: too small."""
    scale, area = 1.0, part.height * part.width
    if config.area is not None and area > config.area:
        scale = math.sqrt(config.area / area)
    parts, sides = (part.height, part.width), (height, width)
    out = [math.floor(p * scale / config.multiple + 1e-6) * config.multiple for p in parts]
    if min(out) == 0:
        return None
    if scale < 1:  # As small as it may be, so that the least is cropped.
        scale = max(o / p for o, p in zip(out, parts, strict=True))
    scaled = [max(round(side * scale), o) for side, o in zip(sides, out, strict=True)]
    down, across = scaled[0] / height, scaled[1] / width
    # The middle of the part.
    top = round(part.top * down + (part.height * down - out[0]) / 2)
    left = round(part.left * across + (part.width * across - out[1]) / 2)
    top, left = min(max(top, 0), scaled[0] - out[0]), min(max(left, 0), scaled[1] - out[1])
    source = Rect(*(round(x) for x in (top / down, left / across, out[0] / down, out[1] / across)))
    return Geometry(scaled[0], scaled[1], Rect(top, left, *out), source)
