"""Which mesh axis each logical axis of parameters and activations lies on.

Models name logical axes only; this table is the one place that knows the mesh. A dimension that a
mesh axis does not divide stays whole: a tiny model on a large mesh is replicated, not refused, but a
large parameter is (``parameter_shardings``). A rule that matches nothing is refused too
(``check_rules``).
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
    "embed": ("fsdp", "context"),
    "embed_out": None,
    "embed_vector": None,
    "heads": "tensor",
    "mlp": "tensor",
    "modulation": "tensor",
    "modulation_table": None,
    "patch": None,
    "time": None,
    "vocab": None,
    "text_place": None,
    "text_out": None,
    "text_states": None,
}
OPTIONAL = frozenset({"modulation_table", "text_out", "text_place", "text_states", "vocab"})
"""Axes that not every model has. Any other rule that a model does not use is refused as a typo."""
OF_TRANSFORMERS = frozenset({"heads", "layers", "mlp", "modulation", "patch", "time"})
"""Axes of which every transformer has some, and autoencoders and feature networks none."""
LARGE = 2**20
"""Elements that a device may hold of a parameter which the mesh should have split and could not."""
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


def _names(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else (target or ())


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
        names: tuple[str, ...] = _names(target)
        if clash := used.intersection(names):
            raise ValueError(f"logical axes {axes} use mesh axis {clash.pop()!r} twice.")
        used.update(names)
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        parts.append(names if len(names) > 1 else next(iter(names), None))
    return PartitionSpec(*parts)


def activation_spec(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """How an activation with these logical axes lies over the mesh."""
    return _spec(ACTIVATION_RULES, mesh, shape, axes)


def make_constrain(mesh: Mesh) -> Callable[..., jax.Array]:
    """The function that lays activations out over the mesh, for models to call."""

    def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
        spec = activation_spec(mesh, x.shape, *axes)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def check_rules(boxed: Any) -> None:
    """Refuses rules that match nothing in a transformer's abstract parameters, unless ``OPTIONAL``."""
    leaves = [leaf for leaf in jax.tree.leaves(boxed, is_leaf=_is_boxed) if _is_boxed(leaf)]
    used = {name for leaf in leaves for name in leaf.names if name is not None}
    if not used & OF_TRANSFORMERS:
        return
    if unused := sorted(PARAMETER_RULES.keys() - used - OPTIONAL):
        raise ValueError(
            f"the rules for {unused} match no parameter of this model, whose logical axes are "
            f"{sorted(used)}: correct them in dit_jax/parallel/rules.py, or add them to OPTIONAL there "
            "if only some models have them."
        )


def _check_split(path: Any, leaf: Any, sharding: NamedSharding, left_out: str | None) -> None:
    """Refuses a large parameter that lies whole along an axis which the mesh has for it."""
    boxed, mesh = _is_boxed(leaf), sharding.mesh
    shape = leaf.value.shape if boxed else leaf.shape
    mine = math.prod(sharding.shard_shape(shape))
    if mine <= LARGE:
        return
    text = f"parameter {jax.tree_util.keystr(path)} {list(shape)}"
    if not boxed:
        if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
            raise ValueError(
                f"{text} carries no logical axes, so that each device would hold all of its {mine:,} "
                "elements: give its initialiser nn.with_logical_partitioning."
            )
        return
    for size, name, lies in zip(shape, leaf.names, sharding.spec, strict=True):
        wanted = _names(PARAMETER_RULES[name]) if name is not None else ()
        wanted = [axis for axis in wanted if mesh.shape[axis] > 1 and axis != left_out]
        if set(wanted) <= set(_names(lies)):
            continue
        parts = math.prod(mesh.shape[axis] for axis in wanted)
        axes = " x ".join(f"mesh.{axis}" for axis in wanted)
        raise ValueError(
            f"{text}: its dimension {name!r} of {size} does not divide over {axes} {parts}, so that "
            f"each device would hold {mine:,} elements. Make the dimension a multiple of {parts}, or "
            f"the mesh axis a divisor of {size}, such as {math.gcd(size, parts)}."
        )


def _without(part: Any, axis: str) -> Any:
    kept = tuple(name for name in _names(part) if name != axis)
    return kept if len(kept) > 1 else (kept[0] if kept else None)


def parameter_shardings(mesh: Mesh, boxed: Any, over_context: bool = True) -> Any:
    """Shardings of abstract parameters that still carry their logical axes.

    Without ``over_context`` the devices that share a row all have the parameters that it passes: more
    memory and less to gather, as sampling wants it.

    Raises:
        ValueError: for a parameter of which a device would hold more than ``LARGE`` elements because
            a dimension does not divide over its mesh axis.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        spec = PartitionSpec()
        if _is_boxed(leaf):
            spec = _spec(PARAMETER_RULES, mesh, leaf.value.shape, leaf.names)
            if not over_context:
                spec = PartitionSpec(*(_without(part, "context") for part in spec))
        found = NamedSharding(mesh, spec)
        _check_split(path, leaf, found, None if over_context else "context")
        return found

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=_is_boxed)


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


def batch_sharding(mesh: Mesh, ndim: int, tokens: bool, rows: int | None = None) -> NamedSharding:
    """Of a batch's field: rows over data and fsdp, and the tokens of a row over context.

    ``rows`` that do not divide lie whole on every device (given for sampling, where a batch may be
    smaller than the mesh).
    """
    context = ("context",) if tokens and ndim > 1 else ()
    whole = rows is not None and rows % math.prod(mesh.shape[axis] for axis in ROWS)
    return NamedSharding(mesh, PartitionSpec(None if whole else ROWS, *context))


def clip_sharding(mesh: Mesh, clips: int, h: int, w: int) -> NamedSharding:
    """Of ``clips`` activations ``[b, t, rows, columns, c]``, rows and columns multiples of ``h`` and
    ``w``: clips over data and fsdp, the rows over context, or the columns if it divides only those."""
    context, shards = mesh.shape["context"], math.prod(mesh.shape[axis] for axis in ROWS)
    over = ("context", None) if h % context == 0 else (None, None if w % context else "context")
    return NamedSharding(mesh, PartitionSpec(None if clips % shards else ROWS, None, *over, None))


def make_lay(mesh: Mesh) -> Callable[[int, int], Callable[[jax.Array], jax.Array]]:
    """``make_lay(mesh)(h, w)`` lays activations out by ``clip_sharding``; the compiler sends edges to
    the neighbours."""

    def lay(h: int, w: int) -> Callable[[jax.Array], jax.Array]:
        def constrain(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x, clip_sharding(mesh, len(x), h, w))

        return constrain

    return lay


def make_gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Lays an array out whole on every device: kernels of convolutions, before they are used.

    Of kernels whose channels lie over fsdp and context, and clips over data, fsdp and context, XLA (of
    jax 0.10.2) makes convolutions with wrong numbers, without a warning, where all three are above 1.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return lambda x: jax.lax.with_sharding_constraint(x, whole)
