"""Collectives of optimized HLO: who takes part, what crosses which wire, and for how long.

*Logical* bytes are the whole array that a group gathers, reduces or exchanges; *wire* bytes
are what a chip must send by the best known algorithm: (n - 1) / n of it for a gather, a scatter or an
exchange among n, twice that for an all-reduce. Within a slice they travel over ICI. XLA compiles a
program of several slices as one slice's program, and what crosses slices as transfers by the host
("megascale"): those are DCN. Seconds are wire bytes over the links that a group can use; no latency.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np

from dit_jax.plan.hlo import Array, Computation, Instruction
from dit_jax.plan.topologies import Topology

ICI, DCN = "ici", "dcn"


class Collective(NamedTuple):
    """One execution of a collective, on one chip."""

    kind: str
    network: str
    group: int
    """Members; of DCN transfers, slices."""
    logical: float
    wire: float
    seconds: float
    direction: int
    """Of a permutation: +1 up, -1 down the ring; both can run at once. Else 0."""


class Wiring(NamedTuple):
    """Where the partitions of a program lie: chip coordinates of one slice, and its torus."""

    coordinates: np.ndarray
    """[partitions, dimensions]."""
    topology: Topology

    @property
    def partitions(self) -> int:
        return len(self.coordinates)


def wiring(devices: list[Any], topology: Topology) -> Wiring:
    """The wiring of a mesh's devices, in the mesh's order; partitions are numbered within a slice."""
    home = min(getattr(device, "slice_index", 0) or 0 for device in devices)
    mine = [d for d in devices if (getattr(d, "slice_index", 0) or 0) == home]
    dimensions = topology.chip.dimensions
    coordinates = np.array([tuple(d.coords)[:dimensions] for d in mine])
    return Wiring(coordinates, topology)


# Who takes part.


def replica_groups(text: str) -> np.ndarray | None:
    """The groups of a ``replica_groups`` attribute, [groups, members]; None if it is not understood.

    Three forms: ``{{0,1},{2,3}}``, ``[2,4]<=[4,2]T(1,0)`` and ``mesh['a'=2,'b'=4] {'b'}``, the last
    with ``device_ids=([4,2]T(1,0))`` in between if the mesh's devices are not in order.
    """
    if text.startswith("{{"):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", text)]
        return np.array(groups) if len({len(group) for group in groups}) == 1 else None
    if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes = _numbers(found.group(1)), _numbers(found.group(2))
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if found.group(3):
            ids = ids.transpose(_numbers(found.group(3)))
        return ids.reshape(shape)
    if found := re.fullmatch(
        r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", text
    ):
        axes = re.findall(r"'([^']+)'=(\d+)", found.group(1))
        names = [name for name, _ in axes]
        chosen = re.findall(r"'([^']+)'", found.group(4))
        if not set(chosen) <= set(names):
            return None
        sizes = [int(size) for _, size in axes]
        ids = np.arange(math.prod(sizes))
        if found.group(2):
            ids = ids.reshape(_numbers(found.group(2)))
        if found.group(3):
            ids = ids.transpose(_numbers(found.group(3)))
        ids = ids.reshape(sizes)
        inner = [names.index(name) for name in chosen]
        outer = [d for d in range(len(sizes)) if d not in inner]
        members = math.prod(sizes[d] for d in inner)
        return ids.transpose(outer + inner).reshape(-1, members)
    return None


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


class Links(NamedTuple):
    """What a group has of the torus: links a chip, its longest extent, and whether that is a ring."""

    number: int
    longest: int
    ring: bool


def links(group: np.ndarray, wires: Wiring) -> Links:
    """Two links along every axis that the group spans as a closed ring, one along other axes."""
    points = wires.coordinates[group]
    count, longest, ring = 0, 1, False
    for axis, size in enumerate(wires.topology.shape):
        extent = len(set(points[:, axis].tolist()))
        if extent > 1:
            closed = wires.topology.wrap[axis] and extent == size and extent > 2
            count += 2 if closed else 1
            if extent > longest:
                longest, ring = extent, closed
    return Links(max(count, 1), longest, ring)


# What it costs.


def _bytes(arrays: tuple[Array, ...]) -> float:
    # The scalars of a start's result are semaphores.
    return sum(array.bytes for array in arrays if array.dims)


def ici_collective(
    instruction: Instruction, computation: Computation, wires: Wiring, kind: str | None = None
) -> tuple[Collective, str | None]:
    """A collective within a slice, and a warning where its groups are not understood.

    ``kind`` is given where the instruction is a part of something else: XLA:TPU writes a reduce-scatter
    as an all-reduce and a slice, fused.
    """
    kind = kind or instruction.collective
    assert kind is not None
    given = sum(_bytes(computation[o].results) for o in instruction.operands if o in computation)
    link = wires.topology.chip.link_bandwidth
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),\s*(\d+)\}", instruction.attributes["source_target_pairs"])
        up = 2 * sum(int(target) > int(source) for source, target in pairs) > len(pairs)
        cost = Collective(kind, ICI, len(pairs), given, given, given / link, 1 if up else -1)
        return cost, None
    text = instruction.attributes.get("replica_groups", "{}")
    if ids := instruction.attributes.get("device_ids"):
        text = f"{text}, device_ids={ids}"
    groups = replica_groups(text)
    known = groups is not None or text == "{}"
    group = groups[0] if groups is not None else np.arange(wires.partitions)
    n = len(group)
    usable = links(group, wires)
    share = (n - 1) / n
    if kind == "all-gather":
        logical = (
            given * n if instruction.opcode.endswith("-start") else _bytes(instruction.results)
        )
        wire = logical * share
    elif kind == "all-reduce":
        logical, wire = given, 2 * given * share
    elif kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        logical, wire = given, given * share
    else:
        logical, wire = given, given
    seconds = wire / (usable.number * link)
    if "all-to-all" in kind:
        # Half of everything crosses the middle of the longest axis: over two links of a ring, in each
        # direction, or one of a line.
        seconds = given * usable.longest / ((8 if usable.ring else 4) * link)
    warning = None if known else f"replica groups {text[:80]} not understood: all chips assumed"
    return Collective(kind, ICI, n, logical, wire, seconds, 0), warning


_DCN_SHARES = {
    "ALL_REDUCE": ("all-reduce", 2.0),
    "ALL_GATHER": ("all-gather", 1.0),
    "REDUCE_SCATTER": ("reduce-scatter", 1.0),
    "ALL_TO_ALL": ("all-to-all", 1.0),
}


def dcn_collective(instruction: Instruction, wires: Wiring) -> Collective | None:
    """What a ``recv`` brings over DCN; None for transfers to the host alone.

    A collective across slices is a ``send`` and a ``recv`` that the host's runtime carries out; the
    result is what was gathered, reduced or exchanged.
    """
    kind = re.search(
        r'_xla_megascale_transfer_type="(\w+)"',
        instruction.attributes.get("frontend_attributes", ""),
    )
    if instruction.opcode != "recv" or kind is None:
        return None
    slices = wires.topology.slices
    received = _bytes(instruction.results)
    name, times = _DCN_SHARES.get(kind.group(1), (kind.group(1).lower().replace("_", "-"), None))
    logical = received * slices if name == "reduce-scatter" else received
    wire = logical if times is None else times * logical * (slices - 1) / slices
    return Collective(name, DCN, slices, logical, wire, wire / wires.topology.chip.dcn_bandwidth, 0)
