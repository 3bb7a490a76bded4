"""Guidance: how what is predicted with the condition and without it becomes one prediction.

Classifier-free guidance (Ho & Salimans 2022), of all channels or of the first few (as the code of
DiT and SiT guides three of four), in an interval of noise levels (Kynkäänniemi et al. 2024), rescaled
against overexposure (Lin et al. 2023, section 3.4), and CFG-Zero* for flows (Fan et al. 2025).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dit_jax.types import PAD


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """How strong guidance is, and where.

    Raises:
        ValueError: for values out of range, named as the fields of ``SamplingConfig``.
    """

    scale: float = 4.0
    channels: int | None = None
    """Only the first so many channels are guided; all if unset."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guided at noise levels low < t <= high."""
    rescale: float = 0.0
    """Share phi of the guided prediction that has its deviation set back to the conditional's."""
    zero_star: bool = False
    """Scale the unconditional velocity by its projection on the conditional (CFG-Zero*)."""
    zero_init: int = 0
    """First steps in which nothing moves (CFG-Zero*)."""

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ValueError(f"sampling.cfg_scale is {self.scale}: it is at least 0.")
        if self.channels is not None and self.channels < 1:
            raise ValueError(
                f"sampling.cfg_channels is {self.channels}: guide at least 1, or None for all."
            )
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"sampling.cfg_interval is {(low, high)}: noise levels 0 <= low < high <= 1."
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(
                f"sampling.cfg_rescale is {self.rescale}: it is in [0, 1] (0.7 is usual)."
            )
        if self.zero_init < 0:
            raise ValueError(
                f"sampling.cfg_zero_init is {self.zero_init}: a number of steps, at least 0."
            )

    @property
    def active(self) -> bool:
        return self.scale != 1

    def guided_at(self, t: float) -> bool:
        """Whether the level is within the interval (and guidance does anything).

        Compared as float32, as the compiled step compares.
        """
        low, high = (np.float32(bound) for bound in self.interval)
        return self.active and bool(low < np.float32(t) <= high)


def classifier_free(
    conditional: Float[Array, "b l p"],
    unconditional: Float[Array, "b l p"],
    cfg_scale: Float[Array, ""] | float,
) -> Float[Array, "b l p"]:
    """Extrapolates from the unconditional to the conditional prediction; scale 1 is unguided."""
    return unconditional + cfg_scale * (conditional - unconditional)


def segment_sum(
    values: Float[Array, "b l"], segment_ids: Int[Array, "b l"], segments: int
) -> Float[Array, "b l"]:
    """The sum over each token's own segment, at that token; 0 at padding."""
    member = (segment_ids[..., None] == jnp.arange(1, segments + 1)).astype(values.dtype)
    return jnp.einsum("bln,bn->bl", member, jnp.einsum("bln,bl->bn", member, values))


def optimised_scale(
    conditional: Float[Array, "b l p"],
    unconditional: Float[Array, "b l p"],
    counted: Bool[Array, "b l"],
    segment_ids: Int[Array, "b l"],
    segments: int,
) -> Float[Array, "b l"]:
    """s* = <v_c, v_u> / |v_u|^2 over each segment's counted tokens (Fan et al. 2025, eq. 12)."""
    along = jnp.where(counted, (conditional * unconditional).sum(-1), 0)
    norm = jnp.where(counted, jnp.square(unconditional).sum(-1), 0)
    total = segment_sum(norm, segment_ids, segments)
    return segment_sum(along, segment_ids, segments) / jnp.where(total > 0, total, 1)


def deviation(
    x: Float[Array, "b l p"],
    counted: Bool[Array, "b l"],
    segment_ids: Int[Array, "b l"],
    segments: int,
) -> Float[Array, "b l"]:
    """The standard deviation over all numbers of each segment's counted tokens."""
    count = segment_sum(counted.astype(x.dtype), segment_ids, segments)
    count = jnp.maximum(count, 1)
    mean = segment_sum(jnp.where(counted, x.mean(-1), 0), segment_ids, segments) / count
    square = jnp.square(x - mean[..., None]).mean(-1)
    return jnp.sqrt(segment_sum(jnp.where(counted, square, 0), segment_ids, segments) / count)


def guide(
    config: GuidanceConfig,
    conditional: Float[Array, "b l p"],
    unconditional: Float[Array, "b l p"],
    t: Float[Array, ""],
    tau: Float[Array, "b l"],
    segment_ids: Int[Array, "b l"],
    segments: int,
    channels: int,
) -> Float[Array, "b l p"]:
    """The guided prediction.

    Args:
        t: the noise level of the schedule, for the interval.
        tau: that of each token: given tokens (0) count in no segment's statistics.
        segments: the most segments of a row.
        channels: of the data; a token's numbers are ordered (t, h, w, c).

    Raises:
        ValueError: where more channels are to be guided than there are.
    """
    counted = (segment_ids != PAD) & (tau > 0)
    base = unconditional
    if config.zero_star:
        scale = optimised_scale(conditional, unconditional, counted, segment_ids, segments)
        base = scale[..., None] * unconditional
    guided = classifier_free(conditional, base, config.scale)
    if config.rescale:
        wanted = deviation(conditional, counted, segment_ids, segments)
        found = deviation(guided, counted, segment_ids, segments)
        ratio = wanted / jnp.where(found > 0, found, 1)
        guided = guided * (config.rescale * ratio + (1 - config.rescale))[..., None]
    if config.channels is not None:
        if config.channels > channels:
            raise ValueError(
                f"sampling.cfg_channels is {config.channels}, and the model's patches have "
                f"{channels} channels: guide at most so many, or None for all."
            )
        first = np.arange(conditional.shape[-1]) % channels < config.channels
        guided = jnp.where(first, guided, conditional)
    if config.interval != (0.0, 1.0):
        low, high = config.interval
        guided = jnp.where((low < t) & (t <= high), guided, conditional)
    return guided
