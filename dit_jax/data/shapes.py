"""Captioned moving shapes: the embedded default data set, drawn on the fly, nothing to download.

A scene is one filled shape (circle, square, triangle, cross) in a saturated colour that glides in a
straight line over a dark grey background; its caption names size, colour, shape and direction, so
text following can be judged exactly (`dit_jax.evaluate.judge`). Every example is a function of
(seed, index) alone. A fixed eighth of the (colour, shape, direction) triples is held out of
training, so that composition, and not recall, can be measured.

It does not encode, patch or batch: sizes and frame counts that a codec or patcher cannot take
are refused there, not here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal

import numpy as np

from dit_jax.types import Sample

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
COLORS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (235, 30, 30),
        "green": (30, 210, 30),
        "blue": (40, 60, 250),
        "yellow": (235, 225, 30),
        "magenta": (225, 40, 225),
        "cyan": (30, 215, 225),
    }
)
DIRECTIONS: tuple[str, ...] = ("left", "right", "up", "down")
SIZES: tuple[str, ...] = ("small", "big")

# Unit steps in (x, y); y grows downwards, as array rows do.
STEPS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
)
# Ranges of the radius in px; the gap leaves no doubt which of the two a shape is.
RADII: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"small": (4.0, 5.0), "big": (7.0, 8.0)}
)
SPEEDS = (0.75, 1.5)  # px/frame, where the canvas has room
MIN_SPEED = 0.5  # px/frame: slower than this, a five-frame clip hardly moves
MARGIN = 0.25  # px kept free between the shape's outline and the frame
MAX_SHADE = 0.2

# Half extents in radii. They even out the areas (pi, 3.1, 2.2 and 2.8 radii squared) as far as the
# largest shape still has 6 px of way on a 24 px canvas.
_SQUARE, _TRIANGLE, _CROSS, _ARM = 0.886, 1.05, 1.09, 0.36
EXTENTS: Mapping[str, float] = MappingProxyType(
    {"circle": 1.0, "square": _SQUARE, "triangle": _TRIANGLE, "cross": _CROSS}
)
# Area in radii squared, by shape.
AREAS: Mapping[str, float] = MappingProxyType(
    {
        "circle": float(np.pi),
        "square": 4 * _SQUARE**2,
        "triangle": 2 * _TRIANGLE**2,
        "cross": 4 * _ARM * (2 - _ARM) * _CROSS**2,
    }
)


@dataclass(frozen=True)
class Scene:
    """One clip, fully determined: `render` draws it and `caption` says it.

    `x`, `y` are the centre of the shape's bounding box in the first frame, in px from the top left
    corner (pixel i covers [i, i+1)); `speed` is in px/frame, `radius` in px (half extents are
    `EXTENTS[shape] * radius`), `shade` the grey of the background in [0, 1]. A `direction` of None
    is a shape that rests: a still image where `frames` is 1.

    Raises ValueError for an unknown word and for a path that leaves the frame.
    """

    shape: str
    color: str
    size: str
    direction: str | None
    frames: int
    height: int
    width: int
    x: float
    y: float
    speed: float
    radius: float
    shade: float = 0.0

    def __post_init__(self) -> None:
        words = (("shape", SHAPES), ("color", tuple(COLORS)), ("size", SIZES))
        for field, known in words:
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown: use one of {known}")
        if self.direction is not None and self.direction not in DIRECTIONS:
            raise ValueError(f"direction={self.direction!r}: use one of {DIRECTIONS} or None")
        if self.frames < 1 or (self.frames == 1 and self.direction is not None):
            raise ValueError(
                f"frames={self.frames} with direction={self.direction!r}: a moving scene needs two "
                "frames or more; give direction=None for a still image"
            )
        reach = EXTENTS[self.shape] * self.radius
        x, y = self.centers()
        for name, ways, limit in (("x", x, self.width), ("y", y, self.height)):
            low, high = min(ways[0], ways[-1]) - reach, max(ways[0], ways[-1]) + reach
            if low < 0 or high > limit:
                raise ValueError(
                    f"the shape spans {name} = {low:.2f}..{high:.2f} px and must stay in "
                    f"0..{limit}: take a smaller radius or speed, fewer frames, or another start"
                )

    def centers(self) -> tuple[np.ndarray, np.ndarray]:
        """Centre of every frame: x and y, float64 [t] each, in px."""
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

    `x`, `y` [t] are centres of the bounding box in px and `radius` a scalar or [t] in px. Squares
    and crosses are exact area coverage; circles and triangles take it from the signed distance.
    """
    r = np.asarray(radius, np.float32).reshape(-1, 1)
    px = np.arange(width, dtype=np.float32) + 0.5 - np.asarray(x, np.float32)[:, None]
    py = np.arange(height, dtype=np.float32) + 0.5 - np.asarray(y, np.float32)[:, None]
    rows, cols = py[:, :, None], px[:, None, :]
    if shape == "circle":
        distance = np.sqrt(rows * rows + cols * cols) - r[:, :, None]
        return np.clip(0.5 - distance, 0, 1)
    if shape == "square":
        return _span(rows, _SQUARE * r) * _span(cols, _SQUARE * r)
    if shape == "cross":
        long, short = _CROSS * r, _ARM * _CROSS * r
        inner_y, inner_x = _span(rows, short), _span(cols, short)
        return _span(rows, long) * inner_x + inner_y * (_span(cols, long) - inner_x)
    if shape == "triangle":
        # Apex up, base as wide as the triangle is high: the sides are the lines 2|x| - y = extent.
        reach = (_TRIANGLE * r)[:, :, None]
        side = (2 * np.abs(cols) - rows - reach) / np.float32(np.sqrt(5))
        return np.clip(0.5 - side, 0, 1) * np.clip(0.5 + reach - rows, 0, 1)
    raise ValueError(f"shape={shape!r} is unknown: use one of {SHAPES}")


def _span(at: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Share of the unit pixel centred `at` that lies in [-half, half]; half is [t, 1] px."""
    half = half[:, :, None]
    return np.clip(np.minimum(at + 0.5, half) - np.maximum(at - 0.5, -half), 0, 1)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene, antialiased and with subpixel motion: uint8 [t, h, w, 3]."""
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
    """The 12 of 96 (colour, shape, direction) triples that training never shows.

    Two for each colour, three for each shape and each direction, and no pair (colour, shape),
    (shape, direction) or (colour, direction) is lost: each still occurs in other triples.
    """
    triples = []
    for c, color in enumerate(COLORS):
        for k in (0, 2):
            s = (c + k) % len(SHAPES)
            triples.append((color, SHAPES[s], DIRECTIONS[(s + c // 2) % len(DIRECTIONS)]))
    return tuple(triples)


@cache
def _seen_combinations() -> tuple[tuple[str, str, str], ...]:
    every = ((c, s, d) for c in COLORS for s in SHAPES for d in DIRECTIONS)
    return tuple(triple for triple in every if triple not in held_out_combinations())


def _check_room(height: int, width: int, frames: int) -> None:
    """ValueError unless the largest shape fits the canvas with its slowest path, any direction."""
    reach = max(EXTENTS.values()) * RADII["big"][1]
    needed = 2 * (reach + MARGIN) + MIN_SPEED * (frames - 1)
    if min(height, width) < needed:
        raise ValueError(
            f"a canvas of {height}x{width} px has no room for {frames} frames: the shorter side "
            f"must be at least {needed:.2f} px for the largest shape to move {MIN_SPEED} px/frame; "
            "take a larger canvas or fewer frames"
        )


def _offset(room: float, jitter: float | None, u: float) -> float:
    """Where the middle of a path lies off the canvas's, uniform over the room there is."""
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
    """A scene with the free numbers (radius, speed, start, shade) drawn; the canvas has room.

    The middle of the path lies within `jitter` px of the canvas's, or anywhere.
    """
    color, shape, direction = triple
    height, width = hw
    u = rng.random(5).tolist()
    low, high = RADII[size]
    radius = low + (high - low) * u[0]
    reach = EXTENTS[shape] * radius + MARGIN
    dx, dy = STEPS[direction] if direction else (0, 0)
    speed = 0.0
    if direction:
        room = (width if dx else height) - 2 * reach
        fastest = min(speeds[1], room / (frames - 1))
        slowest = min(speeds[0], fastest)
        speed = slowest + (fastest - slowest) * u[1]
    way = speed * (frames - 1)
    x = width / 2 - dx * way / 2 + _offset(width - 2 * reach - abs(dx) * way, jitter, u[2])
    y = height / 2 - dy * way / 2 + _offset(height - 2 * reach - abs(dy) * way, jitter, u[3])
    return Scene(
        shape, color, size, direction, frames, height, width, x, y, speed, radius, MAX_SHADE * u[4]
    )


def held_out_scenes(
    n: int, seed: int, frames: int = 9, height: int = 32, width: int = 32
) -> list[Scene]:
    """`n` scenes for evaluation prompts that cover the held-out triples evenly.

    Every 12 scenes hold each triple once and both sizes six times; every 24 each triple in both
    sizes. Raises ValueError where `n` < 0, `frames` < 2 or the canvas is too small.
    """
    if n < 0 or frames < 2 or not 0 <= seed < 2**64:
        raise ValueError(
            f"n={n}, frames={frames}, seed={seed}: need n >= 0, a seed in [0, 2**64) and, to show "
            "motion, frames >= 2"
        )
    _check_room(height, width, frames)
    triples = held_out_combinations()
    scenes = []
    for k in range(n):
        size = SIZES[(k + k // len(triples)) % len(SIZES)]
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, k], np.uint64)))
        scenes.append(_place(rng, triples[k % len(triples)], size, frames, (height, width)))
    return scenes


@dataclass(frozen=True)
class ShapesConfig:
    """What `MovingShapes` draws. Sizes are (height, width) in px, `fps` frames a second.

    Clips take a random member of `sizes` and of `frames`; a share `image_fraction` in [0, 1] of the
    examples is a still image of one frame in a size of `image_sizes`. The split "held_out" draws
    from `held_out_combinations()` only, so it holds no images.

    Raises ValueError where a value is out of range or a canvas cannot fit the motion.
    """

    num_examples: int = 100_000
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (24, 40), (40, 24))
    frames: tuple[int, ...] = (5, 9, 13)
    image_fraction: float = 0.15
    image_sizes: tuple[tuple[int, int], ...] = ((32, 32), (48, 48), (24, 40), (40, 24))
    jitter: float | None = None
    """How far the middle of a path may lie from the canvas's, in px along each side; None: as far
    as the path fits. The less of it, the sooner a small model learns the rest."""
    anywhere: float = 0.0
    """Share of the clips whose paths lie anywhere, whatever the jitter: what may be given to a model
    of moving shapes, which begins where it likes."""
    speeds: tuple[float, float] = SPEEDS
    """From and to, in px a frame, where the canvas has room."""
    fps: float = 8.0
    seed: int = 0
    split: Literal["train", "held_out"] = "train"

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ValueError(f"num_examples={self.num_examples}: give at least 1")
        if not 0 <= self.image_fraction <= 1:
            raise ValueError(f"image_fraction={self.image_fraction}: give a share in [0, 1]")
        if self.jitter is not None and not self.jitter >= 0:
            raise ValueError(f"jitter={self.jitter}: give at least 0 px, or None for anywhere")
        if not 0 <= self.anywhere <= 1:
            raise ValueError(f"anywhere={self.anywhere}: give a share in [0, 1]")
        if not MIN_SPEED <= self.speeds[0] <= self.speeds[1]:
            raise ValueError(
                f"speeds={self.speeds}: give two in order, of at least {MIN_SPEED} px a frame (slower "
                "shapes hardly move)"
            )
        if not self.fps > 0:
            raise ValueError(f"fps={self.fps}: give a positive number of frames a second")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: give an integer in [0, 2**64)")
        if self.split not in ("train", "held_out"):
            raise ValueError(f"split={self.split!r} is unknown: use 'train' or 'held_out'")
        for field in ("sizes", "frames", "image_sizes"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty: give at least one")
        if min(self.frames) < 2:
            raise ValueError(
                f"frames={self.frames}: clips need two frames or more; image_fraction sets how "
                "many examples are single images"
            )
        for height, width in self.sizes:
            _check_room(height, width, max(self.frames))
        for height, width in self.image_sizes:
            _check_room(height, width, 1)

    def open(self) -> "MovingShapes":
        """The clips."""
        return MovingShapes(self)


class MovingShapes:
    """The random-access source of moving shapes: `len`, and samples by index.

    A sample is {"video": uint8 [t, h, w, 3], "caption": str, "fps": float}. Deterministic in
    (config.seed, index), stateless, hence picklable and safe in threads. IndexError outside
    0..len-1.
    """

    def __init__(self, config: ShapesConfig | None = None) -> None:
        self.config = config or ShapesConfig()
        held_out = self.config.split == "held_out"
        self._triples = held_out_combinations() if held_out else _seen_combinations()
        self._image_fraction = 0.0 if held_out else self.config.image_fraction

    def eval_set(self) -> "MovingShapes":
        """The held-out split: combinations that training never draws."""
        return MovingShapes(replace(self.config, split="held_out"))

    def __len__(self) -> int:
        return self.config.num_examples

    def scene(self, i: int) -> Scene:
        """The scene of example `i` in 0..len-1."""
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is out of range for {len(self)} examples")
        config = self.config
        # A counter-based generator keyed by (seed, index): no example depends on another.
        rng = np.random.Generator(np.random.Philox(key=np.array([config.seed, i], np.uint64)))
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
