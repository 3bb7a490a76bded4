"""Attention within the segments of packed rows, as functions that models are given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30
"""The score of a key of another segment; finite, so that a row of padding stays finite."""


def xla_attention(
    q: Float[Array, "b l a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    q_segment_ids: Int[Array, "b l"],
    k_segment_ids: Int[Array, "b m"],
) -> Float[Array, "b l a d"]:
    """The reference: plain matrix products, the softmax in float32.

    Keys of other segments, padding among them, have no weight. Scores are scaled by
    1 / sqrt(d) (Vaswani et al. 2017, eq. 1).
    """
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("blad,bmad->balm", q * scale, k, preferred_element_type=jnp.float32)
    same = q_segment_ids[:, None, :, None] == k_segment_ids[:, None, None, :]
    scores = jnp.where(same, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("balm,bmad->blad", weights, v)
