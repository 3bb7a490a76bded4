"""Which implementation of attention and of matrix products runs on a mesh."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from dit_jax.parallel.attention import BLOCKS, host_attention, xla_attention
from dit_jax.parallel.blockwise import blockwise_attention
from dit_jax.parallel.gpu import gpu_blocks
from dit_jax.parallel.quantized import Matmul, quantized_dot_general
from dit_jax.parallel.splash import LANES, splash_blocks
from dit_jax.parallel.spread import DEFAULT_ATTENTION, AttentionConfig, SpreadAttention
from dit_jax.types import Attention, DotGeneral

AUTO = {"cpu": "host", "tpu": "splash", "gpu": "flash", "cuda": "flash", "rocm": "xla"}


def platform(mesh: Mesh) -> str:
    """What the mesh's devices are: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def is_host(mesh: Mesh) -> bool:
    """Whether the mesh is made of CPUs."""
    return platform(mesh) == "cpu"


def chosen_kernel(mesh: Mesh, config: AttentionConfig) -> str:
    """The config's kernel, or the platform's where it leaves that open."""
    return AUTO.get(platform(mesh), "xla") if config.kernel == "auto" else config.kernel


def choose_attention(
    mesh: Mesh, config: AttentionConfig = DEFAULT_ATTENTION, interpret: bool | None = None
) -> Attention:
    """The attention function for a mesh.

    ``interpret`` runs the Pallas kernels by the interpreter, for tests; unset, on CPUs.
    """
    kernel = chosen_kernel(mesh, config)
    interpret = is_host(mesh) if interpret is None else interpret
    if kernel == "splash":
        return SpreadAttention(mesh, splash_blocks(config.splash, interpret), config)
    if kernel == "flash":
        return SpreadAttention(mesh, gpu_blocks(interpret), config)
    if mesh.shape["context"] > 1:
        return SpreadAttention(mesh, BLOCKS, config)
    if kernel == "host":
        # Rows and heads that are spread over devices are not computed one after the other.
        alone = is_host(mesh) and mesh.size == 1
        return blockwise_attention if alone else host_attention
    return xla_attention


def token_multiple(mesh: Mesh, config: AttentionConfig = DEFAULT_ATTENTION) -> int:
    """What the tokens of a row must be a multiple of on this mesh."""
    context = mesh.shape["context"]
    blocks = context > 1 and chosen_kernel(mesh, config) == "splash"
    return context * (LANES if blocks else 1)


def flat_dot_general(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
    """``dot_general`` of ``[b, l, d]`` and ``[d, e]`` as one of two matrices ``[b l, d]``.

    On a CPU the gradient of ``rhs`` is then one matrix product as well, and no strided copy of
    ``lhs`` is made.
    """
    ((contract, kernel), batch) = dimension_numbers
    if tuple(contract) != (lhs.ndim - 1,) or tuple(kernel) != (0,) or any(map(len, batch)):
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)
    flat = lhs.reshape(-1, lhs.shape[-1])
    out = jax.lax.dot_general(flat, rhs, (((1,), (0,)), ((), ())), **options)
    return out.reshape(*lhs.shape[:-1], *rhs.shape[1:])


def choose_dot_general(mesh: Mesh, matmul: Matmul = "full") -> DotGeneral:
    """The product for linear layers: flat on CPUs, unless the tokens of a row are spread (rows and
    tokens that lie on different mesh axes cannot be joined without moving them), or in 8 bits."""
    if matmul != "full":
        return quantized_dot_general(matmul)
    return flat_dot_general if is_host(mesh) and mesh.shape["context"] == 1 else jax.lax.dot_general
