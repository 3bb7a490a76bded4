"""Which implementation of attention and of matrix products runs on a mesh."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from dit_jax.parallel.attention import host_attention, xla_attention
from dit_jax.types import Attention, DotGeneral


def is_host(mesh: Mesh) -> bool:
    """Whether the mesh is made of CPUs."""
    return mesh.devices.flat[0].platform == "cpu"


def choose_attention(mesh: Mesh) -> Attention:
    """The attention function for a mesh."""
    return host_attention if is_host(mesh) else xla_attention


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


def choose_dot_general(mesh: Mesh) -> DotGeneral:
    """The product for linear layers: flat on CPUs, unless the tokens of a row are spread (rows and
    tokens that lie on different mesh axes cannot be joined without moving them)."""
    return flat_dot_general if is_host(mesh) and mesh.shape["context"] == 1 else jax.lax.dot_general
