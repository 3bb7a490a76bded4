"""The judge is exact on true clips, sturdy under mild damage, and strict with impostors."""

import numpy as np
import pytest
from scipy import ndimage

from dit_jax.data.shapes import COLORS, Scene, ShapesConfig, held_out_scenes, render
from dit_jax.evaluate.judge import Verdict, centroids, judge, prompt_following

REVERSED = {"left": "right", "right": "left", "up": "down", "down": "up", None: None}
SOURCE = ShapesConfig(seed=11)
AXIS = np.arange(32) - 15.5
Y, X = AXIS[:, None], AXIS[None, :]


def truth(scene):
    return Verdict(scene.color, scene.shape, scene.direction, scene.size)


def to_float(video):
    return video.astype(np.float32) / 127.5 - 1


def clip(alpha, color="red", frames=1, rgb=None):
    """A resting clip of a soft mask [32, 32] on black, float in [-1, 1]."""
    image = np.clip(alpha, 0, 1)[..., None] * np.array(rgb or COLORS[color]) / 127.5 - 1
    return np.repeat(image[None], frames, 0)


def disc(x, y, radius):
    return 0.5 + radius - np.hypot(X - x, Y - y)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        (SOURCE, 200),
        (ShapesConfig(split="held_out", seed=3), 40),
        (ShapesConfig(sizes=((64, 96),), frames=(2, 33), image_fraction=0, seed=2), 12),
        (ShapesConfig(white=1.0, seed=5), 40),
    ],
    ids=["every kind", "held out", "large, longest and shortest", "white"],
)
def test_exact_on_true_clips(source, count):
    scenes = [source.scene(i) for i in range(count)]
    assert not [s for s in scenes if judge(render(s)) != truth(s)]


def test_float_and_uint8_agree():
    for i in range(5):
        video = SOURCE[i]["video"]
        assert judge(to_float(video)) == judge(video)


@pytest.mark.parametrize(
    ("noise", "blur", "shape_share"),
    # The other words are always right; a blur of 1 px rounds small crosses and triangles off.
    [(0.05, 0.0, 1.0), (0.03, 0.7, 0.98), (0.03, 1.0, 0.6)],
)
def test_sturdy_under_noise_blur_and_a_wobbling_background(noise, blur, shape_share):
    rng = np.random.default_rng(0)
    right = []
    for i in range(60):
        scene = SOURCE.scene(i)
        video = ndimage.gaussian_filter(render(scene) / 255, (0, blur, blur, 0))
        wobble = ndimage.gaussian_filter(rng.normal(size=video.shape), (0, 4, 4, 0))
        video = video + 0.03 * wobble / wobble.std() + noise * rng.normal(size=video.shape)
        verdict, expected = judge(2 * video - 1), truth(scene)
        right.append(verdict.shape == expected.shape)
        # A shape that is not sure is None, never another.
        assert verdict.shape in (expected.shape, None)
        assert verdict._replace(shape=expected.shape) == expected
    assert np.mean(right) >= shape_share


def test_reversal_flips_the_direction_and_nothing_else():
    for i in range(30):
        scene = SOURCE.scene(i)
        expected = truth(scene)._replace(direction=REVERSED[scene.direction])
        assert judge(render(scene)[::-1]) == expected


def test_resting_diagonal_and_erratic_motion():
    scene = Scene("cross", "cyan", "big", None, 9, 32, 32, 16.0, 16.0, 0.0, 7.5)
    assert judge(render(scene)) == Verdict("cyan", "cross", "still", "big")
    assert prompt_following([render(scene)], [scene])["all"] == 1
    diagonal = np.concatenate([clip(disc(k - 4, k - 4, 4.5)) for k in range(9)])
    assert judge(diagonal) == Verdict("red", "circle", None, "small")
    places = np.random.default_rng(1).uniform(-10, 10, (9, 2))
    assert judge(np.concatenate([clip(disc(*p, 4.5)) for p in places])).direction is None


IMPOSTORS = {
    "gaussian 2": np.exp(-(X**2 + Y**2) / 8),
    "diamond": 0.5 - (abs(X) + abs(Y) - 9) / np.sqrt(2),
    "ellipse": 7.5 - np.hypot(X / 1.15, Y * 1.15),
    "triangle upside down": 0.5 - np.maximum((2 * abs(X) + Y - 8) / np.sqrt(5), -8 - Y),
    "ring": 2.5 - abs(np.hypot(X, Y) - 6),
    "half disc": 0.5 - np.maximum(np.hypot(X, Y) - 8, -Y),
    "thin cross": 0.5
    - np.minimum(np.maximum(abs(X) - 8, abs(Y) - 1.5), np.maximum(abs(X) - 1.5, abs(Y) - 8)),
    "letter T": 0.5
    - np.minimum(np.maximum(abs(X) - 2.5, abs(Y) - 7), np.maximum(abs(X) - 7, abs(Y + 4.5) - 2.5)),
    "a disc and a third": np.maximum(disc(-6, 0, 7), disc(9, 0, 4)),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_have_a_colour_but_no_shape(name):
    verdict = judge(clip(IMPOSTORS[name], frames=3))
    assert (verdict.color, verdict.shape) == ("red", None)


def test_two_colours_grey_and_between_colours_are_none():
    video = np.maximum(clip(disc(-7, 0, 5), "red"), clip(disc(7, 0, 5), "blue"))
    assert judge(video)._replace(direction=None, size=None) == Verdict()
    grey = clip(disc(0, 0, 7), rgb=(160, 160, 160))
    assert judge(grey) == Verdict(None, "circle", None, "big")
    orange = clip(disc(0, 0, 7), rgb=(235, 129, 30))
    assert judge(orange).color is None


def test_what_shows_nothing_is_nothing():
    for value in (0, 40, 255):
        assert judge(np.full((9, 32, 32, 3), value, np.uint8)) == Verdict()
    video = render(held_out_scenes(1, seed=0)[0]).copy()
    video[3:] = video[:, :1, :1][3:]  # missing from most frames
    assert judge(video) == Verdict()
    video = to_float(SOURCE[0]["video"])
    video[0, 3, 3, 0] = np.nan
    assert judge(video) == Verdict()


def test_noise_has_no_colour_and_no_shape():
    rng = np.random.default_rng(0)
    for k in range(10):
        smooth = ndimage.gaussian_filter(rng.normal(size=(5, 32, 32, 3)), (0, 3, 3, 0))
        assert judge(smooth / smooth.std() / 2).shape is None
        rough = judge(rng.uniform(-1, 1, (5 + k % 2, 32, 32, 3)))
        assert (rough.color, rough.shape) == (None, None)


def test_prompt_following_of_truth_blank_and_wrong_prompts():
    scenes = [s for s in (SOURCE.scene(i) for i in range(250)) if s.direction]
    videos = [render(s) for s in scenes]
    perfect = {"color": 1.0, "shape": 1.0, "direction": 1.0, "size": 1.0, "all": 1.0}
    assert prompt_following(videos[:50], scenes[:50]) == {**perfect, "n": 50}
    images = [s for s in (SOURCE.scene(i) for i in range(100)) if not s.direction]
    assert prompt_following([render(s) for s in images], images)["all"] == 1
    for blank in (np.zeros((9, 32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.uint8)):
        scores = prompt_following([blank] * 60, [*scenes[:30], *images[:10], *scenes[30:50]])
        assert scores == {**dict.fromkeys(perfect, 0.0), "n": 60}
    chance = prompt_following(videos, scenes[1:] + scenes[:1])
    # Four standard deviations at about 200 clips.
    for name, share in (("color", 1 / 6), ("shape", 1 / 4), ("direction", 1 / 4), ("size", 1 / 2)):
        margin = 4 * np.sqrt(share * (1 - share) / len(scenes))
        assert abs(chance[name] - share) < margin, name
    assert chance["all"] < 0.05


def test_refusals():
    scenes = held_out_scenes(2, seed=0)
    with pytest.raises(ValueError, match="1 videos for 2 scenes"):
        prompt_following([render(scenes[0])], scenes)
    with pytest.raises(ValueError, match="at least one"):
        prompt_following([], [])
    with pytest.raises(ValueError, match=r"shape \(32, 32, 3\)"):
        judge(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="dtype int64"):
        judge(np.zeros((1, 32, 32, 3), np.int64))


def test_centroids_follow_the_path():
    (scene,) = held_out_scenes(1, 0)
    clip = render(scene)
    steps = np.diff(centroids(clip), axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), scene.speed, atol=0.1)  # 8 bits
    assert np.isnan(centroids(np.zeros_like(clip))).all()
