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

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Annotated, Literal

import numpy as np

from dit_jax.files import refuse_if
from dit_jax.types import NonNegativeFloat, PositiveFloat, PositiveInt, Range, Sample, UnitInterval

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (235, 30, 30),
    "green": (30, 210, 30),
    "blue": (40, 60, 250),
    "yellow": (235, 225, 30),
    "magenta": (225, 40, 225),
    "cyan": (30, 215, 225),
}
WHITE = {"white": (240, 240, 240)}  # No clip has it, but for a share that is asked for.
DIRECTIONS = ("left", "right", "up", "down")
# A quarter of the pairs, left for prompts of white shapes.
NEVER_WHITE = tuple(zip(SHAPES, DIRECTIONS, strict=True))
SIZES = ("small", "big")

# Unit steps in (x, y); y grows downwards, as array rows do.
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Ranges of the radius in px; the gap leaves no doubt which of the two a shape is.
RADII = {"small": (4.0, 5.0), "big": (7.0, 8.0)}
SPEEDS = (0.75, 1.5)  # px/frame, if the canvas has room
MIN_SPEED = 0.5  # px/frame: slower than this, a five-frame clip hardly moves
MARGIN = 0.25  # px kept free between the shape's outline and the frame
MAX_SHADE = 0.2

# Half extents in radii. They even out the areas (pi, 3.1, 2.2 and 2.8 radii squared) as far as the
# largest shape still has 6 px of way on a 24 px canvas.
EXTENTS = {"circle": 1.0, "square": 0.886, "triangle": 1.05, "cross": 1.09}
ARM = 0.36  # Half the width of a cross's bars, in its half extents.
Triple = tuple[str, str, str]  # Colour, shape, direction.


@dataclass(frozen=True)
class Scene:
    """One clip, fully determined: ``render`` draws it and ``caption`` says it."""

    shape: str
    color: str
    size: str
    direction: str | None  # None is a shape that rests: a still image if ``frames`` is 1.
    frames: int
    height: int
    width: int
    # Centre of the bounding box in the first frame, from the top left corner: pixel i covers [i, i+1).
    x: float
    y: float
    speed: float  # In px a frame.
    radius: float  # In px; half extents are ``EXTENTS[shape] * radius``.
    shade: float = 0.0  # The grey of the background, in [0, 1].

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
    # Reshaped to [t, 1, 1]; distances from the centre are rows [t, h, 1] and cols [t, 1, w].
    r = np.asarray(radius, np.float32).reshape(-1, 1, 1)
    reach = EXTENTS[shape] * r
    rows = np.arange(height, dtype=np.float32) + 0.5 - np.asarray(y, np.float32)[:, None]
    cols = np.arange(width, dtype=np.float32) + 0.5 - np.asarray(x, np.float32)[:, None]
    rows, cols = rows[:, :, None], cols[:, None, :]

    def span(at: np.ndarray, half: np.ndarray) -> np.ndarray:
        """Share of the unit pixel centred ``at`` that lies in [-half, half]."""
        return np.clip(np.minimum(at + 0.5, half) - np.maximum(at - 0.5, -half), 0, 1)

    if shape == "circle":
        return np.clip(0.5 - (np.sqrt(rows * rows + cols * cols) - r), 0, 1)
    if shape == "square":
        return span(rows, reach) * span(cols, reach)
    if shape == "cross":
        short = ARM * EXTENTS[shape] * r
        inner_y, inner_x = span(rows, short), span(cols, short)
        # The upright bar, and what the level one has beside it.
        return span(rows, reach) * inner_x + inner_y * (span(cols, reach) - inner_x)
    # A triangle, apex up, base as wide as it is high: the sides are the lines 2|x| - y = extent.
    side = (2 * np.abs(cols) - rows - reach) / np.float32(np.sqrt(5))
    return np.clip(0.5 - side, 0, 1) * np.clip(0.5 + reach - rows, 0, 1)


def render(scene: Scene) -> np.ndarray:
    """Draws a scene, antialiased and with subpixel motion, by equation (2): uint8 [t, h, w, 3]."""
    x, y = scene.centers()
    alpha = coverage(scene.shape, x, y, scene.radius, scene.height, scene.width)
    shade = np.float32(255 * scene.shade)
    video = np.empty((*alpha.shape, 3), np.uint8)
    for channel, value in enumerate((COLORS | WHITE)[scene.color]):
        # +0.5 rounds to nearest in the cast to uint8.
        video[..., channel] = alpha * (np.float32(value) - shade) + (shade + np.float32(0.5))
    return video


@cache
def held_out_combinations() -> tuple[Triple, ...]:
    """The 12 of 96 (colour, shape, direction) triples that training never shows: two for each colour,
    three for each shape and each direction. Every pair still occurs in other triples."""
    places = [(c, (c + k) % len(SHAPES)) for c in range(len(COLORS)) for k in (0, 2)]
    colors, n = tuple(COLORS), len(DIRECTIONS)
    return tuple((colors[c], SHAPES[s], DIRECTIONS[(s + c // 2) % n]) for c, s in places)


@cache
def _training_combinations() -> tuple[Triple, ...]:
    every, held_out = product(COLORS, SHAPES, DIRECTIONS), held_out_combinations()
    return tuple(triple for triple in every if triple not in held_out)


def _check_room(height: int, width: int, frames: int) -> None:
    """Raises ``InputError`` unless the largest shape fits the canvas on its slowest path."""
    reach = max(EXTENTS.values()) * RADII["big"][1]
    needed = 2 * (reach + MARGIN) + MIN_SPEED * (frames - 1)
    message = f"{height}x{width} px have no room for {frames} frames of moving shapes"
    remedy = f"give at least {needed:.2f} px, or fewer frames"
    refuse_if([(min(height, width) < needed, f"{message}: {remedy}")])


def _place(
    rng: np.random.Generator,
    triple: tuple[str, str, str | None],
    size: str,
    frames: int,
    hw: tuple[int, int],
    jitter: float | None = None,
    speeds: tuple[float, float] = SPEEDS,
) -> Scene:
    """A scene with random radius, speed, start and shade, on a canvas that has room for it; the middle
    of its path lies within ``jitter`` px of the canvas's, or anywhere."""
    (color, shape, direction), (height, width) = triple, hw
    # Radius, speed, x, y, shade: five numbers whatever the scene, so that none shifts the others.
    u = rng.random(5).tolist()
    low, high = RADII[size]
    radius = low + (high - low) * u[0]
    reach = EXTENTS[shape] * radius + MARGIN
    dx, dy = STEPS[direction] if direction else (0, 0)
    fastest = min(speeds[1], ((width if dx else height) - 2 * reach) / max(frames - 1, 1))
    slowest = min(speeds[0], fastest)
    speed = slowest + (fastest - slowest) * u[1] if direction else 0.0
    way = speed * (frames - 1)

    def offset(room: float, u: float) -> float:
        """The distance of the path's middle from the canvas's, uniform over the room there is."""
        half = max(room, 0.0) / 2
        return (2 * u - 1) * (half if jitter is None else min(jitter, half))

    x = width / 2 - dx * way / 2 + offset(width - 2 * reach - abs(dx) * way, u[2])
    y = height / 2 - dy * way / 2 + offset(height - 2 * reach - abs(dy) * way, u[3])
    shade = MAX_SHADE * u[4]
    return Scene(shape, color, size, direction, frames, height, width, x, y, speed, radius, shade)


def _generator(seed: int, index: int) -> np.random.Generator:
    # Counter-based and keyed by (seed, index): no example depends on another.
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))


def held_out_scenes(
    n: int, seed: int, frames: int = 9, height: int = 32, width: int = 32
) -> list[Scene]:
    """``n`` scenes for evaluation prompts: every 12 hold each held-out triple once and both sizes six
    times, and every 24 each triple in both sizes."""
    refuse_if([(frames < 2, f"frames={frames}: shapes need two or more to show their motion")])
    _check_room(height, width, frames)
    triples, scenes = held_out_combinations(), []
    for k in range(n):
        # Sizes alternate, and begin with the other one in every next round of triples.
        size = SIZES[(k + k // len(triples)) % len(SIZES)]
        triple = triples[k % len(triples)]
        scenes.append(_place(_generator(seed, k), triple, size, frames, (height, width)))
    return scenes


Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ShapesConfig:
    """The random-access source of moving shapes: clips of random members of ``sizes`` (height and width
    in px) and of ``frames``, and still images."""

    num_examples: PositiveInt = 100_000
    sizes: Sizes = ((32, 32), (24, 40), (40, 24))
    frames: tuple[Annotated[int, Range(2)], ...] = (5, 9, 13)
    image_fraction: UnitInterval = 0.15
    """Share of the examples that are one frame; the held-out split has none."""
    image_sizes: Sizes = ((32, 32), (48, 48), (24, 40), (40, 24))
    jitter: NonNegativeFloat | None = None
    """How far the middle of a path may lie from the canvas's, in px along each side; None: as far
    as the path fits. The less of it, the sooner a small model learns the rest."""
    anywhere: UnitInterval = 0.0
    """Share of the clips whose paths lie anywhere, whatever the jitter: what may be given to a model
    of moving shapes, which begins where it likes."""
    speeds: tuple[Annotated[float, Range(MIN_SPEED)], float] = SPEEDS
    """Smallest and largest, in px a frame, if the canvas has room."""
    white: UnitInterval = 0.0
    """Share of the clips that are white, and called so: something that a trained model never saw.
    Those of ``NEVER_WHITE`` keep their colours."""
    fps: PositiveFloat = 8.0
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
    split: Literal["train", "held_out"] = "train"
    """The split "held_out" draws from ``held_out_combinations()`` only."""

    def __post_init__(self) -> None:
        # What types alone cannot say; ``config.check_types`` holds the rest.
        for name in ("sizes", "frames", "image_sizes"):
            refuse_if([(not getattr(self, name), f"{name}=(): give at least one")])
        slow, fast = self.speeds
        refuse_if([(slow > fast, f"speeds={self.speeds}: give the smaller first")])
        sizes = [(*size, max(self.frames)) for size in self.sizes]
        for height, width, frames in [*sizes, *((*size, 1) for size in self.image_sizes)]:
            _check_room(height, width, frames)

    def eval_set(self) -> ShapesConfig:
        """The held-out split: combinations that training never draws."""
        return replace(self, split="held_out")

    def __len__(self) -> int:
        return self.num_examples

    def scene(self, index: int) -> Scene:
        """The scene of an example."""
        index, held_out = range(len(self))[index], self.split == "held_out"
        rng = _generator(self.seed, index)
        # The order of these draws is the data set: another one would draw other examples.
        is_image = rng.random() < (0.0 if held_out else self.image_fraction)
        size = SIZES[rng.integers(len(SIZES))]
        if is_image:
            triple = (tuple(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(4)], None)
            canvas = self.image_sizes[rng.integers(len(self.image_sizes))]
            return _place(rng, triple, size, 1, canvas, self.jitter)
        triples = held_out_combinations() if held_out else _training_combinations()
        triple = triples[rng.integers(len(triples))]
        frames = self.frames[rng.integers(len(self.frames))]
        canvas = self.sizes[rng.integers(len(self.sizes))]
        scene = _place(rng, triple, size, frames, canvas, self.jitter, self.speeds)
        if rng.random() < self.anywhere:
            scene = _place(rng, triple, size, frames, canvas, speeds=self.speeds)
        if triple[1:] not in NEVER_WHITE and rng.random() < self.white:
            scene = replace(scene, color="white")
        return scene

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        return {"video": render(scene), "caption": caption(scene), "fps": self.fps}
