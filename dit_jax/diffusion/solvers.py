"""Solvers of the reverse process under noise caps, the noise levels that they visit, and guidance.

A schedule t_0 > ... > t_K = 0 of noise levels is shared by all tokens. A token with noise cap s stands
at level ``min(t_k, s)``: a conditioning token (s = 0) never moves, and one with some noise keeps its
value bit for bit until the schedule has come down to its cap. With alpha, sigma and
lambda = log(alpha / sigma) at a token's level, the same primed at its next level, and
h = lambda' - lambda::

    x' = x + (t' - t) v,    v = dx/dt                                                  (1)
    x' = alpha' x0 + sigma' eps                                                        (2)
    x' = sigma' / sigma e^-h x + alpha' (1 - e^-2h) x0 + noise,                        (3)
         of a variance between sigma'^2 (1 - e^-2h) and sigma^2 (1 - e^-2h)            (4)
    x' = x + (t' - t) (v + w eps) + noise of variance 2 w sigma (t - t')               (5)
    x' = sigma' / sigma x + alpha' int_0^h e^(s - h) x0(lambda + s) ds                 (6)

========= ======================================================================================
euler     order 1: (1), and (2) on the discrete chain, where it is Euler in sigma / alpha
heun      order 2, the improved Euler method (Karras et al. 2022, algorithm 1), same variables
ddim      order 1: (2) (Song et al. 2021, eq. 12); eta > 0 renews a share of eps (eq. 16)
ddpm      ancestral sampling (Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, eq. 15): (3), between
          any two levels of any path (Kingma et al. 2021, appendix A)
sde       Euler-Maruyama of SiT's reverse equation (Ma et al. 2024, eq. 6): (5), w = strength
dpmpp_2m  order 2, DPM-Solver++ (Lu et al. 2022b, algorithm 2): (6), x0 on a line through the
          predictions at this level and the one before
unipc     order 3, UniPC-2 with B_2(h) (Zhao et al. 2023, algorithms 5 and 6): predicts like
          dpmpp_2m, then corrects the point by the prediction that is made at it
========= ======================================================================================

The steps to data and from no signal at all have an infinite h; multistep solvers take them at order 1.

Guidance combines the conditional prediction c and the unconditional one u, in all channels or the first
(DiT and SiT guide three of four), at all noise levels or in an interval (Kynkäänniemi et al. 2024)::

    g = u + scale (c - u)                              Ho & Salimans 2022              (7)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dit_jax.diffusion.paths import Estimate, Level, PathConfig, Variance, level, shift_time
from dit_jax.types import NonNegativeFloat, PositiveInt

Spacing = Literal["linear", "flow", "trailing", "linspace"]
FLOW_STEPS = 1000  # in whole ones of which "flow" counts time
Tokens = Float[Array, "b l p"]
ByToken = Float[Array, "b l"]
Scalar = Float[Array, ""]


class Solver(NamedTuple):
    """What a solver costs, and what it needs."""

    evaluations: int = 1  # of the denoiser, in a step
    memory: int = 0  # how many evaluations it remembers
    continuous: bool = False  # whether it needs dx/dt, which the discrete chain does not have


SOLVERS = {
    "euler": Solver(),
    "heun": Solver(evaluations=2),
    "ddim": Solver(),
    "ddpm": Solver(),
    "sde": Solver(continuous=True),
    "dpmpp_2m": Solver(memory=1),
    "unipc": Solver(memory=2),
}


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """A solver of ``SOLVERS`` and its constants, as ``SamplingConfig`` bounds them."""

    name: str = "euler"
    # Of ddpm, in (4): the smallest (the posterior's if x0 is known), the largest (the forward step's),
    # or between them as the network predicts.
    variance: Variance = "fixed_small"
    eta: float = 0.0  # of ddim: 0 takes no noise, 1 as much as ddpm
    strength: float = 1.0  # w of sde, in (5)


class Evaluation(NamedTuple):
    """An earlier evaluation of the denoiser, as multistep solvers remember it."""

    t: Scalar
    x: Tokens
    x0: Tokens


History = tuple[Evaluation, ...]  # the newest first; as many as the solver remembers


class Interval(NamedTuple):
    """One step of the schedule, as each token takes it; all ``[b, l, 1]``."""

    now: Level
    next: Level
    moves: Bool[Array, "..."]  # False for tokens whose cap is below both levels
    h: Float[Array, "..."]  # 1 for tokens that do not move, so that all stays finite


def interval(path: PathConfig, caps: ByToken, t: Scalar, t_next: Scalar) -> Interval:
    """The step between two levels of the schedule."""
    now, after = (level(path, jnp.minimum(at, caps)[..., None]) for at in (t, t_next))
    # By lambda: on the chain, times within rounding of each other are one level, of which h is 0.
    moves = after.logsnr > now.logsnr
    return Interval(now, after, moves, jnp.where(moves, after.logsnr - now.logsnr, 1))


def start(
    path: PathConfig, clean: Tokens, eps: Tokens, caps: ByToken, t: Scalar | float = 1.0
) -> Tokens:
    """The point from which a solver starts at level ``t``: every token is noised up to its cap."""
    at = level(path, jnp.minimum(t, caps)[..., None])
    # Generated tokens are pure noise even on a chain that leaves some signal at t = 1.
    return jnp.where(caps[..., None] < 1, at.alpha * clean + at.sigma * eps, eps)


def start_history(solver: str, x: Tokens, t: Scalar) -> History:
    """The history before the first step: no token has moved yet."""
    # 0 * x and not zeros: a constant would not be sharded as x is.
    return (Evaluation(t, 0 * x, 0 * x),) * SOLVERS[solver].memory


def step(
    config: SolverConfig,
    path: PathConfig,
    caps: ByToken,
    denoiser: Callable[[Tokens, Scalar], Estimate],
    x: Tokens,
    history: History,
    t: Scalar,
    t_next: Scalar,
    noise: Callable[[], Tokens],
) -> tuple[Tokens, History]:
    """A solver's step from level ``t`` of the schedule to ``t_next``: x there, and the next history.

    ``denoiser(x, t)`` is the network's prediction for every token at level t of the schedule;
    ``noise()`` is the step's standard normal noise, for solvers that take noise.
    """
    now, after, moves, h = interval(path, caps, t, t_next)
    by, last = after.t - now.t, t_next <= 0
    out: Any = denoiser(x, t)  # with a velocity on the straight path
    ratio = after.sigma / jnp.where(moves, now.sigma, 1)  # no noise, no move: finite all the same

    if config.name in ("euler", "heun"):
        if path.discrete:
            euler = after.alpha * out.x0 + after.sigma * out.eps  # (2)
        else:
            euler = x + by * out.velocity  # (1)
        x_next = ahead = jnp.where(moves, euler, x)

        def heun() -> Tokens:
            then: Any = denoiser(ahead, t_next)
            if not path.discrete:
                return x + by * (0.5 * (out.velocity + then.velocity))
            # In x / alpha, whose derivative by sigma / alpha is eps. From no signal at all
            # sigma / alpha is infinite: that step stays Euler's.
            signal = now.alpha > 0
            slope = after.sigma - after.alpha * (now.sigma / jnp.where(signal, now.alpha, 1))
            return jnp.where(signal, ahead + 0.5 * slope * (then.eps - out.eps), ahead)

        if config.name == "heun":  # the last step stays Euler's: at 0 dx/dt may be undefined
            x_next = jax.lax.cond(t_next > 0, heun, lambda: ahead)

    elif config.name == "ddim":
        eps = out.eps
        if config.eta:
            renewed = config.eta**2 * -jnp.expm1(-2 * h)
            eps = jnp.sqrt(1 - renewed) * eps + jnp.sqrt(renewed) * noise()
        x_next = after.alpha * out.x0 + after.sigma * eps  # (2)

    elif config.name == "ddpm":
        gained = -jnp.expm1(-2 * h)
        mean = ratio * jnp.exp(-h) * x + after.alpha * gained * out.x0  # (3)
        # Logarithms of (4): the network predicts the variance between them geometrically.
        small, large = (2 * jnp.log(at.sigma) + jnp.log(gained) for at in (after, now))
        log_variance = small if config.variance == "fixed_small" else large
        if config.variance == "learned_range":
            part = (out.fraction + 1) / 2
            # In the last step small is -inf, and 0 times it would be nan.
            log_variance = part * large + (1 - part) * jnp.where(last, large, small)
        x_next = mean + jnp.where(last, 0, jnp.exp(0.5 * log_variance)) * noise()

    elif config.name == "sde":
        # The diffusion w(t) = strength sigma(t) times the score -eps / sigma is -strength eps.
        mean = x + by * (out.velocity + config.strength * out.eps)  # (5)
        deviation = jnp.sqrt(jnp.maximum(2 * config.strength * now.sigma * -by, 0))
        x_next = mean + jnp.where(last, 0, deviation) * noise()

    else:
        # (6), with x0 as a polynomial through the last predictions. A token whose history does not
        # reach back that far, because it only just began to move, takes a step of lower order.
        x0, before = out.x0, history[0]
        then, _, moved, h1 = interval(path, caps, before.t, t)
        if config.name == "unipc":
            # The evaluation first corrects the point at which it was made. UniC-2: weights of the two
            # differences of x0 that make a parabola through three predictions. They solve
            # [[1, 1], [r, 1]] weights = moments, with B_2(h) = e^-h - 1 as the unit.
            first = interval(path, caps, history[1].t, before.t)
            known = first.moves & jnp.isfinite(h1)
            hh = jnp.where(known, h1, 1)
            unit = jnp.expm1(-hh)
            moments = -unit / hh - 1, 2 * ((unit / hh + 1) / hh - 0.5)
            r = jnp.where(known, -first.h / hh, -1)
            weight = (moments[0] - moments[1]) / (1 - r) / unit
            change = x0 - before.x0
            parabola = (
                weight * (history[1].x0 - before.x0) / r + (moments[0] / unit - weight) * change
            )
            # UniC-1, half the change, is for tokens with two predictions.
            bend = jnp.where(known, parabola, 0.5 * change)
            ratio1 = now.sigma / jnp.where(moved, then.sigma, 1)
            gain = now.alpha * jnp.expm1(-h1)
            x = jnp.where(moved, ratio1 * before.x - gain * before.x0 - gain * bend, x)
        slope = (x0 - before.x0) * jnp.where(moved & jnp.isfinite(h), h / h1, 0)
        x_next = ratio * x - after.alpha * jnp.expm1(-h) * (x0 + 0.5 * slope)
        history = (Evaluation(t, x, x0), *history)[: len(history)]

    return jnp.where(moves, x_next, x), history


def noise_levels(
    path: PathConfig, spacing: Spacing, steps: int, shift: float = 1.0, last: float | None = None
) -> Float[np.ndarray, "k"]:
    """``steps + 1`` noise levels from 1 to 0, float32.

    Linear ones are evenly spaced (with ``last``, to it, and then to 0: SiT's sampler, 0.04), then
    shifted towards noise (Esser et al. 2024, eq. 23). The others pick indices of the discrete chain
    (Lin et al. 2023, table 2); linspace is how the code of DiT respaces its chain. flow is what the
    schedulers of published flow models make: evenly from nearly 1 to 1/1000, the last left out.
    """
    if spacing == "flow":
        levels = shift_time(np.linspace(1.0, 1 / FLOW_STEPS, steps + 1)[:-1], shift)
        return np.append(np.minimum(levels, 1 - 1e-6), 0.0).astype(np.float32)
    if spacing == "linear":
        levels = np.linspace(1.0, 0.0, steps + 1)
        if last is not None:
            levels = np.append(np.linspace(1.0, last, steps), 0.0)
        return np.asarray(shift_time(levels, shift), np.float32)
    count = path.timesteps
    if spacing == "trailing":
        indices = np.round(np.arange(steps) * -(count / steps) + count) - 1
    else:
        indices = np.round(np.linspace(count - 1, 0, steps))
    return np.append((indices + 1) / count, 0.0).astype(np.float32)


# --- Guidance ---


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """How strong guidance is, and where it applies: fields of ``SamplingConfig``."""

    cfg_scale: NonNegativeFloat = 4.0  # Guidance; 1 is none and halves the work.
    cfg_channels: PositiveInt | None = None  # Guide the first so many (DiT: 3 of 4). None: all.
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at noise levels low < t <= high; outside, steps have half the work."""

    def guided_at(self, t: float) -> bool:
        """Whether guidance changes anything at this noise level."""
        # Compared as float32, as the compiled step compares: both must agree on every level.
        low, high = (np.float32(bound) for bound in self.cfg_interval)
        return self.cfg_scale != 1 and bool(low < np.float32(t) <= high)


def guide(
    config: GuidanceConfig,
    conditional: Tokens,
    unconditional: Tokens,
    t: Float[Array, ""],
    channels: int,
) -> Tokens:
    """The guided prediction at level ``t`` of the schedule; the numbers of a token are ordered
    (t, h, w, c), with so many ``channels``."""
    guided = unconditional + config.cfg_scale * (conditional - unconditional)  # (7)
    if config.cfg_channels is not None:
        first = np.arange(conditional.shape[-1]) % channels < config.cfg_channels
        guided = jnp.where(first, guided, conditional)
    if config.cfg_interval != (0.0, 1.0):
        low, high = config.cfg_interval
        guided = jnp.where((low < t) & (t <= high), guided, conditional)
    return guided
