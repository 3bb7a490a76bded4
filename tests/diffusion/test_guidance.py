"""Guidance: each form by hand, over segments packed side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.solvers import GuidanceConfig, guide

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]], np.int32)  # two and padding
CHANNELS, DIM = 4, 8
RNG = np.random.default_rng(0)
WITH_TEXT, WITHOUT = RNG.normal(size=(2, *SEGMENTS.shape, DIM)).astype(np.float32)
WITH_TEXT[SEGMENTS == 0] *= 1e6  # what a network predicts for padding may be anything


def guided(config, t=0.5, conditional=WITH_TEXT, unconditional=WITHOUT):
    arrays = map(jnp.asarray, (conditional, unconditional, np.float32(t)))
    return np.asarray(guide(config, *arrays, channels=CHANNELS))


def test_guidance_extrapolates_from_the_unconditional():
    with_text, without = np.ones_like(WITH_TEXT), np.ones_like(WITH_TEXT)
    with_text[..., 0], with_text[..., 1] = 3.0, -1.0
    for scale, expected in ((0.0, [1, 1]), (1.0, [3, -1]), (0.5, [2, 0]), (4.0, [9, -7])):
        out = guided(GuidanceConfig(scale), 0.5, with_text, without)
        assert out[0, 0, :2].tolist() == expected


def test_only_the_first_channels_are_guided():
    whole, part = guided(GuidanceConfig(3.0)), guided(GuidanceConfig(3.0, cfg_channels=3))
    # A token is (t, h, w, c): every fourth number is of the fourth channel.
    fourth = np.arange(DIM) % CHANNELS == 3
    assert np.array_equal(part[..., fourth], WITH_TEXT[..., fourth])
    assert np.array_equal(part[..., ~fourth], whole[..., ~fourth])


@pytest.mark.parametrize("t", [0.2, 0.21, 0.8, 0.81])
def test_guidance_has_an_interval(t):
    config = GuidanceConfig(3.0, cfg_interval=(0.2, 0.8))
    inside = 0.2 < t <= 0.8
    assert config.guided_at(t) == inside
    out = guided(config, t=np.float32(t) if t != 0.8 else np.nextafter(np.float32(0.8), 0))
    assert np.array_equal(out, guided(GuidanceConfig(3.0)) if inside else WITH_TEXT)
    assert not GuidanceConfig(1.0).guided_at(t)


def test_a_segments_guidance_does_not_depend_on_its_neighbours():
    config, other = GuidanceConfig(3.0), SEGMENTS == 2
    before = guided(config)
    after = guided(config, 0.5, np.where(other[..., None], 9 * WITH_TEXT, WITH_TEXT))
    assert np.array_equal(before[~other], after[~other])
    assert (before[other] != after[other]).any()


def test_no_dtype_is_promoted_silently():
    with jax.numpy_dtype_promotion("strict"):
        assert guided(GuidanceConfig(3.0, 3, (0.1, 0.9))).dtype == np.float32
