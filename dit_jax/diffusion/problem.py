"""What every solver is given, and where each token stands in a step of the schedule.

A token with ceiling s stands at tau = min(t, s): a given token (s = 0) never moves, and a softly given
one waits until the schedule has come down to it. A token that waits keeps its value bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dit_jax.diffusion.paths import Level, PathConfig, level
from dit_jax.diffusion.predictions import Estimate

Denoiser = Callable[[Float[Array, "b l p"], Float[Array, ""]], Estimate]
"""``denoiser(x, t)``: what the network says of every token when the schedule stands at t."""

Noise = Callable[[], Float[Array, "b l p"]]
"""Standard normal noise of this step, for the solvers that take some."""

Variance = Literal["fixed_small", "fixed_large", "learned_range"]

History = Any
"""What a solver remembers from one step to the next: a pytree, () where it is nothing."""


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """The constants of solvers."""

    variance: Variance = "fixed_small"
    """Of the ancestral solver's noise: that of the posterior where x0 is known, that of the forward
    step, or between them as the network says."""
    eta: float = 0.0
    """Of ddim: 0 takes no noise, 1 that of the ancestral solver."""
    strength: float = 1.0
    """Of sde: its diffusion is ``strength`` sigma(t)."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(
                f"sampling.eta is {self.eta}: it is in [0, 1] (0 takes no noise, 1 all)."
            )
        if not self.strength >= 0:
            raise ValueError(
                f"sampling.sde_strength is {self.strength}: it is at least 0 (1 is usual)."
            )


class Problem(NamedTuple):
    """A path, how far each token may go on it, and the constants of the solver."""

    path: PathConfig
    ceilings: Float[Array, "b l"]
    config: SolverConfig = SolverConfig()

    def at(self, t: Float[Array, ""]) -> Level:
        """Where each token stands, ``[b, l, 1]``."""
        return level(self.path, self.tau(t)).each()

    def tau(self, t: Float[Array, ""]) -> Float[Array, "b l"]:
        return jnp.minimum(t, self.ceilings)


class Interval(NamedTuple):
    """A step as each token takes it; all ``[b, l, 1]``."""

    now: Level
    next: Level
    moves: Bool[Array, "..."]
    h: Float[Array, "..."]
    """By how much log(alpha / sigma) rises; 1 where the token does not move, so that all is finite."""

    def take(
        self, after: Float[Array, "b l p"], before: Float[Array, "b l p"]
    ) -> Float[Array, "b l p"]:
        """The new value of tokens that move, the old of those that wait."""
        return jnp.where(self.moves, after, before)


def interval(problem: Problem, t: Float[Array, ""], t_next: Float[Array, ""]) -> Interval:
    """The step from one level of the schedule to the next."""
    now, after = problem.at(t), problem.at(t_next)
    moves = after.t < now.t
    h = jnp.where(moves, after.logsnr - now.logsnr, 1)
    return Interval(now, after, moves, h)
