"""The straight path, the shift of times, and the distributions that training draws from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy.special import ndtr

from dit_jax.diffusion import PathConfig, TimeConfig, resolution_shift
from dit_jax.diffusion.paths import interpolate
from dit_jax.diffusion.predictions import velocity_of
from dit_jax.diffusion.times import draw_time, shift_time

STRAIGHT = PathConfig()
SHIFTS = (0.2, 0.5, 1.0, 1.7, 3.0, 12.0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- the path ---


def test_the_path_leads_from_data_to_noise(jit):
    x0, eps = normal(3, 5, 4), normal(3, 5, 4, seed=1)
    t = np.array([[0, 1, 0.25, 0.5, 0.9]] * 3, np.float32)
    xt = np.asarray(jit(interpolate, static_argnums=0)(STRAIGHT, x0, eps, t))
    # At the ends bit for bit: 1 x + 0 y.
    assert np.array_equal(xt[:, 0], x0[:, 0]) and np.array_equal(xt[:, 1], eps[:, 1])
    expected = x0 + t[..., None].astype(np.float64) * (eps - x0)
    np.testing.assert_allclose(xt, expected, atol=1e-6)  # float32


def test_the_velocity_of_true_data_is_that_of_the_path(jit):
    x0, eps = normal(6, 4), normal(6, 4, seed=1)
    t = np.array([1.0, 0.7, 0.3, 0.1, 0.05, 0.0], np.float32)
    xt = (x0 + t[:, None].astype(np.float64) * (eps - x0)).astype(np.float32)
    velocity_from_x0 = jit(functools.partial(velocity_of, STRAIGHT, "x0", floor=0.1))
    velocity = np.asarray(velocity_from_x0(x0, xt, t))
    # float32 divided by at least 0.1.
    np.testing.assert_allclose(velocity[:4], (eps - x0)[:4], atol=1e-5)
    # Below the floor of 0.1 it falls with t, and is zero at t = 0.
    np.testing.assert_allclose(velocity[4], 0.5 * (eps - x0)[4], atol=1e-5)
    assert not velocity[5].any()


# --- the shift ---


@pytest.mark.parametrize("r", SHIFTS)
def test_the_shift_keeps_the_ends_and_the_order(r):
    t = np.linspace(0, 1, 1001)
    shifted = shift_time(t, r)
    assert shifted[0] == 0.0
    np.testing.assert_allclose(shifted[-1], 1.0, rtol=1e-15)  # r / (1 + (r - 1)) in float64
    assert (np.diff(shifted) > 0).all()
    assert ((shifted[1:-1] > t[1:-1]) == (r > 1)).all() or r == 1


@pytest.mark.parametrize("r", SHIFTS)
def test_the_inverse_of_a_shift_is_the_shift_by_its_inverse(r):
    t = np.linspace(0, 1, 101)
    # float64, grown at most by r or 1 / r.
    np.testing.assert_allclose(shift_time(shift_time(t, r), 1 / r), t, atol=1e-14)
    np.testing.assert_allclose(shift_time(shift_time(t, r), 2.0), shift_time(t, 2 * r), atol=1e-14)


def test_the_shift_multiplies_the_odds():
    assert shift_time(np.array([0.5, 0.25]), 3.0).tolist() == [0.75, 0.5]
    assert np.array_equal(shift_time(np.linspace(0, 1, 11), 1.0), np.linspace(0, 1, 11))


def test_arrays_stay_of_their_kind():
    assert isinstance(shift_time(np.ones(2), 2.0), np.ndarray)
    assert isinstance(shift_time(jnp.ones(2), 2.0), jax.Array)


def test_the_resolution_shift_is_the_root_of_the_ratio():
    counts = np.array([[256, 1024], [64, 0]], np.int32)
    config = TimeConfig(shift=1.5, reference_tokens=256)
    shift = resolution_shift(config, counts)
    assert shift.dtype == jnp.float32
    # The tokens of an empty slot count as one.
    np.testing.assert_allclose(shift, [[1.5, 3.0], [0.75, 1.5 / 16]], rtol=1e-6)
    np.testing.assert_allclose(resolution_shift(config, np.int64(576)), 2.25, rtol=1e-6)


def test_without_a_reference_every_size_has_one_shift():
    shift = resolution_shift(TimeConfig(shift=2.0), np.array([1, 10, 10**6]))
    assert shift.tolist() == [2.0, 2.0, 2.0]


# --- draws ---

DRAWS = 20_000


def unshifted(t: np.ndarray, r: float) -> np.ndarray:
    return t / (r - (r - 1) * t)


@pytest.mark.parametrize(
    ("config", "tokens", "r"),
    [
        (TimeConfig("uniform"), 1, 1.0),
        (TimeConfig("uniform", shift=3.0), 1, 3.0),
        (TimeConfig("logit_normal"), 1, 1.0),
        (TimeConfig("logit_normal", mean=-0.5, std=1.5, shift=0.5), 1, 0.5),
        (TimeConfig("logit_normal", shift=1.5, reference_tokens=100), 400, 3.0),
    ],
)
def test_times_have_the_distribution_that_the_config_says(config, tokens, r, jit):
    draw = jit(jax.vmap(functools.partial(draw_time, config), (0, None)))
    keys = jax.random.split(jax.random.key(0), DRAWS)
    times = np.sort(np.asarray(draw(keys, np.int32(tokens)), np.float64))
    assert 0 < times[0] and times[-1] <= 1
    before = unshifted(times, r)
    if config.distribution == "uniform":
        cdf = before
    else:
        cdf = ndtr((np.log(before / (1 - before)) - config.mean) / config.std)
    steps = np.arange(DRAWS + 1) / DRAWS
    distance = max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())
    # Kolmogorov and Smirnov: passed by chance less often than once in 10^4 (2.23 / sqrt(n)).
    assert distance < 2.23 / DRAWS**0.5
    # And the test is sharp enough to tell a shift of 10%.
    assert np.abs(cdf - unshifted(cdf, 1.1)).max() > 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shift": 0.0}, "time.shift 0.0"),
        ({"std": -1.0}, "time.std -1.0"),
        ({"reference_tokens": 0}, "time.reference_tokens is 0"),
    ],
)
def test_nonsense_times_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TimeConfig(**fields)


def test_a_wrong_shape_or_kind_is_caught():
    x = jnp.zeros((2, 3))
    with pytest.raises(TypeCheckError, match="parameter 't'"):
        interpolate(STRAIGHT, x, x, jnp.zeros(3))
    with pytest.raises(TypeCheckError, match="parameter 'eps'"):
        interpolate(STRAIGHT, x, jnp.zeros((2, 4)), jnp.zeros(2))
    with pytest.raises(TypeCheckError, match="parameter 'x0'"):
        interpolate(STRAIGHT, jnp.zeros((2, 3), jnp.int32), x, jnp.zeros(2))
    with pytest.raises(TypeCheckError, match="parameter 't'"):
        shift_time([0.5], 2.0)
