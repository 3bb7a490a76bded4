"""Attention of long rows on one CPU: a block of scores at a time, which stays in the processor's cache.

Without a gradient no score outlives its block, so memory grows with the tokens and not with their
square (Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory"). With one the exponentials
are kept, all of them, as ``host_attention`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dit_jax.parallel.attention import BLOCKS, Band, Blocks, attend_whole, masked_scores, weighted

LONG = 512
"""The fewest tokens, of queries and of keys, that are worth blocks."""
BLOCK_BYTES = 2**23
"""The most bytes of scores in a block (of several queries)."""
SMALL = 60.0
"""Scores whose exponentials float32 holds as they are: e^60 is 1e26, and sums of some billions fit."""
LEAST = 1e-30
"""Less than e^-60: the sum of weights where a query sees no key."""


def blockwise_attention(
    q: Float[Array, "b l a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    q_segment_ids: Int[Array, "b l"],
    k_segment_ids: Int[Array, "b m"] | None,
    *,
    band: int | None = None,
) -> Float[Array, "b l a d"]:
    """``host_attention`` for one device; long rows without a gradient in blocks."""
    return attend_whole(BLOCKWISE, q, k, v, q_segment_ids, k_segment_ids, band)


def _whole(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    band: Band | None,
) -> jax.Array:
    if min(q.shape[2], k.shape[2]) < LONG:
        return BLOCKS.whole(q, k, v, q_ids, k_ids, band)
    return in_blocks(band, BLOCK_BYTES, q, k, v, q_ids, k_ids)


BLOCKWISE = Blocks(_whole, BLOCKS.forward, BLOCKS.backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_blocks(
    band: Band | None,
    size: int,
    q: Float[Array, "b a l d"],
    k: Float[Array, "b a m d"],
    v: Float[Array, "b a m d"],
    q_ids: Int[Array, "b l"],
    k_ids: Int[Array, "b m"],
) -> Float[Array, "b a l d"]:
    """Attention a head at a time, and of it the queries that have ``size`` bytes of scores.

    No score is larger than the longest query times the longest key (Cauchy and Schwarz). Where that is
    at most ``SMALL``, as it usually is of normalised queries and keys, the scores' maximum need not be
    found first. What a head does so depends on its row alone, but on all segments of that: very large
    queries or keys of one change the last bits of another.
    """
    (rows, heads), ids = q.shape[:2], (q_ids, k_ids)
    ids = (jnp.broadcast_to(x[:, None], (rows, heads, x.shape[1])) for x in ids)
    every = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, *ids)]

    def head(given: list[jax.Array]) -> jax.Array:
        q, k, *_ = given
        longest = (jnp.square(x.astype(jnp.float32)).sum(-1).max() for x in (q, k))
        small = math.prod(longest) <= SMALL**2
        return lax.cond(
            small, partial(_head, _small, band, size), partial(_head, _any, band, size), *given
        )

    return lax.map(head, every).reshape(q.shape)


def _any(*given: Any) -> jax.Array:
    return BLOCKS.forward(*given)[0]


def _small(q: jax.Array, k: jax.Array, v: jax.Array, *ids_and_band: Any) -> jax.Array:
    weights = jnp.exp(masked_scores(q, k, *ids_and_band))
    return weighted(weights, jnp.maximum(weights.sum(-1, keepdims=True), LEAST), v)


def _head(
    attend: Callable[..., jax.Array],
    band: Band | None,
    size: int,
    q: Float[Array, "l d"],
    k: Float[Array, "m d"],
    v: Float[Array, "m d"],
    q_ids: Int[Array, "l"],
    k_ids: Int[Array, "m"],
) -> Float[Array, "l d"]:
    """``attend(q, k, v, q_ids, k_ids, band)`` of each block of a head."""
    queries, width = q.shape
    count = math.ceil(queries / max(1, size // (4 * len(k))))
    length = math.ceil(queries / count)

    def cut(x: jax.Array) -> jax.Array:
        """Queries that fill the last block are dropped at the end."""
        x = jnp.pad(x, [(0, count * length - queries), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(count, length, *x.shape[1:])

    def block(given: tuple[jax.Array, ...]) -> jax.Array:
        first, q, q_ids = given
        here = band
        if band is not None:
            here = Band(band.width, band.offset + first)  # pyright: ignore[reportArgumentType]
        alone = (x[None, None] for x in (q, k, v))
        return attend(*alone, q_ids[None], k_ids[None], here)[0, 0]

    out = lax.map(block, (jnp.arange(count) * length, cut(q), cut(q_ids)))
    return out.reshape(-1, width)[:queries]


def _forward(
    band: Band | None,
    size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, ...]]]:
    return jax.vjp(lambda q, k, v: BLOCKS.whole(q, k, v, q_ids, k_ids, band), q, k, v)


def _backward(
    band: Band | None,
    size: int,
    pull: Callable[[jax.Array], tuple[jax.Array, ...]],
    dout: jax.Array,
) -> tuple[jax.Array | None, ...]:
    return *pull(dout), None, None


in_blocks.defvjp(_forward, _backward)
