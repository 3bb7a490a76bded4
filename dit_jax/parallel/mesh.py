"""The device mesh ``data x fsdp x context x tensor``, and what lies on which of its axes.

``data`` holds replicas, ``fsdp`` shards parameters and batch, ``context`` shards the tokens of a
row, ``tensor`` shards heads and the MLP. Axes are of type Auto: the compiler places the
collectives, from the shardings of parameters and the constraints inside the model.

TPUs of several slices are joined by the data centre's network, far slower than the links inside a
slice. One axis crosses it, ``data`` unless ``slices_over`` says ``fsdp``; every other axis stays
within a slice. GPUs are ordered host by host, so that inner axes stay within a host if they fit.

Models name logical axes only: two tables map them to the mesh. A dimension that a mesh axis does not
divide stays whole: a tiny model on a large mesh is replicated, not refused, but a large parameter is.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.types import PositiveInt

AXES = ("data", "fsdp", "context", "tensor")
PEAK_FLOPS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p: the longest name that a device's kind begins with holds
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # half a chip
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 flops a second of one device, by what its ``device_kind`` begins with."""
Size = PositiveInt | Literal[-1]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what the others leave."""

    data: Size = -1
    fsdp: Size = 1
    context: Size = 1
    tensor: Size = 1
    slices_over: Literal["data", "fsdp"] = "data"
    """The axis that crosses TPU slices, if there are several; its size is a multiple of their
    number. data moves the gradients between slices once a step, fsdp the parameters too."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Sizes of the axes over ``num_devices``, all of which they must use."""
        sizes = self.sizes
        fixed = math.prod(size for size in sizes if size != -1)
        shape = tuple(num_devices // fixed if size == -1 and fixed else size for size in sizes)
        if math.prod(shape) != num_devices or min(shape) < 1:
            text = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
            raise ValueError(
                f"mesh {text} does not divide {num_devices} device(s): the product of the axes must "
                f"be {num_devices}. Change mesh.* (each is at least 1, one may be -1 to fill)."
            )
        return shape


def device_grid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array ``[data, fsdp, context, tensor]``: neighbours where axes talk most."""
    shape, kind = config.shape(len(devices)), devices[0].platform
    if kind == "cpu":
        return np.asarray(devices).reshape(shape)
    sizes = Counter(getattr(device, "slice_index", 0) for device in devices if kind == "tpu")
    slices, over, crossing = len(sizes), config.slices_over, shape[AXES.index(config.slices_over)]
    # Axes may share a physical one: else only products of the torus's own sizes would be possible.
    if slices < 2:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if len(set(sizes.values())) > 1 or crossing % slices:
        raise ValueError(
            f"mesh.{over} is {crossing} over {slices} TPU slices of "
            f"{', '.join(map(str, sizes.values()))} devices: give every slice the same topology, and "
            f"make mesh.{over} a multiple of {slices}, or set mesh.slices_over."
        )
    across = [slices if axis == over else 1 for axis in AXES]
    within = [size // n for size, n in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over ``devices`` (by default all, of every process)."""
    grid = device_grid(config, jax.devices() if devices is None else devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform(mesh: Mesh) -> str:
    """What the mesh's devices are: cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def peak_flops(kind: str) -> float | None:
    """Peak flops of one device of this kind; None if it is not known, as of CPUs."""
    names = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


# Logical axes

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


def _names(target: Any) -> tuple[str, ...]:
    """The mesh axes of a rule, or of an entry of a ``PartitionSpec``."""
    return (target,) if isinstance(target, str) else (target or ())


def _part(names: Sequence[str]) -> Any:
    """A dimension's entry of a ``PartitionSpec``."""
    return tuple(names) if len(names) > 1 else next(iter(names), None)


def _spec(rules: Any, mesh: Mesh, shape: Sequence[int], axes: Sequence[Any]) -> PartitionSpec:
    assert len(shape) == len(axes), f"logical axes {axes} do not name the dimensions of {shape}"
    used: set[str] = set()
    parts: list[Any] = []
    for size, axis in zip(shape, axes, strict=True):
        assert axis is None or axis in rules, f"logical axis {axis!r} is in no rule of {__name__}"
        names = _names(rules[axis]) if axis is not None else ()
        assert not used.intersection(names), f"logical axes {axes} use a mesh axis of {names} twice"
        used.update(names)
        # The axes that divide it, outer ones first; of one that does not, every device has all.
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        parts.append(_part(names))
    return PartitionSpec(*parts)


def activation_spec(mesh: Mesh, shape: Sequence[int], *axes: str | None) -> PartitionSpec:
    """How an activation with these logical axes is sharded."""
    return _spec(ACTIVATION_RULES, mesh, shape, axes)


def make_constrain(mesh: Mesh) -> Callable[..., jax.Array]:
    """The function by which models shard their activations."""

    def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
        spec = activation_spec(mesh, x.shape, *axes)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def parameter_shardings(mesh: Mesh, boxed: Any, over_context: bool = True) -> Any:
    """Shardings of abstract parameters that still carry their logical axes.

    Without ``over_context`` the devices that share a row all have the parameters that it passes: more
    memory and less to gather, which suits sampling. Refuses a parameter of which a device would hold
    more than ``LARGE`` elements because a dimension does not divide over its mesh axis.
    """
    left_out = None if over_context else "context"

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        if not _is_boxed(leaf):
            unsplit = leaf.size > LARGE and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
            name = jax.tree_util.keystr(path)
            assert not unsplit, f"{name} carries no logical axes: give its initialiser some"
            return NamedSharding(mesh, PartitionSpec())
        shape = leaf.value.shape
        parts = [_names(part) for part in _spec(PARAMETER_RULES, mesh, shape, leaf.names)]
        parts = [tuple(name for name in part if name != left_out) for part in parts]
        out = NamedSharding(mesh, PartitionSpec(*map(_part, parts)))
        held = math.prod(out.shard_shape(shape))
        for size, axis, part in zip(shape, leaf.names, parts, strict=True):
            targets = [t for t in _names(PARAMETER_RULES.get(axis)) if t != left_out]
            targets = [target for target in targets if mesh.shape[target] > 1]
            if held > LARGE and not set(targets) <= set(part):
                count = math.prod(mesh.shape[target] for target in targets)
                name, over = jax.tree_util.keystr(path), " x ".join(f"mesh.{t}" for t in targets)
                raise ValueError(
                    f"parameter {name} {list(shape)}: its dimension {axis!r} of {size} does not divide "
                    f"over {over} {count}, so that each device would hold {held:,} elements. Make the "
                    f"dimension a multiple of {count}, or the mesh axis a divisor of {size}, such as "
                    f"{math.gcd(size, count)}."
                )
        return out

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=_is_boxed)


def state_shardings(mesh: Mesh, tree: Any, shardings: Any) -> Any:
    """Shardings of a state whose subtrees mirror the parameters, as optimizers' moments do.

    A leaf whose path ends in the path of a parameter is sharded like it; all others are whole.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(shardings)
    known = {tuple(map(str, path)): leaf for path, leaf in flat}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = tuple(map(str, path))
        for start in range(len(names)):
            parameter = known.get(names[start:])
            if parameter is not None and len(parameter.spec) <= leaf.ndim:
                return parameter
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, ndim: int, tokens: bool, rows: int | None = None) -> NamedSharding:
    """The sharding of a batch's field: rows over data and fsdp, the tokens of a row over context.

    If ``rows`` do not divide they are whole on every device: sampling's batch may be smaller than the
    mesh.
    """
    context = ("context",) if tokens and ndim > 1 else ()
    whole = rows is not None and rows % math.prod(mesh.shape[axis] for axis in ROWS)
    return NamedSharding(mesh, PartitionSpec(None if whole else ROWS, *context))
