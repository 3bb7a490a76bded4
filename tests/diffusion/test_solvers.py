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
from jaxtyping import TypeCheckError

from dit_jax.diffusion import PathConfig
from dit_jax.diffusion.paths import Estimate, alphas_cumprod, level
from dit_jax.diffusion.solvers import (
    SOLVERS,
    SolverConfig,
    interval,
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


def gaussian(path, caps, x, t) -> Estimate:
    """The prediction of a perfect network for Gaussian data: the posterior means of x0 and eps."""
    at = level(path, jnp.minimum(t, caps)[..., None])
    variance = at.alpha**2 * DEVIATION**2 + at.sigma**2
    apart = x - at.alpha * MEAN
    x0 = MEAN + at.alpha * DEVIATION**2 / variance * apart
    eps = at.sigma / variance * apart
    if path.discrete:
        return Estimate(x0, eps, None, jnp.zeros_like(x))
    return Estimate(x0, eps, eps - x0)


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


@pytest.fixture(scope="module")
def run(jit):
    """``run(solver, path, denoise, x, caps, levels)``: every x of the solver over a schedule."""

    @functools.cache
    def compiled(config, path, denoise):
        def one(x, history, caps, t, t_next, i):
            noise = functools.partial(jax.random.normal, jax.random.key(i), x.shape, x.dtype)
            denoiser = functools.partial(denoise, path, caps)
            return step(config, path, caps, denoiser, x, history, t, t_next, noise)

        return jit(one)

    def whole(solver, path, denoise, x, caps, levels, dtype=jnp.float64):
        config = solver if isinstance(solver, SolverConfig) else SolverConfig(solver)
        x, caps, levels = (jnp.asarray(a, dtype) for a in (x, caps, levels))
        history, out = start_history(config.name, x, levels[0]), [x]
        one = compiled(config, path, denoise)
        for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
            x, history = one(x, history, caps, t, t_next, i)
            out.append(x)
        return np.asarray(out)

    return whole


# --- exactness ---


def test_the_closed_form_is_one():
    """The flow's derivative is the velocity, by central differences."""
    x, t = points(STRAIGHT, [0.2, 0.5, 0.9])
    ahead, back = (gaussian_flow(STRAIGHT, x, t, t[..., None] + h) for h in (1e-5, -1e-5))
    velocity = gaussian(STRAIGHT, jnp.asarray(t), jnp.asarray(x), jnp.float64(1)).velocity
    # Central differences: h^2, and float64 over h.
    np.testing.assert_allclose((ahead - back) / 2e-5, velocity, atol=1e-7)


def orders_of(run, name, path, levels_of, x, caps, steps=(32, 64, 128)):
    """Orders of convergence by doubling steps, and the last error."""
    errors = []
    for levels in map(levels_of, steps):
        end = gaussian_flow(path, x, np.minimum(caps, levels[0]), float(levels[-1]))
        errors.append(np.abs(run(name, path, gaussian, x, caps, levels)[-1] - end).max())
    return np.log2(np.array(errors[:-1]) / errors[1:]), errors[-1]


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_convergence(run, name):
    x, caps = points(STRAIGHT, [1.0, 0.5, 0.25, 0.75])
    even = functools.partial(noise_levels, STRAIGHT, "linear")
    if name in MULTISTEP:
        # Their steps in log(alpha / sigma) do not shrink at the ends, which costs a logarithm.
        orders, error = orders_of(run, name, STRAIGHT, even, x, caps, (128, 256))
        assert 1.5 < orders[0] < 2.4
    else:
        orders, error = orders_of(run, name, STRAIGHT, even, x, caps)
        # The next term of the error is a step (1/64) against the leading one.
        np.testing.assert_allclose(orders, ORDERS[name], atol=0.15)
    assert error < {1: 2e-2, 2: 4e-4}[ORDERS[name]]


def smooth(path, high, low):
    """Levels between two, even in log(alpha / sigma)."""
    grid = np.linspace(0, 1, 1001)[1:]
    ends = np.interp([high, low], grid, table := np.asarray(level(path, jnp.asarray(grid)).logsnr))
    return lambda k: np.interp(np.linspace(*ends, k + 1), table[::-1], grid[::-1])


@BOTH
@pytest.mark.parametrize("name", ORDERS)
def test_the_order_between_two_levels(run, name, path):
    """Without the ends, at which log(alpha / sigma) is infinite, there is nothing but the order; the
    corrector of unipc adds one to it (Zhao et al. 2023, theorem 3.1)."""
    levels = smooth(path, 0.9, 0.1)
    x, _ = points(path, [float(levels(32)[0])] * 4)
    steps = (128, 256) if name in MULTISTEP else (64, 128)
    orders, _ = orders_of(run, name, path, levels, x, np.ones(x.shape[:2]), steps)
    np.testing.assert_allclose(orders, 3 if name == "unipc" else ORDERS[name], atol=0.15)


def constant(path, caps, x, t):
    """A network that always predicts the same clean patches."""
    at, x0 = level(path, jnp.minimum(t, caps)[..., None]), jnp.arange(5.0) + 0 * x
    eps = (x - at.alpha * x0) / jnp.maximum(at.sigma, 1e-9)
    velocity = None if path.discrete else eps - x0
    return Estimate(x0, eps, velocity, jnp.zeros_like(x))


@BOTH
@pytest.mark.parametrize("name", ORDERS)
def test_constant_predictions_are_reached_in_any_number_of_steps(run, name, path):
    x, caps = points(path, [1.0, 0.6, 0.3, 0.1])
    for steps in (1, 3):
        out = run(name, path, constant, x, caps, np.linspace(1, 0, steps + 1))[-1]
        np.testing.assert_allclose(out[0], [np.arange(5.0)] * 4, atol=1e-13)  # float64


def test_evaluations_are_counted():
    x, caps = map(jnp.asarray, points(STRAIGHT, [1.0]))
    for name, solver in SOLVERS.items():
        calls = []

        def denoiser(x, t, calls=calls):
            calls.append(t)
            return gaussian(STRAIGHT, caps, x, t)

        def one(x, t, t_next, name=name, denoiser=denoiser):
            history, noise = start_history(name, x, t), functools.partial(jnp.zeros_like, x)
            return step(SolverConfig(name), STRAIGHT, caps, denoiser, x, history, t, t_next, noise)

        jax.eval_shape(one, x, jnp.float64(0.8), jnp.float64(0.4))
        assert len(calls) == solver.evaluations, name
    assert SOLVERS.keys() == ORDERS.keys() | {"ddpm", "sde"}


@pytest.mark.parametrize("name", ORDERS)
def test_float32_is_enough(run, name):
    """50 steps of float32, soft tokens among them, end where those of float64 do."""
    path = CHAIN if name in MULTISTEP else STRAIGHT
    # 0.1 is within rounding of a level, at which the token shall not take a step of no length.
    x, caps = points(path, [1.0, 0.5, 0.1, 0.01])
    levels = np.linspace(1, 0, 51)
    assert 0 < min(abs(levels - 0.1)) < 1e-15
    exact = run(name, path, gaussian, x, caps, levels)[-1]
    out = run(name, path, gaussian, x, caps, levels, dtype=jnp.float32)[-1]
    assert out.dtype == jnp.float32
    # 50 roundings of numbers of some units, 1e-7 each.
    np.testing.assert_allclose(out, exact, atol=1e-5)


# --- solvers that take noise ---


@pytest.mark.parametrize(
    ("path", "config"),
    [
        (CHAIN, SolverConfig("ddpm", "fixed_small")),
        pytest.param(CHAIN, SolverConfig("ddpm", "fixed_large"), marks=pytest.mark.slow),
        (CHAIN, SolverConfig("ddpm", "learned_range")),
        (STRAIGHT, SolverConfig("ddpm", "fixed_small")),
        pytest.param(CHAIN, SolverConfig("ddim", eta=1.0), marks=pytest.mark.slow),
        (STRAIGHT, SolverConfig("ddim", eta=0.5)),
        (STRAIGHT, SolverConfig("sde", strength=0.5)),
    ],
    ids=lambda value: getattr(value, "kind", getattr(value, "name", value)),
)
def test_noisy_solvers_sample_the_mean_and_the_variance_of_data(path, config, run):
    x = np.random.default_rng(1).normal(size=(1, 1, 20_000))
    levels = np.linspace(1, 0, 401)
    out = run(config, path, gaussian, x, np.ones((1, 1)), levels)[-1]
    # 20000 points: 4 standard errors are 0.011 and 0.0065; 400 steps leave some 0.006 themselves, which
    # is of order 1 (0.023 for 100 steps of the smallest variance).
    assert abs(out.mean() - MEAN) < 0.011 + 0.01
    assert abs(out.var() - DEVIATION**2) < 0.0065 + 0.01


def test_noise_makes_points_independent_of_where_they_began(run):
    """Otherwise the test above would hold for solvers that take no noise at all."""
    x, levels = np.random.default_rng(1).normal(size=(1, 1, 20_000)), np.linspace(1, 0, 51)
    for name, low, high in (("euler", 0.999, 1.01), ("sde", -0.5, 0.5), ("ddpm", -0.1, 0.1)):
        end = run(name, STRAIGHT, gaussian, x, np.ones((1, 1)), levels)[-1]
        assert low < np.corrcoef(x.ravel(), end.ravel())[0, 1] < high


# --- noise caps ---

EVERY = [(name, path) for name in SOLVERS for path in (STRAIGHT, CHAIN)]
EVERY = [(name, path) for name, path in EVERY if not (name == "sde" and path.discrete)]


@pytest.mark.parametrize(("name", "path"), EVERY, ids=lambda v: getattr(v, "kind", v))
def test_conditioning_tokens_never_move_and_soft_ones_wait(name, path, run):
    x, caps = points(path, [0.0, 1.0, 0.5, 0.3])
    levels = np.linspace(1, 0, 6)
    config = SolverConfig(name, eta=0.5 * (name == "ddim"))
    out = run(config, path, gaussian, x, caps, levels)
    assert np.isfinite(out).all() and np.array_equal(out[-1, 0, 0], x[0, 0])
    for before, after, t_next in zip(out[:-1], out[1:], levels[1:], strict=True):
        waits = caps[0] <= t_next
        assert waits[0] and not waits[1]
        # Bit for bit.
        assert np.array_equal(before[0, waits], after[0, waits])
        assert (before != after)[0, ~waits].any(-1).all()


@BOTH
@pytest.mark.parametrize("name", ORDERS)
def test_soft_tokens_follow_the_flow_from_their_cap(run, name, path):
    # Caps between two levels of the schedule are the starts of shorter first steps.
    x, caps = points(path, [0.5, 0.3, 0.05, 1.0])
    out = run(name, path, gaussian, x, caps, np.linspace(1, 0, 257))
    # The error of 256 steps; near data the chain's steps are wider in log(alpha / sigma).
    atol = {1: 1e-2, 2: 2e-3 if path.discrete else 3e-4}[ORDERS[name]]
    np.testing.assert_allclose(out[-1], gaussian_flow(path, x, caps, 0.0), atol=atol)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_late_token_of_a_multistep_solver_takes_a_first_order_step(run, name):
    """At the level of its cap it has no history: as if the schedule began there."""
    x, caps = points(STRAIGHT, [0.5] * 4)
    late = run(name, STRAIGHT, gaussian, x, caps, [1.0, 0.8, 0.5, 0.3, 0.1, 0.0])
    fresh = run(name, STRAIGHT, gaussian, x, caps, [0.5, 0.3, 0.1, 0.0])
    assert np.array_equal(late[2:], fresh)


def test_a_solver_starts_at_the_caps():
    clean, eps = np.ones((1, 3, 2)), np.full((1, 3, 2), -1.0)
    arrays = jnp.asarray(clean), jnp.asarray(eps), jnp.array([[0.0, 0.25, 1.0]])
    assert start(STRAIGHT, *arrays)[0].tolist() == [[1, 1], [0.5, 0.5], [-1, -1]]
    # A schedule that begins lower finds soft tokens there; generated ones are always pure noise.
    assert start(STRAIGHT, *arrays, 0.125)[0, :, 0].tolist() == [1, 0.75, -1]
    assert start(CHAIN, *arrays)[0, 2].tolist() == [-1, -1]


def test_a_token_moves_as_far_as_its_cap_lets_it():
    caps = jnp.array([[0.0, 0.25, 0.5, 1.0]])
    one = interval(STRAIGHT, caps, jnp.float64(0.75), jnp.float64(0.25))
    assert (one.next.t - one.now.t)[0, :, 0].tolist() == [0.0, 0.0, -0.25, -0.5]
    assert one.moves[0, :, 0].tolist() == [False, False, True, True]


@pytest.mark.usefixtures("checked")
def test_a_wrong_shape_is_caught():
    x = jnp.zeros((1, 4, 2))
    with pytest.raises(TypeCheckError, match="parameter 'caps'"):
        start(STRAIGHT, x, x, jnp.zeros((2, 4)))
    with pytest.raises(TypeCheckError, match="parameter 't'"):
        interval(STRAIGHT, jnp.zeros((1, 4)), jnp.ones(1), jnp.float64(0.5))


# --- noise levels ---


@pytest.mark.parametrize(("steps", "shift"), [(1, 7.0), (30, 0.3)])
def test_linear_levels_fall_from_one_to_zero(steps, shift):
    levels = noise_levels(STRAIGHT, "linear", steps, shift)
    assert levels.shape == (steps + 1,) and levels.dtype == np.float32
    assert levels[0] == 1.0 and levels[-1] == 0.0 and (np.diff(levels) < 0).all()
    t = np.linspace(1, 0, steps + 1)
    np.testing.assert_allclose(levels, shift * t / (1 + (shift - 1) * t), rtol=1e-6)  # float32


def test_linear_levels_by_hand():
    assert noise_levels(STRAIGHT, "linear", 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert noise_levels(STRAIGHT, "linear", 2, 3.0).tolist() == [1.0, 0.75, 0.0]
    # A shorter last step, as SiT's: 250 levels down to it, and 0.
    levels = noise_levels(STRAIGHT, "linear", 250, last=0.04)
    np.testing.assert_allclose(levels, np.append(np.linspace(1, 0.04, 250), 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "steps", "indices"),
    [
        ("trailing", 3, [999, 666, 332]),
        ("linspace", 4, [999, 666, 333, 0]),
        ("trailing", 1000, list(range(999, -1, -1))),
    ],
)
def test_indices_of_the_chain_by_hand(spacing, steps, indices):
    levels = noise_levels(CHAIN, spacing, steps)
    assert levels.dtype == np.float32 and levels[-1] == 0
    np.testing.assert_allclose(levels[:-1] * 1000 - 1, indices, atol=1e-4)  # float32 of 1000


def test_linspace_is_how_the_code_of_dit_respaces():
    """250 of 1000: one index after another, a fraction at a time (Nichol & Dhariwal 2021)."""
    indices = [round(i * 999 / 249) for i in range(250)]
    levels = noise_levels(CHAIN, "linspace", 250)
    assert np.round(levels[:-1] * 1000 - 1).astype(int).tolist() == indices[::-1]
    # And DiT's alphas there: its respaced betas are 1 - kept / kept of the index before.
    kept = alphas_cumprod(CHAIN)[indices]
    at = level(CHAIN, jnp.asarray(levels[:-1], jnp.float64))
    np.testing.assert_allclose(np.square(at.alpha)[::-1], kept, rtol=1e-6)
