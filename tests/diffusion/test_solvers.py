"""Solvers against closed forms.

Where data is Gaussian, N(m, d^2), the exact velocity and its flow are known: at time t a point of
the path is N((1 - t) m, v) with v = (1 - t)^2 d^2 + t^2, and the flow keeps each point at the same
number of standard deviations from the mean. Everything is float64, so that what is measured is the
solver's error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dit_jax.diffusion import EVALUATIONS, SOLVERS, sigma_schedule, solve, start
from dit_jax.diffusion.solvers import move

MEAN, DEVIATION = 0.7, 0.4
ORDERS = {"euler": 1, "heun": 2}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian_velocity(ceilings, x, sigma):
    """The exact dx/dt of Gaussian data where each token stands at min(sigma, its ceiling)."""
    t = jnp.minimum(sigma, ceilings)[..., None]
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    return -MEAN + (t - (1 - t) * DEVIATION**2) / variance * (x - (1 - t) * MEAN)


def gaussian_flow(x: np.ndarray, t: np.ndarray, end: np.ndarray | float) -> np.ndarray:
    """Where the exact flow takes x from time t to time ``end``."""
    t = t[..., None]

    def deviation(t):
        return np.sqrt((1 - t) ** 2 * DEVIATION**2 + t**2)

    return (1 - end) * MEAN + deviation(end) / deviation(t) * (x - (1 - t) * MEAN)


def points(ceilings: list[float], count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[1, l, count]`` at their ceilings, and the ceilings ``[1, l]``."""
    rng = np.random.default_rng(0)
    levels = np.array([ceilings])
    clean = MEAN + DEVIATION * rng.normal(size=(*levels.shape, count))
    eps = rng.normal(size=clean.shape)
    return np.asarray(start(*map(jnp.asarray, (clean, eps, levels)))), levels


@pytest.fixture(scope="module")
def stepper(jit):
    """``stepper(solver, velocity)(x, ceilings, sigma, sigma_next)``, compiled."""

    @functools.cache
    def compiled(name, velocity):
        def one(x, ceilings, sigma, sigma_next):
            denoiser = functools.partial(velocity, ceilings)
            return SOLVERS[name](denoiser, x, ceilings, sigma, sigma_next)

        return jit(one)

    return compiled


@pytest.fixture
def run(stepper):
    """``run(solver, velocity, x, ceilings, sigmas)``: the solver over a schedule."""

    def whole(name, velocity, x, ceilings, sigmas):
        def step(_, x, ceilings, sigma, sigma_next):
            return stepper(name, velocity)(x, ceilings, sigma, sigma_next)

        arrays = (jnp.asarray(x), jnp.asarray(ceilings), jnp.asarray(sigmas, jnp.float64))
        return np.asarray(solve(step, lambda x, sigma: x, *arrays))

    return whole


# --- schedules ---


@pytest.mark.parametrize("shift", [0.3, 1.0, 1.5, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_schedules_fall_from_one_to_zero(steps, shift):
    sigmas = sigma_schedule(steps, shift)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == np.float32
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
    assert (np.diff(sigmas) < 0).all()
    t = np.linspace(1, 0, steps + 1)
    np.testing.assert_allclose(sigmas, shift * t / (1 + (shift - 1) * t), rtol=1e-6)  # float32


def test_a_schedule_by_hand():
    assert sigma_schedule(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sigma_schedule(2, 3.0).tolist() == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("steps", [0, -3])
def test_a_schedule_has_steps(steps):
    with pytest.raises(ValueError, match=f"{steps} solver steps: at least 1"):
        sigma_schedule(steps)


# --- exactness ---


def test_the_closed_form_is_one():
    """The flow's derivative is the velocity, by central differences."""
    x, t = points([0.2, 0.5, 0.9])
    ahead, back = (gaussian_flow(x, t, t[..., None] + h) for h in (1e-5, -1e-5))
    # Central differences: h^2, and float64 over h.
    np.testing.assert_allclose((ahead - back) / 2e-5, gaussian_velocity(t, x, 1.0), atol=1e-8)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_order_of_convergence(run, name):
    x, ceilings = points([1.0] * 4)
    exact = gaussian_flow(x, ceilings, 0.0)
    errors = [
        np.abs(run(name, gaussian_velocity, x, ceilings, np.linspace(1, 0, k + 1)) - exact).max()
        for k in (32, 64, 128)
    ]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    # The next term of the error is a step (1/64) against the leading one.
    np.testing.assert_allclose(orders, ORDERS[name], atol=0.1)
    assert errors[-1] < {1: 2e-2, 2: 2e-4}[ORDERS[name]]


@pytest.mark.parametrize("name", SOLVERS)
def test_shifted_schedules_converge_to_the_same(run, name):
    x, ceilings = points([1.0] * 4)
    t = np.linspace(1, 0, 257)
    out = run(name, gaussian_velocity, x, ceilings, 3 * t / (1 + 2 * t))
    # 256 even steps leave 4e-3 (order 1) and 2e-5 (order 2); the last of these are three times as
    # long, and nine times as wrong.
    atol = {1: 4e-2, 2: 5e-4}[ORDERS[name]]
    np.testing.assert_allclose(out, gaussian_flow(x, ceilings, 0.0), atol=atol)


def towards_a_point(ceilings, x, sigma):
    """The velocity where the network always predicts the same clean patches."""
    t = jnp.minimum(sigma, ceilings)[..., None]
    return (x - jnp.arange(5.0)) / jnp.maximum(t, 0.05)


@pytest.mark.parametrize("name", SOLVERS)
def test_straight_paths_are_followed_in_one_step(run, name):
    x, ceilings = points([1.0, 0.6, 0.1])
    for steps in (1, 3):
        out = run(name, towards_a_point, x, ceilings, np.linspace(1, 0, steps + 1))
        np.testing.assert_allclose(out[0], [np.arange(5.0)] * 3, atol=1e-14)  # float64


def test_evaluations_are_counted():
    x, ceilings = points([1.0])
    for name, count in EVALUATIONS.items():
        calls = []

        def velocity(x, sigma, calls=calls):
            calls.append(sigma)
            return -x

        args = (jnp.asarray(x), jnp.asarray(ceilings), jnp.float64(0.8), jnp.float64(0.4))
        jax.eval_shape(functools.partial(SOLVERS[name], velocity), *args)
        assert len(calls) == count, name
    assert EVALUATIONS.keys() == SOLVERS.keys() == ORDERS.keys()


# --- ceilings ---


@pytest.mark.parametrize("name", SOLVERS)
def test_held_tokens_never_move(run, name):
    x, ceilings = points([0.0, 1.0, 0.0])
    out = run(name, gaussian_velocity, x, ceilings, sigma_schedule(5))
    # Bit for bit: x + 0 v.
    assert np.array_equal(out[0, [0, 2]], x[0, [0, 2]])
    assert (out[0, 1] != x[0, 1]).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_softly_held_tokens_wait_and_then_follow_the_flow(stepper, name):
    levels = [0.5, 0.3, 0.05, 1.0]
    x, ceilings = points(levels)
    sigmas = np.linspace(1, 0, 257)
    now = x
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        now = np.asarray(stepper(name, gaussian_velocity)(now, ceilings, sigma, sigma_next))
        waiting = ceilings[0] <= sigma_next
        assert np.array_equal(now[0, waiting], x[0, waiting])
        assert (now[0, ~waiting] != x[0, ~waiting]).any(-1).all()
    # Ceilings that lie between two levels of the schedule are the starts of shorter first steps.
    # From their own ceiling: the error of 256 steps, see the order of convergence.
    atol = {1: 1e-2, 2: 1e-4}[ORDERS[name]]
    np.testing.assert_allclose(now, gaussian_flow(x, ceilings, 0.0), atol=atol)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_order_holds_under_soft_ceilings(run, name):
    x, ceilings = points([0.5, 0.25, 0.75])
    exact = gaussian_flow(x, ceilings, 0.0)
    errors = [
        np.abs(run(name, gaussian_velocity, x, ceilings, np.linspace(1, 0, k + 1)) - exact).max()
        for k in (32, 64, 128)
    ]
    np.testing.assert_allclose(np.log2(np.array(errors[:-1]) / errors[1:]), ORDERS[name], atol=0.15)


def test_the_start_is_at_the_ceiling():
    clean, eps = np.ones((1, 3, 2)), np.full((1, 3, 2), -1.0)
    x = start(jnp.asarray(clean), jnp.asarray(eps), jnp.array([[0.0, 0.25, 1.0]]))
    assert x[0].tolist() == [[1, 1], [0.5, 0.5], [-1, -1]]


def test_a_token_moves_as_far_as_its_ceiling_lets_it():
    x, v = jnp.zeros((1, 4, 1)), jnp.ones((1, 4, 1))
    ceilings = jnp.array([[0.0, 0.25, 0.5, 1.0]])
    moved = move(x, v, ceilings, jnp.float64(0.75), jnp.float64(0.25))
    assert moved[0, :, 0].tolist() == [0.0, 0.0, -0.25, -0.5]


def test_a_wrong_shape_is_caught():
    x = jnp.zeros((1, 4, 2))
    with pytest.raises(TypeCheckError, match="parameter 'ceilings'"):
        move(x, x, jnp.zeros((1, 3)), jnp.float64(1.0), jnp.float64(0.5))
    with pytest.raises(TypeCheckError, match="parameter 'sigma'"):
        move(x, x, jnp.zeros((1, 4)), jnp.ones(1), jnp.float64(0.5))
