"""Attention within the segments of packed rows: one interface, and the kernels of plain products.

With queries scaled by 1 / sqrt(d) (Vaswani et al. 2017, eq. 1), keys of other segments or beyond the
local window masked, and the slope dO:

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

MASKED = -1e30
"""The score of a masked key; finite, so that a row of padding stays finite."""
NOBODY = -1
"""The segment id of keys that no query may see."""
LONG = 512
"""The fewest tokens, of queries and of keys, that are worth blocks on a CPU."""
BLOCK_BYTES = 2**23
"""The most bytes of scores in a block (of several queries): they stay in the processor's cache."""
SMALL = 60.0
"""Scores whose exponentials float32 holds as they are: e^60 is 1e26, and sums of some billions fit."""
LEAST = 1e-30
"""Less than e^-60: the sum of weights of a query that sees no key."""


class Window(NamedTuple):
    """Keys at most ``width`` tokens away; the first query is ``offset`` tokens after the first key."""

    width: int
    offset: Any = 0
    """An int, or in a loop over blocks an array."""


class Operands(NamedTuple):
    """What a kernel takes: heads before tokens, queries scaled."""

    q: Float[Array, "b a l d"]
    k: Float[Array, "b a m d"]
    v: Float[Array, "b a m d"]
    q_ids: Int[Array, "b l"]
    k_ids: Int[Array, "b m"]


class Kernel(NamedTuple):
    """One implementation of attention on one device."""

    whole: Callable[[Operands, Window | None], jax.Array]
    """Differentiable attention to all keys there are: O ``[b, a, l, d]``."""
    forward: Callable[[Operands, Window | None], tuple[jax.Array, jax.Array]]
    """(O, lse) over some of the keys; lse is float32 ``[b, a, l]``, and hugely negative where a query
    sees none of them."""
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    """``backward(operands, window, out, lse, dout)``: (dq, dk, dv) of some of the keys, where ``out``
    and ``lse`` are those over all keys."""


def make_attention(attend: Callable[..., jax.Array]) -> Attention:
    """The ``Attention`` of ``attend(q, k, v, q_ids, k_ids, window)`` with queries scaled; tokens are
    before heads, and ``k_ids`` is None for self-attention."""

    def attention(
        q: Float[Array, "b l a d"],
        k: Float[Array, "b m a d"],
        v: Float[Array, "b m a d"],
        q_segment_ids: Int[Array, "b l"],
        k_segment_ids: Int[Array, "b m"] | None,
        *,
        band: int | None = None,
    ) -> Float[Array, "b l a d"]:
        window = None if band is None else Window(band)
        return attend(q * q.shape[-1] ** -0.5, k, v, q_segment_ids, k_segment_ids, window)

    return attention


def on_one_device(kernel: Kernel) -> Attention:
    """The ``Attention`` of a kernel where every device that computes it has all of it."""

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Any, k_ids: Any, window: Window | None
    ) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        operands = Operands(q, k, v, q_ids, q_ids if k_ids is None else k_ids)
        return kernel.whole(operands, window).swapaxes(1, 2)

    return make_attention(attend)


# The reference, and the same for CPUs


def visible(
    q_ids: Int[Array, "b l"], k_ids: Int[Array, "b m"], window: Window | None
) -> Bool[Array, "b l m"]:
    """Which keys each query sees: those of its own segment, within the window if there is one."""
    same = q_ids[:, :, None] == k_ids[:, None, :]
    if window is None:
        return same
    q, k = jnp.arange(q_ids.shape[1])[:, None] + window.offset, jnp.arange(k_ids.shape[1])
    return same & (jnp.abs(q - k) <= window.width)


def _attend_xla(
    q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Any, k_ids: Any, window: Window | None
) -> jax.Array:
    """The definition that every other implementation is tested against; the softmax is float32."""
    scores = jnp.einsum("blad,bmad->balm", q, k, preferred_element_type=jnp.float32)
    seen = visible(q_ids, q_ids if k_ids is None else k_ids, window)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("balm,bmad->blad", weights, v)


xla_attention = make_attention(_attend_xla)


@jax.custom_vjp
def _attend_host(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    return _attend_host_forward(q, k, v, bias)[0]


def _attend_host_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Keeps the exponentials for the backward pass, which saves computing them again."""
    scores = jnp.einsum("bald,bamd->balm", q, k, preferred_element_type=jnp.float32) + bias
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    inverse = 1 / weights.sum(-1, keepdims=True)
    # Normalised after the product: [l, d] numbers instead of [l, m].
    out = jnp.einsum("balm,bamd->bald", weights.astype(v.dtype), v) * inverse.astype(v.dtype)
    return out, (q, k, v, weights, inverse, out)


def _attend_host_backward(
    residuals: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, inverse, out = residuals
    g = g * inverse.astype(g.dtype)
    slope = jnp.einsum("bald,bamd->balm", g, v, preferred_element_type=jnp.float32)
    scores = weights * (slope - (out * g).astype(jnp.float32).sum(-1, keepdims=True))  # (3)
    scores, weights = scores.astype(q.dtype), weights.astype(v.dtype)
    # Written [b, l, a, d] so that XLA copies the small operand's transpose, not the scores'.
    dk = jnp.einsum("balm,blad->bmad", scores, q.swapaxes(1, 2)).swapaxes(1, 2)
    dv = jnp.einsum("balm,blad->bmad", weights, g.swapaxes(1, 2)).swapaxes(1, 2)
    return jnp.einsum("balm,bamd->bald", scores, k), dk, dv, None


_attend_host.defvjp(_attend_host_forward, _attend_host_backward)


def _whole(x: Operands, window: Window | None) -> jax.Array:
    bias = jnp.where(visible(x.q_ids, x.k_ids, window), 0.0, MASKED)[:, None]
    return _attend_host(x.q, x.k, x.v, bias)


def _scores(x: Operands, window: Window | None) -> Float[Array, "b a l m"]:
    scores = jnp.einsum("bald,bamd->balm", x.q, x.k, preferred_element_type=jnp.float32)
    return jnp.where(visible(x.q_ids, x.k_ids, window)[:, None], scores, MASKED)


def _weighted_mean(weights: jax.Array, total: jax.Array, v: jax.Array) -> jax.Array:
    """Values averaged by weights ``[b, a, l, m]`` whose sum is ``total``, in float32."""
    weights = weights.astype(v.dtype)
    out = jnp.einsum("balm,bamd->bald", weights, v, preferred_element_type=jnp.float32)
    return (out / total).astype(v.dtype)


def _forward(x: Operands, window: Window | None) -> tuple[jax.Array, jax.Array]:
    scores = _scores(x, window)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    return _weighted_mean(weights, total, x.v), (largest + jnp.log(total))[..., 0]


def _backward(
    x: Operands, window: Window | None, out: jax.Array, lse: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weights = jnp.exp(_scores(x, window) - lse[..., None])
    slope = jnp.einsum("bald,bamd->balm", dout, x.v, preferred_element_type=jnp.float32)
    along = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1, keepdims=True)
    scores = (weights * (slope - along)).astype(x.q.dtype)  # (3)
    dk = jnp.einsum("balm,bald->bamd", scores, x.q)
    dv = jnp.einsum("balm,bald->bamd", weights.astype(dout.dtype), dout)
    return jnp.einsum("balm,bamd->bald", scores, x.k), dk, dv


HOST = Kernel(_whole, _forward, _backward)
host_attention = on_one_device(HOST)


# Long rows on one CPU, a block of scores at a time


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attend_in_blocks(x: Operands, window: Window | None, block_bytes: int) -> jax.Array:
    """Attention a head at a time, and of it the queries that have ``block_bytes`` of scores.

    Without a gradient no score outlives its block, so memory grows with the tokens and not with their
    square (Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory"). With one all exponentials
    are kept, as ``host_attention`` keeps them.

    No score is larger than the longest query times the longest key (Cauchy and Schwarz). If that is at
    most ``SMALL``, as it usually is of normalised queries and keys, the scores' maximum need not be
    computed first. The choice depends on a head's row alone, but on all segments of it: very large
    queries or keys of one change the last bits of another.
    """
    rows, heads = x.q.shape[:2]
    ids = (jnp.broadcast_to(i[:, None], (rows, heads, i.shape[1])) for i in (x.q_ids, x.k_ids))
    by_head = Operands(*(y.reshape(-1, *y.shape[2:]) for y in (x.q, x.k, x.v, *ids)))
    small, large = (partial(_attend_head, f, window, block_bytes) for f in (_mean_small, _mean))

    def attend_head(head: Operands) -> jax.Array:
        longest = (jnp.square(y.astype(jnp.float32)).sum(-1).max() for y in (head.q, head.k))
        return lax.cond(math.prod(longest) <= SMALL**2, small, large, head)

    return lax.map(attend_head, by_head).reshape(x.q.shape)


def _mean(x: Operands, window: Window | None) -> jax.Array:
    return _forward(x, window)[0]


def _mean_small(x: Operands, window: Window | None) -> jax.Array:
    weights = jnp.exp(_scores(x, window))
    return _weighted_mean(weights, jnp.maximum(weights.sum(-1, keepdims=True), LEAST), x.v)


def _attend_head(
    attend: Callable[[Operands, Window | None], jax.Array],
    window: Window | None,
    block_bytes: int,
    x: Operands,
) -> Float[Array, "l d"]:
    """``attend`` for each block of a head's queries; ``x`` is without rows and heads."""
    queries, width = x.q.shape
    count = math.ceil(queries / max(1, block_bytes // (4 * len(x.k))))
    length = math.ceil(queries / count)

    def split(y: jax.Array) -> jax.Array:
        y = jnp.pad(y, [(0, count * length - queries), *[(0, 0)] * (y.ndim - 1)])
        return y.reshape(count, length, *y.shape[1:])

    def block(operands: tuple[jax.Array, ...]) -> jax.Array:
        first, q, q_ids = operands
        here = window and Window(window.width, window.offset + first)
        q, k, v = (y[None, None] for y in (q, x.k, x.v))
        return attend(Operands(q, k, v, q_ids[None], x.k_ids[None]), here)[0, 0]

    out = lax.map(block, (jnp.arange(count) * length, split(x.q), split(x.q_ids)))
    return out.reshape(-1, width)[:queries]  # without those that fill the last block


def _in_blocks_forward(x: Operands, window: Window | None, block_bytes: int) -> tuple[Any, Any]:
    return jax.vjp(lambda q, k, v: _whole(x._replace(q=q, k=k, v=v), window), x.q, x.k, x.v)


def _in_blocks_backward(
    window: Window | None, block_bytes: int, pull: Any, dout: Any
) -> tuple[Any]:
    return (Operands(*pull(dout), None, None),)  # pyright: ignore


attend_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _whole_in_blocks(x: Operands, window: Window | None) -> jax.Array:
    if min(x.q.shape[2], x.k.shape[2]) < LONG:
        return _whole(x, window)
    return attend_in_blocks(x, window, BLOCK_BYTES)


blockwise_attention = on_one_device(HOST._replace(whole=_whole_in_blocks))
