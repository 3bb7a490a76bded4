"""JAX's flash attention for GPUs (a Pallas kernel compiled by Triton) for packed rows.

No matrix of scores is ever stored (Dao et al. 2022, "FlashAttention"); segments are masked inside the
kernel. It knows one array of segment ids, for queries and keys alike, and no band: cross-attention,
banded layers and the parts of a ring are plain matrix products here (``attention.BLOCKS``), whose
scores are stored.

Compared with the reference in interpret mode, and lowered to Triton's code; not run on a GPU by us.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu import attention as kernel
from jaxtyping import Array, Float, Int

from dit_jax.parallel.attention import BLOCKS, Band, Blocks, attend_whole
from dit_jax.types import ATTENTION, PAD

MHA: Any = kernel.mha
BLOCK = 128
"""Tokens of a block; shorter rows are one block of a power of two."""
BLOCK_BACKWARD = 32
SMALLEST = 16
"""Triton multiplies no smaller matrices."""


def _padded(length: int) -> int:
    if length > BLOCK:
        return -(-length // BLOCK) * BLOCK
    return max(SMALLEST, 1 << (length - 1).bit_length())


def _settings(length: int, interpret: bool) -> tuple[object, ...]:
    """What the kernel takes after q, k, v and segment ids, in its order."""
    block, backward = min(BLOCK, length), min(BLOCK_BACKWARD, length)
    sizes = kernel.BlockSizes(block, block, backward, backward, backward, backward)
    scale, causal, warps, stages, grid, debug, residuals = 1.0, False, None, 2, None, False, False
    return scale, causal, sizes, "triton", warps, stages, grid, interpret, debug, residuals


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attention of ``[b, l, a, d]`` within segments, ``l`` being a multiple of the block."""
    return _flash_forward(interpret, q, k, v, ids)[0]


def _flash_forward(
    interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    settings = _settings(q.shape[1], interpret)
    out, (*given, _, lse) = MHA.fwd(q, k, v, ids, *settings)
    # The kernel's own rule does not name what a rematerialisation policy may keep.
    out, lse = checkpoint_name(out, ATTENTION), checkpoint_name(lse, ATTENTION)
    return out, (*given, out, lse)


def _flash_backward(
    interpret: bool, kept: tuple[jax.Array, ...], dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    return MHA.bwd(*_settings(dout.shape[1], interpret), kept, dout)


_flash.defvjp(_flash_forward, _flash_backward)


def _whole(
    interpret: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    band: Band | None,
) -> jax.Array:
    if q_ids is not k_ids or band is not None:
        return BLOCKS.whole(q, k, v, q_ids, k_ids, band)
    length, d = q.shape[2:]
    more = _padded(length) - length
    # Zeros add nothing to a score, and the tokens added are padding to all others.
    pad = ((0, 0), (0, more), (0, 0), (0, max(SMALLEST - d, 0)))
    ids = jnp.pad(q_ids, ((0, 0), (0, more)), constant_values=PAD)
    q, k, v = (jnp.pad(x.swapaxes(1, 2), pad) for x in (q, k, v))
    out: Any = _flash(interpret, q, k, v, ids)
    return out[:, :length, :, :d].swapaxes(1, 2)


def gpu_blocks(interpret: bool = False) -> Blocks:
    """Attention on one GPU. ``whole`` runs the kernel where both segment ids are the same array."""
    whole = partial(_whole, interpret)
    return Blocks(whole, BLOCKS.forward, BLOCKS.backward)  # pyright: ignore[reportArgumentType]


def gpu_attention(
    q: Float[Array, "b l a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    q_segment_ids: Int[Array, "b l"],
    k_segment_ids: Int[Array, "b m"] | None,
    *,
    band: int | None = None,
    interpret: bool = False,
) -> Float[Array, "b l a d"]:
    """Attention where all devices hold all of it: the compiler cannot split the kernel over a mesh.

    ``interpret`` runs the kernel by the interpreter, on any device, for tests.
    """
    return attend_whole(gpu_blocks(interpret), q, k, v, q_segment_ids, k_segment_ids, band)
