"""Solvers against closed forms.

Where data is Gaussian, N(m, d^2), the posterior mean of x0 and the flow are known: at a level of the
path x is N(alpha m, v) with v = alpha^2 d^2 + sigma^2, and the flow keeps each point at the same
number of standard deviations from the mean. Everything is float64, so that what is measured is the
solver's error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dit_jax.diffusion import (
    EVALUATIONS,
    SOLVERS,
    Estimate,
    PathConfig,
    Problem,
    SolverConfig,
    check_solver,
    sigma_schedule,
    solve,
    start,
)
from dit_jax.diffusion.paths import level, rates, time_of
from dit_jax.diffusion.problem import interval
from dit_jax.diffusion.solvers import move, no_noise

MEAN, DEVIATION = 0.7, 0.4
STRAIGHT, GVP, VP = PathConfig(), PathConfig("gvp"), PathConfig("vp")
# Many steps, so that the chain is smooth where 128 steps of a solver look at it.
CHAIN = PathConfig("ddpm", timesteps=1000)
ORDERS = {"euler": 1, "heun": 2, "ddim": 1, "dpmpp_2m": 2, "unipc": 2}
PLAIN = SolverConfig()
MULTISTEP = ("dpmpp_2m", "unipc")
NOISY = ("ddpm", "sde")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian(problem: Problem, x, t) -> Estimate:
    """What a perfect network says of Gaussian data: the posterior means of x0 and eps."""
    at = problem.at(t)
    variance = at.alpha**2 * DEVIATION**2 + at.sigma**2
    apart = x - at.alpha * MEAN
    x0 = MEAN + at.alpha * DEVIATION**2 / variance * apart
    eps = at.sigma / variance * apart
    if problem.path.discrete:
        return Estimate(x0, eps, None, jnp.zeros_like(x))
    by = rates(problem.path, problem.tau(t)).each()
    return Estimate(x0, eps, by.alpha * x0 + by.sigma * eps)


def gaussian_flow(path: PathConfig, x: np.ndarray, t: np.ndarray, end: np.ndarray | float):
    """Where the exact flow takes x from time t ``[b, l]`` to time ``end``."""
    now = level(path, jnp.asarray(t)[..., None])
    then = level(path, jnp.asarray(end, jnp.float64))

    def deviation(at):
        return jnp.sqrt(at.alpha**2 * DEVIATION**2 + at.sigma**2)

    return np.asarray(then.alpha * MEAN + deviation(then) / deviation(now) * (x - now.alpha * MEAN))


def points(path: PathConfig, ceilings: list[float], count: int = 5):
    """Tokens ``[1, l, count]`` at their ceilings, and the ceilings ``[1, l]``."""
    rng = np.random.default_rng(0)
    levels = np.array([ceilings])
    clean = MEAN + DEVIATION * rng.normal(size=(*levels.shape, count))
    eps = rng.normal(size=clean.shape)
    return np.asarray(start(path, *map(jnp.asarray, (clean, eps, levels)))), levels


@pytest.fixture(scope="module")
def stepper(jit):
    """``stepper(name, path, denoise)(x, history, ceilings, t, t_next)``, compiled."""

    @functools.cache
    def compiled(name, path, denoise, config=PLAIN):
        def one(x, history, ceilings, t, t_next):
            problem = Problem(path, ceilings, config)
            denoiser = functools.partial(denoise, problem)
            return SOLVERS[name].step(problem, denoiser, x, history, t, t_next, no_noise)

        return jit(one)

    return compiled


@pytest.fixture
def run(stepper):
    """``run(name, path, denoise, x, ceilings, levels)``: every x of the solver over a schedule."""

    def whole(name, path, denoise, x, ceilings, levels):
        x, ceilings, levels = (jnp.asarray(a, jnp.float64) for a in (x, ceilings, levels))
        history, found = SOLVERS[name].begin(x, levels[0]), [x]
        for t, t_next in zip(levels[:-1], levels[1:], strict=True):
            x, history = stepper(name, path, denoise)(x, history, ceilings, t, t_next)
            found.append(x)
        return np.asarray(found)

    return whole


# --- exactness ---


@pytest.mark.parametrize("path", [STRAIGHT, GVP, VP], ids=lambda path: path.kind)
def test_the_closed_form_is_one(path):
    """The flow's derivative is the velocity, by central differences."""
    x, t = points(path, [0.2, 0.5, 0.9])
    ahead, back = (gaussian_flow(path, x, t, t[..., None] + h) for h in (1e-5, -1e-5))
    velocity = gaussian(Problem(path, jnp.asarray(t)), jnp.asarray(x), jnp.float64(1)).velocity
    # Central differences: h^2, and float64 over h.
    np.testing.assert_allclose((ahead - back) / 2e-5, velocity, atol=1e-7)


def orders_of(run, name, path, levels_of, x, ceilings, steps=(32, 64, 128)):
    """Orders of convergence by doubling steps, and the last error."""
    ends = [levels_of(k) for k in steps]
    errors = [
        np.abs(
            run(name, path, gaussian, x, ceilings, levels)[-1]
            - gaussian_flow(path, x, np.minimum(ceilings, levels[0]), float(levels[-1]))
        ).max()
        for levels in ends
    ]
    return np.log2(np.array(errors[:-1]) / errors[1:]), errors[-1]


def even(k):
    return np.linspace(1, 0, k + 1)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("path", [STRAIGHT, GVP], ids=lambda path: path.kind)
def test_the_order_of_convergence(run, name, path):
    x, ceilings = points(path, [1.0] * 4)
    if name in MULTISTEP:
        # Their steps in log(alpha / sigma) do not shrink at the ends, which costs a logarithm.
        found, error = orders_of(run, name, path, even, x, ceilings, (128, 256))
        assert 1.5 < found[0] < 2.4
    else:
        found, error = orders_of(run, name, path, even, x, ceilings)
        # The next term of the error is a step (1/64) against the leading one.
        np.testing.assert_allclose(found, ORDERS[name], atol=0.1)
    assert error < {1: 2e-2, 2: 4e-4}[ORDERS[name]]


def smooth(path, high, low):
    """Levels between two, even in log(alpha / sigma)."""
    ends = [float(level(path, jnp.float64(t)).logsnr) for t in (high, low)]
    return lambda k: time_of(path, np.exp(-np.linspace(*ends, k + 1)))


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("path", [STRAIGHT, GVP, VP, CHAIN], ids=lambda path: path.kind)
def test_the_order_between_two_levels(run, name, path):
    """Without the ends, where log(alpha / sigma) is infinite, there is nothing but the order; unipc's
    corrector adds one to it (Zhao et al. 2023, theorem 3.1)."""
    levels = smooth(path, 0.9, 0.1)
    x, _ = points(path, [float(levels(32)[0])] * 4)
    steps = (128, 256) if name in MULTISTEP else (64, 128)
    found, _ = orders_of(run, name, path, levels, x, np.ones(x.shape[:2]), steps)
    np.testing.assert_allclose(found, 3 if name == "unipc" else ORDERS[name], atol=0.15)


@pytest.mark.parametrize("name", ORDERS)
def test_shifted_schedules_converge_to_the_same(run, name):
    x, ceilings = points(STRAIGHT, [1.0] * 4)
    t = np.linspace(1, 0, 257)
    out = run(name, STRAIGHT, gaussian, x, ceilings, 3 * t / (1 + 2 * t))[-1]
    # 256 even steps leave 4e-3 (order 1) and 2e-5 (order 2); the last of these are three times as
    # long, and nine times as wrong.
    atol = {1: 4e-2, 2: 2e-3 if name in MULTISTEP else 5e-4}[ORDERS[name]]
    np.testing.assert_allclose(out, gaussian_flow(STRAIGHT, x, ceilings, 0.0), atol=atol)


def same_patches(problem, x, t):
    """What follows where the network always predicts the same clean patches."""
    at, x0 = problem.at(t), jnp.arange(5.0) + 0 * x
    eps = (x - at.alpha * x0) / jnp.maximum(at.sigma, 1e-9)
    velocity = None if problem.path.discrete else eps - x0
    return Estimate(x0, eps, velocity, jnp.zeros_like(x))


@pytest.mark.parametrize("path", [STRAIGHT, CHAIN], ids=lambda path: path.kind)
@pytest.mark.parametrize("name", ORDERS)
def test_straight_paths_are_followed_in_one_step(run, name, path):
    x, ceilings = points(path, [1.0, 0.6, 0.1])
    for steps in (1, 3):
        out = run(name, path, same_patches, x, ceilings, np.linspace(1, 0, steps + 1))[-1]
        np.testing.assert_allclose(out[0], [np.arange(5.0)] * 3, atol=1e-13)  # float64


def test_evaluations_are_counted():
    x, ceilings = points(STRAIGHT, [1.0])
    x, ceilings = jnp.asarray(x), jnp.asarray(ceilings)
    for name, count in EVALUATIONS.items():
        calls = []
        problem = Problem(STRAIGHT, ceilings)

        def denoiser(x, t, calls=calls, problem=problem):
            calls.append(t)
            return gaussian(problem, x, t)

        def one(x, t, t_next, name=name, denoiser=denoiser, problem=problem):
            history = SOLVERS[name].begin(x, t)
            noise = functools.partial(jnp.zeros_like, x)
            return SOLVERS[name].step(problem, denoiser, x, history, t, t_next, noise)

        jax.eval_shape(one, x, jnp.float64(0.8), jnp.float64(0.4))
        assert len(calls) == count, name
    assert EVALUATIONS.keys() == SOLVERS.keys() == ORDERS.keys() | set(NOISY)


@pytest.mark.parametrize("path", [STRAIGHT, VP, CHAIN], ids=lambda path: path.kind)
@pytest.mark.parametrize("name", ORDERS)
def test_float32_is_enough(run, name, path, jit):
    """50 steps of float32, soft tokens among them, end where those of float64 do."""
    x, ceilings = points(path, [1.0, 0.5, 0.01])
    levels = np.linspace(1, 0, 51)
    exact = run(name, path, gaussian, x, ceilings, levels)[-1]

    @jit
    def one(x, history, t, t_next):
        problem = Problem(path, jnp.asarray(ceilings, jnp.float32))
        denoiser = functools.partial(gaussian, problem)
        return SOLVERS[name].step(problem, denoiser, x, history, t, t_next, no_noise)

    now, levels = jnp.asarray(x, jnp.float32), jnp.asarray(levels, jnp.float32)
    history = SOLVERS[name].begin(now, levels[0])
    for t, t_next in zip(levels[:-1], levels[1:], strict=True):
        now, history = one(now, history, t, t_next)
    assert now.dtype == jnp.float32
    # 50 roundings of numbers of some units, 1e-7 each.
    np.testing.assert_allclose(now, exact, atol=1e-5)


# --- those that take noise ---


def spread(jit, name, path, levels, config=PLAIN, count=20_000):
    """Mean and variance of many points that a noisy solver makes of pure noise."""
    problem = Problem(path, jnp.ones((1, 1)), config)
    denoiser = functools.partial(gaussian, problem)

    @jit
    def one(x, i, t, t_next):
        draw = functools.partial(jax.random.normal, jax.random.key(i), x.shape)
        return SOLVERS[name].step(problem, denoiser, x, (), t, t_next, draw)[0]

    x = jax.random.normal(jax.random.key(10**6), (1, 1, count))
    for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        x = one(x, i, t, t_next)
    return float(x.mean()), float(x.var())


@pytest.mark.parametrize(
    ("name", "path", "config"),
    [
        ("ddpm", CHAIN, SolverConfig("fixed_small")),
        ("ddpm", CHAIN, SolverConfig("fixed_large")),
        ("ddpm", CHAIN, SolverConfig("learned_range")),
        ("ddpm", STRAIGHT, SolverConfig("fixed_small")),
        ("ddim", CHAIN, SolverConfig(eta=1.0)),
        ("ddim", VP, SolverConfig(eta=0.5)),
        ("sde", STRAIGHT, SolverConfig()),
        ("sde", GVP, SolverConfig(strength=0.5)),
        ("sde", VP, SolverConfig()),
    ],
    ids=lambda value: getattr(value, "kind", getattr(value, "variance", value)),
)
def test_noisy_solvers_make_the_mean_and_the_variance_of_data(name, path, config, jit):
    mean, variance = spread(jit, name, path, np.linspace(1, 0, 401), config)
    # 20000 points: 4 standard errors are 0.011 and 0.0065; 400 steps leave some 0.006 themselves, which
    # is of order 1 (0.023 for 100 steps of the smallest variance).
    assert abs(mean - MEAN) < 0.011 + 0.01, mean
    assert abs(variance - DEVIATION**2) < 0.0065 + 0.01, variance


def test_noise_makes_points_independent_of_where_they_began():
    """Otherwise the tests above would hold for solvers that take no noise at all."""
    problem = Problem(STRAIGHT, jnp.ones((1, 1)))
    x = jax.random.normal(jax.random.key(1), (1, 1, 4000))

    def noise(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), x.shape)

    levels, ends = np.linspace(1, 0, 51), {}
    for name in ("euler", "sde", "ddpm"):
        denoiser = functools.partial(gaussian, problem)
        ends[name] = np.asarray(solve(name, problem, denoiser, x, levels, noise)).ravel()
    correlation = {name: np.corrcoef(np.ravel(x), end)[0, 1] for name, end in ends.items()}
    assert correlation["euler"] > 0.999
    assert abs(correlation["ddpm"]) < 0.1 and abs(correlation["sde"]) < 0.5


def test_solvers_that_take_noise_say_so():
    x, ceilings = points(STRAIGHT, [1.0])
    problem = Problem(STRAIGHT, jnp.asarray(ceilings))
    denoiser = functools.partial(gaussian, problem)
    with pytest.raises(ValueError, match="takes noise in every step"):
        solve("ddpm", problem, denoiser, jnp.asarray(x), sigma_schedule(2))


def test_a_learned_variance_must_be_given():
    x, ceilings = points(STRAIGHT, [1.0])
    problem = Problem(STRAIGHT, jnp.asarray(ceilings), SolverConfig("learned_range"))
    denoiser = functools.partial(gaussian, problem)
    with pytest.raises(ValueError, match="'learned_range' needs a network of two outputs"):
        solve("ddpm", problem, denoiser, jnp.asarray(x), sigma_schedule(2), lambda i: 0 * x)


def test_the_discrete_path_has_no_velocity_to_follow():
    with pytest.raises(ValueError, match="'sde' follows a velocity, and path.kind 'ddpm' has none"):
        check_solver("sde", CHAIN)
    for name in SOLVERS:
        check_solver(name, STRAIGHT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"eta": 1.5}, "sampling.eta is 1.5"), ({"strength": -1.0}, "sampling.sde_strength is -1.0")],
)
def test_nonsense_constants_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SolverConfig(**fields)


# --- ceilings ---

EVERY = [(name, path) for name in SOLVERS for path in (STRAIGHT, CHAIN)]
EVERY = [(name, path) for name, path in EVERY if not (name == "sde" and path.discrete)]


@pytest.mark.parametrize(("name", "path"), EVERY, ids=lambda v: getattr(v, "kind", v))
def test_held_tokens_never_move_and_soft_ones_wait(name, path, jit):
    x, ceilings = points(path, [0.0, 1.0, 0.5, 0.3])
    problem = Problem(path, jnp.asarray(ceilings), SolverConfig(eta=0.5 * (name == "ddim")))

    @jit
    def one(x, history, t, t_next, seed):
        noise = functools.partial(jax.random.normal, jax.random.key(seed), x.shape)
        denoiser = functools.partial(gaussian, problem)
        return SOLVERS[name].step(problem, denoiser, x, history, t, t_next, noise)

    now, levels = jnp.asarray(x), jnp.asarray(np.linspace(1, 0, 6))
    history = SOLVERS[name].begin(now, levels[0])
    for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        before, (now, history) = np.asarray(now), one(now, history, t, t_next, i)
        waits = ceilings[0] <= float(t_next)
        assert waits[0] and not waits[1]
        # Bit for bit.
        assert np.array_equal(before[0, waits], np.asarray(now)[0, waits])
        assert (before != np.asarray(now))[0, ~waits].any(-1).all()
        assert np.isfinite(now).all()
    assert np.array_equal(np.asarray(now)[0, 0], x[0, 0])


@pytest.mark.parametrize("path", [STRAIGHT, CHAIN], ids=lambda path: path.kind)
@pytest.mark.parametrize("name", ORDERS)
def test_softly_held_tokens_follow_the_flow_from_their_ceiling(run, name, path):
    levels = [0.5, 0.3, 0.05, 1.0]
    x, ceilings = points(path, levels)
    sigmas = np.linspace(1, 0, 257)
    found = run(name, path, gaussian, x, ceilings, sigmas)
    # Ceilings that lie between two levels of the schedule are the starts of shorter first steps.
    # From their own ceiling: the error of 256 steps, see the order of convergence; near data the
    # chain's steps are wider in log(alpha / sigma).
    atol = {1: 1e-2, 2: 2e-3 if path.discrete else 3e-4}[ORDERS[name]]
    end = gaussian_flow(path, x, ceilings, 0.0)
    np.testing.assert_allclose(found[-1], end, atol=atol)


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_holds_under_soft_ceilings(run, name):
    x, ceilings = points(STRAIGHT, [0.5, 0.25, 0.75])
    if name in MULTISTEP:
        found, _ = orders_of(run, name, STRAIGHT, even, x, ceilings, (128, 256))
        # See above: a logarithm is lost at the end.
        assert 1.5 < found[0] < 2.4
    else:
        found, _ = orders_of(run, name, STRAIGHT, even, x, ceilings)
        np.testing.assert_allclose(found, ORDERS[name], atol=0.15)


def test_a_late_token_of_a_multistep_solver_takes_a_first_order_step(run):
    """At the level where its ceiling lets it go it has no history: as if the schedule began there."""
    for name in ("dpmpp_2m", "unipc"):
        x, ceilings = points(STRAIGHT, [0.5, 0.5])
        late = run(name, STRAIGHT, gaussian, x, ceilings, [1.0, 0.8, 0.5, 0.3, 0.1, 0.0])
        fresh = run(name, STRAIGHT, gaussian, x, ceilings, [0.5, 0.3, 0.1, 0.0])
        assert np.array_equal(late[2:], fresh), name


def test_the_start_is_at_the_ceiling():
    clean, eps = np.ones((1, 3, 2)), np.full((1, 3, 2), -1.0)
    arrays = jnp.asarray(clean), jnp.asarray(eps), jnp.array([[0.0, 0.25, 1.0]])
    assert start(STRAIGHT, *arrays)[0].tolist() == [[1, 1], [0.5, 0.5], [-1, -1]]
    # A schedule that begins lower finds soft tokens there; free ones are pure noise on every path.
    late = start(VP, *arrays, 0.1)
    at = level(VP, jnp.float64(0.1))
    np.testing.assert_allclose(late[0, :, 0], [1, at.alpha - at.sigma, -1], rtol=1e-12)


def test_a_token_moves_as_far_as_its_ceiling_lets_it():
    x, v = jnp.zeros((1, 4, 1)), jnp.ones((1, 4, 1))
    ceilings = jnp.array([[0.0, 0.25, 0.5, 1.0]])
    step = interval(Problem(STRAIGHT, ceilings), jnp.float64(0.75), jnp.float64(0.25))
    assert move(x, v, step)[0, :, 0].tolist() == [0.0, 0.0, -0.25, -0.5]
    assert step.moves[0, :, 0].tolist() == [False, False, True, True]


def test_a_wrong_shape_is_caught():
    x = jnp.zeros((1, 4, 2))
    with pytest.raises(TypeCheckError, match="parameter 'ceilings'"):
        start(STRAIGHT, x, x, jnp.zeros((2, 4)))
    with pytest.raises(TypeCheckError, match="parameter 't'"):
        interval(Problem(STRAIGHT, jnp.zeros((1, 4))), jnp.ones(1), jnp.float64(0.5))
