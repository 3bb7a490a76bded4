"""Named TPU slices without the TPUs: chips, their published numbers, and devices to compile for.

``v5p:4x4x8`` is 4 x 4 x 8 chips of a v5p. With libtpu installed, XLA compiles for such a name on any
host; nothing here runs a program, and ``parallel.make_mesh`` lays a mesh over such devices as over
others.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from dit_jax.parallel.mesh import PEAK_FLOPS

Shape = tuple[int, ...]


def wraps_cubes(shape: Shape) -> tuple[bool, ...]:
    """v4, v5p and 7x: optical switches close a slice into a torus where it is made of whole cubes of
    4 x 4 x 4 chips."""
    return (all(size % 4 == 0 for size in shape),) * len(shape)


def wraps_sixteen(shape: Shape) -> tuple[bool, ...]:
    """v5e and v6e: an axis closes into a ring only where it spans the pod, 16 chips."""
    return tuple(size == 16 for size in shape)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip: published peaks, per chip, in flops and bytes a second."""

    name: str
    kinds: tuple[str, ...]
    """What ``device.device_kind`` begins with."""
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    """Of one ICI link, in one direction."""
    ports: int
    """ICI links: two for each dimension of the torus."""
    dcn_bandwidth: float
    """An estimate: the host's network cards, in one direction, shared by its chips."""
    host_bandwidth: float
    """An estimate: PCIe to the host's memory."""
    wraps: Callable[[Shape], tuple[bool, ...]]
    source: str
    example: str
    """The name of a small slice."""
    devices: int = 1
    """JAX devices on a chip."""
    options: tuple[tuple[str, Any], ...] = ()
    """What libtpu must be told besides."""

    @property
    def flops(self) -> float:
        """Dense bfloat16."""
        return PEAK_FLOPS[self.kinds[0]] * self.devices

    @property
    def dimensions(self) -> int:
        """Of the torus."""
        return self.ports // 2


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_GIB = 2.0**30

# DCN: v5p, v6e, 7x as printed in tpu7x's table (Gb/s per chip), v5e a pod's 6.4 Tb/s over 256 chips,
# v4 a host's 25 GB/s over 4 chips, which like PCIe is from https://jax-ml.github.io/scaling-book/tpus.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 32 * _GIB, 1200e9, 50e9, 6, 6.25e9, 15e9, wraps_cubes,
             _DOCS + "v4", "v4:2x2x1", options=(("chip_config_name", "megacore"),)),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16e9, 819e9, 50e9, 4, 3.125e9, 15e9,
             wraps_sixteen, _DOCS + "v5e", "v5e:2x4"),
        Chip("v5p", ("TPU v5", "TPU v5p"), 95e9, 2765e9, 100e9, 6, 6.25e9, 15e9, wraps_cubes,
             _DOCS + "v5p", "v5p:2x2x2"),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32e9, 1638e9, 100e9, 4, 12.5e9, 32e9,
             wraps_sixteen, _DOCS + "v6e", "v6e:2x4"),
        Chip("tpu7x", ("TPU7x",), 192 * _GIB, 7380e9, 100e9, 6, 12.5e9, 32e9, wraps_cubes,
             _DOCS + "tpu7x", "tpu7x:2x2x1", devices=2),
    )
}  # fmt: skip
"""Chips that XLA can compile for. Without ``chip_config_name`` a v4 chip is two devices."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one shape, joined by the data centre's network if there are several."""

    chip: Chip
    shape: Shape
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        return self.chip.wraps(self.shape)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """A topology from its name.

    Raises:
        ValueError: for an unknown chip or a shape it cannot have.
    """
    known = ", ".join(chip.example for chip in CHIPS.values())
    kind, _, text = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        raise ValueError(
            f"--topology {name!r}: the chip {kind!r} is not known. The form is CHIP:SHAPE, such as "
            f"{known}."
        )
    sizes = text.split("x")
    valid = all(size.isdigit() and int(size) > 0 for size in sizes)
    if not valid or len(sizes) != chip.dimensions:
        raise ValueError(
            f"--topology {name!r}: a {kind} slice has {chip.dimensions} sizes of at least 1, as in "
            f"{chip.example}."
        )
    if slices < 1:
        raise ValueError(f"--slices is {slices}: it is at least 1.")
    return Topology(chip, tuple(map(int, sizes)), slices)


COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",  # No metadata server to ask what this machine is.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",  # It warns that this is no TPU host; errors are raised anyway.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu locks real chips; compilers may share.
}


def prepare_environment() -> None:
    """Sets what libtpu reads where there is no TPU, and keeps JAX's own work on the CPU; call it before
    anything makes JAX choose its backend."""
    for name, value in COMPILE_ONLY.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def topology_devices(topology: Topology) -> list[Any]:
    """Devices of a topology that programs can be compiled for, and not run on.

    Raises:
        ValueError: where libtpu is not installed, or refuses the shape.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu, which holds the TPU compiler, is not installed: pip install 'dit-jax[tpu]', "
            "in a clone pip install -e '.[tpu]' (Linux; no TPU is needed)."
        )
    prepare_environment()
    options: dict[str, Any] = dict(topology.chip.options)
    # Left alone, libtpu compiles for an open mesh even where the slice is a torus.
    wrap = (*topology.wrap, False, False)[:3]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, wrap=wrap, **options
        )
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(
            f"libtpu does not know the topology {topology.name} x {topology.slices} "
            f"({str(error).splitlines()[0]}): try {topology.chip.example}."
        ) from error
    return described.devices
