"""Which mesh axis each logical axis of parameters and activations lies on.

Models name logical axes only; this table is the one place that knows the mesh. A dimension that a
mesh axis does not divide stays whole (a tiny model on a large mesh is replicated, not refused).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PARAMETER_RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "embed": "fsdp",
    "embed_out": None,
    "heads": "tensor",
    "mlp": "tensor",
    "modulation": "tensor",
    "patch": None,
    "time": None,
    "vocab": None,
    "text_place": None,
    "text_out": None,
}
ROWS = ("fsdp", "data")
"""The axes that rows lie over, fsdp first. With data first, XLA (of jax 0.10.2, GSPMD and Shardy)
moves the rows of a product whose kernel has its columns over fsdp, and does not move them back: wrong
numbers, without a warning, on some meshes where data, fsdp and tensor are all above 1."""
ACTIVATION_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ROWS,
    "tokens": "context",
    "text_tokens": None,
    "heads": "tensor",
    "mlp": "tensor",
    "width": None,
}


def _spec(
    rules: dict[str, Any], mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> PartitionSpec:
    if len(shape) != len(axes):
        raise ValueError(f"logical axes {axes} do not name the dimensions of shape {shape}.")
    used: set[str] = set()
    parts: list[Any] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(
                f"logical axis {axis!r} is in no rule; known are {sorted(rules)}. Add it to "
                "dit_jax/parallel/rules.py."
            )
        target = rules[axis] if axis is not None else None
        names = (target,) if isinstance(target, str) else (target or ())
        if clash := used.intersection(names):
            raise ValueError(f"logical axes {axes} use mesh axis {clash.pop()!r} twice.")
        used.update(names)
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        parts.append(target if names and divides else None)
    return PartitionSpec(*parts)


def make_constrain(mesh: Mesh) -> Callable[..., jax.Array]:
    """The function that lays activations out over the mesh, for models to call."""

    def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
        spec = _spec(ACTIVATION_RULES, mesh, x.shape, axes)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def parameter_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Shardings of abstract parameters that still carry their logical axes."""

    def sharding(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            spec = _spec(PARAMETER_RULES, mesh, leaf.value.shape, leaf.names)
        else:
            spec = PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(
        sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def like_parameters(mesh: Mesh, tree: Any, shardings: Any) -> Any:
    """Shardings of a state whose subtrees mirror the parameters, as optimizers' moments do.

    A leaf whose path ends in the path of a parameter is laid out like it; all others are whole.
    """
    known = {
        tuple(map(str, path)): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(shardings)[0]
    }

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = tuple(map(str, path))
        for start in range(len(names)):
            found = known.get(names[start:])
            if found is not None and len(found.spec) <= leaf.ndim:
                return found
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, ndim: int, tokens: bool) -> NamedSharding:
    """Of a batch's field: rows over data and fsdp, and the tokens of a row over context."""
    context = ("context",) if tokens and ndim > 1 else ()
    return NamedSharding(mesh, PartitionSpec(ROWS, *context))
