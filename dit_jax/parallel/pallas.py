"""JAX's Pallas kernels for packed rows: splash attention on TPUs, flash attention on GPUs.

Keys and values stream through the chip's fast memory in blocks and no matrix of scores is ever
stored (Dao et al. 2022, "FlashAttention"); segments are masked inside the kernels. ``interpret=True``
runs the same kernels on a CPU, for tests.

Splash attention takes a local window too, and skips the blocks that it hides. Flash attention knows one
array of segment ids, for queries and keys alike, and no window: cross-attention, windows and the parts
of a ring are plain products there. It was compared with the reference in interpret mode, and lowered
to Triton's code, but not run on a GPU by us.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu import attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from dit_jax.parallel.attention import HOST, NOBODY, Arrays, Kernel, Operands, Window
from dit_jax.types import ATTENTION, PAD, PositiveInt

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
    """Attention on one TPU."""
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
            dq, of_keys = jax.lax.scan(add_portion, jnp.zeros(x.q.shape, jnp.float32), portions)
            return dq, *(jnp.moveaxis(y, 0, 2).reshape(x.k.shape) for y in of_keys)
        run = kernel(x, window)

        def row(x: Operands, out: Any, lse: Any, dout: Any) -> Arrays:
            segments = splash.SegmentIds(x.q_ids, x.k_ids)
            residuals: Any = (*x[:3], segments, None, out, lse, run.dq_mask_info, run.dkv_mask_info)
            # Not exported (jax 0.10.2), and needed: the parts of a ring have another's result.
            return splash._splash_attention_bwd(res=residuals, do=dout, **run.kwargs)[3:6]

        return jax.vmap(row)(x, *others)

    return Kernel(whole, forward, backward)


# --- GPUs ---

MHA: Any = flash.mha
BLOCK, BLOCK_BACKWARD = 128, 32  # tokens; shorter rows are one block of a power of two
SMALLEST = 16  # Triton multiplies no smaller matrices


def flash_kernel(interpret: bool = False) -> Kernel:
    """Attention on one GPU, if both segment ids are the same array; else plain products."""

    def settings(length: int) -> tuple[object, ...]:
        """What the kernel takes after q, k, v and segment ids, in its order."""
        block, backward = min(BLOCK, length), min(BLOCK_BACKWARD, length)
        sizes = flash.BlockSizes(block, block, backward, backward, backward, backward)
        scale, causal, warps, stages, grid, debug, residuals = (
            1.0,
            False,
            None,
            2,
            None,
            False,
            False,
        )
        return scale, causal, sizes, "triton", warps, stages, grid, interpret, debug, residuals

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
