"""Collectives of optimized HLO: who takes part, what crosses which wire, and for how long.

*Logical* bytes B are the whole array that a group of n gathers, reduces or exchanges; *wire* bytes are
what a chip must send by the best known algorithm::

    (1)  gather, scatter, exchange   (n - 1) / n B
    (2)  all-reduce                  2 (n - 1) / n B
    (3)  permutation, broadcast      B

Seconds are wire bytes over the links that a group can use; no latency. Within a slice they travel over
ICI. XLA compiles a program of several slices as one slice's program, and what crosses slices as
transfers by the host ("megascale"): those are DCN.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np

from dit_jax.plan.hlo import Array, Computation, Instruction, numbers
from dit_jax.plan.topologies import Topology

ICI, DCN = "ici", "dcn"
PERMUTE = "collective-permute"


class Collective(NamedTuple):
    """One execution of a collective, on one chip."""

    kind: str
    network: str
    group: int  # Members; of DCN transfers, slices.
    logical: float
    wire: float
    seconds: float
    direction: int = 0  # Of a permutation: +1 up, -1 down the ring; both can run at once.
    warning: str | None = None


def coordinates(devices: list[Any], topology: Topology) -> np.ndarray:
    """Where a mesh's partitions, which are numbered within a slice, lie in it: [partitions, axes]."""
    slices = [getattr(device, "slice_index", 0) or 0 for device in devices]
    places = [d.coords for d, index in zip(devices, slices, strict=True) if index == min(slices)]
    return np.array(places)[:, : topology.chip.dimensions]


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Partitions counted up in an array of these sizes, which is then transposed."""
    ids = np.arange(math.prod(numbers(sizes))).reshape(numbers(sizes))
    return ids.transpose(numbers(order)) if order else ids


def replica_groups(text: str) -> np.ndarray | None:
    """The groups of a ``replica_groups`` attribute, [groups, members]; None if it is not understood.

    Three forms: ``{{0,1},{2,3}}``, ``[2,4]<=[4,2]T(1,0)`` and ``mesh['a'=2,'b'=4] {'b'}``, the last
    with ``device_ids=([4,2]T(1,0))`` in between if the mesh's devices are not in order.
    """
    if text.startswith("{{"):
        groups = [numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", text)]
        return np.array(groups) if len({len(group) for group in groups}) == 1 else None
    if form := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(form.group(2), form.group(3)).reshape(numbers(form.group(1)))
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    form = re.fullmatch(rf"mesh\[([^\]]*)\]{order}\s*\{{([^}}]*)\}}", text)
    axes = dict(re.findall(r"'([^']+)'=(\d+)", form.group(1))) if form else {}
    chosen = re.findall(r"'([^']+)'", form.group(4)) if form else []
    if form is None or not axes.keys() >= set(chosen):
        return None
    sizes = list(map(int, axes.values()))
    ids = _iota(form.group(2) or ",".join(axes.values()), form.group(3)).reshape(sizes)
    inner = [list(axes).index(name) for name in chosen]
    outer = [d for d in range(len(sizes)) if d not in inner]
    return ids.transpose(outer + inner).reshape(-1, math.prod(sizes[d] for d in inner))


def links(points: np.ndarray, topology: Topology) -> tuple[int, int, bool]:
    """How many links a chip has for a group of chips [n, axes]: two along every axis that it spans as a
    closed ring, one along other axes; the group's longest extent, and whether that is a ring."""
    count, longest, ring = 0, 1, False
    for axis, (size, wraps) in enumerate(zip(topology.shape, topology.wrap, strict=True)):
        extent = len(set(points[:, axis].tolist()))
        if extent > 1:
            closed = wraps and extent == size and extent > 2
            count += 2 if closed else 1
            if extent > longest:
                longest, ring = extent, closed
    return max(count, 1), longest, ring


def _bytes(arrays: tuple[Array, ...]) -> float:
    # The scalars of a start's result are semaphores.
    return sum(array.bytes for array in arrays if array.dims)


def _wire_bytes(kind: str, logical: float, n: int) -> float:
    share = (n - 1) / n
    if kind == "all-reduce":
        return 2 * logical * share  # (2)
    shared = kind in ("all-gather", "reduce-scatter") or "all-to-all" in kind
    return logical * share if shared else logical  # (1), (3)


def ici_collective(
    one: Instruction,
    computation: Computation,
    points: np.ndarray,
    topology: Topology,
    scattered: bool = False,
) -> Collective:
    """A collective within a slice. ``scattered`` says that a slice of its result is taken in the same
    fusion: XLA:TPU writes a reduce-scatter as an all-reduce and a slice."""
    kind = str(one.collective)
    if scattered and kind == "all-reduce":
        kind = "reduce-scatter"
    operand = sum(_bytes(computation[o].results) for o in one.operands if o in computation)
    link = topology.chip.link_bandwidth
    if kind == PERMUTE:
        pairs = re.findall(r"\{(\d+),\s*(\d+)\}", one.attributes["source_target_pairs"])
        up = 2 * sum(int(target) > int(source) for source, target in pairs) > len(pairs)
        seconds = operand / link
        return Collective(kind, ICI, len(pairs), operand, operand, seconds, 1 if up else -1)
    text, warning = one.attributes.get("replica_groups", "{}"), None
    if ids := one.attributes.get("device_ids"):
        text = f"{text}, device_ids={ids}"
    groups = replica_groups(text)
    if groups is None:
        groups = np.arange(len(points))[None]
        if text != "{}":
            warning = f"replica groups {text[:80]} not understood: all chips assumed"
    n, logical = len(groups[0]), operand
    if kind == "all-gather":
        logical = operand * n if one.opcode.endswith("-start") else _bytes(one.results)
    number, longest, ring = links(points[groups[0]], topology)
    wire = _wire_bytes(kind, logical, n)
    seconds = wire / (number * link)
    if "all-to-all" in kind:
        # Half of everything crosses the middle of the longest axis: over two links of a ring, in each
        # direction, or one of a line.
        seconds = logical * longest / ((8 if ring else 4) * link)
    return Collective(kind, ICI, n, logical, wire, seconds, warning=warning)


def dcn_collective(instruction: Instruction, topology: Topology) -> Collective | None:
    """What a ``recv`` brings over DCN; None for transfers to the host alone.

    A collective across slices is a ``send`` and a ``recv`` that the host's runtime carries out; the
    result is what was gathered, reduced or exchanged.
    """
    attributes = instruction.attributes.get("frontend_attributes", "")
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    if instruction.opcode != "recv" or transfer is None:
        return None
    kind, slices = transfer.group(1).lower().replace("_", "-"), topology.slices
    logical = _bytes(instruction.results) * (slices if kind == "reduce-scatter" else 1)
    wire = _wire_bytes(kind, logical, slices)
    return Collective(kind, DCN, slices, logical, wire, wire / topology.chip.dcn_bandwidth)
