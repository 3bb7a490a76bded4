"""Solvers against closed forms, and the noise levels that they visit.

If data is Gaussian, N(m, d^2), the posterior mean of x0 and the flow are known: at a level of the path
x is N(alpha m, v) with v = alpha^2 d^2 + sigma^2, and the flow keeps each point at the same number of
standard deviations from the mean. Everything is float64, so that the solver's error is measured.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import PathConfig
from dit_jax.diffusion.paths import Estimate, level
from dit_jax.diffusion.solvers import (
    SOLVERS,
    SolverConfig,
    noise_levels,
    start,
    start_history,
    step,
)

MEAN, DEVIATION = 0.7, 0.4
STRAIGHT, CHAIN = PathConfig(), PathConfig("ddpm")
BOTH = pytest.mark.parametrize("path", [STRAIGHT, CHAIN], ids=lambda path: path.kind)
ORDERS = {"euler": 1, "heun": 2, "ddim": 1, "dpmpp_2m": 2, "unipc": 2}
MULTISTEP = ("dpmpp_2m", "unipc")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian(path, caps, x, t, mean=MEAN, deviation=DEVIATION) -> Estimate:
    """The prediction of a perfect network for Gaussian data: the posterior means of x0 and eps."""
    at = level(path, jnp.minimum(t, caps)[..., None])
    variance = at.alpha**2 * deviation**2 + at.sigma**2
    apart = x - at.alpha * mean
    x0 = mean + at.alpha * deviation**2 / jnp.maximum(variance, 1e-18) * apart
    eps = at.sigma / jnp.maximum(variance, 1e-18) * apart
    return Estimate(x0, eps, None if path.discrete else eps - x0, jnp.zeros_like(x))


def gaussian_flow(path: PathConfig, x: np.ndarray, t: np.ndarray, end: np.ndarray | float):
    """Where the exact flow takes x from time t ``[b, l]`` to time ``end``."""
    now, then = level(path, jnp.asarray(t)[..., None]), level(path, jnp.asarray(end, jnp.float64))

    def deviation(at):
        return jnp.sqrt(at.alpha**2 * DEVIATION**2 + at.sigma**2)

    return np.asarray(then.alpha * MEAN + deviation(then) / deviation(now) * (x - now.alpha * MEAN))


def points(path: PathConfig, caps: list[float], count: int = 5):
    """Tokens ``[1, l, count]`` at their noise caps, and the caps ``[1, l]``."""
    rng = np.random.default_rng(0)
    levels = np.array([caps])
    clean = MEAN + DEVIATION * rng.normal(size=(*levels.shape, count))
    eps = rng.normal(size=clean.shape)
    return np.asarray(start(path, *map(jnp.asarray, (clean, eps, levels)))), levels


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_step(config, path, data, caps, x, history, t, t_next, i):
    noise = functools.partial(jax.random.normal, jax.random.key(i), x.shape, x.dtype)
    denoiser = functools.partial(gaussian, path, caps, mean=data[0], deviation=data[1])
    return step(config, path, caps, denoiser, x, history, t, t_next, noise)


def run(name, path, x, caps, levels, data=(MEAN, DEVIATION), dtype=jnp.float64):
    """Every x of a solver over a schedule."""
    config, mean = SolverConfig(name), np.broadcast_to(data[0], x.shape[-1:])
    x, caps, levels, *data = (jnp.asarray(a, dtype) for a in (x, caps, levels, mean, data[1]))
    history, out = start_history(name, x, levels[0]), [x]
    for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        x, history = one_step(config, path, data, caps, x, history, t, t_next, i)
        out.append(x)
    return np.asarray(out)


# --- exactness ---


def smooth(path, high, low):
    """Levels between two, even in log(alpha / sigma)."""
    grid = np.linspace(0, 1, 1001)[1:]
    ends = np.interp([high, low], grid, table := np.asarray(level(path, jnp.asarray(grid)).logsnr))
    return lambda k: np.interp(np.linspace(*ends, k + 1), table[::-1], grid[::-1])


@BOTH
@pytest.mark.parametrize("name", ORDERS)
def test_the_order_between_two_levels(name, path):
    """Without the ends, at which log(alpha / sigma) is infinite, there is nothing but the order; the
    corrector of unipc adds one to it (Zhao et al. 2023, theorem 3.1)."""
    levels, errors = smooth(path, 0.9, 0.1), []
    x, _ = points(path, [float(levels(32)[0])] * 4)
    for steps in (128, 256) if name in MULTISTEP else (64, 128):
        times = levels(steps)
        end = gaussian_flow(path, x, np.full(x.shape[:2], times[0]), times[-1])
        errors.append(np.abs(run(name, path, x, np.ones(x.shape[:2]), times)[-1] - end).max())
    order = np.log2(errors[0] / errors[1])
    np.testing.assert_allclose(order, 3 if name == "unipc" else ORDERS[name], atol=0.15)


@BOTH
@pytest.mark.parametrize("name", ORDERS)
def test_constant_predictions_are_reached_in_any_number_of_steps(name, path):
    x, caps = points(path, [1.0, 0.6, 0.3, 0.1])
    for steps in (1, 3):
        levels = np.linspace(1, 0, steps + 1)
        out = run(name, path, x, caps, levels, (np.arange(5.0), 0.0))[-1]
        np.testing.assert_allclose(out[0], [np.arange(5.0)] * 4, atol=1e-13)  # float64


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_counted(name):
    x, caps = map(jnp.asarray, points(STRAIGHT, [1.0]))
    calls = []

    def denoiser(x, t):
        calls.append(t)
        return gaussian(STRAIGHT, caps, x, t)

    def one(x, t, t_next):
        history, noise = start_history(name, x, t), functools.partial(jnp.zeros_like, x)
        return step(SolverConfig(name), STRAIGHT, caps, denoiser, x, history, t, t_next, noise)

    jax.eval_shape(one, x, jnp.float64(0.8), jnp.float64(0.4))
    assert len(calls) == SOLVERS[name].evaluations


@pytest.mark.parametrize(("name", "path"), [("euler", STRAIGHT), ("unipc", CHAIN)])
def test_float32_is_enough(name, path):
    """50 steps of float32, soft tokens among them, end where those of float64 do."""
    # 0.1 is within rounding of a level, at which the token shall not take a step of no length.
    x, caps = points(path, [1.0, 0.5, 0.1, 0.01])
    levels = np.linspace(1, 0, 51)
    assert 0 < min(abs(levels - 0.1)) < 1e-15
    exact = run(name, path, x, caps, levels)[-1]
    out = run(name, path, x, caps, levels, dtype=jnp.float32)[-1]
    assert out.dtype == jnp.float32
    # 50 roundings of numbers of some units, 1e-7 each.
    np.testing.assert_allclose(out, exact, atol=1e-5)


# --- solvers that take noise ---


@pytest.mark.parametrize(
    ("path", "config"),
    [
        (CHAIN, SolverConfig("ddpm", "fixed_small")),
        (CHAIN, SolverConfig("ddpm", "fixed_large")),
        (CHAIN, SolverConfig("ddpm", "learned_range")),
        (CHAIN, SolverConfig("ddim", eta=1.0)),
        (STRAIGHT, SolverConfig("ddpm", "fixed_small")),
        (STRAIGHT, SolverConfig("ddim", eta=0.5)),
        (STRAIGHT, SolverConfig("sde", strength=0.5)),
        (STRAIGHT, SolverConfig("euler")),
    ],
    ids=lambda value: getattr(value, "kind", getattr(value, "name", value)),
)
def test_noisy_solvers_sample_the_mean_and_the_variance_of_data(path, config):
    """Every step is x' = a x + b + c noise, so that both follow exactly from steps of x = 0 and 1."""

    def moves(t, t_next):
        x, noise, caps = jnp.array([[[0.0, 1, 0]]]), jnp.array([[[0.0, 0, 1]]]), jnp.ones((1, 1))
        denoiser = functools.partial(gaussian, path, caps)
        return step(config, path, caps, denoiser, x, (), t, t_next, lambda: noise)[0][0, 0]

    levels = jnp.linspace(1, 0, 401)
    mean, variance, kept = 0.0, 1.0, 1.0
    for zero, one, noisy in np.asarray(jax.jit(jax.vmap(moves))(levels[:-1], levels[1:])):
        mean, variance = (
            (one - zero) * mean + zero,
            (one - zero) ** 2 * variance + (noisy - zero) ** 2,
        )
        kept *= one - zero
    # 400 steps leave some 0.006, which is of order 1 (0.023 for 100 steps of the smallest variance).
    assert abs(mean - MEAN) < 0.01 and abs(variance - DEVIATION**2) < 0.01
    # Noise makes points independent of where they began: their correlation with it.
    low, high = {"euler": (0.999, 1.01), "sde": (-0.6, 0.6)}.get(config.name, (-0.1, 0.1))
    assert config.eta == 0.5 or low < kept / variance**0.5 < high


# --- noise caps ---

EVERY = [(name, path) for name in SOLVERS for path in (STRAIGHT, CHAIN)]
EVERY.remove(("sde", CHAIN))  # The chain has no dx/dt.


@pytest.mark.parametrize(("name", "path"), EVERY, ids=lambda v: getattr(v, "kind", v))
def test_conditioning_tokens_never_move_and_soft_ones_wait(name, path):
    x, caps = points(path, [0.0, 1.0, 0.5, 0.3])
    levels = np.linspace(1, 0, 6)
    out = run(name, path, x, caps, levels)
    assert np.isfinite(out).all() and np.array_equal(out[-1, 0, 0], x[0, 0])
    for before, after, t_next in zip(out[:-1], out[1:], levels[1:], strict=True):
        waits = caps[0] <= t_next
        assert waits[0] and not waits[1]
        # Bit for bit.
        assert np.array_equal(before[0, waits], after[0, waits])
        assert (before != after)[0, ~waits].any(-1).all()


@BOTH
@pytest.mark.parametrize("name", ORDERS)
def test_soft_tokens_follow_the_flow_from_their_cap(name, path):
    # Caps between two levels of the schedule are the starts of shorter first steps.
    x, caps = points(path, [0.5, 0.3, 0.05, 1.0])
    out = run(name, path, x, caps, np.linspace(1, 0, 257))
    # The error of 256 steps; near data the chain's steps are wider in log(alpha / sigma).
    atol = {1: 1e-2, 2: 2e-3 if path.discrete else 3e-4}[ORDERS[name]]
    np.testing.assert_allclose(out[-1], gaussian_flow(path, x, caps, 0.0), atol=atol)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_late_token_of_a_multistep_solver_takes_a_first_order_step(name):
    """At the level of its cap it has no history: as if the schedule began there."""
    x, caps = points(STRAIGHT, [0.5] * 4)
    late = run(name, STRAIGHT, x, caps, [1.0, 0.8, 0.5, 0.3, 0.1, 0.0])
    assert np.array_equal(late[2:], run(name, STRAIGHT, x, caps, [0.5, 0.3, 0.1, 0.0]))


def test_a_solver_starts_at_the_caps():
    clean, eps = np.ones((1, 3, 2)), np.full((1, 3, 2), -1.0)
    arrays = jnp.asarray(clean), jnp.asarray(eps), jnp.array([[0.0, 0.25, 1.0]])
    assert start(STRAIGHT, *arrays)[0].tolist() == [[1, 1], [0.5, 0.5], [-1, -1]]
    # A schedule that begins lower finds soft tokens there; generated ones are always pure noise.
    assert start(STRAIGHT, *arrays, 0.125)[0, :, 0].tolist() == [1, 0.75, -1]
    assert start(CHAIN, *arrays)[0, 2].tolist() == [-1, -1]


# --- noise levels ---


def test_linear_levels():
    levels = noise_levels(STRAIGHT, "linear", 30, 0.3)
    assert levels.dtype == np.float32 and levels[0] == 1.0 and levels[-1] == 0.0
    t = np.linspace(1, 0, 31)
    np.testing.assert_allclose(levels, 0.3 * t / (1 - 0.7 * t), rtol=1e-6)  # float32
    assert noise_levels(STRAIGHT, "linear", 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert noise_levels(STRAIGHT, "linear", 2, 3.0).tolist() == [1.0, 0.75, 0.0]
    # A shorter last step, as SiT's: 250 levels down to it, and 0.
    levels = noise_levels(STRAIGHT, "linear", 250, last=0.04)
    np.testing.assert_allclose(levels, np.append(np.linspace(1, 0.04, 250), 0), rtol=1e-6)


# By hand; and 250 of 1000 as the code of DiT respaces them, one index after another, a fraction at a
# time (Nichol & Dhariwal 2021).
@pytest.mark.parametrize(
    ("spacing", "steps", "indices"),
    [
        ("trailing", 3, [999, 666, 332]),
        ("linspace", 4, [999, 666, 333, 0]),
        ("trailing", 1000, list(range(999, -1, -1))),
        ("linspace", 250, [round(i * 999 / 249) for i in reversed(range(250))]),
    ],
)
def test_indices_of_the_chain(spacing, steps, indices):
    levels = noise_levels(CHAIN, spacing, steps)
    assert levels.dtype == np.float32 and levels[-1] == 0
    np.testing.assert_allclose(levels[:-1] * 1000 - 1, indices, atol=1e-4)  # float32 of 1000
