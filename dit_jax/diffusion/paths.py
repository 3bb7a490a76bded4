"""Paths between data and noise: x_t = alpha(t) x0 + sigma(t) eps, with t = 0 data and t = 1 noise.

Rectified flow (Liu et al. 2022; Lipman et al. 2022), the interpolants of SiT (Ma et al. 2024,
section 2.2 and appendix), and the discrete chain of DDPM (Ho et al. 2020) with the betas of
Nichol & Dhariwal 2021 (cosine, eq. 17), Rombach et al. 2022 (scaled linear) and the rescaling to
zero terminal SNR of Lin et al. 2023 (algorithm 1).

On the discrete chain of N steps, index i = 0 ... N - 1 stands at t = (i + 1) / N, and t = 0 is data,
which the chain itself does not visit. Between indices log(sigma / alpha) is linear in the index;
below the first, and above the last but one where the last has no signal, sigma / alpha and
alpha / sigma are linear instead, for the logarithm ends in infinity there.

What the network is told of a level (an index, a reversed clock) is the model's affair.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)

VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0
"""Of the variance-preserving interpolant (Song et al. 2021, section C)."""
VP_SMALLEST_T = 1e-5
"""Its derivative grows without bound towards data: that at this time stands for all earlier."""
COSINE_OFFSET, COSINE_BETA_MAX = 0.008, 0.999


@dataclasses.dataclass(frozen=True)
class PathConfig:
    """Which path, and for the discrete one which betas.

    Raises:
        ValueError: where a discrete chain has no steps, or betas that are no variances.
    """

    kind: Literal["rectified_flow", "gvp", "vp", "ddpm"] = "rectified_flow"
    """Straight; SiT's generalised variance-preserving (cos, sin) and variance-preserving; discrete."""
    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"
    """For ddpm: evenly spaced, evenly spaced roots, or those of a squared cosine."""
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal_snr: bool = False
    """For ddpm: rescale the betas so that the last step holds no signal."""

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise ValueError(
                f"path.timesteps is {self.timesteps}: a chain has at least 2 (1000 is usual)."
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"path.beta_start {self.beta_start} and beta_end {self.beta_end}: 0 < beta_start <= "
                "beta_end < 1 (1e-4 and 0.02 are usual)."
            )
        if self.zero_terminal_snr and self.kind != "ddpm":
            raise ValueError(
                f"path.zero_terminal_snr rescales the betas of ddpm, and path.kind is {self.kind!r}: "
                "leave it False (rectified_flow and gvp end in pure noise as they are)."
            )

    @property
    def discrete(self) -> bool:
        return self.kind == "ddpm"

    @property
    def ends_in_noise(self) -> bool:
        """Whether no signal at all is left at t = 1, so that x0 cannot be told from eps there."""
        return self.zero_terminal_snr or self.kind in ("rectified_flow", "gvp")


class Level(NamedTuple):
    """Where points stand on a path; all of one shape."""

    t: Float[Array, "..."]
    alpha: Float[Array, "..."]
    sigma: Float[Array, "..."]
    logsnr: Float[Array, "..."]
    """lambda = log(alpha / sigma), half the log of the signal-to-noise ratio; infinite at data."""

    def each(self) -> Level:
        """With an axis for the numbers of a token: ``[*b]`` to ``[*b, 1]``."""
        return Level(*(x[..., None] for x in self))


class Rates(NamedTuple):
    """Derivatives by t of a continuous path, and alpha sigma' - sigma alpha'."""

    alpha: Float[Array, "..."]
    sigma: Float[Array, "..."]
    wronskian: Float[Array, "..."]

    def each(self) -> Rates:
        return Rates(*(x[..., None] for x in self))


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
        kept = np.cos((grid + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
        values = np.minimum(1 - kept[1:] / kept[:-1], COSINE_BETA_MAX)
    if config.zero_terminal_snr:
        root = np.sqrt(np.cumprod(1 - values))
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        values = 1 - np.concatenate([root[:1], root[1:] / root[:-1]]) ** 2
    return values


@functools.cache
def alphas_cumprod(config: PathConfig) -> Float[np.ndarray, "i"]:
    """alpha(t)^2 at the indices of the chain (Ho et al. 2020, eq. 4), float64 ``[timesteps]``."""
    return np.cumprod(1 - betas(config))


@functools.cache
def chain_logsnr(config: PathConfig) -> Float[np.ndarray, "i"]:
    """log(alpha / sigma) at the indices of the chain; -inf where no signal is left."""
    kept = alphas_cumprod(config)
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(kept) - np.log1p(-kept))


def index_of(config: PathConfig, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The chain's index at t, -1 at data; whole where t is on the grid but for its rounding."""
    index = t * config.timesteps - 1
    whole = jnp.round(index)
    close = jnp.abs(index - whole) <= 4 * config.timesteps * jnp.finfo(t.dtype).eps
    return jnp.where(close, whole, index)


def on_grid(config: PathConfig, t: Float[Array, "*b"], up: bool) -> Float[Array, "*b"]:
    """Times rounded to the chain's grid: up to an index, or down to one or to data. Those of a
    continuous path as they are."""
    if not config.discrete:
        return t
    steps = t * config.timesteps
    whole = jnp.clip(jnp.ceil(steps), 1) if up else jnp.floor(steps)
    return jnp.minimum(whole, config.timesteps) / config.timesteps


def _chain_level(config: PathConfig, t: Float[Array, "*b"]) -> Level:
    last = config.timesteps - 1
    table = jnp.asarray(chain_logsnr(config), t.dtype)
    index = index_of(config, t)
    low = jnp.clip(jnp.floor(index), 0, last - 1)
    below = low.astype(jnp.int32)
    part = index - low
    first, second = table[below], table[below + 1]
    if config.zero_terminal_snr:
        to_noise = first + jnp.log1p(-jnp.clip(part, 0, 1))
        inside = jnp.where(below == last - 1, to_noise, first + part * _finite(second - first))
    else:
        inside = first + part * (second - first)
    to_data = table[0] - jnp.log(jnp.clip(index + 1, 0, 1))
    logsnr = jnp.where(index < 0, to_data, inside)
    noise, signal = jnp.exp(-2 * jnp.abs(logsnr)), 1 / (1 + jnp.exp(-2 * jnp.abs(logsnr)))
    large, small = jnp.sqrt(signal), jnp.sqrt(noise * signal)
    clean = logsnr > 0
    return Level(t, jnp.where(clean, large, small), jnp.where(clean, small, large), logsnr)


def _finite(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return jnp.where(jnp.isfinite(x), x, 0)


def vp_log_alpha(t: Float[AnyArray, "*b"]) -> Float[AnyArray, "*b"]:
    """log(alpha) of the variance-preserving interpolant."""
    return -0.25 * t**2 * (VP_BETA_MAX - VP_BETA_MIN) - 0.5 * t * VP_BETA_MIN


def level(config: PathConfig, t: Float[Array, "*b"]) -> Level:
    """alpha, sigma and log(alpha / sigma) at ``t`` in [0, 1], in the dtype of ``t``.

    Exact at both ends: sigma is 0 at t = 0, and alpha 0 at t = 1 where the path ends in noise.
    """
    if config.kind == "ddpm":
        return _chain_level(config, t)
    if config.kind == "rectified_flow":
        alpha, sigma = 1 - t, t
    elif config.kind == "gvp":
        alpha, sigma = jnp.sin(math.pi / 2 * (1 - t)), jnp.sin(math.pi / 2 * t)
    else:
        log_alpha = vp_log_alpha(t)
        alpha, sigma = jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))
    return Level(t, alpha, sigma, jnp.log(alpha) - jnp.log(sigma))


def rates(config: PathConfig, t: Float[Array, "*b"]) -> Rates:
    """Derivatives by t, in the dtype of ``t``.

    Raises:
        ValueError: for the discrete path, which has none.
    """
    if config.kind == "ddpm":
        raise ValueError(
            "path.kind 'ddpm' is discrete and has no velocity: use eps, v or x0, or another path."
        )
    if config.kind == "rectified_flow":
        one = jnp.ones_like(t)
        return Rates(-one, one, one)
    if config.kind == "gvp":
        turn = math.pi / 2
        return Rates(
            -turn * jnp.sin(turn * t), turn * jnp.sin(turn * (1 - t)), jnp.full_like(t, turn)
        )
    t = jnp.maximum(t, VP_SMALLEST_T)
    at = level(config, t)
    # d log(alpha) / dt; the rest follows from alpha^2 + sigma^2 = 1.
    decay = -0.5 * (VP_BETA_MIN + t * (VP_BETA_MAX - VP_BETA_MIN))
    return Rates(at.alpha * decay, -(at.alpha**2) * decay / at.sigma, -at.alpha * decay / at.sigma)


def interpolate(
    config: PathConfig, x0: Float[Array, "*b p"], eps: Float[Array, "*b p"], t: Float[Array, "*b"]
) -> Float[Array, "*b p"]:
    """The point x_t of the path; ``t`` in [0, 1]."""
    at = level(config, t).each()
    return at.alpha * x0 + at.sigma * eps


def time_of(config: PathConfig, ratio: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """The time at which sigma / alpha is ``ratio`` (0 to infinity), float64; inverse of ``level``."""
    ratio = np.asarray(ratio, np.float64)
    if config.kind == "rectified_flow":
        return np.where(np.isinf(ratio), 1.0, ratio / (1 + np.where(np.isinf(ratio), 0, ratio)))
    if config.kind == "gvp":
        return np.arctan(ratio) / (math.pi / 2)
    if config.kind == "vp":
        # log(alpha) = -a t^2 - b t
        a, b = 0.25 * (VP_BETA_MAX - VP_BETA_MIN), 0.5 * VP_BETA_MIN
        log_alpha = -0.5 * np.log1p(ratio**2)
        return (-b + np.sqrt(b**2 - 4 * a * log_alpha)) / (2 * a)
    steps = -chain_logsnr(config)
    with np.errstate(divide="ignore", invalid="ignore"):
        index = np.interp(np.log(ratio), steps, np.arange(config.timesteps))
    below = ratio < np.exp(steps[0])
    if config.zero_terminal_snr:
        top = steps[-2]
        with np.errstate(divide="ignore"):
            above = config.timesteps - 1 - np.exp(top) / ratio
        index = np.where(ratio > np.exp(top), above, index)
    return np.where(below, ratio / np.exp(steps[0]), index + 1) / config.timesteps
