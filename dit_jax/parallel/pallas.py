"""JAX's Pallas kernels for packed rows: splash attention on TPUs, flash attention on GPUs.

Keys and values stream through the chip's fast memory in blocks and no matrix of scores is ever
stored (Dao et al. 2022, "FlashAttention"); segments are masked inside the kernels. ``interpret=True``
runs the same kernels on a CPU, for tests.

Splash attention takes a local window too, and skips the blocks that it hides. The parts of a ring
need its backward pass with a result that is not its own: that is ``_splash_attention_bwd``, which JAX
does not export (present in jax 0.10.2). Flash attention knows one array of segment ids, for queries
and keys alike, and no window: cross-attention, windows and the parts of a ring are plain products
there (``attention.HOST``). It was compared with the reference in interpret mode, and lowered to
Triton's code, but not run on a GPU by us.
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

from dit_jax.parallel.attention import HOST, NOBODY, Kernel, Operands, Window
from dit_jax.types import ATTENTION, PAD

LANES = 128
"""Splash attention's blocks are multiples of it."""
PARTS = 32
"""Copies of the queries' gradients that a fused backward pass may make, one for a block of keys."""


@dataclasses.dataclass(frozen=True)
class SplashConfig:
    """Block sizes, in tokens: larger ones stream keys and values less often and need more of the
    chip's fast memory. Each is lowered to what divides the length at hand."""

    block_q: int = 1024
    block_kv: int = 2048
    block_kv_compute: int = 512
    """Keys that are multiplied at once, within a block."""
    block_q_backward: int = 1024
    block_kv_backward: int = 2048
    block_kv_backward_compute: int = 512
    fused_backward: bool = True
    """One kernel for all three gradients: five matrix products instead of seven, and a copy of the
    queries' gradients for every ``block_kv_backward`` keys. If those would be more than ``PARTS``,
    the parts of a ring take their keys in portions, and other attention is not fused."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name != "fused_backward" and (size < LANES or size % LANES):
                raise ValueError(
                    f"attention.splash.{field.name} is {size}: blocks are multiples of {LANES} tokens; "
                    f"try {max(size // LANES, 1) * LANES}."
                )


def _fit(length: int, largest: int) -> int:
    """The largest block of at most ``largest`` tokens that divides ``length``."""
    # `token_multiple` makes rows so long.
    assert length % LANES == 0, f"{length} tokens are not a multiple of {LANES}"
    return next(b for b in range(min(largest, length), 0, -LANES) if length % b == b % LANES == 0)


def _is_fused(config: SplashConfig, k_length: int) -> bool:
    return config.fused_backward and k_length <= PARTS * _fit(k_length, config.block_kv_backward)


def _splash(
    config: SplashConfig,
    interpret: bool,
    x: Operands,
    window: Window | None,
    residuals: bool = False,
) -> splash.SplashAttentionKernel:
    shape = (x.q.shape[2], x.k.shape[2])
    fused = _is_fused(config, shape[1])
    block_kv, block_kv_backward = (
        _fit(shape[1], size) for size in (config.block_kv, config.block_kv_backward)
    )
    block_q_backward = _fit(shape[0], config.block_q_backward)
    options: Any = {
        "block_sizes": splash.BlockSizes(
            block_q=_fit(shape[0], config.block_q),
            block_kv=block_kv,
            block_kv_compute=_fit(block_kv, config.block_kv_compute),
            block_q_dkv=block_q_backward,
            block_kv_dkv=block_kv_backward,
            block_kv_dkv_compute=_fit(block_kv_backward, config.block_kv_backward_compute),
            block_q_dq=None if fused else block_q_backward,
            block_kv_dq=None if fused else block_kv,
            use_fused_bwd_kernel=fused,
        ),
        "save_residuals": residuals,
        "residual_checkpoint_name": ATTENTION,
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": None,
        "interpret": interpret,
    }
    if window is None:
        # Nothing is masked but by segments: no table of blocks, which for millions of tokens would
        # not fit the chip's scalar memory.
        nothing = MaskInfo(*[None] * 5)
        of_dq = None if fused else nothing
        return splash.SplashAttentionKernel(
            nothing, of_dq, nothing, is_mqa=False, mask_function=None, **options
        )
    # Built anew at every trace: it holds arrays, which belong to the trace that they are made in.
    mask = masks.LocalMask(shape, (window.width, window.width), window.offset)
    heads = masks.MultiHeadMask([mask] * x.q.shape[1])
    return splash.make_splash_mha(heads, head_shards=1, q_seq_shards=1, **options)


def _pad(x: jax.Array, axis: int, value: int = PAD) -> jax.Array:
    """Pads to a whole number of blocks: text is of any length."""
    more = [(0, 0)] * x.ndim
    more[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, more, constant_values=value)


def _splash_whole(
    config: SplashConfig, interpret: bool, x: Operands, window: Window | None
) -> jax.Array:
    length = x.q.shape[2]
    q, k, v = (_pad(y, 2) for y in (x.q, x.k, x.v))
    x = Operands(q, k, v, _pad(x.q_ids, 1), _pad(x.k_ids, 1, NOBODY))
    run: Any = _splash(config, interpret, x, window)
    return jax.vmap(run)(x.q, x.k, x.v, splash.SegmentIds(x.q_ids, x.k_ids))[:, :, :length]


def _splash_forward(
    config: SplashConfig, interpret: bool, x: Operands, window: Window | None
) -> tuple[jax.Array, jax.Array]:
    run = _splash(config, interpret, x, window, residuals=True)
    out, (lse,) = jax.vmap(run)(x.q, x.k, x.v, splash.SegmentIds(x.q_ids, x.k_ids))
    # If the window skips every block of a query, the kernel divides by zero.
    return jnp.where(jnp.isneginf(lse)[..., None], 0, out), lse


def _splash_backward(
    config: SplashConfig,
    interpret: bool,
    x: Operands,
    window: Window | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    b, heads, length, d = x.k.shape
    if window is None and config.fused_backward and not _is_fused(config, length):
        portion = _fit(length, PARTS * _fit(length, config.block_kv_backward))
        shape = (b, heads, length // portion, portion, d)

        def add_portion(dq: jax.Array, keys: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
            k, v, ids = keys
            some = x._replace(k=k, v=v, k_ids=ids)
            more, dk, dv = _splash_backward(config, interpret, some, None, out, lse, dout)
            return dq + more, (dk, dv)

        ids = x.k_ids.reshape(b, length // portion, portion).swapaxes(0, 1)
        portions = (*(jnp.moveaxis(y.reshape(shape), 2, 0) for y in (x.k, x.v)), ids)
        dq, slopes = jax.lax.scan(add_portion, jnp.zeros(x.q.shape, jnp.float32), portions)
        dk, dv = (jnp.moveaxis(y, 0, 2).reshape(x.k.shape) for y in slopes)
        return dq, dk, dv
    run = _splash(config, interpret, x, window)

    def row(x: Operands, out: Any, lse: Any, dout: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        segments = splash.SegmentIds(x.q_ids, x.k_ids)
        masks = run.dq_mask_info, run.dkv_mask_info
        residuals: Any = (x.q, x.k, x.v, segments, None, out, lse, *masks)
        return splash._splash_attention_bwd(res=residuals, do=dout, **run.kwargs)[3:6]

    return jax.vmap(row)(x, out, lse, dout)


def splash_kernel(config: SplashConfig, interpret: bool = False) -> Kernel:
    """Attention on one TPU."""
    return Kernel(
        partial(_splash_whole, config, interpret),
        partial(_splash_forward, config, interpret),
        partial(_splash_backward, config, interpret),
    )


# GPUs

MHA: Any = flash.mha
BLOCK = 128
"""Tokens of a block; shorter rows are one block of a power of two."""
BLOCK_BACKWARD = 32
SMALLEST = 16
"""Triton multiplies no smaller matrices."""


def _flash_settings(length: int, interpret: bool) -> tuple[object, ...]:
    """What the kernel takes after q, k, v and segment ids, in its order."""
    block, backward = min(BLOCK, length), min(BLOCK_BACKWARD, length)
    sizes = flash.BlockSizes(block, block, backward, backward, backward, backward)
    scale, causal, warps, stages, grid, debug, residuals = 1.0, False, None, 2, None, False, False
    return scale, causal, sizes, "triton", warps, stages, grid, interpret, debug, residuals


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attention of ``[b, l, a, d]`` within segments, ``l`` being a multiple of the block."""
    return _flash_forward(interpret, q, k, v, ids)[0]


def _flash_forward(
    interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, (*inputs, _, lse) = MHA.fwd(q, k, v, ids, *_flash_settings(q.shape[1], interpret))
    # The kernel's own rule does not name what a rematerialisation policy may keep.
    out, lse = checkpoint_name(out, ATTENTION), checkpoint_name(lse, ATTENTION)
    return out, (*inputs, out, lse)


def _flash_backward(
    interpret: bool, residuals: tuple[jax.Array, ...], dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    return MHA.bwd(*_flash_settings(dout.shape[1], interpret), residuals, dout)


_flash.defvjp(_flash_forward, _flash_backward)


def _flash_whole(interpret: bool, x: Operands, window: Window | None) -> jax.Array:
    if x.q_ids is not x.k_ids or window is not None:
        return HOST.whole(x, window)
    length, d = x.q.shape[2:]
    power_of_two = max(SMALLEST, 1 << (length - 1).bit_length())
    more = (-length % BLOCK) if length > BLOCK else power_of_two - length
    # Zeros add nothing to a score, and the tokens added are padding to all others.
    pad = ((0, 0), (0, more), (0, 0), (0, max(SMALLEST - d, 0)))
    ids = jnp.pad(x.q_ids, ((0, 0), (0, more)), constant_values=PAD)
    q, k, v = (jnp.pad(y.swapaxes(1, 2), pad) for y in (x.q, x.k, x.v))
    out: Any = _flash(interpret, q, k, v, ids)
    return out[:, :length, :, :d].swapaxes(1, 2)


def flash_kernel(interpret: bool = False) -> Kernel:
    """Attention on one GPU, if both segment ids are the same array; else plain products."""
    return HOST._replace(whole=partial(_flash_whole, interpret))
