"""Captioned moving shapes: the built-in data set, drawn on the fly, nothing to download.

A scene is one filled shape that glides in a straight line over a dark grey background; its caption
names size, colour, shape and direction, so that text following can be measured exactly
(``dit_jax.evaluate.judge``). With the centre of frame ``k`` and a pixel's share ``a`` of the shape::

    (x_k, y_k) = (x_0, y_0) + k speed (dx, dy)                                                    (1)
    pixel = a colour + (1 - a) background,  a = clip(1/2 - signed distance to the outline, 0, 1)   (2)

Every example is a function of (seed, index) alone. An eighth of the (colour, shape, direction) triples
is held out of training, so that composition, and not recall, can be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Annotated, Literal

import numpy as np

from dit_jax.types import NonNegativeFloat, PositiveFloat, PositiveInt, Range, Sample

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (235, 30, 30),
    "green": (30, 210, 30),
    "blue": (40, 60, 250),
    "yellow": (235, 225, 30),
    "magenta": (225, 40, 225),
    "cyan": (30, 215, 225),
}
DIRECTIONS: tuple[str, ...] = ("left", "right", "up", "down")
SIZES: tuple[str, ...] = ("small", "big")

# Unit steps in (x, y); y grows downwards, as array rows do.
STEPS: Mapping[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
# Ranges of the radius in px; the gap leaves no doubt which of the two a shape is.
RADII: Mapping[str, tuple[float, float]] = {"small": (4.0, 5.0), "big": (7.0, 8.0)}
SPEEDS = (0.75, 1.5)  # px/frame, if the canvas has room
MIN_SPEED = 0.5  # px/frame: slower than this, a five-frame clip hardly moves
MARGIN = 0.25  # px kept free between the shape's outline and the frame
MAX_SHADE = 0.2

# Half extents in radii. They even out the areas (pi, 3.1, 2.2 and 2.8 radii squared) as far as the
# largest shape still has 6 px of way on a 24 px canvas.
_SQUARE, _TRIANGLE, _CROSS, _ARM = 0.886, 1.05, 1.09, 0.36
EXTENTS: Mapping[str, float] = {
    "circle": 1.0,
    "square": _SQUARE,
    "triangle": _TRIANGLE,
    "cross": _CROSS,
}
# Area in radii squared, by shape.
AREAS: Mapping[str, float] = {
    "circle": float(np.pi),
    "square": 4 * _SQUARE**2,
    "triangle": 2 * _TRIANGLE**2,
    "cross": 4 * _ARM * (2 - _ARM) * _CROSS**2,
}


@dataclass(frozen=True)
class Scene:
    """One clip, fully determined: ``render`` draws it and ``caption`` says it."""

    shape: str
    color: str
    size: str
    direction: str | None
    """None is a shape that rests: a still image if ``frames`` is 1."""
    frames: int
    height: int
    width: int
    x: float
    y: float
    """Centre of the shape's bounding box in the first frame, in px from the top left corner: pixel i
    covers [i, i+1)."""
    speed: float
    """In px a frame."""
    radius: float
    """In px; half extents are ``EXTENTS[shape] * radius``."""
    shade: float = 0.0
    """The grey of the background, in [0, 1]."""

    def __post_init__(self) -> None:
        assert self.shape in SHAPES and self.color in COLORS and self.size in SIZES, self
        assert self.direction in (None, *DIRECTIONS), self
        assert self.frames > (self.direction is not None), self  # One frame shows no motion.
        reach = EXTENTS[self.shape] * self.radius
        for path, limit in zip(self.centers(), (self.width, self.height), strict=True):
            assert reach <= path.min() and path.max() + reach <= limit, f"{self} leaves its frame"

    def centers(self) -> tuple[np.ndarray, np.ndarray]:
        """Centre of every frame by equation (1): x and y, float64 [t] each, in px."""
        dx, dy = STEPS[self.direction] if self.direction else (0, 0)
        way = self.speed * np.arange(self.frames)
        return self.x + dx * way, self.y + dy * way


def caption(scene: Scene) -> str:
    """What the scene shows, e.g. "a big red circle moves left"; "a big red circle" if it rests."""
    words = f"a {scene.size} {scene.color} {scene.shape}"
    return f"{words} moves {scene.direction}" if scene.direction else words


def coverage(
    shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float, height: int, width: int
) -> np.ndarray:
    """Share of each pixel that lies in the shape: float32 [t, h, w] in [0, 1].

    ``x``, ``y`` [t] are centres of the bounding box in px and ``radius`` is a scalar or [t] in px.
    Squares and crosses are exact area coverage; circles and triangles are equation (2).
    """
    r = np.asarray(radius, np.float32).reshape(-1, 1)
    px = np.arange(width, dtype=np.float32) + 0.5 - np.asarray(x, np.float32)[:, None]
    py = np.arange(height, dtype=np.float32) + 0.5 - np.asarray(y, np.float32)[:, None]
    rows, cols = py[:, :, None], px[:, None, :]  # [t, h, 1] and [t, 1, w]
    if shape == "circle":
        distance = np.sqrt(rows * rows + cols * cols) - r[:, :, None]
        return np.clip(0.5 - distance, 0, 1)
    if shape == "square":
        return _span(rows, _SQUARE * r) * _span(cols, _SQUARE * r)
    if shape == "cross":
        long, short = _CROSS * r, _ARM * _CROSS * r
        inner_y, inner_x = _span(rows, short), _span(cols, short)
        return _span(rows, long) * inner_x + inner_y * (_span(cols, long) - inner_x)
    assert shape == "triangle", shape
    # Apex up, base as wide as the triangle is high: the sides are the lines 2|x| - y = extent.
    reach = (_TRIANGLE * r)[:, :, None]
    side = (2 * np.abs(cols) - rows - reach) / np.float32(np.sqrt(5))
    return np.clip(0.5 - side, 0, 1) * np.clip(0.5 + reach - rows, 0, 1)


def _span(at: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Share of the unit pixel centred ``at`` that lies in [-half, half]; half is [t, 1] px."""
    half = half[:, :, None]
    return np.clip(np.minimum(at + 0.5, half) - np.maximum(at - 0.5, -half), 0, 1)


def render(scene: Scene) -> np.ndarray:
    """Draws a scene, antialiased and with subpixel motion, by equation (2): uint8 [t, h, w, 3]."""
    x, y = scene.centers()
    alpha = coverage(scene.shape, x, y, scene.radius, scene.height, scene.width)
    shade = np.float32(255 * scene.shade)
    video = np.empty((*alpha.shape, 3), np.uint8)
    for channel, value in enumerate(COLORS[scene.color]):
        # +0.5 rounds to nearest in the cast to uint8.
        video[..., channel] = alpha * (np.float32(value) - shade) + (shade + np.float32(0.5))
    return video


@cache
def held_out_combinations() -> tuple[tuple[str, str, str], ...]:
    """The 12 of 96 (colour, shape, direction) triples that training never shows: two for each colour,
    three for each shape and each direction. Every pair still occurs in other triples."""
    triples = []
    for c, color in enumerate(COLORS):
        for k in (0, 2):
            s = (c + k) % len(SHAPES)
            triples.append((color, SHAPES[s], DIRECTIONS[(s + c // 2) % len(DIRECTIONS)]))
    return tuple(triples)


@cache
def _seen_combinations() -> tuple[tuple[str, str, str], ...]:
    every = product(COLORS, SHAPES, DIRECTIONS)
    return tuple(triple for triple in every if triple not in held_out_combinations())


def _check_room(height: int, width: int, frames: int) -> None:
    """Raises ``ValueError`` unless the largest shape fits the canvas on its slowest path."""
    reach = max(EXTENTS.values()) * RADII["big"][1]
    needed = 2 * (reach + MARGIN) + MIN_SPEED * (frames - 1)
    if min(height, width) < needed:
        raise ValueError(
            f"a canvas of {height}x{width} px has no room for {frames} frames: the shorter side "
            f"must be at least {needed:.2f} px for the largest shape to move {MIN_SPEED} px/frame; "
            "take a larger canvas or fewer frames"
        )


def _offset(room: float, jitter: float | None, u: float) -> float:
    """The distance of a path's middle from the canvas's, uniform over the room there is."""
    half = max(room, 0.0) / 2
    return (2 * u - 1) * (half if jitter is None else min(jitter, half))


def _place(
    rng: np.random.Generator,
    triple: tuple[str, str, str | None],
    size: str,
    frames: int,
    hw: tuple[int, int],
    jitter: float | None = None,
    speeds: tuple[float, float] = SPEEDS,
) -> Scene:
    """A scene with random radius, speed, start and shade, on a canvas that has room for it.

    The middle of the path lies within ``jitter`` px of the canvas's, or anywhere.
    """
    (color, shape, direction), (height, width) = triple, hw
    # Radius, speed, x, y, shade: five numbers whatever the scene, so that none shifts the others.
    u = rng.random(5).tolist()
    low, high = RADII[size]
    radius = low + (high - low) * u[0]
    reach = EXTENTS[shape] * radius + MARGIN
    dx, dy, speed = 0, 0, 0.0
    if direction:
        dx, dy = STEPS[direction]
        room = (width if dx else height) - 2 * reach
        fastest = min(speeds[1], room / (frames - 1))
        slowest = min(speeds[0], fastest)
        speed = slowest + (fastest - slowest) * u[1]
    way = speed * (frames - 1)
    x = width / 2 - dx * way / 2 + _offset(width - 2 * reach - abs(dx) * way, jitter, u[2])
    y = height / 2 - dy * way / 2 + _offset(height - 2 * reach - abs(dy) * way, jitter, u[3])
    shade = MAX_SHADE * u[4]
    return Scene(shape, color, size, direction, frames, height, width, x, y, speed, radius, shade)


def held_out_scenes(
    n: int, seed: int, frames: int = 9, height: int = 32, width: int = 32
) -> list[Scene]:
    """``n`` scenes for evaluation prompts that cover the held-out triples evenly.

    Every 12 scenes hold each triple once and both sizes six times; every 24 each triple in both
    sizes.
    """
    if frames < 2:
        raise ValueError(f"frames={frames}: shapes need two frames or more to show their motion")
    _check_room(height, width, frames)
    triples, scenes = held_out_combinations(), []
    for k in range(n):
        # Sizes alternate, and begin with the other one in every next round of triples.
        size = SIZES[(k + k // len(triples)) % len(SIZES)]
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, k], np.uint64)))
        scenes.append(_place(rng, triples[k % len(triples)], size, frames, (height, width)))
    return scenes


Share = Annotated[float, Range(0, 1)]
Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ShapesConfig:
    """What ``MovingShapes`` draws: clips of random members of ``sizes`` (height and width in px) and
    of ``frames``, and still images."""

    num_examples: PositiveInt = 100_000
    sizes: Sizes = ((32, 32), (24, 40), (40, 24))
    frames: tuple[Annotated[int, Range(2)], ...] = (5, 9, 13)
    image_fraction: Share = 0.15
    """Share of the examples that are one frame; the held-out split has none."""
    image_sizes: Sizes = ((32, 32), (48, 48), (24, 40), (40, 24))
    jitter: NonNegativeFloat | None = None
    """How far the middle of a path may lie from the canvas's, in px along each side; None: as far
    as the path fits. The less of it, the sooner a small model learns the rest."""
    anywhere: Share = 0.0
    """Share of the clips whose paths lie anywhere, whatever the jitter: what may be given to a model
    of moving shapes, which begins where it likes."""
    speeds: tuple[Annotated[float, Range(MIN_SPEED)], float] = SPEEDS
    """Smallest and largest, in px a frame, if the canvas has room."""
    fps: PositiveFloat = 8.0
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
    split: Literal["train", "held_out"] = "train"
    """The split "held_out" draws from ``held_out_combinations()`` only."""

    def __post_init__(self) -> None:
        # What types alone cannot say; ``config.check_types`` holds the rest.
        if not (self.sizes and self.frames and self.image_sizes) or self.speeds[0] > self.speeds[1]:
            raise ValueError(
                f"sizes={self.sizes}, frames={self.frames}, image_sizes={self.image_sizes}, "
                f"speeds={self.speeds}: give at least one of each, and speeds in order"
            )
        for height, width in self.sizes:
            _check_room(height, width, max(self.frames))
        for height, width in self.image_sizes:
            _check_room(height, width, 1)

    def open(self) -> MovingShapes:
        """The clips."""
        return MovingShapes(self)


class MovingShapes:
    """The random-access source of moving shapes; stateless, hence picklable and safe in threads."""

    def __init__(self, config: ShapesConfig | None = None) -> None:
        self.config = config or ShapesConfig()
        held_out = self.config.split == "held_out"
        self._triples = held_out_combinations() if held_out else _seen_combinations()
        self._image_fraction = 0.0 if held_out else self.config.image_fraction

    def eval_set(self) -> MovingShapes:
        """The held-out split: combinations that training never draws."""
        return MovingShapes(replace(self.config, split="held_out"))

    def __len__(self) -> int:
        return self.config.num_examples

    def scene(self, index: int) -> Scene:
        """The scene of an example."""
        config, index = self.config, range(len(self))[index]
        # A counter-based generator keyed by (seed, index): no example depends on another.
        rng = np.random.Generator(np.random.Philox(key=np.array([config.seed, index], np.uint64)))
        is_image = rng.random() < self._image_fraction
        size = SIZES[rng.integers(len(SIZES))]
        if is_image:
            triple = (tuple(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(4)], None)
            canvas = config.image_sizes[rng.integers(len(config.image_sizes))]
            return _place(rng, triple, size, 1, canvas, config.jitter)
        triple = self._triples[rng.integers(len(self._triples))]
        frames = config.frames[rng.integers(len(config.frames))]
        canvas = config.sizes[rng.integers(len(config.sizes))]
        scene = _place(rng, triple, size, frames, canvas, config.jitter, config.speeds)
        if rng.random() < config.anywhere:
            return _place(rng, triple, size, frames, canvas, speeds=config.speeds)
        return scene

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        return {"video": render(scene), "caption": caption(scene), "fps": self.config.fps}
