"""The device mesh: ``data x fsdp x context x tensor``.

``data`` holds replicas, ``fsdp`` shards parameters and batch, ``context`` shards the tokens of a
row, ``tensor`` shards heads and the MLP. Axes are of type Auto: the compiler places the
collectives, from the shardings of parameters and the constraints inside the model.

TPUs of several slices are joined by the data centre's network, far slower than the links inside a
slice. One axis crosses it, ``data`` unless ``slices_over`` says ``fsdp``; every other axis stays
within a slice. GPUs are laid out host by host, so that inner axes stay within a host where they fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    slices_over: Literal["data", "fsdp"] = "data"
    """The axis that crosses TPU slices, where there are several; its size is a multiple of their
    number. data moves the gradients between slices once a step, fsdp the parameters too."""

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh {dict(zip(AXES, sizes, strict=True))}: each axis is at least 1, and one of "
                "them may be -1 to take all remaining devices."
            )
        if self.slices_over not in ("data", "fsdp"):
            raise ValueError(
                f"mesh.slices_over is {self.slices_over!r}: it is data or fsdp. (context and tensor "
                "talk too much to leave a slice.)"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Sizes of the axes over so many devices.

        Raises:
            ValueError: where they do not use exactly the devices there are.
        """
        fixed = math.prod(size for size in self.sizes if size > 0)
        shape = tuple(num_devices // fixed if size == -1 else size for size in self.sizes)
        if math.prod(shape) != num_devices or 0 in shape:
            text = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True))
            raise ValueError(
                f"mesh {text} does not divide {num_devices} device(s): the product of the axes must "
                f"be {num_devices}. Change mesh.* (one axis may be -1 to fill)."
            )
        return shape


def _across(config: MeshConfig, shape: tuple[int, ...], devices: Sequence[Any]) -> tuple[int, ...]:
    """How many slices each axis crosses: one, all but ``slices_over``.

    Raises:
        ValueError: where the slices differ in size, or the axis does not divide over them.
    """
    sizes = Counter(getattr(device, "slice_index", 0) for device in devices)
    count = len(sizes)
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the {count} TPU slices have {', '.join(map(str, sizes.values()))} devices: a mesh needs "
            "the same number in each. Give every slice the same topology."
        )
    size = shape[AXES.index(config.slices_over)]
    if size % count:
        other = "fsdp" if config.slices_over == "data" else "data"
        raise ValueError(
            f"mesh.{config.slices_over} is {size}, but it crosses {count} TPU slices: make it a "
            f"multiple of {count}, or set mesh.slices_over to {other} if mesh.{other} is one."
        )
    return tuple(count if axis == config.slices_over else 1 for axis in AXES)


def device_grid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array ``[data, fsdp, context, tensor]``: neighbours where axes talk most."""
    shape, platform = config.shape(len(devices)), devices[0].platform
    if platform == "cpu":
        return np.asarray(devices).reshape(shape)
    across = _across(config, shape, devices) if platform == "tpu" else (1,) * len(AXES)
    # Axes may share a physical one: else only products of the torus's own sizes would be possible.
    if max(across) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within = tuple(size // slices for size, slices in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """The mesh over ``devices`` (all of them, on every process, if not given)."""
    grid = device_grid(config, jax.devices() if devices is None else devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def peak_flops(kind: str) -> float | None:
    """Peak flops of one device of this kind; None if it is not known, as of CPUs."""
    names = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None
