"""Moving shapes: what is drawn is what is said, by measurement of the pixels."""

import dataclasses
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dit_jax.config import check_types
from dit_jax.data.shapes import (
    COLORS,
    DIRECTIONS,
    EXTENTS,
    MIN_SPEED,
    NEVER_WHITE,
    RADII,
    SHAPES,
    SIZES,
    STEPS,
    Scene,
    ShapesConfig,
    caption,
    coverage,
    held_out_combinations,
    held_out_scenes,
    render,
)
from dit_jax.evaluate.judge import AREAS

STILL = Scene("circle", "red", "big", None, 1, 32, 32, 16.0, 16.0, 0.0, 7.5, 0.1)


def triple(scene):
    return scene.color, scene.shape, scene.direction


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_equals_supersampling_and_sums_to_the_area(shape):
    at = (np.arange(32 * 16) + 0.5) / 16 - 16.2
    y, x = at[:, None], at[None, :]
    r, e = 6.4, 6.4 * EXTENTS.get(shape, 0)
    inside = {
        "circle": lambda: x**2 + y**2 < r**2,
        "square": lambda: (abs(x) < e) & (abs(y) < e),
        "triangle": lambda: (2 * abs(x) - y < e) & (y < e),
        "cross": lambda: (np.maximum(abs(x), abs(y)) < e) & (np.minimum(abs(x), abs(y)) < 0.36 * e),
    }[shape]()
    exact = inside.reshape(32, 16, 32, 16).mean((1, 3))
    drawn = coverage(shape, np.array([16.2]), np.array([16.2]), r, 32, 32)[0]
    # 1/16 px of sampling in the exact one; a straight edge's distance is not quite its area.
    straight = shape in ("square", "cross")
    assert np.abs(exact - drawn).max() < (0.07 if straight else 0.26)
    assert np.abs(exact - drawn).mean() < 0.004 and drawn.min() == 0 and drawn.max() == 1
    # The distance-based shapes miss some of the area at corners.
    np.testing.assert_allclose(drawn.sum(), AREAS[shape] * r**2, rtol=1e-5 if straight else 0.02)


def test_caption_and_colours():
    assert caption(STILL) == "a big red circle"
    moving = dataclasses.replace(STILL, direction="left", frames=5, speed=1.0)
    assert caption(moving) == "a big red circle moves left"
    frame = render(STILL)[0]
    assert frame.dtype == np.uint8
    assert tuple(frame[16, 16]) == COLORS["red"]
    assert tuple(frame[0, 0]) == (26, 26, 26)  # 0.1 of 255, rounded


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_motion_is_subpixel_and_exact(direction):
    scene = dataclasses.replace(STILL, direction=direction, frames=9, speed=0.65, shade=0.0)
    alpha = render(scene)[..., 0] / 235
    mass = alpha.sum((1, 2))
    x = (alpha.sum(1) * (np.arange(32) + 0.5)).sum(1) / mass
    y = (alpha.sum(2) * (np.arange(32) + 0.5)).sum(1) / mass
    dx, dy = STEPS[direction]
    # Eight-bit rounding moves the centroid by about 0.01 px.
    np.testing.assert_allclose(x, 16 + dx * 0.65 * np.arange(9), atol=0.02)
    np.testing.assert_allclose(y, 16 + dy * 0.65 * np.arange(9), atol=0.02)


def test_examples_stay_inside_and_within_ranges():
    source = ShapesConfig(seed=5)
    counts = Counter()
    for i in range(1500):
        scene = source.scene(i)
        video = render(scene)
        assert video.shape == (scene.frames, scene.height, scene.width, 3)
        background = round(255 * scene.shade)
        edges = [video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]]
        ring = np.concatenate(edges, axis=1).astype(int)
        # A margin of 0.25 px leaves the outermost pixels at most three quarters covered.
        assert np.abs(ring - background).max() / max(COLORS[scene.color]) < 0.8
        low, high = RADII[scene.size]
        assert low <= scene.radius <= high and 0 <= scene.shade <= 0.2
        if scene.direction:
            assert MIN_SPEED <= scene.speed <= 1.5
            assert (scene.height, scene.width) in source.sizes
        else:
            assert scene.frames == 1 and (scene.height, scene.width) in source.image_sizes
        for field in ("shape", "color", "size", "direction", "frames"):
            counts[getattr(scene, field)] += 1
    assert set(counts) == {*SHAPES, *COLORS, *SIZES, *DIRECTIONS, None, 1, 5, 9, 13}
    assert 0.12 < counts[None] / 1500 < 0.18
    assert min(counts[c] for c in COLORS) > 180 and min(counts[s] for s in SHAPES) > 300


def test_sizes_never_overlap_in_area():
    areas = {size: [AREAS[s] * r**2 for s in SHAPES for r in RADII[size]] for size in SIZES}
    assert max(areas["small"]) < 0.75 * min(areas["big"])


def test_held_out_is_balanced_and_never_in_training():
    held_out = set(held_out_combinations())
    assert len(held_out) == 12 == len(held_out_combinations())
    for position, words, times in ((0, COLORS, 2), (1, SHAPES, 3), (2, DIRECTIONS, 3)):
        assert Counter(t[position] for t in held_out) == dict.fromkeys(words, times)
    train = ShapesConfig(seed=1)
    seen = Counter(triple(train.scene(i)) for i in range(4000))
    assert not held_out & set(seen)
    assert len([t for t in seen if t[2]]) == 84
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs = {(t[a], t[b]) for t in seen if t[2]}
        assert len(pairs) == {(0, 1): 24, (0, 2): 24, (1, 2): 16}[a, b]
    test = ShapesConfig(seed=1, split="held_out")
    assert {triple(test.scene(i)) for i in range(300)} == held_out


def test_held_out_scenes_cover_evenly():
    scenes = held_out_scenes(48, seed=0)
    assert Counter((triple(s), s.size) for s in scenes) == {
        (t, size): 2 for t in held_out_combinations() for size in SIZES
    }
    assert scenes == held_out_scenes(48, seed=0) != held_out_scenes(48, seed=1)
    assert scenes[:5] == held_out_scenes(5, seed=0)
    other = held_out_scenes(2, seed=0, frames=5, height=24, width=40)[1]
    assert (other.frames, other.height, other.width) == (5, 24, 40)


def test_deterministic_by_index_in_any_order_thread_and_process():
    source = ShapesConfig(seed=7)
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(source.__getitem__, range(40)))
    for i in reversed(range(40)):
        again = copy[np.int64(i)]
        np.testing.assert_array_equal(parallel[i]["video"], again["video"])
        assert parallel[i]["caption"] == again["caption"] and again["fps"] == 8.0
    other = ShapesConfig(seed=8)
    assert [other.scene(i) for i in range(9)] != [source.scene(i) for i in range(9)]
    assert len({source.scene(i) for i in range(500)}) == 500
    few = ShapesConfig(num_examples=3)
    assert len(few) == 3 == len(list(few))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": 0}, "num_examples is 0"),
        ({"sizes": ((16, 32),)}, "16x32"),
        ({"frames": (5, 33)}, "33.94"),
        ({"frames": (1, 5)}, "frames"),
        ({"frames": ()}, r"frames=\(\)"),
        ({"image_sizes": ((16, 16),)}, "16x16"),
        ({"image_fraction": 1.5}, "image_fraction is 1.5"),
        ({"speeds": (0.4, 1.0)}, "speeds.* is 0.4"),
        ({"speeds": (1.0, 0.9)}, r"\(1.0, 0.9\)"),
        ({"split": "test"}, "test"),
    ],
)
def test_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_types(ShapesConfig(**changes))


def test_sizes_of_held_out_scenes_are_refused():
    for changes, message in (({"frames": 1}, "frames=1"), ({"height": 16}, "16x32")):
        with pytest.raises(ValueError, match=message):
            held_out_scenes(4, seed=0, **changes)


def offsets(scenes) -> np.ndarray:
    """How far the middles of paths lie from the middle of the frame."""
    middles = [[c.mean() for c in s.centers()] for s in scenes]
    return np.abs(np.array(middles) - [[s.width / 2, s.height / 2] for s in scenes])


def test_paths_and_speeds_are_within_their_ranges():
    near, far = (
        offsets([ShapesConfig(jitter=jitter, frames=(5,)).scene(i) for i in range(300)]).max()
        for jitter in (1.5, None)
    )
    assert 1.4 < near <= 1.5 + 1e-9 and far > 6
    config = ShapesConfig(speeds=(0.5, 0.6), anywhere=0.5, image_fraction=0, sizes=((48, 48),))
    speeds = [config.scene(i).speed for i in range(60)]
    assert 0.5 <= min(speeds) < 0.52 and 0.58 < max(speeds) <= 0.6


def test_a_share_of_the_paths_lies_anywhere():
    """The others are those of the same seed without."""
    near, mixed = (
        ShapesConfig(jitter=0.0, image_fraction=0, frames=(5,), anywhere=share)
        for share in (0.0, 0.4)
    )
    moved = [i for i in range(400) if mixed.scene(i) != near.scene(i)]
    assert 0.33 < len(moved) / 400 < 0.47
    assert offsets([mixed.scene(i) for i in moved]).max() > 5


def test_a_share_of_the_clips_is_white():
    """In all else the clips are those without, and a quarter of the pairs is kept for prompts."""
    old, new = (ShapesConfig(seed=4, white=share) for share in (0.0, 0.5))
    scenes = [(old.scene(i), new.scene(i)) for i in range(600)]
    white = [b for _, b in scenes if b.color == "white"]
    assert all(dataclasses.replace(b, color=a.color) == a for a, b in scenes)
    pairs = {(s.shape, s.direction) for s in white}
    every = {(s, d) for s in SHAPES for d in DIRECTIONS}
    assert pairs == every - set(NEVER_WHITE) and len(NEVER_WHITE) == 4
    may = [b for _, b in scenes if (b.shape, b.direction) in pairs]
    assert 0.43 < len(white) / len(may) < 0.57
    video = render(white[0])
    assert (video.max((0, 1, 2)) == 240).all() and "white" in caption(white[0])
