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

MASKED = -1e30  # the score of a masked key; finite, so that a row of padding stays finite
NOBODY = -1  # the segment id of keys that no query may see
LONG = 512
"""The fewest tokens, of queries and of keys, that are worth blocks on a CPU."""
BLOCK_BYTES = 2**23
"""The most bytes of scores in a block (of several queries): they stay in the processor's cache."""
# Scores whose exponentials float32 holds as they are: e^60 is 1e26, and sums of some billions fit. And
# what is less than e^-60: the sum of weights of a query that sees no key.
SMALL, LEAST = 60.0, 1e-30


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
    k_ids: Any
    """``[b, m]``; None, before it is known which keys lie where, for self-attention."""


class Kernel(NamedTuple):
    """One implementation of attention on one device."""

    whole: Callable[[Operands, Window | None], jax.Array]
    """Differentiable attention to all keys there are: O ``[b, a, l, d]``."""
    forward: Callable[[Operands, Window | None], tuple[jax.Array, ...]]
    """(O, lse) over some of the keys; lse is float32 ``[b, a, l]``, and hugely negative where a query
    sees none of them."""
    backward: Callable[..., tuple[jax.Array, ...]]
    """``backward(operands, window, out, lse, dout)``: (dq, dk, dv) of some of the keys, where ``out``
    and ``lse`` are those over all keys."""


def make_attention(attend: Callable[[Operands, Window | None], jax.Array]) -> Attention:
    """The ``Attention`` that models call, tokens before heads, from a function of ``Operands``."""

    def attention(
        q: Float[Array, "b l a d"],
        k: Float[Array, "b m a d"],
        v: Float[Array, "b m a d"],
        q_segment_ids: Int[Array, "b l"],
        k_segment_ids: Int[Array, "b m"] | None,
        *,
        window: int | None = None,
    ) -> Float[Array, "b l a d"]:
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        x = Operands(q, k, v, q_segment_ids, k_segment_ids)
        return attend(x, None if window is None else Window(window)).swapaxes(1, 2)

    return attention


def on_one_device(kernel: Kernel) -> Attention:
    """The ``Attention`` of a kernel where every device that computes it has all of it."""

    def attend(x: Operands, window: Window | None) -> jax.Array:
        k_ids = x.q_ids if x.k_ids is None else x.k_ids
        return kernel.whole(x._replace(k_ids=k_ids), window)

    return make_attention(attend)


def visible(
    q_ids: Int[Array, "b l"], k_ids: Int[Array, "b m"], window: Window | None
) -> Bool[Array, "b l m"]:
    """Which keys each query sees: those of its own segment, within the window if there is one."""
    same = q_ids[:, :, None] == k_ids[:, None, :]
    if window is None:
        return same
    q, k = jnp.arange(q_ids.shape[1])[:, None] + window.offset, jnp.arange(k_ids.shape[1])
    return same & (jnp.abs(q - k) <= window.width)


# The product of heads of two operands over width or keys; scores and their softmax are float32, because
# bfloat16 exponentials of scores of some tens would be off by a tenth.
_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _reference(x: Operands, window: Window | None) -> jax.Array:
    """The definition that every other implementation is tested against."""
    scores = _einsum("bald,bamd->balm", x.q, x.k)
    seen = visible(x.q_ids, x.k_ids, window)[:, None]  # one mask for all heads
    weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(x.v.dtype)
    return jnp.einsum("balm,bamd->bald", weights, x.v)


# The same for CPUs


def _scores(x: Operands, window: Window | None) -> Float[Array, "b a l m"]:
    # Added, not selected: the bias is computed once for all heads.
    bias = jnp.where(visible(x.q_ids, x.k_ids, window), 0.0, MASKED)[:, None]
    return _einsum("bald,bamd->balm", x.q, x.k) + bias


def _attend(x: Operands, window: Window | None, bounded: bool = False) -> tuple[jax.Array, ...]:
    """(O, exponentials, 1 / their sum, lse). ``bounded``: no score is above ``SMALL``."""
    scores = _scores(x, window)
    largest = 0.0 if bounded else scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.maximum(weights.sum(-1, keepdims=True), LEAST)
    inverse = 1 / total
    # Normalised after the product: [l, d] numbers instead of [l, m].
    out = _einsum("balm,bamd->bald", weights.astype(x.v.dtype), x.v) * inverse
    return out.astype(x.v.dtype), weights, inverse, (largest + jnp.log(total))[..., 0]


def _slopes(
    x: Operands, weights: jax.Array, inverse: jax.Array, out: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) (3, 4), with P = ``weights`` * ``inverse``."""
    dout = dout * inverse.astype(dout.dtype)
    along = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1, keepdims=True)
    scores = (weights * (_einsum("bald,bamd->balm", dout, x.v) - along)).astype(x.q.dtype)  # (3)
    # Written [b, l, a, d] so that XLA copies the small operand's transpose, not the scores'.
    dk = jnp.einsum("balm,blad->bmad", scores, x.q.swapaxes(1, 2)).swapaxes(1, 2)
    weights = weights.astype(x.v.dtype)
    dv = jnp.einsum("balm,blad->bmad", weights, dout.swapaxes(1, 2)).swapaxes(1, 2)
    return jnp.einsum("balm,bamd->bald", scores, x.k), dk, dv


def _backward(
    x: Operands, window: Window | None, out: jax.Array, lse: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weights = jnp.exp(_scores(x, window) - lse[..., None])  # (1)
    return _slopes(x, weights, jnp.ones(()), out, dout)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def host_product(x: Operands, window: Window | None, block_bytes: int | None) -> jax.Array:
    """Attention by plain products, for CPUs; with ``block_bytes`` in blocks if there is no gradient.

    In blocks it goes a head at a time, and of a head the queries that have so many bytes of scores. No
    score outlives its block: memory grows with the tokens, not with their square (Rabe & Staats 2021,
    "Self-attention Does Not Need O(n^2) Memory"). For a gradient all exponentials are kept, which saves
    computing them again.

    No score is larger than the longest query times the longest key (Cauchy and Schwarz). If that is at
    most ``SMALL``, as it usually is of normalised queries and keys, the scores' maximum need not be
    computed first. The choice depends on a head's row alone, but on all segments of it: very large
    queries or keys of one change the last bits of another.
    """
    if block_bytes is None:
        return _attend(x, window)[0]
    rows, heads, queries, width = x.q.shape
    count = math.ceil(queries / max(1, block_bytes // (4 * x.k.shape[2])))
    length = math.ceil(queries / count)
    ids = (jnp.broadcast_to(i[:, None], (rows, heads, i.shape[1])) for i in (x.q_ids, x.k_ids))
    by_head = Operands(*(y.reshape(-1, *y.shape[2:]) for y in (x.q, x.k, x.v, *ids)))  # [b a, ...]

    def split(
        y: jax.Array,
    ) -> jax.Array:  # [l, ...] -> [count, length, ...], the last one filled up
        y = jnp.pad(y, [(0, count * length - queries), *[(0, 0)] * (y.ndim - 1)])
        return y.reshape(count, length, *y.shape[1:])

    def attend_head(head: Operands) -> jax.Array:
        blocks = (jnp.arange(count) * length, split(head.q), split(head.q_ids))

        def attend_block(bounded: bool, block: tuple[jax.Array, ...]) -> jax.Array:
            first, q, q_ids = block
            here = window and Window(window.width, window.offset + first)
            q, k, v = (y[None, None] for y in (q, head.k, head.v))
            one = Operands(q, k, v, q_ids[None], head.k_ids[None])
            return _attend(one, here, bounded)[0][0, 0]

        longest = (jnp.square(y.astype(jnp.float32)).sum(-1).max() for y in (head.q, head.k))
        small, large = (
            lambda b=b: lax.map(partial(attend_block, b), blocks) for b in (True, False)
        )
        out = lax.cond(math.prod(longest) <= SMALL**2, small, large)
        return out.reshape(-1, width)[:queries]

    return lax.map(attend_head, by_head).reshape(x.q.shape)


def _host_forward(x: Operands, window: Window | None, block_bytes: int | None) -> tuple[Any, Any]:
    out, weights, inverse, _ = _attend(x, window)
    return out, (x, weights, inverse, out)


def _host_backward(window: Any, block_bytes: int | None, residuals: Any, dout: jax.Array) -> Any:
    return (Operands(*_slopes(*residuals, dout), None, None),)  # pyright: ignore


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
