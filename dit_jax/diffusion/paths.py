"""Paths between data and noise, what a network predicts along them, and the times that training visits.

Time runs from t = 0 (data) to t = 1 (noise)::

    x_t = alpha(t) x0 + sigma(t) eps                                                       (1)

rectified_flow (Liu et al. 2022; Lipman et al. 2022) is straight: alpha = 1 - t, sigma = t. ddpm is the
chain of N steps of Ho et al. 2020 (eq. 4), whose index i = 0 ... N - 1 stands at t = (i + 1) / N::

    alpha^2 = (1 - beta_0) ... (1 - beta_i),    sigma^2 = 1 - alpha^2                      (2)

A network predicts x0, eps, or one of ::

    velocity = dx/dt = eps - x0            on the straight path                            (3)
    v        = alpha eps - sigma x0        Salimans & Ho 2022, section 4                   (4)

each of which gives the others by (1). Times are sampled uniformly or logit-normally, and shifted
towards noise by the resolution (Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23)::

    t' = r t / (1 + (r - 1) t)                                                             (5)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dit_jax.types import PositiveFloat, PositiveInt, Range, UnitInterval, require

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)
Points = Float[Array, "*b p"]
Times = Float[Array, "*b"]
Prediction = Literal["velocity", "x0", "eps", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]

COSINE_OFFSET, COSINE_BETA_MAX = 0.008, 0.999
# Floors of divisors, if there is no inverse: x0 of eps without signal, eps of x0 without noise (tokens
# without noise do not move, whatever their quotient).
SMALLEST_SIGMA, SMALLEST_ALPHA = 1e-4, 1e-8


@dataclasses.dataclass(frozen=True)
class PathConfig:
    """Which path, and the betas of the discrete one."""

    kind: Literal["rectified_flow", "ddpm"] = "rectified_flow"
    # Evenly spaced; evenly spaced roots (Rombach et al. 2022); those of a squared cosine (Nichol &
    # Dhariwal 2021, eq. 17).
    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"
    timesteps: Annotated[int, Range(2)] = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    # Rescale the betas so that no signal is left at the last step (Lin et al. 2023).
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        rising, chain = 0 < self.beta_start <= self.beta_end, self.discrete
        require(
            "path.",
            self,
            ("beta_start", rising, f"above 0 and at most beta_end {self.beta_end}"),
            ("beta_end", self.beta_end < 1, "below 1"),
            ("zero_terminal_snr", chain or not self.zero_terminal_snr, f"False for {self.kind!r}"),
        )

    @property
    def discrete(self) -> bool:
        return self.kind == "ddpm"

    @property
    def ends_in_noise(self) -> bool:
        """Whether no signal is left at t = 1, so that eps does not determine x0 there."""
        return self.zero_terminal_snr or not self.discrete


class Level(NamedTuple):
    """A noise level of a path; all of one shape."""

    t: Float[Array, "..."]
    alpha: Float[Array, "..."]
    sigma: Float[Array, "..."]
    logsnr: Float[Array, "..."]  # log(alpha / sigma), infinite at data


@functools.cache
def betas(config: PathConfig) -> Float[np.ndarray, "i"]:
    """Variances of the chain's steps, float64 ``[timesteps]``."""
    count = config.timesteps
    if config.betas == "linear":
        values = np.linspace(config.beta_start, config.beta_end, count)
    elif config.betas == "scaled_linear":
        values = np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    else:
        grid = np.arange(count + 1) / count
        signal = np.cos((grid + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
        values = np.minimum(1 - signal[1:] / signal[:-1], COSINE_BETA_MAX)
    if config.zero_terminal_snr:
        root = np.sqrt(np.cumprod(1 - values))
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        values = 1 - np.concatenate([root[:1], root[1:] / root[:-1]]) ** 2
    return values


def alphas_cumprod(config: PathConfig) -> Float[np.ndarray, "i"]:
    """alpha^2 at the indices of the chain (2), float64 ``[timesteps]``."""
    return np.cumprod(1 - betas(config))


def level(config: PathConfig, t: Times) -> Level:
    """alpha, sigma and log(alpha / sigma) at ``t`` in [0, 1], exact at both ends; between the indices
    of the chain, alpha^2 and sigma^2 are linear in t."""
    if not config.discrete:
        return Level(t, 1 - t, t, jnp.log(1 - t) - jnp.log(t))
    count = config.timesteps
    place, whole = t * count, jnp.round(t * count)
    # t is on the grid but for its rounding; without this, alpha near pure noise would lose digits.
    place = jnp.where(jnp.abs(place - whole) <= 4 * count * jnp.finfo(t.dtype).eps, whole, place)
    below = jnp.clip(jnp.floor(place), 0, count - 1)
    share, index = place - below, below.astype(jnp.int32)
    # Two tables: in float32, 1 - alpha^2 would lose the digits of sigma^2 near data.
    signal = np.append(1.0, alphas_cumprod(config))
    tables = (jnp.asarray(table, t.dtype) for table in (signal, 1 - signal))
    alpha2, sigma2 = ((1 - share) * table[index] + share * table[index + 1] for table in tables)
    logsnr = 0.5 * (jnp.log(alpha2) - jnp.log(sigma2))
    return Level(t, jnp.sqrt(alpha2), jnp.sqrt(sigma2), logsnr)


def on_grid(config: PathConfig, t: Times, up: bool) -> Times:
    """Rounds times to the chain's grid: up to an index, or down to one or to data."""
    if not config.discrete:
        return t
    steps = t * config.timesteps
    whole = jnp.clip(jnp.ceil(steps), 1) if up else jnp.floor(steps)
    return jnp.minimum(whole, config.timesteps) / config.timesteps


def interpolate(config: PathConfig, x0: Points, eps: Points, t: Times) -> Points:
    """The point x_t of the path (1)."""
    at = level(config, t[..., None])
    return at.alpha * x0 + at.sigma * eps


# --- Predictions ---


class Estimate(NamedTuple):
    """What a network's output says of points ``[b, l, p]`` at their levels."""

    x0: Float[Array, "..."]
    eps: Float[Array, "..."]
    velocity: Float[Array, "..."] | None = None  # dx/dt, on the straight path
    # Of a learned variance: -1 is the smallest, 1 the largest that it may be.
    fraction: Float[Array, "..."] | None = None


def prediction_of(path: PathConfig, kind: Prediction, x0: Points, eps: Points, t: Times) -> Points:
    """What a network of the kind should predict at x_t."""
    if kind in ("x0", "eps"):
        return x0 if kind == "x0" else eps
    if kind == "velocity":
        return eps - x0  # (3)
    at = level(path, t[..., None])
    return at.alpha * eps - at.sigma * x0  # (4)


def clean_and_noise(
    path: PathConfig, kind: Prediction, output: Points, xt: Points, t: Times
) -> tuple[Points, Points]:
    """x0 and eps from a prediction of the kind at ``xt``: (3) or (4) with (1), solved for them."""
    at = level(path, t[..., None])
    if kind == "x0":
        return output, (xt - at.alpha * output) / jnp.maximum(at.sigma, SMALLEST_SIGMA)
    if kind == "eps":
        return (xt - at.sigma * output) / jnp.maximum(at.alpha, SMALLEST_ALPHA), output
    if kind == "velocity":
        return xt - at.sigma * output, xt + at.alpha * output
    norm = at.alpha**2 + at.sigma**2
    return (at.alpha * xt - at.sigma * output) / norm, (at.sigma * xt + at.alpha * output) / norm


def velocity_of(
    path: PathConfig, kind: Prediction, output: Points, xt: Points, t: Times, floor: float = 1e-4
) -> Points:
    """dx/dt at ``xt`` from a prediction of the kind, on the straight path; ``floor`` bounds the sigma
    that the error of a predicted x0 is divided by."""
    assert not path.discrete, "the discrete chain has no velocity"
    if kind == "velocity":
        return output
    if kind == "x0":
        # (x_t - x0) / t, and not through eps, which the floor would make inconsistent with x0.
        return (xt - output) / jnp.maximum(t[..., None], floor)
    x0, eps = clean_and_noise(path, kind, output, xt, t)
    return eps - x0


# --- Times ---


@dataclasses.dataclass(frozen=True)
class TimeConfig:
    """The distribution of a segment's noise level t in training; sampling shares its shift."""

    distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0  # of logit(t) before the shift, as is std
    std: PositiveFloat = 1.0
    shift: PositiveFloat = 1.0  # r of (5): above 1 moves times towards noise
    # If set, r is ``shift`` for a segment of this many tokens and grows with the root of their number.
    reference_tokens: PositiveInt | None = None
    # The noise levels that are trained, if not all: those of one of two experts.
    lowest: UnitInterval = 0.0
    highest: UnitInterval = 1.0


def shift_time(t: Float[AnyArray, "*b"], r: Float[AnyArray, "*b"] | float) -> Float[AnyArray, "*b"]:
    """Moves times towards noise if r > 1, and keeps 0 and 1 (5)."""
    return r * t / (1 + (r - 1) * t)


def resolution_shift(
    config: TimeConfig, num_tokens: Int[Array | np.ndarray, "*b"] | np.integer
) -> Float[Array | np.ndarray, "*b"]:
    """r of (5) for segments of this many tokens."""
    if config.reference_tokens is None:
        return np.full(num_tokens.shape, config.shift, np.float32)
    # What is known on the host is computed there: nothing is compiled for it.
    xp = jnp if isinstance(num_tokens, jax.Array) else np
    count = xp.maximum(xp.asarray(num_tokens, np.float32), 1.0)
    return xp.asarray(config.shift * xp.sqrt(count / config.reference_tokens))


def sample_time(config: TimeConfig, key: jax.Array, num_tokens: Int[Array, ""]) -> Float[Array, ""]:
    """A noise level in (0, 1] for one segment."""
    if config.distribution == "uniform":
        t = 1.0 - jax.random.uniform(key)
    else:
        t = jax.nn.sigmoid(config.mean + config.std * jax.random.normal(key))
    t = shift_time(t, jnp.asarray(resolution_shift(config, num_tokens)))
    return config.lowest + (config.highest - config.lowest) * t
