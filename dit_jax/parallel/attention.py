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


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    return _attend_forward(q, k, v, bias)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.einsum("bald,bamd->balm", q, k, preferred_element_type=jnp.float32) + bias
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    inverse = 1 / weights.sum(-1, keepdims=True)
    # Normalised after the product: [l, d] numbers instead of [l, m].
    out = jnp.einsum("balm,bamd->bald", weights.astype(v.dtype), v) * inverse.astype(v.dtype)
    return out, (q, k, v, weights, inverse, out)


def _attend_backward(
    kept: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, inverse, out = kept
    g = g * inverse.astype(g.dtype)
    slope = jnp.einsum("bald,bamd->balm", g, v, preferred_element_type=jnp.float32)
    scores = weights * (slope - (out * g).astype(jnp.float32).sum(-1, keepdims=True))
    scores, weights = scores.astype(q.dtype), weights.astype(v.dtype)
    # Written [b, l, a, d] so that XLA copies the small operand's transpose, not the scores'.
    dk = jnp.einsum("balm,blad->bmad", scores, q.swapaxes(1, 2)).swapaxes(1, 2)
    dv = jnp.einsum("balm,blad->bmad", weights, g.swapaxes(1, 2)).swapaxes(1, 2)
    return jnp.einsum("balm,bamd->bald", scores, k), dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def host_attention(
    q: Float[Array, "b l a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    q_segment_ids: Int[Array, "b l"],
    k_segment_ids: Int[Array, "b m"],
) -> Float[Array, "b l a d"]:
    """The same for CPUs: heads before tokens, and a backward pass that keeps the exponentials."""
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    same = q_segment_ids[:, None, :, None] == k_segment_ids[:, None, None, :]
    return _attend(q, k, v, jnp.where(same, 0.0, MASKED)).swapaxes(1, 2)
