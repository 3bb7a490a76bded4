"""Attention within the segments of packed rows, by plain matrix products.

``xla_attention`` is the definition that every other implementation is tested against.
``host_attention`` is the same, written for CPUs (see ``blockwise`` for long rows). ``BLOCKS`` is
attention to a part of the keys: what a ring of devices is made of where there is no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""The score of a key of another segment; finite, so that a row of padding stays finite."""


NOBODY = -1
"""The segment id of keys that no query may see."""


class Band(NamedTuple):
    """Keys at most ``width`` tokens away; the first query is ``offset`` tokens after the first key."""

    width: int
    offset: int = 0


def visible(
    q_ids: Int[Array, "b l"], k_ids: Int[Array, "b m"], band: Band | None
) -> Bool[Array, "b l m"]:
    """Which keys each query sees: those of its own segment, and within the band if there is one."""
    same = q_ids[:, :, None] == k_ids[:, None, :]
    if band is None:
        return same
    q, k = jnp.arange(q_ids.shape[1])[:, None] + band.offset, jnp.arange(k_ids.shape[1])
    return same & (jnp.abs(q - k) <= band.width)


def xla_attention(
    q: Float[Array, "b l a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    q_segment_ids: Int[Array, "b l"],
    k_segment_ids: Int[Array, "b m"] | None,
    *,
    band: int | None = None,
) -> Float[Array, "b l a d"]:
    """The reference: plain matrix products, the softmax in float32.

    Keys of other segments, padding among them, have no weight. Scores are scaled by
    1 / sqrt(d) (Vaswani et al. 2017, eq. 1).
    """
    k_ids = q_segment_ids if k_segment_ids is None else k_segment_ids
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("blad,bmad->balm", q * scale, k, preferred_element_type=jnp.float32)
    seen = visible(q_segment_ids, k_ids, None if band is None else Band(band))
    scores = jnp.where(seen[:, None], scores, MASKED)
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
    k_segment_ids: Int[Array, "b m"] | None,
    *,
    band: int | None = None,
) -> Float[Array, "b l a d"]:
    """The same for CPUs: heads before tokens, and a backward pass that keeps the exponentials."""
    return attend_whole(BLOCKS, q, k, v, q_segment_ids, k_segment_ids, band)


class Whole(Protocol):
    """Differentiable attention to all keys there are; heads before tokens, queries scaled."""

    def __call__(
        self,
        q: Float[Array, "b a l d"],
        k: Float[Array, "b a m d"],
        v: Float[Array, "b a m d"],
        q_ids: Int[Array, "b l"],
        k_ids: Int[Array, "b m"],
        band: Band | None,
    ) -> Float[Array, "b a l d"]: ...


class Blocks(NamedTuple):
    """One implementation of attention on one device."""

    whole: Whole
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    """``forward(q, k, v, q_ids, k_ids, band) -> (out, lse)`` to some of the keys: what they alone would
    give, and the logarithm of their weights' sum, float32 ``[b, a, l]`` (hugely negative where a
    query sees none of them)."""
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    """``backward(q, k, v, q_ids, k_ids, band, out, lse, dout) -> (dq, dk, dv)``: what these keys add,
    ``out`` and ``lse`` being those over all keys."""


def attend_whole(
    blocks: Blocks,
    q: Float[Array, "b l a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    q_segment_ids: Int[Array, "b l"],
    k_segment_ids: Int[Array, "b m"] | None,
    band: int | None,
) -> Float[Array, "b l a d"]:
    """``types.Attention`` by ``blocks``, where every device that computes it has all of it."""
    k_ids = q_segment_ids if k_segment_ids is None else k_segment_ids
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    limit = None if band is None else Band(band)
    return blocks.whole(q, k, v, q_segment_ids, k_ids, limit).swapaxes(1, 2)


def _whole(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    band: Band | None,
) -> jax.Array:
    return _attend(q, k, v, jnp.where(visible(q_ids, k_ids, band), 0.0, MASKED)[:, None])


def masked_scores(
    q: Float[Array, "b a l d"],
    k: Float[Array, "b a m d"],
    q_ids: Int[Array, "b l"],
    k_ids: Int[Array, "b m"],
    band: Band | None,
) -> Float[Array, "b a l m"]:
    """Products of queries (scaled already) and keys, float32; ``MASKED`` where a query does not see."""
    scores = jnp.einsum("bald,bamd->balm", q, k, preferred_element_type=jnp.float32)
    return jnp.where(visible(q_ids, k_ids, band)[:, None], scores, MASKED)


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    band: Band | None,
) -> tuple[jax.Array, jax.Array]:
    scores = masked_scores(q, k, q_ids, k_ids, band)
    most = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    return weighted(weights, total, v), (most + jnp.log(total))[..., 0]


def weighted(
    weights: Float[Array, "b a l m"], total: Float[Array, "b a l 1"], v: Float[Array, "b a m d"]
) -> Float[Array, "b a l d"]:
    """The mean of the values by weights of which ``total`` is the sum, made in float32."""
    weights = weights.astype(v.dtype)
    out = jnp.einsum("balm,bamd->bald", weights, v, preferred_element_type=jnp.float32)
    return (out / total).astype(v.dtype)


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    band: Band | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weights = jnp.exp(masked_scores(q, k, q_ids, k_ids, band) - lse[..., None])
    slope = jnp.einsum("bald,bamd->balm", dout, v, preferred_element_type=jnp.float32)
    along = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1, keepdims=True)
    scores = (weights * (slope - along)).astype(q.dtype)
    dk = jnp.einsum("balm,bald->bamd", scores, q)
    dv = jnp.einsum("balm,bald->bamd", weights.astype(dout.dtype), dout)
    return jnp.einsum("balm,bamd->bald", scores, k), dk, dv


BLOCKS = Blocks(_whole, _forward, _backward)
