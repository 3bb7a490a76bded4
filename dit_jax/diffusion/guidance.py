"""Guidance: combines the predictions with and without the condition into one.

With the conditional prediction c and the unconditional one u::

    g = u + scale (c - u)                               (1)  Ho & Salimans 2022
    g <- (phi std(c) / std(g) + 1 - phi) g              (2)  Lin et al. 2023, section 3.4

(1) may be limited to the first channels (DiT and SiT guide three of four) and to an interval of noise
levels (Kynkäänniemi et al. 2024). The deviations of (2) are those of each segment's generated tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dit_jax.types import PAD, require

Tokens = Float[Array, "b l p"]
ByToken = Float[Array, "b l"]
Ids = Int[Array, "b l"]


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """How strong guidance is, and where it applies: ``cfg_*`` of ``SamplingConfig``."""

    scale: float = 4.0
    channels: int | None = None  # guide this many, the first ones; None: all
    interval: tuple[float, float] = (0.0, 1.0)  # guide at noise levels low < t <= high
    rescale: float = 0.0  # phi of (2)

    def __post_init__(self) -> None:
        low, high = self.interval
        rule = "noise levels 0 <= low < high <= 1"
        require("sampling.cfg_", self, ("interval", 0 <= low < high <= 1, rule))

    @property
    def active(self) -> bool:
        return self.scale != 1

    def guided_at(self, t: float) -> bool:
        """Whether guidance changes anything at this noise level."""
        # Compared as float32, as the compiled step compares: both must agree on every level.
        low, high = (np.float32(bound) for bound in self.interval)
        return self.active and bool(low < np.float32(t) <= high)


def deviation(x: Tokens, counted: Bool[Array, "b l"], segment_ids: Ids, segments: int) -> ByToken:
    """The standard deviation of each token's segment, over all numbers of its counted tokens."""
    member = (segment_ids[..., None] == jnp.arange(1, segments + 1)).astype(x.dtype)  # [b, l, n]

    def segment_sum(values: ByToken) -> ByToken:
        values = jnp.where(counted, values, 0)
        return jnp.einsum("bln,bn->bl", member, jnp.einsum("bln,bl->bn", member, values))

    count = jnp.maximum(segment_sum(jnp.ones_like(x[..., 0])), 1)
    mean = segment_sum(x.mean(-1)) / count
    return jnp.sqrt(segment_sum(jnp.square(x - mean[..., None]).mean(-1)) / count)


def guide(
    config: GuidanceConfig,
    conditional: Tokens,
    unconditional: Tokens,
    t: Float[Array, ""],
    tau: ByToken,
    segment_ids: Ids,
    segments: int,
    channels: int,
) -> Tokens:
    """The guided prediction at level ``t`` of the schedule, of rows with at most so many ``segments``
    and of tokens whose numbers are ordered (t, h, w, c), with so many ``channels``."""
    guided = unconditional + config.scale * (conditional - unconditional)  # (1)
    if config.rescale:
        counted = (segment_ids != PAD) & (tau > 0)
        expected = deviation(conditional, counted, segment_ids, segments)
        actual = deviation(guided, counted, segment_ids, segments)
        ratio = expected / jnp.where(actual > 0, actual, 1)
        guided = guided * (config.rescale * ratio + (1 - config.rescale))[..., None]  # (2)
    if config.channels is not None:
        first = np.arange(conditional.shape[-1]) % channels < config.channels
        guided = jnp.where(first, guided, conditional)
    if config.interval != (0.0, 1.0):
        low, high = config.interval
        guided = jnp.where((low < t) & (t <= high), guided, conditional)
    return guided
