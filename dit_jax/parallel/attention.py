"""Attention within the segments of packed rows: one interface, and the kernels of plain products.

With queries scaled by 1 / sqrt(d) (Vaswani et al. 2017, eq. 1), keys of other segments or beyond the
local window masked, and the result's gradient dO:

    S = q kT                P = exp(S - lse)        lse = log sum exp S         (1)
    O = P v                                                                     (2)
    dS = P * (dO vT - sum(O * dO))                                              (3)
    dq = dS k               dk = dST q              dv = PT dO                  (4)

A ``Kernel`` computes these on one device; ``make_attention`` turns one into the ``Attention`` that
models call. Not here: Pallas kernels (``pallas``), tokens of a row on several devices (``context``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dit_jax.types import Attention

MASKED = -1e30  # the score of a masked key; finite, so that a row of padding stays finite
NOBODY = -1  # the segment id of keys that no query may see
LONG = 512  # the fewest tokens, of queries and of keys, that are worth blocks on a CPU
BLOCK_BYTES = 2**23  # scores of a block of queries: they stay in the processor's cache
# Scores whose exponentials float32 holds as they are: e^60 is 1e26, and sums of some billions fit. And
# what is less than e^-60: the sum of weights of a query that sees no key.
SMALL, LEAST = 60.0, 1e-30

Arrays = tuple[jax.Array, ...]
Queries = Float[Array, "b l a d"]
Keys = Float[Array, "b m a d"]
Ids = Int[Array, "b _"]


class Window(NamedTuple):
    """Keys at most ``width`` tokens away; the first query is ``offset`` tokens after the first key."""

    width: int
    offset: Any = 0


class Operands(NamedTuple):
    """What a kernel takes: heads before tokens, queries scaled."""

    q: Float[Array, "b a l d"]
    k: Float[Array, "b a m d"]
    v: Float[Array, "b a m d"]
    q_ids: Ids
    k_ids: Any  # [b, m]; None for self-attention, until it is known which keys lie where


class Kernel(NamedTuple):
    """One implementation of attention on one device."""

    # O [b, a, l, d] over all keys there are, differentiable.
    whole: Callable[[Operands, Window | None], jax.Array]
    # (O, lse) over some of the keys; lse is float32 [b, a, l], and hugely negative without a key.
    forward: Callable[[Operands, Window | None], Arrays]
    # (operands, window, O, lse, dO) to (dq, dk, dv) of some of the keys; O and lse are over all.
    backward: Callable[..., Arrays]


def make_attention(attend: Callable[[Operands, Window | None], jax.Array]) -> Attention:
    """Turns a function of ``Operands`` into the ``Attention`` that models call."""

    def attention(
        q: Queries, k: Keys, v: Keys, q_segment_ids: Ids, k_segment_ids: Any, *, window: Any = None
    ) -> Queries:
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        x = Operands(q, k, v, q_segment_ids, k_segment_ids)
        return attend(x, None if window is None else Window(window)).swapaxes(1, 2)

    return attention


def on_one_device(kernel: Kernel) -> Attention:
    """Makes the ``Attention`` of a kernel for devices that hold all of what they compute with."""

    def attend(x: Operands, window: Window | None) -> jax.Array:
        k_ids = x.q_ids if x.k_ids is None else x.k_ids
        return kernel.whole(x._replace(k_ids=k_ids), window)

    return make_attention(attend)


def visible(q_ids: Ids, k_ids: Ids, window: Window | None) -> Bool[Array, "b l m"]:
    """Says which keys each query sees: those of its own segment, within the window if there is one."""
    same = q_ids[:, :, None] == k_ids[:, None, :]
    if window is None:
        return same
    q, k = jnp.arange(q_ids.shape[1])[:, None] + window.offset, jnp.arange(k_ids.shape[1])
    return same & (jnp.abs(q - k) <= window.width)


# Scores and their softmax are float32: bfloat16 exponentials of scores of some tens are off by a tenth.
_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _reference(x: Operands, window: Window | None) -> jax.Array:
    """The definition that every other implementation is tested against."""
    scores = _einsum("bald,bamd->balm", x.q, x.k)
    seen = visible(x.q_ids, x.k_ids, window)[:, None]  # one mask for all heads
    weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(x.v.dtype)
    return jnp.einsum("balm,bamd->bald", weights, x.v)


# --- The same for CPUs ---


def _scores(x: Operands, window: Window | None) -> Float[Array, "b a l m"]:
    # Added, not selected: the bias is computed once for all heads.
    bias = jnp.where(visible(x.q_ids, x.k_ids, window), 0.0, MASKED)[:, None]
    return _einsum("bald,bamd->balm", x.q, x.k) + bias


def _attend(x: Operands, window: Window | None, bounded: bool = False) -> Arrays:
    """(O, exponentials, 1 / their sum, lse). ``bounded``: no score is above ``SMALL``."""
    scores = _scores(x, window)
    largest = 0.0 if bounded else scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.maximum(weights.sum(-1, keepdims=True), LEAST)
    inverse = 1 / total
    # Normalised after the product: [l, d] numbers instead of [l, m].
    out = _einsum("balm,bamd->bald", weights.astype(x.v.dtype), x.v) * inverse
    return out.astype(x.v.dtype), weights, inverse, (largest + jnp.log(total))[..., 0]


def _gradients(x: Operands, weights: Any, inverse: Any, out: Any, dout: jax.Array) -> Arrays:
    """(dq, dk, dv) (3, 4), with P = ``weights`` * ``inverse``."""
    dout = dout * inverse.astype(dout.dtype)
    along = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1, keepdims=True)
    scores = (weights * (_einsum("bald,bamd->balm", dout, x.v) - along)).astype(x.q.dtype)  # (3)
    # Written [b, l, a, d] so that XLA copies the small operand's transpose, not the scores'.
    dk = jnp.einsum("balm,blad->bmad", scores, x.q.swapaxes(1, 2)).swapaxes(1, 2)
    weights = weights.astype(x.v.dtype)
    dv = jnp.einsum("balm,blad->bmad", weights, dout.swapaxes(1, 2)).swapaxes(1, 2)
    return jnp.einsum("balm,bamd->bald", scores, x.k), dk, dv


def _backward(x: Operands, window: Window | None, out: Any, lse: Any, dout: Any) -> Arrays:
    weights = jnp.exp(_scores(x, window) - lse[..., None])  # (1)
    return _gradients(x, weights, jnp.ones(()), out, dout)


def _attend_in_blocks(x: Operands, window: Window | None, block_bytes: int) -> jax.Array:
    """O, of one head and ``block_bytes`` of scores at a time: memory grows with the tokens, not with
    their square (Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory")."""
    queries, width = x.q.shape[2:]
    count = math.ceil(queries / max(1, block_bytes // (4 * x.k.shape[2])))
    length = math.ceil(queries / count)

    def split(y: jax.Array) -> jax.Array:  # [l, ...] -> [count, length, ...]
        y = jnp.pad(y, [(0, count * length - queries), *[(0, 0)] * (y.ndim - 1)])
        return y.reshape(count, length, *y.shape[1:])

    def attend_head(q_ids: jax.Array, k_ids: jax.Array, q: Any, k: Any, v: Any) -> jax.Array:
        def attend_block(block: Arrays, bounded: bool) -> jax.Array:
            first, q, q_ids = block
            here = window and Window(window.width, window.offset + first)
            q, keys, values = (y[None, None] for y in (q, k, v))
            x = Operands(q, keys, values, q_ids[None], k_ids[None])
            return _attend(x, here, bounded)[0][0, 0]

        blocks = (jnp.arange(count) * length, split(q), split(q_ids))
        # No score is larger than the longest query times the longest key (Cauchy and Schwarz): of
        # normalised ones usually at most SMALL, and then no maximum need be computed first.
        longest = (jnp.square(y.astype(jnp.float32)).sum(-1).max() for y in (q, k))
        ways = [partial(lax.map, partial(attend_block, bounded=y)) for y in (True, False)]
        out = lax.cond(math.prod(longest) <= SMALL**2, *ways, blocks)
        return out.reshape(-1, width)[:queries]

    def attend_row(row: Operands) -> jax.Array:
        return lax.map(lambda heads: attend_head(*row[3:], *heads), tuple(row[:3]))

    return lax.map(attend_row, x)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def host_product(x: Operands, window: Window | None, block_bytes: int | None) -> jax.Array:
    """O by plain products; with ``block_bytes`` in blocks, unless a gradient is asked for."""
    if block_bytes is None:
        return _attend(x, window)[0]
    return _attend_in_blocks(x, window, block_bytes)


def _host_forward(x: Operands, window: Window | None, block_bytes: int | None) -> tuple[Any, Any]:
    # All exponentials are kept, which saves computing them again.
    out, weights, inverse, _ = _attend(x, window)
    return out, (x, weights, inverse, out)


def _host_backward(window: Any, block_bytes: int | None, residuals: Any, dout: jax.Array) -> Any:
    return (Operands(*_gradients(*residuals, dout), None, None),)  # pyright: ignore


host_product.defvjp(_host_forward, _host_backward)


def _whole_in_blocks(x: Operands, window: Window | None) -> jax.Array:
    is_long = min(x.q.shape[2], x.k.shape[2]) >= LONG
    return host_product(x, window, BLOCK_BYTES if is_long else None)


HOST = Kernel(
    whole=lambda x, window: host_product(x, window, None),
    forward=lambda x, window: _attend(x, window)[::3],
    backward=_backward,
)
host_attention = on_one_device(HOST)
blockwise_attention = on_one_device(HOST._replace(whole=_whole_in_blocks))
xla_attention = on_one_device(HOST._replace(whole=_reference))
