"""Resizing against averages by hand; cropping and mirroring exactly."""

import numpy as np
import pytest

from dit_jax.data import TransformConfig, crop
from dit_jax.data.records import centre, flip, resized

RNG = np.random.default_rng(0)


def clip(t, h, w):
    return RNG.integers(0, 256, (t, h, w, 3), np.uint8)


def test_what_is_left_as_it_is():
    video, latents = clip(2, 5, 7), np.ones((1, 5, 5, 4), np.float32)
    assert crop(TransformConfig(), video) is video
    assert crop(TransformConfig(crop=2), latents) is latents
    # What is left over falls on both sides.
    assert np.array_equal(centre(video, 4, 4), video[:, 0:4, 1:5])


def test_halving_averages():
    video = clip(2, 16, 24)
    means = video.reshape(2, 8, 2, 12, 2, 3).astype(float).mean((2, 4))
    # The scaler works in fixed point, and through another layout of the colours.
    assert np.abs(resized(video, 8, 12) - means).max() <= 2


@pytest.mark.parametrize(("h", "w"), [(50, 70), (70, 50), (20, 64), (32, 32)])
def test_a_crop_is_the_square_in_the_middle(h, w):
    out = crop(TransformConfig(crop=32), clip(2, h, w))
    assert out.shape == (2, 32, 32, 3) and out.dtype == np.uint8
    # A ramp from left to right stays one, and its middle in the middle.
    ramp = np.broadcast_to((np.arange(w) * (255 / (w - 1))).astype(np.uint8)[:, None], (1, h, w, 3))
    made = crop(TransformConfig(crop=32), ramp)[0, 16, :, 0].astype(int)
    assert (np.diff(made) >= -1).all() and made[31] > made[0]
    assert abs(made[15] + made[16] - 255) <= 8


def test_half_of_the_clips_are_mirrored():
    video = clip(1, 2, 3)
    made = [
        flip({"video": video, "caption": "a", "fps": 1.0}, np.random.default_rng(i))["video"]
        for i in range(400)
    ]
    mirrored = sum(np.array_equal(x, video[:, :, ::-1]) for x in made)
    assert sum(np.array_equal(x, video) for x in made) == 400 - mirrored
    assert 150 < mirrored < 250  # five standard deviations of a fair coin
