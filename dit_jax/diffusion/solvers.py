"""Solvers of the reverse process under noise caps, and the noise levels that they visit.

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
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dit_jax.diffusion.paths import Estimate, Level, PathConfig, Variance, level, shift_time
from dit_jax.types import require

Spacing = Literal["linear", "trailing", "linspace"]
Tokens = Float[Array, "b l p"]
Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """The constants of solvers; errors name the fields of ``SamplingConfig``."""

    variance: Variance = "fixed_small"
    """Of ddpm, in (4): the smallest (the posterior's if x0 is known), the largest (the forward
    step's), or between them as the network predicts."""
    eta: float = 0.0
    """Of ddim: 0 takes no noise, 1 as much as ddpm."""
    strength: float = 1.0
    """w of sde, in (5)."""

    def __post_init__(self) -> None:
        require("sampling.", self, ("eta", 0 <= self.eta <= 1, "in [0, 1] (0 takes no noise)"))
        require("sampling.sde_", self, ("strength", self.strength >= 0, "at least 0"))


# --- What a step works on ---


class Interval(NamedTuple):
    """One step of the schedule, as each token takes it; all ``[b, l, 1]``."""

    now: Level
    next: Level
    moves: Bool[Array, "..."]
    """False for tokens whose cap is below both levels."""
    h: Float[Array, "..."]
    """The rise of log(alpha / sigma); 1 for tokens that do not move, so that all stays finite."""

    def update(self, x: Tokens, x_next: Tokens) -> Tokens:
        """The new value of tokens that move, the old value of the others."""
        return jnp.where(self.moves, x_next, x)


class SolverContext(NamedTuple):
    """What stays the same over all steps of a solver."""

    path: PathConfig
    caps: Float[Array, "b l"]
    """Noise cap of each token."""
    config: SolverConfig = SolverConfig()

    def tau(self, t: Scalar) -> Float[Array, "b l"]:
        """The noise level of each token when the schedule stands at t."""
        return jnp.minimum(t, self.caps)

    def interval(self, t: Scalar, t_next: Scalar) -> Interval:
        """The step between two levels of the schedule."""
        now, after = (level(self.path, self.tau(at)).each() for at in (t, t_next))
        moves = after.t < now.t
        return Interval(now, after, moves, jnp.where(moves, after.logsnr - now.logsnr, 1))


class Evaluation(NamedTuple):
    """An earlier evaluation of the denoiser, as multistep solvers remember it."""

    t: Scalar
    x: Tokens
    x0: Tokens


History = tuple[Evaluation, ...]
"""The last evaluations, the newest first; as many as the solver remembers."""


class StepInput(NamedTuple):
    """The input of one step of a solver."""

    context: SolverContext
    denoiser: Callable[[Tokens, Scalar], Estimate]
    """``denoiser(x, t)``: the network's prediction for every token at level t of the schedule."""
    x: Tokens
    history: History
    t: Scalar
    t_next: Scalar
    noise: Callable[[], Tokens]
    """Standard normal noise of this step; called by solvers that take noise."""

    @property
    def interval(self) -> Interval:
        return self.context.interval(self.t, self.t_next)


StepOutput = tuple[Tokens, History]
"""x at the next level, and the history for the next step."""


def start(
    path: PathConfig, clean: Tokens, eps: Tokens, caps: Float[Array, "b l"], t: Scalar | float = 1.0
) -> Tokens:
    """The point from which a solver starts at level ``t``: every token is noised up to its cap."""
    at = level(path, jnp.minimum(t, caps)).each()
    # Generated tokens are pure noise even on a chain that leaves some signal at t = 1.
    return jnp.where(caps[..., None] < 1, at.alpha * clean + at.sigma * eps, eps)


# --- One-step solvers ---


def _euler_point(s: StepInput, step: Interval, now: Estimate) -> Tokens:
    if s.context.path.discrete:
        return step.next.alpha * now.x0 + step.next.sigma * now.eps  # (2)
    assert now.velocity is not None
    return s.x + (step.next.t - step.now.t) * now.velocity  # (1)


def euler(s: StepInput) -> StepOutput:
    """Euler's method, one evaluation."""
    step, now = s.interval, s.denoiser(s.x, s.t)
    return step.update(s.x, _euler_point(s, step, now)), s.history


def heun(s: StepInput) -> StepOutput:
    """Heun's method, two evaluations; one in the last step, where dx/dt may be undefined at 0."""
    step, now = s.interval, s.denoiser(s.x, s.t)
    ahead = step.update(s.x, _euler_point(s, step, now))

    def correct(_: None) -> Tokens:
        then = s.denoiser(ahead, s.t_next)
        if not s.context.path.discrete:
            assert now.velocity is not None and then.velocity is not None
            mean = 0.5 * (now.velocity + then.velocity)
            return step.update(s.x, s.x + (step.next.t - step.now.t) * mean)
        # In x / alpha, whose derivative by sigma / alpha is eps. From no signal at all sigma / alpha
        # is infinite: that step stays Euler's.
        signal = step.now.alpha > 0
        ratio = step.now.sigma / jnp.where(signal, step.now.alpha, 1)
        by = step.next.sigma - step.next.alpha * ratio
        corrected = ahead + 0.5 * by * (then.eps - now.eps)
        return step.update(s.x, jnp.where(signal, corrected, ahead))

    return jax.lax.cond(s.t_next > 0, correct, lambda _: ahead, None), s.history


def ddim(s: StepInput) -> StepOutput:
    """DDIM, one evaluation."""
    step, now = s.interval, s.denoiser(s.x, s.t)
    eps, eta = now.eps, s.context.config.eta
    if eta:
        renewed = eta**2 * -jnp.expm1(-2 * step.h)
        eps = jnp.sqrt(1 - renewed) * eps + jnp.sqrt(renewed) * s.noise()
    return step.update(s.x, step.next.alpha * now.x0 + step.next.sigma * eps), s.history  # (2)


def ddpm(s: StepInput) -> StepOutput:
    """Ancestral sampling, one evaluation; the last step takes no noise."""
    step, now = s.interval, s.denoiser(s.x, s.t)
    variance, last = s.context.config.variance, s.t_next <= 0
    ratio = step.next.sigma / jnp.where(step.moves, step.now.sigma, 1)
    gained = -jnp.expm1(-2 * step.h)
    mean = ratio * jnp.exp(-step.h) * s.x + step.next.alpha * gained * now.x0  # (3)
    # Logarithms of (4): the network predicts the variance between them geometrically.
    small, large = (2 * jnp.log(at.sigma) + jnp.log(gained) for at in (step.next, step.now))
    if variance == "learned_range":
        assert now.fraction is not None, "a learned variance needs a second output"
        part = (now.fraction + 1) / 2
        # In the last step small is -inf, and 0 times it would be nan.
        log_variance = part * large + (1 - part) * jnp.where(last, large, small)
    else:
        log_variance = small if variance == "fixed_small" else large
    deviation = jnp.where(last, 0, jnp.exp(0.5 * log_variance))
    return step.update(s.x, mean + deviation * s.noise()), s.history


def sde(s: StepInput) -> StepOutput:
    """Euler-Maruyama, one evaluation, on continuous paths (5); the last step takes no noise."""
    step, now = s.interval, s.denoiser(s.x, s.t)
    assert now.velocity is not None
    strength, by = s.context.config.strength, step.now.t - step.next.t
    # The diffusion w(t) = strength sigma(t) times the score -eps / sigma is -strength eps.
    mean = s.x - by * (now.velocity + strength * now.eps)
    deviation = jnp.sqrt(jnp.maximum(2 * strength * step.now.sigma * by, 0))
    x = mean + jnp.where(s.t_next > 0, deviation, 0) * s.noise()
    return step.update(s.x, x), s.history


# --- Multistep solvers ---
# (6), with x0 as a polynomial through the last predictions. A token whose history does not reach back
# that far, because it only just began to move, takes a step of lower order.


def _constant_x0(step: Interval, x: Tokens, x0: Tokens) -> Tokens:
    ratio = step.next.sigma / jnp.where(step.moves, step.now.sigma, 1)
    return ratio * x - step.next.alpha * jnp.expm1(-step.h) * x0


def _linear_x0(s: StepInput, x0: Tokens, before: Evaluation) -> Tokens:
    """(6) with x0 on the line through this prediction and the one before."""
    step, last = s.interval, s.context.interval(before.t, s.t)
    known = last.moves & jnp.isfinite(step.h)
    slope = (x0 - before.x0) * jnp.where(known, step.h / last.h, 0)
    middle = x0 + 0.5 * slope
    return step.update(s.x, _constant_x0(step, s.x, middle))


def dpmpp_2m(s: StepInput) -> StepOutput:
    """DPM-Solver++(2M), one evaluation."""
    (before,) = s.history
    x0 = s.denoiser(s.x, s.t).x0
    return _linear_x0(s, x0, before), (Evaluation(s.t, s.x, x0),)


def unipc(s: StepInput) -> StepOutput:
    """UniPC, one evaluation, which first corrects the point at which it was made."""
    before, earlier = s.history
    x0 = s.denoiser(s.x, s.t).x0
    last = s.context.interval(before.t, s.t)
    first = s.context.interval(earlier.t, before.t)
    known = first.moves & jnp.isfinite(last.h)
    # UniC-2: weights of the two differences of x0 that make a parabola through three predictions.
    # They solve [[1, 1], [ratio, 1]] weights = moments, with B_2(h) = e^-h - 1 as the unit.
    h = jnp.where(known, last.h, 1)
    unit = jnp.expm1(-h)
    moments = -unit / h - 1, 2 * ((unit / h + 1) / h - 0.5)
    ratio = jnp.where(known, -first.h / h, -1)
    weight = (moments[0] - moments[1]) / (1 - ratio) / unit
    change = x0 - before.x0
    parabola = weight * (earlier.x0 - before.x0) / ratio + (moments[0] / unit - weight) * change
    # UniC-1, half the change, is for tokens with two predictions.
    bend = jnp.where(known, parabola, 0.5 * change)
    base = _constant_x0(last, before.x, before.x0)
    x = last.update(s.x, base - last.next.alpha * jnp.expm1(-last.h) * bend)
    s = s._replace(x=x)
    return _linear_x0(s, x0, before), (Evaluation(s.t, x, x0), before)


class Solver(NamedTuple):
    """A step function, how much it remembers, and what it costs."""

    step: Callable[[StepInput], StepOutput]
    memory: int = 0
    """How many evaluations it remembers."""
    evaluations: int = 1
    """Of the denoiser, in a step."""
    continuous: bool = False
    """Whether it needs dx/dt, which the discrete chain does not have."""

    def begin(self, x: Tokens, t: Scalar) -> History:
        """The history before the first step: no token has moved yet."""
        # 0 * x and not zeros: a constant would not be sharded as x is.
        return (Evaluation(t, 0 * x, 0 * x),) * self.memory


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler),
    "heun": Solver(heun, evaluations=2),
    "ddim": Solver(ddim),
    "ddpm": Solver(ddpm),
    "sde": Solver(sde, continuous=True),
    "dpmpp_2m": Solver(dpmpp_2m, memory=1),
    "unipc": Solver(unipc, memory=2),
}


# --- Noise levels ---


def noise_levels(
    path: PathConfig, spacing: Spacing, steps: int, shift: float = 1.0, last: float | None = None
) -> Float[np.ndarray, "k"]:
    """``steps + 1`` noise levels from 1 to 0, float32.

    Linear ones are evenly spaced (with ``last``, to it, and then to 0: SiT's sampler, 0.04), then
    shifted towards noise (Esser et al. 2024, eq. 23). The others pick indices of the discrete chain
    (Lin et al. 2023, table 2); linspace is how the code of DiT respaces its chain.
    """
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
