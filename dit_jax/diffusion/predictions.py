"""What a network may predict, and how each says the same: x0, eps, v, velocity, score.

With x = alpha x0 + sigma eps at a level::

    v        = alpha eps - sigma x0          Salimans & Ho 2022, section 4
    velocity = alpha' x0 + sigma' eps        dx/dt of the path (Ma et al. 2024, eq. 5)
    score    = -eps / sigma                  of the noised data (Song et al. 2021)

Any of them and x give x0 and eps, by the inverse of a matrix of two rows. Where there is no inverse
(x0 of eps where no signal is left, eps of x0 where no noise is) the divisor is held above a floor.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.diffusion.paths import Level, PathConfig, Rates, level, rates

Prediction = Literal["velocity", "x0", "eps", "v"]

SMALLEST_T = 1e-4
"""Floor of the sigma that is divided by; a given token (level 0) does not move at all."""
SMALLEST_ALPHA = 1e-8
"""Floor of the alpha that is divided by, below that of any path which does not end in noise."""


class Estimate(NamedTuple):
    """What a network's output says of points ``[b, l, p]`` at their levels."""

    x0: Float[Array, "..."]
    eps: Float[Array, "..."]
    velocity: Float[Array, "..."] | None = None
    """dx/dt, on continuous paths."""
    fraction: Float[Array, "..."] | None = None
    """Of a learned variance: -1 is the smallest that it may be, 1 the largest."""


def clean_and_noise(
    path: PathConfig,
    kind: Prediction,
    output: Float[Array, "*b p"],
    xt: Float[Array, "*b p"],
    t: Float[Array, "*b"],
    floor: float = SMALLEST_T,
) -> tuple[Float[Array, "*b p"], Float[Array, "*b p"]]:
    """x0 and eps, given a prediction of the kind at ``xt``; ``t`` in [0, 1].

    Raises:
        ValueError: for a velocity on a discrete path.
    """
    at = level(path, t).each()
    if kind == "x0":
        return output, (xt - at.alpha * output) / jnp.maximum(at.sigma, floor)
    if kind == "eps":
        return (xt - at.sigma * output) / jnp.maximum(at.alpha, SMALLEST_ALPHA), output
    if kind == "v":
        norm = at.alpha**2 + at.sigma**2
        return (at.alpha * xt - at.sigma * output) / norm, (
            at.sigma * xt + at.alpha * output
        ) / norm
    by = rates(path, t).each()
    return (by.sigma * xt - at.sigma * output) / by.wronskian, (
        at.alpha * output - by.alpha * xt
    ) / by.wronskian


def prediction_of(
    path: PathConfig,
    kind: Prediction,
    x0: Float[Array, "*b p"],
    eps: Float[Array, "*b p"],
    t: Float[Array, "*b"],
) -> Float[Array, "*b p"]:
    """What a network of the kind should predict of x_t = alpha x0 + sigma eps.

    Raises:
        ValueError: for a velocity on a discrete path.
    """
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    if kind == "v":
        at = level(path, t).each()
        return at.alpha * eps - at.sigma * x0
    by = rates(path, t).each()
    return by.alpha * x0 + by.sigma * eps


def velocity_of(
    path: PathConfig,
    kind: Prediction,
    output: Float[Array, "*b p"],
    xt: Float[Array, "*b p"],
    t: Float[Array, "*b"],
    floor: float = SMALLEST_T,
) -> Float[Array, "*b p"]:
    """dx/dt at ``xt``, given a prediction of the kind; ``floor`` bounds the sigma divided by.

    Predicted x0 and eps lead to it directly, not through each other: for rectified flow and x0 it
    is (x_t - x0) / t, with t held above the floor.

    Raises:
        ValueError: on a discrete path.
    """
    if kind == "velocity":
        return output
    at, by = level(path, t).each(), rates(path, t).each()
    if kind == "x0":
        return (by.sigma * xt - by.wronskian * output) / jnp.maximum(at.sigma, floor)
    if kind == "eps":
        return (by.alpha * xt + by.wronskian * output) / jnp.maximum(at.alpha, SMALLEST_ALPHA)
    x0, eps = clean_and_noise(path, kind, output, xt, t)
    return by.alpha * x0 + by.sigma * eps


def score_of(
    path: PathConfig,
    eps: Float[Array, "*b p"],
    t: Float[Array, "*b"],
    floor: float = SMALLEST_T,
) -> Float[Array, "*b p"]:
    """The gradient of the log-density of x_t, given the noise in it: -eps / sigma."""
    return -eps / jnp.maximum(level(path, t).sigma, floor)[..., None]


def eps_of_score(
    path: PathConfig, score: Float[Array, "*b p"], t: Float[Array, "*b"]
) -> Float[Array, "*b p"]:
    """Inverse of ``score_of`` where sigma is above its floor."""
    return -score * level(path, t).sigma[..., None]


def squared_error_factor(
    path: PathConfig, kind: Prediction, at: Level, by: Rates | None
) -> Float[Array, "..."]:
    """What the squared error of x0 is multiplied by when it is measured in a prediction's space.

    eps: alpha^2 / sigma^2 (the signal-to-noise ratio); v: (alpha^2 + sigma^2)^2 / sigma^2, which is
    SNR + 1 where variance is preserved; velocity: (alpha sigma' - sigma alpha')^2 / sigma^2.
    """
    if kind == "x0":
        return jnp.ones_like(at.alpha)
    if kind == "eps":
        return jnp.square(at.alpha / at.sigma)
    if kind == "v":
        return jnp.square((at.alpha**2 + at.sigma**2) / at.sigma)
    assert by is not None, path
    return jnp.square(by.wronskian / at.sigma)
