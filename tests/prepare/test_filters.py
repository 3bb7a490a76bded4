"""Measures of made pictures against closed forms, their bounds, and near-duplicates."""

import cv2
import numpy as np
import pytest

from dit_jax.prepare import measuring as f
from dit_jax.prepare.clips import Rect
from dit_jax.prepare.duplicates import hashed_frames, near_duplicates, perceptual_hash
from dit_jax.prepare.measuring import FilterConfig, Rejection
from tests.prepare.made_media import moving

RNG = np.random.default_rng(0)


def grey(seed=0, height=96, width=128):
    return cv2.cvtColor(moving(1, height, width, seed=seed)[0], cv2.COLOR_RGB2GRAY)


def test_black_is_counted():
    image = np.full((10, 10), 17, np.uint8)
    image[:3] = 16
    assert f.black_part(image) == pytest.approx(0.3)


def test_sharpness_is_the_laplacians_variance_at_the_clips_size():
    # A checkerboard of +-a: the Laplacian is 8a at every inner pixel, and its sign alternates.
    board = (np.indices((64, 64)).sum(0) % 2 * 20 + 100).astype(np.uint8)
    assert f.sharpness(board, None) == pytest.approx((4 * 20) ** 2, rel=0.02)
    assert f.sharpness(board, 32 * 32) < 5  # Gone at half the size.
    image = grey(1, 240, 320)
    blurred = cv2.GaussianBlur(image, (0, 0), 4)
    assert f.sharpness(image, None) > 50 * f.sharpness(blurred, None)
    enlarged = cv2.resize(image, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    ratio = f.sharpness(enlarged, 240 * 320) / f.sharpness(image, 240 * 320)
    assert 0.5 < ratio < 1.5


def test_motion_is_in_diagonals_a_second():
    texture = cv2.GaussianBlur(RNG.integers(0, 256, (160, 200)).astype(np.uint8), (0, 0), 3)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    before, after = texture[20:92, 20:148], texture[18:90, 20:148]  # Two pixels down.
    assert f.motion(before, after, 25.0) == pytest.approx(2 * 25 / np.hypot(72, 128), rel=0.15)
    assert f.motion(before, before, 25.0) < 1e-3
    assert f.motion(before[:8], after[:8], 25.0) == 0.0


def framed(picture, height, width, top, left, level):
    image = np.full((height, width), level, np.uint8)
    image[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return image


STRIPES = np.full((180, 320), 120, np.uint8)
STRIPES[::7] = 200
NIGHT = np.tile(np.clip(np.arange(160) - 30, 0, 255), (120, 1))  # Brighter to the right.


@pytest.mark.parametrize(
    "image, expected",
    [
        (framed(STRIPES, 240, 320, 31, 0, 0), Rect(31, 0, 180, 320)),
        (framed(STRIPES, 180, 400, 0, 40, 10), Rect(0, 40, 180, 320)),
        (NIGHT, Rect(0, 0, 120, 160)),
        (np.zeros((40, 50)), Rect(0, 0, 40, 50)),
        (framed(np.full((119, 160), 100), 120, 160, 1, 0, 0), Rect(0, 0, 120, 160)),  # A dark line.
    ],
)
def test_bars_are_found_exactly_and_what_is_dark_and_no_bar_is_kept(image, expected):
    image = image.astype(np.uint8)
    assert f.picture_within(image.max(1), image.max(0)) == expected


@pytest.mark.parametrize(
    "scores, reason",
    [
        ({"side": 63.0}, "resolution"),
        ({"aspect": 4.5}, "aspect ratio"),
        ({"bars": 0.6}, "letterbox"),
        ({"black": 0.99}, "black"),
        ({"change": 0.01}, "static"),
        ({"motion": 0.0}, "no motion"),
        ({"motion": 9.0}, "too much motion"),
        ({"sharpness": 1.0}, "blur"),
    ],
)
def test_every_bound_rejects_with_its_score_and_can_be_off(scores, reason):
    good = {"side": 480.0, "aspect": 1.5, "bars": 0.0, "black": 0.1, "change": 2.0}
    good |= {"motion": 0.03, "sharpness": 100.0}
    assert f.verdict(good, FilterConfig()) is None
    found = f.verdict(good | scores, FilterConfig())
    (name, bound) = f.REJECTIONS[reason]
    assert found == Rejection(reason, scores[name], float(getattr(FilterConfig(), bound)))
    assert str(found).startswith(f"{reason}: ")
    assert f.verdict(good | scores, FilterConfig(**{bound: None})) is None


def altered(image):
    """The same picture smaller, noisier, brighter and compressed."""
    small = cv2.resize(image, (90, 70), interpolation=cv2.INTER_AREA)
    small = np.clip(small * 0.9 + 12 + RNG.normal(0, 4, small.shape), 0, 255).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    return cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE)


def test_hashes_survive_copying_and_tell_pictures_apart():
    images = [grey(seed) for seed in range(30)]
    hashes = [perceptual_hash(image) for image in images]
    copies = [perceptual_hash(altered(image)) for image in images]
    assert max((a ^ b).bit_count() for a, b in zip(hashes, copies, strict=True)) <= 6
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 12 and all(0 <= value < 1 << 64 for value in hashes)
    assert hashed_frames(1) == [0] and hashed_frames(81) == [10, 30, 50, 70]


def test_near_duplicates_are_those_of_all_pairs():
    base = RNG.integers(0, 1 << 63, (60, 4))
    clips = []
    for i in range(300):
        row = [int(x) for x in base[RNG.integers(60)]]
        for _ in range(RNG.integers(0, 40)):  # So many bits of the 256.
            row[RNG.integers(4)] ^= 1 << int(RNG.integers(64))
        clips.append((i, row))
    kept, expected = [], {}
    for key, row in clips:
        pairs = [
            (sum((a ^ b).bit_count() for a, b in zip(row, r, strict=True)) / 4, k) for k, r in kept
        ]
        near = [(k, d) for d, k in pairs if d <= 6]
        if near:
            expected[key] = near[0]
        else:
            kept.append((key, row))
    assert near_duplicates(clips, 6.0) == expected and len(expected) > 50


def test_images_are_not_compared_with_clips_and_equal_ones_are_of_the_first():
    clips = [("image", [5]), ("clip", [5, 5, 5, 5]), ("again", [4])]
    assert near_duplicates(clips, 7) == {"again": ("image", 1.0)}
    with pytest.raises(ValueError, match="below 8"):
        near_duplicates([], 8)
    clips = [("a", [0]), ("b", [0]), ("c", [7]), ("d", [1 << 63 | 0xFF << 20]), ("e", [7])]
    expected = {"b": ("a", 0.0), "c": ("a", 3.0), "e": ("a", 3.0)}
    assert near_duplicates(clips, 4.0) == expected
