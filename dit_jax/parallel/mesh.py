"""The device mesh: ``data x fsdp x context x tensor``.

``data`` holds replicas, ``fsdp`` shards parameters and batch, ``context`` shards the tokens of a
row, ``tensor`` shards heads and the MLP. Axes are of type Auto: the compiler places the
collectives, from the shardings of parameters and the constraints inside the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh {dict(zip(AXES, sizes, strict=True))}: each axis is at least 1, and one of "
                "them may be -1 to take all remaining devices."
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


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """The mesh over ``devices`` (all of them, on every process, if not given)."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(shape)
    else:
        grid = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True, contiguous_submeshes=False
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
