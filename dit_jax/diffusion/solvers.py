"""Solvers of the reverse process under noise ceilings.

The schedule falls from t_0 to t_K = 0; where each token stands is told by ``problem``. A step is a
function of arrays, the same compiled one for all steps::

    x, history = SOLVERS[name].step(problem, denoiser, x, history, t, t_next, noise)

============ ======================================================================================
euler        order 1, dx/dt in t; on the discrete path in sigma / alpha (Karras et al. 2022)
heun         order 2, the improved Euler method (Karras et al. 2022, algorithm 1) in the same variables
ddim         order 1, Song et al. 2021, eq. 12 and 16; takes noise where eta is above 0
ddpm         ancestral, takes noise (Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, eq. 15), between
             any two levels of any path (Kingma et al. 2021, appendix A)
sde          Euler-Maruyama of SiT's reverse equation, takes noise (Ma et al. 2024, eq. 6)
dpmpp_2m     order 2, DPM-Solver++ (see ``multistep``)
unipc        order 2, and 3 with its corrector, UniPC (see ``multistep``)
============ ======================================================================================

Multistep solvers remember one interval or two; a token whose own history does not cover them, because
it only just began to move, takes a step of the order that it does cover.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_jax.diffusion.multistep import begin_dpmpp, begin_unipc, dpmpp_2m_step, unipc_step
from dit_jax.diffusion.paths import PathConfig, level
from dit_jax.diffusion.predictions import Estimate
from dit_jax.diffusion.problem import Denoiser, History, Interval, Noise, Problem, interval

Stepped = tuple[Float[Array, "b l p"], History]


def start(
    path: PathConfig,
    clean: Float[Array, "b l p"],
    eps: Float[Array, "b l p"],
    ceilings: Float[Array, "b l"],
    t: Float[Array, ""] | float = 1.0,
) -> Float[Array, "b l p"]:
    """Where a solver begins at level ``t``: every token at its own ceiling, free ones at pure noise
    (though paths that preserve variance, and leading levels, leave some signal there)."""
    at = level(path, jnp.minimum(t, ceilings)).each()
    return jnp.where(ceilings[..., None] < 1, at.alpha * clean + at.sigma * eps, eps)


def move(
    x: Float[Array, "b l p"], velocity: Float[Array, "b l p"], step: Interval
) -> Float[Array, "b l p"]:
    """Follows a velocity, each token as far as its ceiling lets it."""
    return step.take(x + (step.next.t - step.now.t) * velocity, x)


def _velocity(estimate: Estimate) -> Float[Array, "b l p"]:
    assert estimate.velocity is not None
    return estimate.velocity


def euler_step(
    problem: Problem,
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    history: History,
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    noise: Noise,
) -> Stepped:
    """One evaluation, order 1. On the discrete path it is ddim with eta 0, by algebra."""
    step = interval(problem, t, t_next)
    now = denoiser(x, t)
    if problem.path.discrete:
        return step.take(_mix(step, now), x), history
    return move(x, _velocity(now), step), history


def _mix(step: Interval, estimate: Estimate) -> Float[Array, "b l p"]:
    return step.next.alpha * estimate.x0 + step.next.sigma * estimate.eps


def heun_step(
    problem: Problem,
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    history: History,
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    noise: Noise,
) -> Stepped:
    """Two evaluations, order 2. The last step (to 0) is an Euler step: the derivative may not be
    defined there. So is one from no signal at all on the discrete path: sigma / alpha is infinite."""
    step = interval(problem, t, t_next)
    now = denoiser(x, t)
    discrete = problem.path.discrete
    ahead = step.take(_mix(step, now), x) if discrete else move(x, _velocity(now), step)

    def correct(_: None) -> Float[Array, "b l p"]:
        then = denoiser(ahead, t_next)
        if not discrete:
            return move(x, 0.5 * (_velocity(now) + _velocity(then)), step)
        noisy = step.now.alpha > 0
        ratio = step.now.sigma / jnp.where(noisy, step.now.alpha, 1)
        by = step.next.sigma - step.next.alpha * ratio
        corrected = ahead + 0.5 * by * (then.eps - now.eps)
        return step.take(jnp.where(noisy, corrected, ahead), x)

    return jax.lax.cond(t_next > 0, correct, lambda _: ahead, None), history


def ddim_step(
    problem: Problem,
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    history: History,
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    noise: Noise,
) -> Stepped:
    """One evaluation, order 1 where eta is 0."""
    step = interval(problem, t, t_next)
    now = denoiser(x, t)
    if not problem.config.eta:
        return step.take(_mix(step, now), x), history
    # Of the noise that is left, the share that is drawn anew (eq. 16).
    share = problem.config.eta**2 * -jnp.expm1(-2 * step.h)
    fresh = jnp.sqrt(1 - share) * now.eps + jnp.sqrt(share) * noise()
    return step.take(step.next.alpha * now.x0 + step.next.sigma * fresh, x), history


def log_variances(step: Interval) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Logarithms of the smallest and the largest variance of p(x_next | x), ``[b, l, 1]``.

    The posterior's where x0 is known, and the forward step's; -inf where the step ends at data.
    """
    fresh = jnp.log(-jnp.expm1(-2 * step.h))
    return 2 * jnp.log(step.next.sigma) + fresh, 2 * jnp.log(step.now.sigma) + fresh


def ddpm_step(
    problem: Problem,
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    history: History,
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    noise: Noise,
) -> Stepped:
    """One evaluation; the last step (to 0) takes no noise.

    Raises:
        ValueError: for a learned variance that the network does not give.
    """
    step = interval(problem, t, t_next)
    now = denoiser(x, t)
    ratio = step.next.sigma / jnp.where(step.moves, step.now.sigma, 1)
    mean = ratio * jnp.exp(-step.h) * x - step.next.alpha * jnp.expm1(-2 * step.h) * now.x0
    small, large = log_variances(step)
    variance = problem.config.variance
    if variance == "learned_range":
        if now.fraction is None:
            raise ValueError(
                "diffusion.variance 'learned_range' needs a network of two outputs for each number: "
                "learn it in model.dit, or set diffusion.variance to 'fixed_small'."
            )
        part = (now.fraction + 1) / 2
        log_variance = part * large + (1 - part) * jnp.where(t_next > 0, small, large)
    else:
        log_variance = small if variance == "fixed_small" else large
    noisy = jnp.where(t_next > 0, jnp.exp(0.5 * log_variance), 0)
    return step.take(mean + noisy * noise(), x), history


def sde_step(
    problem: Problem,
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    history: History,
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    noise: Noise,
) -> Stepped:
    """One evaluation: dx = velocity dt - w score dt + sqrt(2 w) dW, backwards in time, with the
    diffusion w = strength sigma(t), for which w score = -strength eps. The last step takes no noise."""
    step = interval(problem, t, t_next)
    now = denoiser(x, t)
    by = step.now.t - step.next.t
    mean = x - by * (_velocity(now) + problem.config.strength * now.eps)
    spread = jnp.sqrt(jnp.maximum(2 * problem.config.strength * step.now.sigma * by, 0))
    return step.take(mean + jnp.where(t_next > 0, spread, 0) * noise(), x), history


def begin_plain(x: Float[Array, "b l p"], t: Float[Array, ""]) -> History:
    """Nothing is remembered."""
    del x, t
    return ()


class Solver(NamedTuple):
    """A step, what it remembers, and what it costs."""

    step: Callable[..., Stepped]
    begin: Callable[[Float[Array, "b l p"], Float[Array, ""]], History] = begin_plain
    evaluations: int = 1
    continuous: bool = False
    """Whether it needs a velocity, which the discrete path does not have."""


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler_step),
    "heun": Solver(heun_step, evaluations=2),
    "ddim": Solver(ddim_step),
    "ddpm": Solver(ddpm_step),
    "sde": Solver(sde_step, continuous=True),
    "dpmpp_2m": Solver(dpmpp_2m_step, begin_dpmpp),
    "unipc": Solver(unipc_step, begin_unipc),
}
EVALUATIONS = {name: solver.evaluations for name, solver in SOLVERS.items()}
"""Model evaluations of one step."""


def check_solver(name: str, path: PathConfig) -> None:
    """Raises ``ValueError`` where the solver cannot follow the path, with what can."""
    if SOLVERS[name].continuous and path.discrete:
        raise ValueError(
            f"sampling.solver {name!r} follows a velocity, and path.kind 'ddpm' has none: use 'ddpm' "
            "or 'ddim' with eta for noise, or another solver for none."
        )


def no_noise() -> Float[Array, "b l p"]:
    """For solvers that take none; raises ``ValueError`` for the others."""
    raise ValueError("this solver takes noise in every step: give solve() a noise(step) function.")


def solve(
    name: str,
    problem: Problem,
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    levels: Float[Array | np.ndarray, "k"],
    noise: Callable[[int], Float[Array, "b l p"]] | None = None,
) -> Float[Array, "b l p"]:
    """Runs a solver over a whole schedule; ``noise(i)`` is that of step i."""
    solver = SOLVERS[name]
    check_solver(name, problem.path)
    levels = jnp.asarray(levels)
    history = solver.begin(x, levels[0])
    for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        draw = no_noise if noise is None else functools.partial(noise, i)
        x, history = solver.step(problem, denoiser, x, history, t, t_next, draw)
    return x
