"""Attention within the segments of packed rows: one interface, and the kernels of plain products.

With queries scaled by 1 / sqrt(d) (Vaswani et al. 2017, eq. 1), keys of other segments or beyond the
local window masked, and the result's gradient dO:

    S = q kT                P = exp(S - lse)        lse = log sum exp S         (1)
    O = P v                                                                     (2)
    dS = P * (dO vT - sum(O * dO))                                              (3)
    dq = dS k               dk = dST q              dv = PT dO                  (4)

A ``Kernel`` computes these on one device: by plain products, or by JAX's Pallas kernels, which stream
keys and values through the chip's fast memory in blocks and store no matrix of scores (Dao et al. 2022,
"FlashAttention"); ``interpret=True`` runs those on a CPU. ``make_attention`` turns a kernel into the
``Attention`` that models call. Not here: tokens of a row on several devices (``context``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu import attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from dit_jax.types import ATTENTION, PAD, Attention, PositiveInt

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


# --- TPUs: splash attention ---

LANES = 128  # splash attention's blocks are multiples of it
PARTS = 32  # copies of the queries' gradients, one for a block of keys, of a fused backward pass


@dataclasses.dataclass(frozen=True)
class SplashConfig:
    """Block sizes, in tokens: larger ones stream keys and values less often and need more of the
    chip's fast memory. Each is lowered to a multiple of 128 that divides the length at hand."""

    block_q: PositiveInt = 1024
    block_kv: PositiveInt = 2048
    block_kv_compute: PositiveInt = 512
    """Keys that are multiplied at once, within a block."""
    block_q_backward: PositiveInt = 1024
    block_kv_backward: PositiveInt = 2048
    block_kv_backward_compute: PositiveInt = 512
    fused_backward: bool = True
    """One kernel for all three gradients: five matrix products instead of seven, and a copy of the
    queries' gradients for every ``block_kv_backward`` keys. If those would be more than ``PARTS``,
    the parts of a ring take their keys in portions, and other attention is not fused."""


def _fit(length: int, largest: int) -> int:
    """The largest block of about ``largest`` tokens at most that divides ``length``."""
    most = max(min(largest, length) // LANES, 1)
    return next(n * LANES for n in range(most, 0, -1) if length % (n * LANES) == 0)


def _is_fused(config: SplashConfig, k_length: int) -> bool:
    return config.fused_backward and k_length <= PARTS * _fit(k_length, config.block_kv_backward)


def _splash(config: SplashConfig, interpret: bool, x: Operands, window: Any, **options: Any) -> Any:
    """The kernel for operands of these shapes."""
    q, k = x.q.shape[2], x.k.shape[2]
    fused = _is_fused(config, k)
    block_kv, block_kv_backward = _fit(k, config.block_kv), _fit(k, config.block_kv_backward)
    block_q_backward = _fit(q, config.block_q_backward)
    sizes = splash.BlockSizes(
        block_q=_fit(q, config.block_q),
        block_kv=block_kv,
        block_kv_compute=_fit(block_kv, config.block_kv_compute),
        block_q_dkv=block_q_backward,
        block_kv_dkv=block_kv_backward,
        block_kv_dkv_compute=_fit(block_kv_backward, config.block_kv_backward_compute),
        block_q_dq=None if fused else block_q_backward,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )
    options |= {"block_sizes": sizes, "interpret": interpret, "residual_checkpoint_name": ATTENTION}
    if window is not None:
        # Built anew at every trace: it holds arrays, which belong to the trace that they are made in.
        mask = masks.LocalMask((q, k), (window.width, window.width), window.offset)
        heads = masks.MultiHeadMask([mask] * x.q.shape[1])
        return splash.make_splash_mha(heads, head_shards=1, q_seq_shards=1, **options)
    # Nothing is masked but by segments: no table of blocks, which for millions of tokens would not fit
    # the chip's scalar memory.
    empty = MaskInfo(*[None] * 5)
    options |= {"mask_value": splash.DEFAULT_MASK_VALUE, "attn_logits_soft_cap": None}
    options = {"is_mqa": False, "mask_function": None, "save_residuals": False} | options
    return splash.SplashAttentionKernel(empty, None if fused else empty, empty, **options)


def splash_kernel(config: SplashConfig, interpret: bool = False) -> Kernel:
    """Attention on one TPU; a local window skips the blocks that it hides."""
    kernel = partial(_splash, config, interpret)

    def whole(x: Operands, window: Window | None) -> jax.Array:
        def pad(y: jax.Array, axis: int, value: int = PAD) -> jax.Array:
            # To a whole number of blocks: text is of any length.
            more = [(0, -n % LANES if i == axis else 0) for i, n in enumerate(y.shape)]
            return jnp.pad(y, more, constant_values=value)

        length, (q, k, v) = x.q.shape[2], (pad(y, 2) for y in x[:3])
        x = Operands(q, k, v, pad(x.q_ids, 1), pad(x.k_ids, 1, NOBODY))
        run = kernel(x, window)
        return jax.vmap(run)(q, k, v, splash.SegmentIds(x.q_ids, x.k_ids))[:, :, :length]

    def forward(x: Operands, window: Window | None) -> Arrays:
        run = kernel(x, window, save_residuals=True)
        out, (lse,) = jax.vmap(run)(*x[:3], splash.SegmentIds(x.q_ids, x.k_ids))
        # If the window skips every block of a query, the kernel divides by zero.
        return jnp.where(jnp.isneginf(lse)[..., None], 0, out), lse

    def backward(x: Operands, window: Window | None, *others: jax.Array) -> Arrays:
        length = x.k.shape[2]
        if window is None and config.fused_backward and not _is_fused(config, length):
            portion = _fit(length, PARTS * _fit(length, config.block_kv_backward))

            def add_portion(dq: jax.Array, keys: Arrays) -> tuple[jax.Array, Any]:
                some = Operands(x.q, keys[0], keys[1], x.q_ids, keys[2])
                more, *of_keys = backward(some, None, *others)
                return dq + more, of_keys

            def split(y: jax.Array, axis: int) -> jax.Array:  # m -> portions first, m / portions
                y = y.reshape(*y.shape[:axis], -1, portion, *y.shape[axis + 1 :])
                return jnp.moveaxis(y, axis, 0)

            portions = split(x.k, 2), split(x.v, 2), split(x.k_ids, 1)
            dq, of_keys = lax.scan(add_portion, jnp.zeros(x.q.shape, jnp.float32), portions)
            return dq, *(jnp.moveaxis(y, 0, 2).reshape(x.k.shape) for y in of_keys)
        run = kernel(x, window)

        def row(x: Operands, out: Any, lse: Any, dout: Any) -> Arrays:
            segments = splash.SegmentIds(x.q_ids, x.k_ids)
            residuals: Any = (*x[:3], segments, None, out, lse, run.dq_mask_info, run.dkv_mask_info)
            # Not exported (jax 0.10.2), and needed: the parts of a ring have another's result.
            return splash._splash_attention_bwd(res=residuals, do=dout, **run.kwargs)[3:6]

        return jax.vmap(row)(x, *others)

    return Kernel(whole, forward, backward)


# --- GPUs: flash attention ---

# It knows one array of segment ids, for queries and keys alike, and no window. It was compared with the
# reference in interpret mode, and lowered to Triton's code, but not run on a GPU by us.
MHA: Any = flash.mha
BLOCK, BLOCK_BACKWARD = 128, 32  # tokens; shorter rows are one block of a power of two
SMALLEST = 16  # Triton multiplies no smaller matrices


def flash_kernel(interpret: bool = False) -> Kernel:
    """Attention on one GPU, if both segment ids are the same array; else plain products."""

    def settings(length: int) -> tuple[object, ...]:
        """What the kernel takes after q, k, v and segment ids, in its order."""
        block, backward = min(BLOCK, length), min(BLOCK_BACKWARD, length)
        sizes = flash.BlockSizes(block, block, backward, backward, backward, backward)
        # scale, causal, sizes, backward, warps, stages, grid, interpret, debug, residuals
        return 1.0, False, sizes, "triton", None, 2, None, interpret, False, False

    def forward(*operands: jax.Array) -> tuple[jax.Array, Any]:  # [b, l, a, d], ids [b, l]
        out, (*inputs, _, lse) = MHA.fwd(*operands, *settings(operands[0].shape[1]))
        # The kernel's own rule does not name what a rematerialisation policy may keep.
        out, lse = checkpoint_name(out, ATTENTION), checkpoint_name(lse, ATTENTION)
        return out, (*inputs, out, lse)

    def backward(residuals: Any, dout: jax.Array) -> tuple[Any, ...]:
        return MHA.bwd(*settings(dout.shape[1]), residuals, dout)

    attend = jax.custom_vjp(lambda *operands: forward(*operands)[0])
    attend.defvjp(forward, backward)

    def whole(x: Operands, window: Window | None) -> jax.Array:
        if x.q_ids is not x.k_ids or window is not None:
            return HOST.whole(x, window)
        length, d = x.q.shape[2:]
        power_of_two = max(SMALLEST, 1 << (length - 1).bit_length())
        more = (-length % BLOCK) if length > BLOCK else power_of_two - length
        # Zeros add nothing to a score, and the tokens added are padding to all others.
        pad = ((0, 0), (0, more), (0, 0), (0, max(SMALLEST - d, 0)))
        ids = jnp.pad(x.q_ids, ((0, 0), (0, more)), constant_values=PAD)
        out = attend(*(jnp.pad(y.swapaxes(1, 2), pad) for y in x[:3]), ids)
        return out[:, :length, :, :d].swapaxes(1, 2)

    return HOST._replace(whole=whole)
