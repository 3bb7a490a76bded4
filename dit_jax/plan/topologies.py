"""Named TPU slices without the TPUs: chips, their published numbers, and devices to compile for.

``v5p:4x4x8`` is 4 x 4 x 8 chips of a v5p. With libtpu installed, XLA compiles for such a name on any
host, and ``parallel.make_mesh`` lays a mesh over such devices as over others; nothing here runs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from dit_jax.files import InputError, refuse_if
from dit_jax.parallel.mesh import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip: published peaks, per chip, in flops and bytes a second."""

    name: str
    kind: str  # What ``device.device_kind`` begins with.
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float  # Of one ICI link, in one direction.
    dimensions: int  # Of the torus; a chip has two ICI links for each.
    dcn_bandwidth: (
        float  # An estimate: the host's network cards, one direction, shared by its chips.
    )
    host_bandwidth: float  # An estimate: PCIe to the host's memory.
    example: str  # The name of a small slice.
    devices: int = 1  # JAX devices on a chip.

    @property
    def flops(self) -> float:
        """Dense bfloat16."""
        return PEAK_FLOPS[self.kind] * self.devices


_GIB = 2.0**30
# Sources: https://docs.cloud.google.com/tpu/docs/NAME. DCN: v5p, v6e, 7x as printed in tpu7x's table
# (Gb/s per chip), v5e a pod's 6.4 Tb/s over 256 chips, v4 a host's 25 GB/s over 4 chips, which like
# PCIe is from https://jax-ml.github.io/scaling-book/tpus.
_ALL = (
    Chip("v4", "TPU v4", 32 * _GIB, 1200e9, 50e9, 3, 6.25e9, 15e9, "v4:2x2x1"),
    Chip("v5e", "TPU v5 lite", 16e9, 819e9, 50e9, 2, 3.125e9, 15e9, "v5e:2x4"),
    Chip("v5p", "TPU v5", 95e9, 2765e9, 100e9, 3, 6.25e9, 15e9, "v5p:2x2x2"),
    Chip("v6e", "TPU v6 lite", 32e9, 1638e9, 100e9, 2, 12.5e9, 32e9, "v6e:2x4"),
    Chip("tpu7x", "TPU7x", 192 * _GIB, 7380e9, 100e9, 3, 12.5e9, 32e9, "tpu7x:2x2x1", 2),
)
CHIPS = {chip.name: chip for chip in _ALL}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one shape, joined by the data centre's network if there are several."""

    chip: Chip
    shape: tuple[int, ...]
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
    def capacity(self) -> float:
        """Bytes of HBM of one device."""
        return self.chip.hbm_bytes / self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes of a slice close into rings."""
        if self.chip.dimensions == 2:  # v5e and v6e: those that span the pod, 16 chips.
            return tuple(size == 16 for size in self.shape)
        # Others: optical switches close a slice that is made of whole cubes of 4 x 4 x 4 chips.
        return (all(size % 4 == 0 for size in self.shape),) * 3


def parse_topology(name: str, slices: int = 1) -> Topology:
    """A topology from its name; ``InputError`` for an unknown chip or a shape it cannot have."""
    kind, _, text = name.partition(":")
    known = ", ".join(chip.example for chip in CHIPS.values())
    form = f"the chip {kind!r} is not known. The form is CHIP:SHAPE, such as {known}."
    refuse_if([(kind not in CHIPS, f"--topology {name!r}: {form}")])
    chip, sizes = CHIPS[kind], text.split("x")
    valid = all(n.isdigit() and int(n) > 0 for n in sizes) and len(sizes) == chip.dimensions
    form = f"a {kind} slice has {chip.dimensions} sizes of at least 1, as in {chip.example}."
    refuse_if([(not valid, f"--topology {name!r}: {form}")])
    return Topology(chip, tuple(map(int, sizes)), slices)


def prepare_environment() -> None:
    """Sets what libtpu reads on a host without a TPU, and keeps JAX's own work on the CPU; to be called
    before anything makes JAX choose its backend."""
    values = {
        "TPU_SKIP_MDS_QUERY": "1",  # No metadata server to ask what this machine is.
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",  # It warns that this is no TPU host; errors are raised anyway.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu locks real chips; compilers may share.
    }
    for name, value in values.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def topology_devices(topology: Topology) -> list[Any]:
    """Devices of a topology that programs can be compiled for, and not run on; ``InputError`` if libtpu
    is not installed or refuses the shape."""
    message = (
        "libtpu, which holds the TPU compiler, is not installed: pip install 'dit-jax[tpu]', "
        "in a clone pip install -e '.[tpu]' (Linux; no TPU is needed)."
    )
    refuse_if([(importlib.util.find_spec("libtpu") is None, message)])
    prepare_environment()
    # Left alone, libtpu compiles for an open mesh even if the slice is a torus, and takes a v4 chip for
    # two devices.
    options: dict[str, Any] = {"wrap": (*topology.wrap, False, False)[:3]}
    options |= {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    options |= {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise InputError(
            f"libtpu does not know the topology {topology.name} x {topology.slices} "
            f"({str(error).splitlines()[0]}): try {topology.chip.example}."
        ) from error
