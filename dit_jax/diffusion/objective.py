"""What training asks of the denoiser: noised batches and the velocity loss.

All randomness of a segment comes from its sample's identity and the step's key, never from the
place where it was packed: a sample's loss does not depend on its neighbours, nor on the number
of devices.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from dit_jax.diffusion.ceilings import CeilingConfig, draw_pattern, held_frames
from dit_jax.diffusion.paths import TimeConfig, draw_time, interpolate, velocity_from_x0
from dit_jax.types import PAD, Noised, PackedBatch

GROUPS_PER_SEGMENT = 2
"""Of a segment's tokens, the free ones share a noise level, and the given ones another."""
SMALLEST_T = 1e-4
"""Floor of the noise level that solvers divide by; a given token (level 0) does not move at all."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The objective."""

    prediction: Literal["velocity", "x0"] = "velocity"
    """What the network's output means. The loss is the velocity's either way; predict x0 where a
    patch has more numbers than the model has width (Li & He 2025, "Back to Basics")."""
    time: TimeConfig = TimeConfig()
    ceilings: CeilingConfig = CeilingConfig()
    caption_dropout: float = 0.1
    """Probability that a segment is trained without its caption, for guidance."""
    min_t: float = 0.05
    """Floor of t in the loss of predicted x0, whose error is divided by t: a higher one tells a young
    model to mind the whole picture before the last of the noise."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(
                f"diffusion.caption_dropout is {self.caption_dropout}: it is in [0, 1)."
            )
        if not 0 < self.min_t < 1:
            raise ValueError(f"diffusion.min_t is {self.min_t}: it is between 0 and 1.")


def sample_keys(key: jax.Array, sample_ids: UInt[Array, "b n"]) -> jax.Array:
    """A random key for each segment, made of its sample's identity alone."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, sample_ids)


def per_segment(values: jax.Array, segment_ids: Int[Array, "b l"]) -> jax.Array:
    """Spreads ``[b, n, ...]`` values of segments over their tokens: ``[b, l, ...]``."""
    slots = jnp.maximum(segment_ids - 1, 0)
    return jax.vmap(lambda row, slot: row[slot])(values, slots)


def token_noise(
    keys: jax.Array,
    segment_ids: Int[Array, "b l"],
    token_ids: Int[Array, "b l"],
    dim: int,
) -> Float[Array, "b l p"]:
    """Standard normal noise of each token, from its segment's key and its index in the segment."""

    def draw(segment_key: jax.Array, index: Int[Array, ""]) -> Float[Array, "p"]:
        return jax.random.normal(jax.random.fold_in(segment_key, index), (dim,))

    return jax.vmap(jax.vmap(draw))(per_segment(keys, segment_ids), token_ids)


def noise_batch(config: DiffusionConfig, key: jax.Array, batch: PackedBatch) -> Noised:
    """Draws times, ceilings, noise and caption dropout for every segment of a batch."""
    keys = sample_keys(key, batch.sample_ids)
    split = jax.vmap(jax.vmap(lambda k: jax.random.split(k, 4)))(keys)
    time_keys, ceiling_keys, noise_keys, drop_keys = (split[:, :, i] for i in range(4))

    draw_times = jax.vmap(jax.vmap(lambda k, n: draw_time(config.time, k, n)))
    t = draw_times(time_keys, batch.num_tokens)
    draw_patterns = jax.vmap(jax.vmap(lambda k, f: draw_pattern(config.ceilings, k, f)))
    patterns, given = draw_patterns(ceiling_keys, batch.num_frames)

    held = held_frames(batch.frame_ids, per_segment(patterns, batch.segment_ids))
    slots = jnp.maximum(batch.segment_ids - 1, 0)
    group_t = jnp.stack([t, jnp.minimum(t, given)], -1).reshape(t.shape[0], -1)
    group_ids = GROUPS_PER_SEGMENT * slots + held.astype(slots.dtype)
    tau = jnp.take_along_axis(group_t, group_ids, 1)
    eps = token_noise(noise_keys, batch.segment_ids, batch.token_ids, batch.tokens.shape[-1])
    return Noised(
        tokens=interpolate(batch.tokens, eps, tau),
        eps=eps,
        tau=tau,
        group_ids=group_ids,
        group_t=group_t,
        dropped=jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(k, config.caption_dropout)))(
            drop_keys
        ).astype(jnp.float32),
    )


def drop_captions(
    text_segment_ids: Int[Array, "b s"], dropped: Float[Array, "b n"]
) -> Int[Array, "b s"]:
    """Hides all but the first token of the captions to drop: what is left is the empty prompt."""
    before = jnp.pad(text_segment_ids[:, :-1], ((0, 0), (1, 0)))
    first = text_segment_ids != before
    hide = (per_segment(dropped, text_segment_ids) > 0) & ~first
    return jnp.where(hide, PAD, text_segment_ids)


def predicted_velocity(
    config: DiffusionConfig,
    output: Float[Array, "b l p"],
    xt: Float[Array, "b l p"],
    tau: Float[Array, "b l"],
    min_t: float = SMALLEST_T,
) -> Float[Array, "b l p"]:
    """The network's output as a velocity; ``min_t`` bounds the division by tau."""
    if config.prediction == "velocity":
        return output
    return velocity_from_x0(xt, output, tau, min_t)


def velocity_loss(
    config: DiffusionConfig,
    output: Float[Array, "b l p"],
    noised: Noised,
    batch: PackedBatch,
) -> tuple[Float[Array, "b l"], Float[Array, "b l"]]:
    """Mean squared velocity error of every token, and the weight (0 or 1) it has in the loss.

    Given tokens (tau = 0) and padding have weight 0; the loss of a batch is the weighted mean
    over its tokens.
    """
    x0 = batch.tokens
    if config.prediction == "velocity":
        target = noised.eps - x0
    else:
        target = velocity_from_x0(noised.tokens, x0, noised.tau, config.min_t)
    predicted = predicted_velocity(config, output, noised.tokens, noised.tau, config.min_t)
    error = jnp.square(predicted - target).mean(-1)
    weight = (batch.segment_ids != PAD) & (noised.tau > 0)
    return jnp.where(weight, error, 0.0), weight.astype(jnp.float32)
