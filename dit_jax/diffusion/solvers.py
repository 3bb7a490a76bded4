"""Solvers of the probability-flow equation under noise ceilings.

The schedule falls from sigma_0 = 1 to sigma_K = 0; a token with ceiling s stands at
tau = min(sigma, s), so a given token (s = 0) never moves and a softly given one waits until the
schedule has come down to it::

    start   x = (1 - s) clean + s eps
    step    x <- x + (min(sigma_next, s) - min(sigma, s)) velocity(x, sigma)

Euler and Heun (the improved Euler method, order 2; Karras et al. 2022, algorithm 1). Each step is
a pure function of arrays; the denoiser is a callable.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_jax.diffusion.paths import interpolate, shift_time
from dit_jax.types import Denoiser

SolverStep = Callable[..., Float[Array, "b l p"]]


def sigma_schedule(steps: int, shift: float = 1.0) -> Float[np.ndarray, "k"]:
    """``steps + 1`` noise levels from 1 to 0, evenly spaced and then shifted towards noise."""
    if steps < 1:
        raise ValueError(f"{steps} solver steps: at least 1 is needed (20 to 50 are usual).")
    return np.asarray(shift_time(np.linspace(1.0, 0.0, steps + 1), shift), np.float32)


def start(
    clean: Float[Array, "b l p"], eps: Float[Array, "b l p"], ceilings: Float[Array, "b l"]
) -> Float[Array, "b l p"]:
    """Where a solver begins: every token at its own ceiling."""
    return interpolate(clean, eps, ceilings)


def move(
    x: Float[Array, "b l p"],
    velocity: Float[Array, "b l p"],
    ceilings: Float[Array, "b l"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
) -> Float[Array, "b l p"]:
    """Follows a velocity from sigma to sigma_next, each token as far as its ceiling lets it."""
    by = jnp.minimum(sigma_next, ceilings) - jnp.minimum(sigma, ceilings)
    return x + by[..., None] * velocity


def euler_step(
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    ceilings: Float[Array, "b l"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
) -> Float[Array, "b l p"]:
    """One evaluation, order 1."""
    return move(x, denoiser(x, sigma), ceilings, sigma, sigma_next)


def heun_step(
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    ceilings: Float[Array, "b l"],
    sigma: Float[Array, ""],
    sigma_next: Float[Array, ""],
) -> Float[Array, "b l p"]:
    """Two evaluations, order 2. The last step (to sigma 0) is an Euler step: the velocity at 0 may
    not be defined there."""
    velocity = denoiser(x, sigma)
    ahead = move(x, velocity, ceilings, sigma, sigma_next)

    def correct(_: None) -> Float[Array, "b l p"]:
        mean = 0.5 * (velocity + denoiser(ahead, sigma_next))
        return move(x, mean, ceilings, sigma, sigma_next)

    return jax.lax.cond(sigma_next > 0, correct, lambda _: ahead, None)


SOLVERS: dict[str, SolverStep] = {"euler": euler_step, "heun": heun_step}
EVALUATIONS = {"euler": 1, "heun": 2}
"""Model evaluations of one step."""


def solve(
    step: SolverStep,
    denoiser: Denoiser,
    x: Float[Array, "b l p"],
    ceilings: Float[Array, "b l"],
    sigmas: Float[Array | np.ndarray, "k"],
) -> Float[Array, "b l p"]:
    """Runs a solver over a whole schedule."""
    sigmas = jnp.asarray(sigmas)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = step(denoiser, x, ceilings, sigma, sigma_next)
    return x
