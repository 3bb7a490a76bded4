"""Paths against closed forms, predictions from each other, and the times of training."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from dit_jax.config import check_types
from dit_jax.diffusion import PathConfig, TimeConfig
from dit_jax.diffusion.paths import (
    alphas_cumprod,
    betas,
    clean_and_noise,
    interpolate,
    level,
    on_grid,
    prediction_of,
    resolution_shift,
    sample_time,
    shift_time,
    velocity_of,
)

STRAIGHT, CHAIN = PathConfig(), PathConfig("ddpm")
ZERO = PathConfig("ddpm", betas="scaled_linear", zero_terminal_snr=True)
PATHS = pytest.mark.parametrize("path", [STRAIGHT, CHAIN, ZERO], ids=["straight", "chain", "zero"])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# --- paths ---


@PATHS
def test_the_ends_are_exact(path):
    at = level(path, jnp.array([0.0, 1.0], jnp.float32))
    assert at.sigma[0] == 0 and at.alpha[0] == 1 and np.isposinf(at.logsnr[0])
    if path.ends_in_noise:
        assert at.alpha[1] == 0 and at.sigma[1] == 1 and np.isneginf(at.logsnr[1])
    else:
        assert 0 < at.alpha[1] < 0.01 and at.sigma[1] > 0.9999


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"betas": "scaled_linear"}, {"beta_schedule": "scaled_linear"}),
        ({"betas": "cosine"}, {"beta_schedule": "squaredcos_cap_v2"}),
        (
            {"zero_terminal_snr": True, "timesteps": 50},
            {"rescale_betas_zero_snr": True, "num_train_timesteps": 50},
        ),
    ],
)
def test_betas_are_those_of_diffusers(ours, theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", reason="no second implementation")
        scheduler = diffusers.DDPMScheduler(**theirs)
    path = PathConfig("ddpm", **ours)
    np.testing.assert_allclose(betas(path), scheduler.betas.numpy(), rtol=1e-4, atol=5e-7)
    # A product of up to 1000 numbers near 1 in float32.
    kept = scheduler.alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(path), kept, rtol=1e-4, atol=1e-9)


def test_betas_by_hand():
    short = functools.partial(PathConfig, "ddpm", timesteps=3, beta_start=0.1, beta_end=0.3)
    path, zero = short(), short(zero_terminal_snr=True)
    np.testing.assert_allclose(betas(path), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(alphas_cumprod(path), [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7])
    root = np.sqrt([0.9, 0.72, 0.504])
    expected = (root - root[2]) * root[0] / (root[0] - root[2])
    np.testing.assert_allclose(alphas_cumprod(zero), expected**2, atol=1e-15)
    assert betas(zero)[-1] == 1


@pytest.mark.parametrize(
    ("path", "dtype", "rtol"), [(CHAIN, "float32", 2e-6), (ZERO, "float64", 1e-10)]
)
def test_the_chain_at_its_indices_and_between(path, dtype, rtol, float64):
    kept = alphas_cumprod(path)
    at = level(path, jnp.asarray((np.arange(1000) + 1) / 1000, dtype))
    assert at.alpha.dtype == dtype
    np.testing.assert_allclose(at.alpha, np.sqrt(kept), rtol=rtol)
    np.testing.assert_allclose(at.sigma, np.sqrt(1 - kept), rtol=rtol)
    inside = kept > 0
    logsnr = 0.5 * np.log(kept[inside] / (1 - kept[inside]))
    np.testing.assert_allclose(at.logsnr[inside], logsnr, atol=2e-6)
    kept = np.append(1.0, kept)
    at = level(path, jnp.array([500.25, 0.5]) / 1000)
    expected = 0.75 * kept[500] + 0.25 * kept[501], (1 + kept[1]) / 2
    np.testing.assert_allclose(np.square(at.alpha), expected, rtol=1e-12)
    np.testing.assert_allclose(at.alpha**2 + at.sigma**2, 1, rtol=1e-12)


def test_times_are_rounded_to_the_grid():
    t = jnp.array([1e-7, 0.0004, 0.001, 0.0014, 0.99991, 1.0])
    up, down = (on_grid(CHAIN, t, up) for up in (True, False))
    np.testing.assert_allclose(up * 1000, [1, 1, 1, 2, 1000, 1000], rtol=1e-6)
    np.testing.assert_allclose(down * 1000, [0, 0, 1, 1, 999, 1000], rtol=1e-6)
    assert on_grid(STRAIGHT, t, True) is t


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timesteps": 1}, "timesteps is 1"),
        ({"beta_start": 0.0}, "path.beta_start is 0.0"),
        ({"beta_end": 1.0}, "path.beta_end is 1.0"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr is True.*'rectified_flow'"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_types(PathConfig(**fields), "x")


# --- predictions ---


def kinds(path):
    return ("x0", "eps", "v") if path.discrete else ("x0", "eps", "v", "velocity")


@PATHS
def test_every_prediction_gives_back_x0_and_eps(path, float64):
    x0, eps = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3)))
    t = jnp.array([0.001, 0.05, 0.2, 0.4, 0.613, 0.9, 0.999])
    xt = interpolate(path, x0, eps, t)
    for kind in kinds(path):
        output = prediction_of(path, kind, x0, eps, t)
        clean, noise = clean_and_noise(path, kind, output, xt, t)
        # float64 divided by alpha or sigma, of 1e-3 and more.
        np.testing.assert_allclose(clean, x0, atol=1e-9, err_msg=kind)
        np.testing.assert_allclose(noise, eps, atol=1e-9, err_msg=kind)
        if not path.discrete:
            velocity = velocity_of(path, kind, output, xt, t)
            np.testing.assert_allclose(velocity, eps - x0, rtol=1e-7, atol=1e-7, err_msg=kind)


def test_predictions_by_hand():
    x0, eps, t = jnp.array([[1.0, 2.0]]), jnp.array([[-1.0, 0.5]]), jnp.array([0.25])
    for kind, expected in (("velocity", [-2.0, -1.5]), ("v", [-0.75 - 0.25, 0.375 - 0.5])):
        assert prediction_of(STRAIGHT, kind, x0, eps, t).tolist() == [expected]


def test_the_velocity_of_x0_has_a_floor():
    x0, eps = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    t = np.array([1.0, 0.7, 0.3, 0.1, 0.05, 0.0], np.float32)
    xt = (x0 + t[:, None].astype(np.float64) * (eps - x0)).astype(np.float32)
    velocity = velocity_of(STRAIGHT, "x0", *map(jnp.asarray, (x0, xt, t)), floor=0.1)
    # float32 divided by at least 0.1; below the floor it falls with t, and is zero at t = 0.
    expected = (eps - x0) * np.array([1, 1, 1, 1, 0.5, 0])[:, None]
    np.testing.assert_allclose(velocity, expected, atol=1e-5)
    assert not velocity[5].any()


@PATHS
def test_no_dtype_is_promoted_silently(path, float64):
    def everything(x, t):
        out = [clean_and_noise(path, kind, x, x, t) for kind in kinds(path)]
        out += [prediction_of(path, kind, x, x, t) for kind in kinds(path)]
        return [*out, level(path, t), on_grid(path, t, True)]

    for dtype in ("float32", "float64"):
        with jax.numpy_dtype_promotion("strict"):
            x, t = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 2), (1,)))
            out = jax.eval_shape(everything, x, t)
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(dtype)}


# --- times ---


@pytest.mark.parametrize("r", [0.2, 12.0])
def test_the_shift_keeps_the_ends_and_the_order(r):
    t = np.linspace(0, 1, 101)
    shifted = shift_time(t, r)
    assert shifted[0] == 0.0 and (np.diff(shifted) > 0).all()
    np.testing.assert_allclose(shifted[-1], 1.0, rtol=1e-15)  # r / (1 + (r - 1)) in float64
    # The inverse of a shift is the shift by its inverse: float64, grown at most by r or 1 / r.
    np.testing.assert_allclose(shift_time(shifted, 1 / r), t, atol=1e-14)
    # It multiplies the odds.
    assert shift_time(np.array([0.5, 0.25]), 3.0).tolist() == [0.75, 0.5]


def test_the_resolution_shift_is_the_root_of_the_ratio():
    config = TimeConfig(shift=1.5, reference_tokens=256)
    shift = resolution_shift(config, np.array([[256, 1024], [64, 0]], np.int32))
    assert shift.dtype == jnp.float32
    # The tokens of an empty slot count as one.
    np.testing.assert_allclose(shift, [[1.5, 3.0], [0.75, 1.5 / 16]], rtol=1e-6)
    np.testing.assert_allclose(resolution_shift(config, np.int64(576)), 2.25, rtol=1e-6)
    plain = resolution_shift(TimeConfig(shift=2.0), np.array([1, 10, 10**6]))
    assert plain.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("config", "r"),
    [
        (TimeConfig("uniform", shift=3.0), 3.0),
        (TimeConfig("logit_normal", mean=-0.5, std=1.5, shift=0.5), 0.5),
        (TimeConfig("logit_normal", shift=1.5, reference_tokens=100), 3.0),
    ],
)
def test_times_have_the_distribution_of_their_config(config, r):
    count = 20_000
    sample = jax.jit(jax.vmap(functools.partial(sample_time, config), (0, None)))
    keys = jax.random.split(jax.random.key(0), count)
    times = np.sort(np.asarray(sample(keys, np.int32(400)), np.float64))
    assert 0 < times[0] and times[-1] <= 1
    cdf = shift_time(times, 1 / r)
    if config.distribution == "logit_normal":
        cdf = ndtr((np.log(cdf / (1 - cdf)) - config.mean) / config.std)
    steps = np.arange(count + 1) / count
    distance = max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())
    # Kolmogorov and Smirnov: passed by chance less often than once in 10^4 (2.23 / sqrt(n)).
    assert distance < 2.23 / count**0.5
    # And the test is sharp enough to tell a shift of 10%.
    assert np.abs(cdf - shift_time(cdf, 1 / 1.1)).max() > 0.02
