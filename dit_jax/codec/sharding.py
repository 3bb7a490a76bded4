"""How an autoencoder's clips and kernels lie on the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.parallel.mesh import ROWS


def clip_sharding(mesh: Mesh, clips: int, h: int, w: int) -> NamedSharding:
    """The sharding of ``clips`` activations ``[b, t, rows, columns, c]`` of an autoencoder.

    Clips lie over data and fsdp; the rows, a multiple of ``h``, over context, or the columns, a
    multiple of ``w``, if context divides only those.
    """
    context, shards = mesh.shape["context"], math.prod(mesh.shape[axis] for axis in ROWS)
    over = ("context", None) if h % context == 0 else (None, None if w % context else "context")
    return NamedSharding(mesh, PartitionSpec(None if clips % shards else ROWS, None, *over, None))


def make_clip_constrain(mesh: Mesh) -> Callable[[int, int], Callable[[jax.Array], jax.Array]]:
    """``make_clip_constrain(mesh)(h, w)`` shards activations by ``clip_sharding``; the compiler sends
    edges to the neighbours."""

    def of_size(h: int, w: int) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jax.lax.with_sharding_constraint(x, clip_sharding(mesh, len(x), h, w))

    return of_size


def make_gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Replicates an array on every device: kernels of convolutions, before they are used.

    Of kernels whose channels lie over fsdp and context, and clips over data, fsdp and context, XLA (of
    jax 0.10.2) makes convolutions with wrong numbers, without a warning, if all three are above 1.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return lambda x: jax.lax.with_sharding_constraint(x, whole)
