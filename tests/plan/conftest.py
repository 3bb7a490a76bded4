"""Programs that XLA:TPU (libtpu 0.0.42) compiled, and where they run.

`programs/*.hlo` are as the compiler wrote them, attributes that nothing reads left out; `chain` is cut
out of a train step. All are for v5e:2x4, eight chips.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit_jax.plan.hlo import Module, parse
from dit_jax.plan.topologies import Topology, parse_topology

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture
def program() -> Callable[[str], Module]:
    """``program(name)``: a compiled program."""
    return lambda name: parse((PROGRAMS / f"{name}.hlo").read_text())


@pytest.fixture
def chips() -> Callable[..., tuple[list, Topology]]:
    """``chips(name, slices=1)``: stand-ins for the devices of a topology, x fastest, and itself."""

    def make(name: str, slices: int = 1) -> tuple[list, Topology]:
        topology = parse_topology(name, slices)
        places = [()]
        for size in reversed(topology.shape):
            places = [(i, *place) for place in places for i in range(size)]
        places = sorted(places, key=lambda place: place[::-1])
        devices = [
            SimpleNamespace(coords=place, slice_index=index)
            for index in range(slices)
            for place in places
        ]
        return devices, topology

    return make
