"""Says what a clip of moving shapes shows, by geometry alone: does it follow its prompt?

The background is the median of the frame's border, the foreground alpha the distance from it. Colour is
the nearest palette hue, direction a Theil-Sen fit to the centroid, size the area, and shape the best
intersection over union with analytically rendered templates. The judge is strict: what is not clearly
one of the words is None, and None is never right; templates of shapes that no scene has (diamonds,
ellipses, fat crosses) compete, so that a near miss is not taken for a hit. It knows the vocabulary of
``dit_jax.data.shapes`` only, and says nothing about realism.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dit_jax.data.shapes import ARM, COLORS, EXTENTS, RADII, SHAPES, STEPS, Scene, coverage
from dit_jax.files import refuse_if

# Area in radii squared, by shape.
AREAS = {
    "circle": float(np.pi),
    "square": 4 * EXTENTS["square"] ** 2,
    "triangle": 2 * EXTENTS["triangle"] ** 2,
    "cross": 4 * ARM * (2 - ARM) * EXTENTS["cross"] ** 2,
}
MIN_CONTRAST = 0.25  # distance of foreground from background, in [0, 1] RGB: less is nothing
MIN_AREA = 12.0  # px: the smallest triangle covers 35
MIN_PRESENCE = 0.6  # share of the frames that must show something
MIN_CHROMA = 0.25  # max - min of RGB in [0, 1]: less is grey
MIN_WHITE = 0.7  # of the least of RGB in [0, 1], if it is grey
MAX_HUE_ERROR = 25.0  # degrees; the palette's neighbours are 50 or more apart
MIN_COLOR_VOTE = 0.7  # share of the foreground pixels that must agree
MIN_SHAPE_IOU = 0.83  # of the best template; true clips score > 0.93
MIN_SHAPE_LEAD = 0.02  # over the second best template
MAX_SOFTNESS = 1.2  # half-covered over covered area: a Gaussian blob has 2.0, drawn shapes < 0.6
MAX_SECOND_BLOB = 0.25  # of the mass of the largest
MIN_MOTION = 0.25  # px/frame; below it rests. Scenes move at 0.5 or more
MAX_CROSSWAYS = 0.5  # of the motion along the main axis
FIT_FRAMES = 6  # frames that are compared with templates: more changed no verdict
SIZE_BORDER = (RADII["small"][1] + RADII["big"][0]) / 2
SIZE_LIMITS = (0.7 * RADII["small"][0], 1.3 * RADII["big"][1])


class Verdict(NamedTuple):
    """What a clip shows, in the words of ``dit_jax.data.shapes``; None for what cannot be told."""

    color: str | None = None
    shape: str | None = None
    direction: str | None = None  # None for a single frame, "still" if nothing noticeably moves.
    size: str | None = None


class _Foreground(NamedTuple):
    """The n of t frames that show something."""

    pixels: np.ndarray  # [n, h, w, 3] in [0, 1]
    alpha: np.ndarray  # [n, h, w] >= 0, about 1 inside
    mask: np.ndarray  # alpha, steepened about one half into [0, 1]
    area: np.ndarray  # [n] px
    times: np.ndarray  # [n] frame numbers
    centers: np.ndarray  # [n, 2] (x, y) px


def judge(video: np.ndarray) -> Verdict:
    """What a clip [t, h, w, 3] shows, uint8 or float in [-1, 1] (clipped)."""
    fg = _foreground(video)
    if fg is None:
        return Verdict()
    shape = _shape(fg)
    return Verdict(_color(fg), shape, _direction(fg, len(video)), _size(fg, shape))


def prompt_following(videos: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Fractions in [0, 1] of clips that show what their scene says, and their count "n".

    Keys "color", "shape", "direction", "size", and "all" for colour, shape and direction at once.
    A resting scene asks for "still", or for nothing in a single frame; if the judge finds nothing,
    nothing is right.
    """
    unequal = len(videos) != len(scenes) or not len(scenes)
    message = f"{len(videos)} videos for {len(scenes)} scenes: give one video a scene, at least one"
    refuse_if([(unequal, message)])
    right = np.zeros((len(scenes), 4))
    for k, (video, scene) in enumerate(zip(videos, scenes, strict=True)):
        verdict = judge(video)
        direction = scene.direction or ("still" if len(video) > 1 else None)
        truth = scene.color, scene.shape, direction, scene.size
        # Noise has an area and rests, too: without a colour or a shape there is no object to judge.
        if verdict.color or verdict.shape:
            right[k] = [ours == true for ours, true in zip(verdict, truth, strict=True)]
    fractions = dict(zip(Verdict._fields, right.mean(0).tolist(), strict=True))
    return {**fractions, "all": float(right[:, :3].all(1).mean()), "n": float(len(scenes))}


def centroids(video: np.ndarray) -> np.ndarray:
    """Where the shape is in each frame: (x, y) in px, [t, 2]; NaN where nothing is seen."""
    fg, places = _foreground(video), np.full((len(video), 2), np.nan)
    if fg is not None:
        places[fg.times] = fg.centers
    return places


def _unit_pixels(video: np.ndarray) -> np.ndarray:
    """float32 [t, h, w, 3] in [0, 1] of uint8, or of float in [-1, 1]."""
    fits = video.ndim == 4 and video.shape[-1] == 3 and len(video) and min(video.shape[1:3]) >= 8
    # Custom floats such as bfloat16 are no subtype of np.floating, but kind "V" is theirs alone.
    known = video.dtype == np.uint8 or video.dtype.kind in "fV"
    faults = (
        (not fits, f"video has shape {video.shape}: give [t, h, w, 3] with h, w >= 8"),
        (not known, f"video has dtype {video.dtype}: give uint8, or float in [-1, 1]"),
    )
    refuse_if(faults)
    if video.dtype == np.uint8:
        return video.astype(np.float32) / 255
    return np.clip(video.astype(np.float32) / 2 + 0.5, 0, 1)


def _foreground(video: np.ndarray) -> _Foreground | None:
    """Parts the shape from the background; None if too few frames show anything."""
    pixels = _unit_pixels(np.asarray(video))
    if not np.isfinite(pixels).all():
        return None
    t, h, w, _ = pixels.shape
    ring = np.ones((h, w), bool)
    ring[1:-1, 1:-1] = False
    # A background for each frame: generated ones flicker.
    background = np.median(pixels[:, ring], axis=1)
    distance = np.linalg.norm(pixels - background[:, None, None], axis=-1)
    # Noise has a length too; without its floor it would grow the area and blur the outline.
    floor = np.median(distance[:, ring], axis=1)
    distance = np.maximum(distance - floor[:, None, None], 0)
    brightest = np.sort(distance.reshape(t, -1), axis=1)[:, -int(MIN_AREA) :]
    peak = np.median(brightest.mean(1))
    if peak < MIN_CONTRAST:
        return None
    alpha = distance / np.median(distance[distance > 0.6 * peak])
    mask = np.clip(2 * alpha - 0.5, 0, 1)
    area = mask.sum((1, 2))
    times = np.flatnonzero(area >= MIN_AREA)
    if len(times) < MIN_PRESENCE * t:
        return None
    alpha, mask, area = alpha[times], mask[times], area[times]
    x = (mask.sum(1) * (np.arange(w) + 0.5)).sum(1) / area
    y = (mask.sum(2) * (np.arange(h) + 0.5)).sum(1) / area
    return _Foreground(pixels[times], alpha, mask, area, times, np.stack([x, y], 1))


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Hue in degrees, [..., 3] -> [...], on the chromatic plane; adding grey leaves it as it is."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b))


def _color(fg: _Foreground) -> str | None:
    """The palette colour that the foreground's pixels agree on."""
    rgb, palette = fg.pixels[fg.alpha > 0.7], np.array([*COLORS.values()], np.float32)
    chroma = rgb.max(-1) - rgb.min(-1)
    if np.mean((chroma < MIN_CHROMA) & (rgb.min(-1) >= MIN_WHITE)) >= MIN_COLOR_VOTE:
        return "white"
    error = np.abs((_hue(rgb)[:, None] - _hue(palette) + 180) % 360 - 180)
    sure = (chroma >= MIN_CHROMA) & (error.min(1) <= MAX_HUE_ERROR)
    counts = np.bincount(error.argmin(1)[sure], minlength=len(COLORS))
    return tuple(COLORS)[counts.argmax()] if counts.max() >= MIN_COLOR_VOTE * len(rgb) else None


def _direction(fg: _Foreground, frames: int) -> str | None:
    """One of DIRECTIONS, "still", or None for a single frame, a diagonal and erratic motion."""
    if frames < 2 or len(fg.times) < 2:
        return None
    first, second = np.triu_indices(len(fg.times), 1)
    centers, times = fg.centers, fg.times[:, None]
    slopes = (centers[second] - centers[first]) / (times[second] - times[first])
    velocity = np.median(slopes, axis=0)
    path = centers - velocity * times
    scatter = np.abs(path - np.median(path, axis=0)).max(1)
    axis = int(np.abs(velocity).argmax())
    speed = float(np.abs(velocity[axis]))
    # A blob that jumps about has a slope too: most frames must lie near the fitted line.
    if np.median(scatter) > max(1.0, 0.25 * speed * (frames - 1)):
        return None
    if speed < MIN_MOTION:
        return "still"
    if np.abs(velocity[1 - axis]) > MAX_CROSSWAYS * speed:
        return None
    step = tuple(np.sign(velocity) * (np.arange(2) == axis))
    return next(name for name, way in STEPS.items() if way == step)


def _size(fg: _Foreground, shape: str | None) -> str | None:
    """The size word by the median area; a shape that cannot be told counts as an average one."""
    factor = AREAS[shape] if shape else np.mean(list(AREAS.values()))
    radius = float(np.sqrt(np.median(fg.area) / factor))
    if not SIZE_LIMITS[0] <= radius <= SIZE_LIMITS[1]:
        return None
    return "small" if radius < SIZE_BORDER else "big"


def _shape(fg: _Foreground) -> str | None:
    """The shape whose template fits best, if it fits well, has edges, and is alone."""
    chosen = np.unique(np.linspace(0, len(fg.area) - 1, FIT_FRAMES).round().astype(int))
    mask, alpha, area = fg.mask[chosen], fg.alpha[chosen], fg.area[chosen]
    softness = ((alpha > 0.2) & (alpha < 0.8)).sum((1, 2)) / area
    if np.median(softness) > MAX_SOFTNESS or np.median(_second_blob(mask)) > MAX_SECOND_BLOB:
        return None
    # Shapes that no scene has compete too: a diamond is nearest to a diamond, and so is nothing.
    names = (*SHAPES, *OTHERS)
    scores = np.array([_overlap(name, mask, area, fg.centers[chosen]) for name in names])
    best, second = np.argsort(scores[: len(SHAPES)])[::-1][:2]
    lead = scores[best] - scores[second]
    if scores.argmax() != best or scores[best] < MIN_SHAPE_IOU or lead < MIN_SHAPE_LEAD:
        return None
    return SHAPES[best]


def _second_blob(mask: np.ndarray) -> np.ndarray:
    """Mass of the second largest connected blob over that of the largest, [n]."""
    from scipy import ndimage  # Not for who only samples from a run with this evaluator.

    ratios = np.zeros(len(mask))
    for k, frame in enumerate(mask):
        # SciPy has no stubs, and the checker sees the result of a call with `output` here.
        labels, count = ndimage.label(frame > 0.5)  # pyright: ignore[reportGeneralTypeIssues]
        if count > 1:
            masses = np.sort(ndimage.sum(frame, labels, np.arange(1, count + 1)))
            ratios[k] = masses[-2] / masses[-1]
    return ratios


def _bar(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.minimum(r - abs(x), 0.56 * r - abs(y))


# Shapes that no scene has: depth inside the outline in px (x, y from the centre, radius r), half extent
# in radii and area in radii squared.
OTHERS = {
    "diamond": (lambda x, y, r: (1.25 * r - abs(x) - abs(y)) / np.sqrt(2), 1.25, 3.125),
    "wide ellipse": (lambda x, y, r: r - np.hypot(x / 1.15, y * 1.15), 1.15, np.pi),
    "tall ellipse": (lambda x, y, r: r - np.hypot(x * 1.15, y / 1.15), 1.15, np.pi),
    "fat cross": (lambda x, y, r: np.maximum(_bar(x, y, r), _bar(y, x, r)), 1.0, 3.23),
}


def _overlap(shape: str, mask: np.ndarray, area: np.ndarray, centers: np.ndarray) -> float:
    """Mean over frames of the best soft intersection over union with templates of one shape.

    Templates start at the measured area and centroid; the radius is searched by 10 %, then the
    place by 0.4 px. mask [n, h, w], area [n], centers [n, 2].
    """
    extent, size = (EXTENTS[shape], AREAS[shape]) if shape in SHAPES else OTHERS[shape][1:]
    radius = np.sqrt(area / size)
    x, y = centers.T
    if shape == "triangle":
        # Its centroid lies two thirds down from the apex, a third of the extent below the centre.
        y = y - EXTENTS[shape] * radius / 3
    half = int(np.ceil(1.1 * extent * radius.max())) + 2
    corner = np.floor(np.stack([x, y], 1)).astype(int)
    padded = np.pad(mask, ((0, 0), (half, half), (half, half)))
    span = np.arange(2 * half)
    rows = np.clip(corner[:, 1, None] + span, 0, padded.shape[1] - 1)
    cols = np.clip(corner[:, 0, None] + span, 0, padded.shape[2] - 1)
    window = padded[np.arange(len(mask))[:, None, None], rows[:, :, None], cols[:, None, :]]
    x, y = x - corner[:, 0] + half, y - corner[:, 1] + half

    scales = np.array([0.9, 0.95, 1.0, 1.05, 1.1])[:, None]
    scores = _iou(shape, window, area, x + 0 * scales, y + 0 * scales, radius * scales)
    radius = radius * scales[scores.argmax(0), 0]
    dy, dx = (d.reshape(-1, 1) for d in np.meshgrid([-0.4, 0, 0.4], [-0.4, 0, 0.4]))
    scores = _iou(shape, window, area, x + dx, y + dy, radius + 0 * dx)
    return float(scores.max(0).mean())


def _iou(
    shape: str, window: np.ndarray, area: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray
) -> np.ndarray:
    """Soft intersection over union [k, n] of k templates a frame; window [n, s, s], x, y, r [k, n].

    ``area`` is that of the whole frame, so that mass outside the window counts against the fit.
    """
    side = window.shape[1]
    if shape in SHAPES:
        template = coverage(shape, x.ravel(), y.ravel(), r.ravel(), side, side)
    else:
        at = np.arange(side) + 0.5
        rows, cols = (at - y.reshape(-1, 1))[:, :, None], (at - x.reshape(-1, 1))[:, None, :]
        depth = OTHERS[shape][0](cols + 0 * rows, rows + 0 * cols, r.reshape(-1, 1, 1))
        template = np.clip(0.5 + depth, 0, 1)
    template = np.clip(2 * template - 0.5, 0, 1).reshape(*x.shape, side, side)
    both = np.minimum(template, window).sum((-2, -1))
    return both / (template.sum((-2, -1)) + area - both)
