"""Paths against closed forms, and what a network may predict, each told by each other."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import PathConfig
from dit_jax.diffusion.paths import alphas_cumprod, betas, index_of, level, on_grid, rates
from dit_jax.diffusion.predictions import (
    clean_and_noise,
    eps_of_score,
    prediction_of,
    score_of,
    squared_error_factor,
    velocity_of,
)

PATHS = {kind: PathConfig(kind) for kind in ("rectified_flow", "gvp", "vp", "ddpm")}
CONTINUOUS = ("rectified_flow", "gvp", "vp")
ZERO = PathConfig("ddpm", betas="scaled_linear", zero_terminal_snr=True)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# --- paths ---


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_interpolants_are_the_published_ones(kind, float64):
    t = np.linspace(0.01, 0.99, 31)
    alpha, sigma = {
        "rectified_flow": (1 - t, t),
        "gvp": (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)),
        "vp": (np.exp(-0.25 * 19.9 * t**2 - 0.05 * t),) * 2,
    }[kind]
    if kind == "vp":
        sigma = np.sqrt(1 - alpha**2)
    at = level(PATHS[kind], jnp.asarray(t))
    np.testing.assert_allclose(at.alpha, alpha, rtol=1e-12)
    np.testing.assert_allclose(at.sigma, sigma, rtol=1e-10)
    np.testing.assert_allclose(at.logsnr, np.log(alpha / sigma), rtol=1e-9, atol=1e-10)
    by = rates(PATHS[kind], jnp.asarray(t))
    ahead, back = (level(PATHS[kind], jnp.asarray(t + h)) for h in (1e-6, -1e-6))
    # Central differences: h^2 of the third derivative, which grows near data for vp.
    np.testing.assert_allclose(by.alpha, (ahead.alpha - back.alpha) / 2e-6, atol=1e-7)
    np.testing.assert_allclose(by.sigma, (ahead.sigma - back.sigma) / 2e-6, rtol=1e-6, atol=1e-7)
    wronskian = at.alpha * by.sigma - at.sigma * by.alpha
    np.testing.assert_allclose(by.wronskian, wronskian, rtol=1e-10)


@pytest.mark.parametrize("path", [*PATHS.values(), ZERO], ids=lambda p: p.kind)
def test_the_ends_are_exact(path):
    at = level(path, jnp.array([0.0, 1.0], jnp.float32))
    assert at.sigma[0] == 0 and at.alpha[0] == 1
    if path.ends_in_noise:
        assert at.alpha[1] == 0 and at.sigma[1] == 1 and np.isneginf(at.logsnr[1])
    else:
        assert 0 < at.alpha[1] < 0.01 and at.sigma[1] > 0.9999


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (PathConfig("ddpm"), {"beta_schedule": "linear"}),
        (
            PathConfig("ddpm", betas="scaled_linear", beta_start=0.00085, beta_end=0.012),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (PathConfig("ddpm", betas="cosine"), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            PathConfig("ddpm", zero_terminal_snr=True),
            {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
        ),
        (PathConfig("ddpm", timesteps=50), {"num_train_timesteps": 50}),
    ],
)
def test_betas_are_those_of_diffusers(ours, theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", reason="no second implementation")
        made = diffusers.DDPMScheduler(**theirs)
    np.testing.assert_allclose(betas(ours), made.betas.numpy(), rtol=1e-4, atol=5e-7)  # 1 - float32
    kept = made.alphas_cumprod.numpy()
    # A product of up to 1000 numbers near 1 in float32.
    np.testing.assert_allclose(alphas_cumprod(ours), kept, rtol=1e-4, atol=1e-9)


def test_betas_by_hand():
    path = PathConfig("ddpm", timesteps=3, beta_start=0.1, beta_end=0.3)
    np.testing.assert_allclose(betas(path), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(alphas_cumprod(path), [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7])
    zero = PathConfig("ddpm", timesteps=3, beta_start=0.1, beta_end=0.3, zero_terminal_snr=True)
    root = np.sqrt([0.9, 0.72, 0.504])
    wanted = (root - root[2]) * root[0] / (root[0] - root[2])
    np.testing.assert_allclose(alphas_cumprod(zero), wanted**2, atol=1e-15)
    assert betas(zero)[-1] == 1


def test_the_chain_at_its_indices_and_between(float64):
    path = PATHS["ddpm"]
    kept = alphas_cumprod(path)
    at = level(path, (jnp.arange(1000.0) + 1) / 1000)
    np.testing.assert_allclose(at.alpha, np.sqrt(kept), rtol=1e-10)
    np.testing.assert_allclose(at.sigma, np.sqrt(1 - kept), rtol=1e-10)
    # Between: log(sigma / alpha) is linear in the index; below the first the ratio itself is.
    ratios = np.sqrt((1 - kept) / kept)
    between = level(path, jnp.array([500.25, 0.5]) / 1000)
    ratio = np.asarray(between.sigma / between.alpha)
    wanted = ratios[499] ** 0.75 * ratios[500] ** 0.25, ratios[0] / 2
    np.testing.assert_allclose(ratio, wanted, rtol=1e-10)
    np.testing.assert_allclose(between.alpha**2 + between.sigma**2, 1, rtol=1e-12)
    # Towards no signal at all alpha / sigma is.
    kept = alphas_cumprod(ZERO)
    top = level(ZERO, jnp.array([999.5]) / 1000)
    np.testing.assert_allclose(top.alpha / top.sigma, 0.5 * np.sqrt(kept[-2] / (1 - kept[-2])))


def test_float32_levels_are_those_of_their_indices():
    t = ((np.arange(1000) + 1) / 1000).astype(np.float32)
    path = PATHS["ddpm"]
    assert np.array_equal(index_of(path, jnp.asarray(t)), np.arange(1000))
    at = level(path, jnp.asarray(t))
    np.testing.assert_allclose(at.alpha, np.sqrt(alphas_cumprod(path)), rtol=2e-6)  # float32 of 5
    np.testing.assert_allclose(at.sigma, np.sqrt(1 - alphas_cumprod(path)), rtol=2e-6)


def test_times_are_rounded_to_the_grid():
    t = jnp.array([1e-7, 0.0004, 0.001, 0.0014, 0.99991, 1.0])
    up, down = (on_grid(PATHS["ddpm"], t, up) for up in (True, False))
    np.testing.assert_allclose(up * 1000, [1, 1, 1, 2, 1000, 1000], rtol=1e-6)
    np.testing.assert_allclose(down * 1000, [0, 0, 1, 1, 999, 1000], rtol=1e-6)
    assert on_grid(PATHS["gvp"], t, True) is t


# --- predictions ---


def kinds(path):
    return ("x0", "eps", "v") if path.discrete else ("x0", "eps", "v", "velocity")


@pytest.mark.parametrize("path", [*PATHS.values(), ZERO], ids=lambda p: p.kind)
def test_every_prediction_gives_back_x0_and_eps(path, float64):
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.normal(size=(7, 3))) for _ in range(2))
    t = jnp.array([0.001, 0.05, 0.2, 0.4, 0.613, 0.9, 0.999])
    at = level(path, t).each()
    xt = at.alpha * x0 + at.sigma * eps
    for kind in kinds(path):
        output = prediction_of(path, kind, x0, eps, t)
        found = clean_and_noise(path, kind, output, xt, t)
        # float64 divided by alpha or sigma, of 1e-3 and more.
        np.testing.assert_allclose(found[0], x0, atol=1e-9, err_msg=kind)
        np.testing.assert_allclose(found[1], eps, atol=1e-9, err_msg=kind)
        if not path.discrete:
            wanted = prediction_of(path, "velocity", x0, eps, t)
            velocity = velocity_of(path, kind, output, xt, t)
            np.testing.assert_allclose(velocity, wanted, rtol=1e-7, atol=1e-7, err_msg=kind)


def test_predictions_by_hand(float64):
    x0, eps = jnp.array([[1.0, 2.0]]), jnp.array([[-1.0, 0.5]])
    t = jnp.array([0.25])
    straight = functools.partial(prediction_of, PATHS["rectified_flow"])
    assert straight("velocity", x0, eps, t).tolist() == [[-2.0, -1.5]]
    assert straight("v", x0, eps, t).tolist() == [[-0.75 - 0.25, 0.375 - 0.5]]
    assert straight("x0", x0, eps, t) is x0 and straight("eps", x0, eps, t) is eps
    # v is the velocity of the circle, but for how fast it is gone round.
    turn = prediction_of(PATHS["gvp"], "velocity", x0, eps, t) / (np.pi / 2)
    np.testing.assert_allclose(turn, prediction_of(PATHS["gvp"], "v", x0, eps, t), rtol=1e-12)


def test_the_score_is_the_gradient_of_the_density(float64):
    path, t = PATHS["vp"], jnp.array([0.3, 0.7])
    at = level(path, t).each()
    x0, xt = jnp.array([[0.5], [0.5]]), jnp.array([[0.1], [-0.4]])

    def density(x):
        return (-0.5 * ((x - at.alpha * x0) / at.sigma) ** 2).sum()

    eps = clean_and_noise(path, "x0", x0, xt, t)[1]
    score = score_of(path, eps, t)
    np.testing.assert_allclose(score, jax.grad(density)(xt), rtol=1e-12)
    np.testing.assert_allclose(eps_of_score(path, score, t), eps, rtol=1e-12)


@pytest.mark.parametrize("path", [*PATHS.values()], ids=lambda p: p.kind)
def test_the_errors_of_predictions_are_multiples_of_each_other(path, float64):
    """The factor of each, against the error of a wrong x0 told in its space at the same x_t."""
    t, xt = jnp.array([0.1, 0.5, 0.8]), jnp.array([[0.3], [1.0], [-0.7]])
    x0, wrong = jnp.array([[1.0], [0.2], [-0.4]]), jnp.array([[1.3], [-0.2], [0.1]])
    by = None if path.discrete else rates(path, t)
    for kind in kinds(path):
        told = []
        for guess in (x0, wrong):
            eps = clean_and_noise(path, "x0", guess, xt, t)[1]
            told.append(prediction_of(path, kind, guess, eps, t))
        factor = squared_error_factor(path, kind, level(path, t), by)[:, None]
        error = factor * (x0 - wrong) ** 2
        np.testing.assert_allclose((told[0] - told[1]) ** 2, error, rtol=1e-9, err_msg=kind)


def test_the_chain_has_no_velocity():
    x, t = jnp.zeros((2, 3)), jnp.ones(2)
    for call in (
        lambda: rates(PATHS["ddpm"], t),
        lambda: prediction_of(PATHS["ddpm"], "velocity", x, x, t),
        lambda: velocity_of(PATHS["ddpm"], "eps", x, x, t),
    ):
        with pytest.raises(ValueError, match="'ddpm' is discrete and has no velocity"):
            call()


@pytest.mark.parametrize("path", [*PATHS.values(), ZERO], ids=lambda p: p.kind)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_dtype_is_promoted_silently(path, dtype, float64):
    t, x = jnp.array([0.3], dtype), jnp.ones((1, 2), dtype)
    with jax.numpy_dtype_promotion("strict"):
        made = [clean_and_noise(path, kind, x, x, t) for kind in kinds(path)]
        made += [prediction_of(path, kind, x, x, t) for kind in kinds(path)]
        made += [level(path, t), score_of(path, x, t), on_grid(path, t, True)]
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timesteps": 1}, "path.timesteps is 1"),
        ({"beta_start": 0.0}, "path.beta_start 0.0 and beta_end 0.02"),
        ({"beta_end": 1.0}, "beta_end 1.0"),
        (
            {"zero_terminal_snr": True},
            "rescales the betas of ddpm, and path.kind is 'rectified_flow'",
        ),
    ],
)
def test_nonsense_paths_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PathConfig(**fields)
