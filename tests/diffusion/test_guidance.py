"""Guidance: each form by hand, over segments packed side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dit_jax.diffusion import GuidanceConfig, classifier_free, guide
from dit_jax.diffusion.guidance import deviation, optimised_scale, segment_sum

# Two segments and padding; the last token of the first is given.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]], np.int32)
TAU = np.array([[0.5, 0.5, 0.0, 0.5, 0.5, 0.5], [0.5] * 6], np.float32)
COUNTED = (SEGMENTS > 0) & (TAU > 0)
CHANNELS, DIM = 4, 8


def fields() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    with_text, without = rng.normal(size=(2, *SEGMENTS.shape, DIM)).astype(np.float32)
    # What a network says of given tokens and padding may be anything.
    with_text[~COUNTED] *= 1e6
    return with_text, without


def guided(config, t=0.5, conditional=None, unconditional=None, segments=2):
    given = fields()
    arrays = (
        (given[0] if conditional is None else conditional),
        (given[1] if unconditional is None else unconditional),
    )
    run = functools.partial(guide, config, segments=segments, channels=CHANNELS)
    return np.asarray(
        run(
            *map(jnp.asarray, arrays),
            jnp.float32(t),
            jnp.asarray(TAU),
            jnp.asarray(SEGMENTS),
        )
    )


def each_segment():
    """(row, which tokens) of each segment, those that are to be made."""
    for row in range(2):
        for segment in (1, 2):
            yield row, (SEGMENTS[row] == segment) & (TAU[row] > 0)


# --- the plain form ---


def test_guidance_extrapolates_from_the_unconditional():
    with_text, without = jnp.array([[[3.0, -1.0]]]), jnp.array([[[1.0, 1.0]]])
    for scale, expected in ((0.0, [1, 1]), (1.0, [3, -1]), (0.5, [2, 0]), (4.0, [9, -7])):
        assert classifier_free(with_text, without, scale)[0, 0].tolist() == expected


def test_scale_one_is_unguided_and_zero_is_without_text():
    with_text, without = (
        np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32) for seed in (0, 1)
    )
    arrays = jnp.asarray(with_text), jnp.asarray(without)
    # u + 1 (c - u) is c but for float32.
    np.testing.assert_allclose(classifier_free(*arrays, 1.0), with_text, atol=1e-6)
    assert np.array_equal(classifier_free(*arrays, 0.0), without)
    # Where text makes no difference, no scale does.
    assert np.array_equal(classifier_free(arrays[0], arrays[0], 7.5), with_text)


def test_without_options_it_is_the_plain_form():
    with_text, without = fields()
    plain = classifier_free(jnp.asarray(with_text), jnp.asarray(without), 3.0)
    assert np.array_equal(guided(GuidanceConfig(3.0)), plain)


# --- channels ---


def test_only_the_first_channels_are_guided():
    with_text, _ = fields()
    whole, part = guided(GuidanceConfig(3.0)), guided(GuidanceConfig(3.0, channels=3))
    # A token is (t, h, w, c): every fourth number is of the fourth channel.
    fourth = np.arange(DIM) % CHANNELS == 3
    assert np.array_equal(part[..., fourth], with_text[..., fourth])
    assert np.array_equal(part[..., ~fourth], whole[..., ~fourth])
    assert np.array_equal(guided(GuidanceConfig(3.0, channels=4)), whole)
    with pytest.raises(ValueError, match="cfg_channels is 5, and the model's patches have 4"):
        guided(GuidanceConfig(3.0, channels=5))


# --- the interval ---


@pytest.mark.parametrize("t", [0.1, 0.2, 0.21, 0.5, 0.8, 0.81, 1.0])
def test_guidance_has_an_interval(t):
    config = GuidanceConfig(3.0, interval=(0.2, 0.8))
    inside = 0.2 < t <= 0.8
    assert config.guided_at(t) == inside
    found = guided(config, t=np.float32(t) if t != 0.8 else np.nextafter(np.float32(0.8), 0))
    wanted = guided(GuidanceConfig(3.0)) if inside else fields()[0]
    assert np.array_equal(found, wanted)
    assert not GuidanceConfig(1.0).guided_at(t)


# --- rescale ---


def test_rescale_by_hand():
    with_text, without = fields()
    plain = without + 5.0 * (with_text - without)
    whole, half = (guided(GuidanceConfig(5.0, rescale=phi)) for phi in (1.0, 0.5))
    for row, made in each_segment():
        ratio = with_text[row, made].std() / plain[row, made].std()
        # float32 sums.
        np.testing.assert_allclose(whole[row, made], plain[row, made] * ratio, rtol=1e-4)
        wanted = plain[row, made] * (0.5 * ratio + 0.5)
        np.testing.assert_allclose(half[row, made], wanted, rtol=1e-4)
        np.testing.assert_allclose(whole[row, made].std(), with_text[row, made].std(), rtol=1e-4)


def test_the_deviation_of_each_segment_is_its_own():
    with_text, _ = fields()
    args = jnp.asarray(COUNTED), jnp.asarray(SEGMENTS)
    found = np.asarray(deviation(jnp.asarray(with_text), *args, segments=2))
    for row, made in each_segment():
        np.testing.assert_allclose(found[row, made], with_text[row, made].std(), rtol=1e-4)


# --- CFG-Zero* ---


def test_the_optimised_scale_by_hand():
    with_text, without = fields()
    found = guided(GuidanceConfig(3.0, zero_star=True))
    scales = np.asarray(
        optimised_scale(
            *map(jnp.asarray, (with_text, without, COUNTED, SEGMENTS)),
            segments=2,
        )
    )
    for row, made in each_segment():
        c, u = (a[row, made].astype(np.float64).ravel() for a in (with_text, without))
        scale = (c @ u) / (u @ u)
        np.testing.assert_allclose(scales[row, made], scale, rtol=1e-4)
        # What it minimises: the distance of the scaled unconditional from the conditional.
        distance = [np.square(c - s * u).sum() for s in (scale, scale + 1e-3, scale - 1e-3)]
        assert distance[0] < min(distance[1:])
        wanted = scale * u + 3.0 * (c - scale * u)
        np.testing.assert_allclose(found[row, made].ravel(), wanted, rtol=1e-3, atol=1e-4)


def test_an_unconditional_velocity_of_zero_is_no_division_by_it():
    with_text, without = fields()
    found = guided(GuidanceConfig(3.0, zero_star=True, rescale=0.7), unconditional=0 * without)
    assert np.isfinite(found).all()
    zero = guided(GuidanceConfig(3.0, rescale=1.0), 0.5, 0 * with_text, 0 * without)
    assert not zero.any()


def test_a_segments_guidance_does_not_depend_on_its_neighbours():
    config = GuidanceConfig(3.0, rescale=0.7, zero_star=True)
    with_text, without = fields()
    before = guided(config)
    other = SEGMENTS == 2
    after = guided(config, 0.5, np.where(other[..., None], 9 * with_text, with_text), without)
    mine = (SEGMENTS == 1) & (TAU > 0)
    assert np.array_equal(before[mine], after[mine])
    assert (before[other] != after[other]).any()


def test_sums_are_over_segments():
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    found = segment_sum(jnp.asarray(values), jnp.asarray(SEGMENTS), 2)
    assert found.tolist() == [[3, 3, 3, 7, 7, 0], [13, 13, 38, 38, 38, 38]]


# --- errors ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": -1.0}, "sampling.cfg_scale is -1.0: it is at least 0"),
        ({"channels": 0}, "sampling.cfg_channels is 0: guide at least 1"),
        ({"interval": (0.5, 0.5)}, r"sampling.cfg_interval is \(0.5, 0.5\)"),
        ({"interval": (0.0, 1.5)}, r"sampling.cfg_interval is \(0.0, 1.5\)"),
        ({"rescale": 1.1}, "sampling.cfg_rescale is 1.1"),
        ({"zero_init": -1}, "sampling.cfg_zero_init is -1"),
    ],
)
def test_nonsense_guidance_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**fields)


def test_no_dtype_is_promoted_silently():
    config = GuidanceConfig(3.0, 3, (0.1, 0.9), 0.7, True)
    with jax.numpy_dtype_promotion("strict"):
        assert guided(config).dtype == np.float32


def test_a_wrong_shape_is_caught():
    with pytest.raises(TypeCheckError, match="parameter 'unconditional'"):
        classifier_free(jnp.zeros((2, 3, 4)), jnp.zeros((1, 3, 4)), 2.0)
