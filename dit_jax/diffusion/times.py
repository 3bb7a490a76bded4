"""The times that training visits, and their shift towards noise.

Times are drawn uniformly or logit-normally and shifted towards noise by the resolution
(Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1 and eq. 23). On a discrete
path they are rounded up to its grid, so that uniform times are uniform indices.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class TimeConfig:
    """How training draws the noise level t of a segment; sampling shares its shift."""

    distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    """Of logit(t) before the shift, for logit_normal."""
    std: float = 1.0
    shift: float = 1.0
    """r of t' = r t / (1 + (r - 1) t): above 1 moves times towards noise."""
    reference_tokens: int | None = None
    """If given, r is ``shift`` for a segment of so many tokens and grows with the square root of
    their number; if not, every segment has the same r."""

    def __post_init__(self) -> None:
        if not (self.shift > 0 and self.std > 0):
            raise ValueError(
                f"time.shift {self.shift} and time.std {self.std} must be above 0 (1 is neutral)."
            )
        if self.reference_tokens is not None and self.reference_tokens < 1:
            raise ValueError(
                f"time.reference_tokens is {self.reference_tokens}: give the tokens of a usual clip, "
                "or leave it unset for one shift at every size."
            )


def shift_time(t: Float[AnyArray, "*b"], r: Float[AnyArray, "*b"] | float) -> Float[AnyArray, "*b"]:
    """t' = r t / (1 + (r - 1) t); keeps 0 and 1."""
    return r * t / (1 + (r - 1) * t)


def resolution_shift(
    config: TimeConfig, num_tokens: Int[Array | np.ndarray, "*b"] | np.integer
) -> Float[Array, "*b"]:
    """The shift r of segments of so many tokens (eq. 23: the square root of their ratio)."""
    count = jnp.asarray(num_tokens, jnp.float32)
    if config.reference_tokens is None:
        return jnp.full(count.shape, config.shift, jnp.float32)
    return config.shift * jnp.sqrt(jnp.maximum(count, 1.0) / config.reference_tokens)


def draw_time(config: TimeConfig, key: jax.Array, num_tokens: Int[Array, ""]) -> Float[Array, ""]:
    """A noise level in (0, 1] for one segment."""
    if config.distribution == "uniform":
        t = 1.0 - jax.random.uniform(key)
    else:
        t = jax.nn.sigmoid(config.mean + config.std * jax.random.normal(key))
    return shift_time(t, resolution_shift(config, num_tokens))
