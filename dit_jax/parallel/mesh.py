"""The device mesh ``data x fsdp x context x tensor``, and what lies on which of its axes.

``data`` holds replicas, ``fsdp`` shards parameters and batch, ``context`` shards the tokens of a
row, ``tensor`` shards heads and the MLP. Axes are of type Auto: the compiler places the
collectives, from the shardings of parameters and the constraints inside the model.

Models name logical axes only: two tables map them to the mesh. A dimension that a mesh axis does not
divide stays whole: a tiny model on a large mesh is replicated, not refused, but a large parameter is.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from platform import libc_ver
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.files import InputError
from dit_jax.types import PositiveInt

AXES = ("data", "fsdp", "context", "tensor")
PEAK_FLOPS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), 197e12),
    **dict.fromkeys(("TPU v5", "TPU v5p"), 459e12),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 918e12),
    "TPU7x": 1153.5e12,  # half a chip
    "NVIDIA A100": 312e12,
    **dict.fromkeys(("NVIDIA H100", "NVIDIA H200"), 989e12),
}
"""Dense bfloat16 flops a second of one device, by what its ``device_kind`` begins with."""
Size = PositiveInt | Literal[-1]


def _beside_accelerator() -> bool:
    devices = (Path("/dev").glob(name) for name in ("accel*", "nvidia[0-9]*", "vfio/[0-9]*"))
    return any(itertools.chain(*devices))


def tune_cpu() -> None:
    """Sets how XLA compiles and allocates on CPUs; a program calls it before its first array.

    LLVM's first level of optimisation makes steps as fast as its third and compiles them in two thirds
    of the time: matrix products are not its code. ``XLA_FLAGS`` may say otherwise. And glibc is to keep
    the memory that a step frees for the next one: the page faults of hundreds of MiB, fresh at every
    step, took a fifth of the quickstart's time. Beside an accelerator nothing changes.
    """
    level = "--xla_backend_optimization_level"
    if _beside_accelerator():
        return
    if level not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {level}=1"
    # Only the main thread's arena can hold a large block. (One arena for all threads, M_ARENA_MAX = 1,
    # made LLVM's wait for each other, and compiling take 1.4 times as long.)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if libc_ver()[0] == "glibc":
        # M_MMAP_MAX: no block is a mapping of its own; M_TRIM_THRESHOLD: the heap never shrinks.
        for parameter, value in ((-4, 0), (-1, -1)):
            ctypes.CDLL(None).mallopt(parameter, value)


def keep_programs() -> None:
    """Keeps what is compiled in the user's cache, where the next process finds it.

    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. ``JAX_COMPILATION_CACHE_DIR`` names another
    directory, also one of Cloud Storage; its size and what goes there are then as JAX's variables say.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    # XLA loads what was compiled for another processor with no more than a message, to die by SIGILL
    # (jaxlib 0.10.2), and splits loops by the cores that there are: each kind of machine has its own.
    with contextlib.suppress(OSError):  # Programs are kept on Linux, and by who may write there.
        lines = {*Path("/proc/cpuinfo").read_text().split("\n")}
        kind = str(sorted(one for one in lines if one.startswith(("flags", "Features"))))
        digest = hashlib.sha256(f"{kind} {os.cpu_count()}".encode()).hexdigest()[:8]
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        place = Path(base, "dit_jax", "compiled", digest)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        config.update("jax_compilation_cache_max_size", 2**32)  # bytes; the oldest in use go first
        config.update("jax_persistent_cache_min_compile_time_secs", 0)
        config.update("jax_compilation_cache_dir", str(place))
        if "avx512" in kind and config.jax_logging_level == "NOTSET" and not _beside_accelerator():
            # That message comes on such processors for their own programs too (prefer-no-gather).
            config.update("jax_logging_level", "CRITICAL")
            logging.getLogger("jax").setLevel(logging.WARNING)


def trim_memory() -> None:
    """Gives back freed memory, whose holes may not fit what the program does next."""
    if libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


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
        return self.data, self.fsdp, self.context, self.tensor

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Sizes of the axes over ``num_devices``, all of which they must use."""
        fixed = math.prod(size for size in self.sizes if size != -1)
        shape = tuple(num_devices // fixed if n == -1 and fixed else n for n in self.sizes)
        if math.prod(shape) != num_devices or min(shape) < 1:
            text = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, self.sizes, strict=True))
            raise InputError(
                f"mesh {text} does not divide {num_devices} device(s). Change mesh.*: each is at least "
                "1, one may be -1 to fill."
            )
        return shape


def device_grid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array ``[data, fsdp, context, tensor]``: neighbours where axes talk most."""
    shape = config.shape(len(devices))
    if devices[0].platform == "cpu":
        return np.asarray(devices).reshape(shape)
    # Axes may share a physical one: else only products of the torus's own sizes would be possible.
    options: Any = {"devices": devices, "allow_split_physical_axes": True}
    # The slice of each TPU; GPUs are ordered host by host, so that inner axes stay within a host.
    sizes = Counter(getattr(x, "slice_index", 0) for x in devices if x.platform == "tpu")
    slices, over = len(sizes), config.slices_over
    if slices < 2:
        return mesh_utils.create_device_mesh(shape, **options)
    # Slices are joined by the data centre's network, far slower than the links inside a slice: one
    # axis crosses it, and every other stays within a slice.
    crossing = shape[AXES.index(over)]
    if len(set(sizes.values())) > 1 or crossing % slices:
        raise InputError(
            f"mesh.{over} is {crossing} over TPU slices of {sorted(sizes.values())} devices: take "
            f"equal slices, and make it (or set mesh.slices_over) a multiple of {slices}."
        )
    across = [slices if axis == over else 1 for axis in AXES]
    within = [size // n for size, n in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, across, **options)


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


# --- Logical axes ---

LARGE = 2**20
"""Elements that a device may hold of a parameter which the mesh should have split and could not."""
ROWS = ("fsdp", "data")
"""The axes that rows lie over, fsdp first. With data first, XLA (of jax 0.10.2, GSPMD and Shardy)
moves the rows of a product whose kernel has its columns over fsdp, and does not move them back: wrong
numbers, without a warning, on some meshes where data, fsdp and tensor are all above 1."""
PARAMETER_RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "modulation": ("tensor",),
    # Whole on every device.
    **dict.fromkeys(("layers", "patch", "time", "vocab"), ()),
    **dict.fromkeys(("embed_out", "embed_vector", "modulation_table"), ()),
    **dict.fromkeys(("text_place", "text_out", "text_states"), ()),
}
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "batch": ROWS,
    "tokens": ("context",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    **dict.fromkeys(("text_tokens", "width"), ()),
}


def _spec(rules: Any, mesh: Mesh, shape: Sequence[int], axes: Any) -> P:
    assert len(shape) == len(axes), f"logical axes {axes} do not name the dimensions of {shape}"
    used, parts = set[str](), list[Any]()
    for size, axis in zip(shape, axes, strict=True):
        assert axis is None or axis in rules, f"logical axis {axis!r} is in no rule of {__name__}"
        names = rules.get(axis, ())
        assert not used.intersection(names), f"logical axes {axes} use a mesh axis of {names} twice"
        used.update(names)
        # The axes that divide it, outer ones first; of one that does not, every device has all.
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        parts.append(names if len(names) > 1 else next(iter(names), None))
    return P(*parts)


def activation_spec(mesh: Mesh, shape: Sequence[int], *axes: str | None) -> P:
    """How an activation with these logical axes is sharded."""
    return _spec(ACTIVATION_RULES, mesh, shape, axes)


def make_constrain(mesh: Mesh) -> Callable[..., jax.Array]:
    """The function by which models shard their activations."""

    def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
        spec = activation_spec(mesh, x.shape, *axes)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def parameter_shardings(mesh: Mesh, boxed: Any, over_context: bool = True) -> Any:
    """Shardings of abstract parameters that still carry their logical axes.

    Without ``over_context`` the devices that share a row all have the parameters that it passes: more
    memory and less to gather, which suits sampling.
    """
    rules = PARAMETER_RULES if over_context else PARAMETER_RULES | {"embed": ("fsdp",)}

    def is_boxed(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        if not is_boxed(leaf):
            unsplit = leaf.size > LARGE and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
            assert not unsplit, f"{name} carries no logical axes: give its initialiser some"
            return NamedSharding(mesh, P())
        shape = leaf.value.shape
        out = NamedSharding(mesh, _spec(rules, mesh, shape, leaf.names))
        shard = out.shard_shape(shape)
        for size, axis, part in zip(shape, leaf.names, shard, strict=True):
            count = math.prod(mesh.shape[target] for target in rules.get(axis, ()))
            if math.prod(shard) > LARGE and part * count != size:
                raise InputError(
                    f"parameter {name} {list(shape)}: make its dimension {axis!r} of {size} a multiple "
                    f"of {' x '.join(f'mesh.{target}' for target in rules[axis])} = {count}: a device "
                    f"would hold {math.prod(shard):,} elements."
                )
        return out

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_boxed)


def state_shardings(mesh: Mesh, tree: Any, shardings: Any) -> Any:
    """Shardings of a state whose subtrees mirror the parameters, as optimizers' moments do.

    A leaf whose path ends in the path of a parameter is sharded like it, but along axes where it has
    one number, as scales of rows and columns do; all others are whole.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(shardings)
    known = {path: leaf for path, leaf in flat}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        parameters = (known.get(path[start:]) for start in range(len(path)))
        fits = (x.spec for x in parameters if x is not None and len(x.spec) <= leaf.ndim)
        spec = zip(next(fits, ()), leaf.shape, strict=False)
        return NamedSharding(mesh, P(*(None if size == 1 else part for part, size in spec)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, ndim: int, tokens: bool, rows: int | None = None) -> NamedSharding:
    """The sharding of a batch's field: rows over data and fsdp, the tokens of a row over context."""
    context = ("context",) if tokens and ndim > 1 else ()
    # Sampling's batch may be smaller than the mesh.
    whole = rows is not None and rows % batch_shards(mesh)
    return NamedSharding(mesh, P(None if whole else ROWS, *context))
