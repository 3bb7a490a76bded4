"""JAX's splash attention (a Pallas kernel for TPUs) for packed rows.

Keys and values stream through the chip's fast memory in blocks and no matrix of scores is ever
stored (Dao et al. 2022, "FlashAttention"). Segments are masked inside the kernel; a band also skips the
blocks that it hides. ``interpret=True`` runs the same kernel on a CPU, for tests.

The parts of a ring need the kernel's backward pass with a result that is not its own: that is
``_splash_attention_bwd``, which JAX does not export (present in jax 0.10.2). Attention to all keys uses
exported names only.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from dit_jax.parallel.attention import NOBODY, Band, Blocks
from dit_jax.types import ATTENTION, PAD

LANES = 128
"""Blocks are multiples of it."""
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
    queries' gradients for every ``block_kv_backward`` keys. Where those would be more than ``PARTS``,
    the parts of a ring take their keys in portions, and other attention is not fused."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name != "fused_backward" and (size < LANES or size % LANES):
                raise ValueError(
                    f"attention.splash.{field.name} is {size}: blocks are multiples of {LANES} tokens; "
                    f"try {max(size // LANES, 1) * LANES}."
                )


def _fit(length: int, wanted: int) -> int:
    """The largest block of at most ``wanted`` tokens that divides ``length``."""
    if length % LANES:
        raise ValueError(
            f"{length} tokens of a ring's part do not divide into blocks of {LANES}, as splash "
            f"attention needs: make data.packing.row_tokens a multiple of {LANES} for every device of "
            "mesh.context, or set attention.kernel to xla."
        )
    return next(
        b for b in range(min(wanted, length), 0, -LANES) if length % b == 0 and b % LANES == 0
    )


def _is_fused(config: SplashConfig, k_length: int) -> bool:
    return config.fused_backward and k_length <= PARTS * _fit(k_length, config.block_kv_backward)


def _blocks(config: SplashConfig, q_length: int, k_length: int) -> kernel.BlockSizes:
    fused = _is_fused(config, k_length)
    block_kv = _fit(k_length, config.block_kv)
    block_kv_backward = _fit(k_length, config.block_kv_backward)
    block_q_backward = _fit(q_length, config.block_q_backward)
    return kernel.BlockSizes(
        block_q=_fit(q_length, config.block_q),
        block_kv=block_kv,
        block_kv_compute=_fit(block_kv, config.block_kv_compute),
        block_q_dkv=block_q_backward,
        block_kv_dkv=block_kv_backward,
        block_kv_dkv_compute=_fit(block_kv_backward, config.block_kv_backward_compute),
        block_q_dq=None if fused else block_q_backward,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )


def _make(
    config: SplashConfig,
    interpret: bool,
    q: jax.Array,
    k: jax.Array,
    band: Band | None,
    residuals: bool = False,
) -> kernel.SplashAttentionKernel:
    shape = (q.shape[2], k.shape[2])
    given: Any = {
        "block_sizes": _blocks(config, *shape),
        "save_residuals": residuals,
        "residual_checkpoint_name": ATTENTION,
        "mask_value": kernel.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": None,
        "interpret": interpret,
    }
    if band is None:
        # Nothing is masked but by segments: no table of blocks, which for millions of tokens would
        # not fit the chip's scalar memory.
        nothing = MaskInfo(*[None] * 5)
        of_dq = None if _is_fused(config, shape[1]) else nothing
        return kernel.SplashAttentionKernel(
            nothing, of_dq, nothing, is_mqa=False, mask_function=None, **given
        )
    # Made anew at every trace: it holds arrays, which belong to the trace that they are made in.
    mask = masks.LocalMask(shape, (band.width, band.width), band.offset)
    heads = masks.MultiHeadMask([mask] * q.shape[1])
    return kernel.make_splash_mha(heads, head_shards=1, q_seq_shards=1, **given)


def _padded(x: jax.Array, axis: int, value: int = PAD) -> jax.Array:
    """``x`` made a whole number of blocks long: text is of any length."""
    more = [(0, 0)] * x.ndim
    more[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, more, constant_values=value)


def _whole(
    config: SplashConfig,
    interpret: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    band: Band | None,
) -> jax.Array:
    length = q.shape[2]
    q, k, v = _padded(q, 2), _padded(k, 2), _padded(v, 2)
    run: Any = _make(config, interpret, q, k, band)
    segments = kernel.SegmentIds(_padded(q_ids, 1), _padded(k_ids, 1, NOBODY))
    return jax.vmap(run)(q, k, v, segments)[:, :, :length]


def _forward(
    config: SplashConfig,
    interpret: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    band: Band | None,
) -> tuple[jax.Array, jax.Array]:
    run = _make(config, interpret, q, k, band, residuals=True)
    out, (lse,) = jax.vmap(run)(q, k, v, kernel.SegmentIds(q_ids, k_ids))
    # Where the band skips every block of a query, the kernel divides by zero.
    return jnp.where(jnp.isneginf(lse)[..., None], 0, out), lse


def _backward(
    config: SplashConfig,
    interpret: bool,
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
    length = k.shape[2]
    if band is None and config.fused_backward and not _is_fused(config, length):
        portion = _fit(length, PARTS * _fit(length, config.block_kv_backward))
        return _backward_in_portions(
            config, interpret, portion, q, k, v, q_ids, k_ids, out, lse, dout
        )
    run = _make(config, interpret, q, k, band)

    def row(*given: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v, q_ids, k_ids, out, lse, dout = given
        segments = kernel.SegmentIds(q_ids, k_ids)
        kept: Any = (q, k, v, segments, None, out, lse, run.dq_mask_info, run.dkv_mask_info)
        gradients = kernel._splash_attention_bwd(res=kept, do=dout, **run.kwargs)
        return gradients[3:6]

    return jax.vmap(row)(q, k, v, q_ids, k_ids, out, lse, dout)


def _backward_in_portions(
    config: SplashConfig,
    interpret: bool,
    portion: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``_backward`` with so many keys at a time."""
    b, heads, length, d = k.shape
    shape = (b, heads, length // portion, portion, d)

    def some(dq: jax.Array, keys: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        k, v, ids = keys
        more, dk, dv = _backward(config, interpret, q, k, v, q_ids, ids, None, out, lse, dout)
        return dq + more, (dk, dv)

    ids = k_ids.reshape(b, length // portion, portion).swapaxes(0, 1)
    portions = (*(jnp.moveaxis(x.reshape(shape), 2, 0) for x in (k, v)), ids)
    dq, slopes = jax.lax.scan(some, jnp.zeros(q.shape, jnp.float32), portions)
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(k.shape) for x in slopes)
    return dq, dk, dv


def splash_blocks(config: SplashConfig, interpret: bool = False) -> Blocks:
    """Attention on one device by the splash kernel."""
    given = (config, interpret)
    return Blocks(
        partial(_whole, *given),  # pyright: ignore[reportArgumentType]  # partial keeps the names
        partial(_forward, *given),
        partial(_backward, *given),
    )
