"""Flops, HBM bytes and wire bytes of single instructions of optimized HLO.

Flops are those of matrix products and convolutions, a multiplication and an addition counting as two;
elementwise work is left out. Bytes are logical sizes of what is read from and written to HBM: arrays
that the compiler placed in on-chip memory count nothing, and a slice that is read or written in place
counts as the slice. How often an instruction runs is not known here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dit_jax.plan.hlo import (
    HBM,
    Array,
    Computation,
    Instruction,
    Module,
    numbers,
    parameters,
    root,
)
from dit_jax.plan.topologies import Topology

# Instructions that move nothing themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "while", "call", "conditional", "opt-barrier", "domain"),
    *("async-start", "async-update", "async-done", "add-dependency"),
}
# Asynchronous copies between memories (prefetches, offloads), which run beside computation.
COPIES = {"copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"}
SLICES = {"dynamic-slice", "slice", "gather"}
ICI, DCN = "ici", "dcn"
PERMUTE = "collective-permute"


def fusion_contents(
    module: Module, instruction: Instruction
) -> Iterator[tuple[Instruction, Computation]]:
    """All instructions within a fusion, nested ones included, each with its computation."""
    computation = module.inside(instruction)
    for inner in computation.values():
        yield inner, computation
        if inner.opcode in ("fusion", "call", "async-start"):
            yield from fusion_contents(module, inner)


def chained(instruction: Instruction) -> bool:
    """Whether this is a collective that a chain of fusions carries out beside other work: a fusion that
    starts it, some that go on with it, one that ends it, each showing it whole."""
    attributes = instruction.attributes.get("frontend_attributes", "")
    return instruction.collective is not None and "chain_id" in attributes


def marks(instruction: Instruction, stage: str) -> bool:
    """Whether this ends the fusion that begins (``Start``) or ends (``Done``) a chain."""
    return instruction.attributes.get("custom_call_target") == f'"AsyncCollective{stage}"'


def _carried(instruction: Instruction) -> bool:
    """Whether the arrays of this are only handed on within a chain."""
    return chained(instruction) or marks(instruction, "Start") or marks(instruction, "Done")


# --- Flops ---


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """Of one ``dot`` or ``convolution``; 0 for anything else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    lhs, rhs = (computation[name].results[0].dims for name in instruction.operands[:2])
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, lhs, rhs)
    contracted = numbers(instruction.attributes["lhs_contracting_dims"])
    return 2.0 * math.prod(instruction.results[0].dims) * math.prod(lhs[d] for d in contracted)


def _convolution_flops(one: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """XLA:TPU writes products as convolutions, batch dimensions as dilated spatial ones: only the
    taps that meet data are multiplied."""
    of_lhs, of_rhs, of_out = re.split(r"_|->", one.attributes["dim_labels"])
    window = dict(re.findall(r"(\w+)=([^\s{}]+)", one.attributes.get("window", "")))
    out, products, spatial = one.results[0].dims, 1.0, len(of_lhs) - 2
    defaults = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    rows = [window[k].split("x") if k in window else [v] * spatial for k, v in defaults.items()]
    for d, (stride, pad, *dilations) in enumerate(zip(*rows, strict=True)):
        label, low = str(d), pad.split("_")[0]
        sizes = out[of_out.index(label)], lhs[of_lhs.index(label)], rhs[of_rhs.index(label)]
        products *= _taps(*sizes, *map(int, (stride, low, *dilations)))
    features = lhs[of_lhs.index("f")] / int(one.attributes.get("feature_group_count", 1))
    batch = lhs[of_lhs.index("b")] / int(one.attributes.get("batch_group_count", 1))
    return 2.0 * features * out[of_out.index("f")] * batch * products


@functools.cache
def _taps(out: int, size: int, kernel: int, stride: int, pad: int, base: int, window: int) -> int:
    """Pairs of a window's element and an output that meet real data along one dimension; ``base`` and
    ``window`` are the dilations of the data and of the window."""
    at = np.arange(out)[:, None] * stride - pad + np.arange(kernel)[None, :] * window
    return int(((at >= 0) & (at % base == 0) & (at // base < size)).sum())


# --- Bytes ---


def hbm(arrays: Iterable[Array]) -> float:
    """Bytes of those arrays that lie in HBM."""
    return sum(array.bytes for array in arrays if array.space == HBM)


def transfer(instruction: Instruction, computation: Computation) -> tuple[float, tuple[int, int]]:
    """Bytes that one of ``COPIES`` moves, and the memory spaces that it moves them from and to."""
    operands = [computation[o].results[0] for o in instruction.operands if o in computation]
    if instruction.opcode == "dynamic-update-slice-start":
        target, source = operands[:2]
        return source.bytes, (source.space, target.space)
    if instruction.opcode == "copy-start":
        target, source = instruction.results[:2]
    else:  # (source [, indices]), slice, semaphore.
        source, target = operands[0], [a for a in instruction.results if a.dims][-1]
    return target.bytes, (source.space, target.space)


def hbm_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    """What one instruction, but for ``COPIES``, reads from and writes to HBM."""
    code, written = instruction.opcode, hbm(instruction.results)
    if code in FREE or code.endswith("-done"):
        return 0.0
    if code in ("send", "recv") or (instruction.collective and code.endswith("-start")):
        return written  # The result of a start is a tuple of what is read and what is written.
    operands = [computation[o].results for o in instruction.operands if o in computation]
    if code == "fusion":
        return _fusion_bytes(instruction, operands, module)
    if code in SLICES:
        read = operands[0][0].space == HBM
        return written + sum(array.bytes for array in instruction.results) * read
    if code == "dynamic-update-slice":
        in_place = instruction.results[0].space == HBM
        return hbm(operands[1]) + sum(array.bytes for array in operands[1]) * in_place
    return written + sum(hbm(arrays) for arrays in operands)


def _fusion_bytes(
    instruction: Instruction, operands: list[tuple[Array, ...]], module: Module
) -> float:
    body, total = module.inside(instruction), 0.0
    inside = parameters(body)
    for i, arrays in enumerate(operands):
        whole = hbm(arrays)
        total += min(_read(module, body, inside[i].name), whole) if whole and i in inside else whole
    # What it returns, bitcasts looked through.
    end = root(body)
    outputs = [body[name] for name in end.operands] if end.opcode == "tuple" else [end]
    for i, output in enumerate(outputs):
        while output.opcode == "bitcast" and output.operands[0] in body:
            output = outputs[i] = body[output.operands[0]]
    if len(outputs) == 1 and marks(outputs[0], "Start"):
        # (input, output, semaphores): read and written once in the chain, here.
        return total + hbm(instruction.results[:2])
    for array, output in zip(instruction.results, outputs, strict=False):
        if output.opcode == "dynamic-update-slice":  # In place.
            total += body[output.operands[1]].results[0].bytes * (array.space == HBM)
        elif output.opcode != "parameter" and not _carried(output):
            total += hbm([array])
    return total + hbm(instruction.results[len(outputs) :])


def _read(module: Module, body: Computation, name: str) -> float:
    """Bytes of the array ``name`` that its users in a fused computation read; infinite for all."""
    total = 0.0
    for user in body.values():
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode == "bitcast":
            total += _read(module, body, user.name)
        elif user.opcode == "fusion":
            inner = module.inside(user)
            at = parameters(inner).get(user.operands.index(name))
            total += _read(module, inner, at.name) if at else math.inf
        elif first and user.opcode in SLICES:
            total += sum(array.bytes for array in user.results)
        elif first and user.opcode == "dynamic-update-slice":
            continue  # Written in place; the update is counted where it is written.
        elif (user.root and user.opcode == "tuple") or _carried(user):
            continue  # Handed on as it is.
        else:
            return math.inf
    return total


# --- Wires ---
#
# Logical bytes B are the whole array that a group of n gathers, reduces or exchanges; wire bytes are
# what a chip must send by the best known algorithm:
#
#     (1)  gather, scatter, exchange   (n - 1) / n B
#     (2)  all-reduce                  2 (n - 1) / n B
#     (3)  permutation, broadcast      B
#
# Seconds are wire bytes over the links that a group can use; no latency. Within a slice they go over
# ICI. XLA compiles a program of several slices as one slice's program, and what crosses slices as
# transfers by the host ("megascale"): those are DCN.


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


def _array_bytes(arrays: tuple[Array, ...]) -> float:
    # The scalars of a start's result are semaphores.
    return sum(array.bytes for array in arrays if array.dims)


def _wire_bytes(kind: str, logical: float, n: int) -> float:
    share = (n - 1) / n
    if kind == "all-reduce":
        return 2 * logical * share  # (2)
    shared = kind in ("all-gather", "reduce-scatter") or "all-to-all" in kind
    return logical * share if shared else logical  # (1), (3)


def ici_collective(
    one: Instruction, around: Computation, points: np.ndarray, topology: Topology, scattered: bool
) -> Collective:
    """A collective within a slice. ``scattered`` says that a slice of its result is taken in the same
    fusion: XLA:TPU writes a reduce-scatter as an all-reduce and a slice."""
    reduced = scattered and one.collective == "all-reduce"
    kind = "reduce-scatter" if reduced else str(one.collective)
    logical = sum(_array_bytes(around[o].results) for o in one.operands if o in around)
    link, warning = topology.chip.link_bandwidth, None
    if kind == PERMUTE:
        pairs = re.findall(r"\{(\d+),\s*(\d+)\}", one.attributes["source_target_pairs"])
        up = 2 * sum(int(target) > int(source) for source, target in pairs) > len(pairs)
        seconds, direction = logical / link, 1 if up else -1
        return Collective(kind, ICI, len(pairs), logical, logical, seconds, direction)
    text, ids = (one.attributes.get(key, "") for key in ("replica_groups", "device_ids"))
    groups = replica_groups(f"{text}, device_ids={ids}" if ids else text)
    if groups is None:
        groups = np.arange(len(points))[None]
        if text not in ("", "{}"):
            warning = f"replica groups {text[:80]} not understood: all chips assumed"
    n = len(groups[0])
    if kind == "all-gather":
        whole = not one.opcode.endswith("-start")
        logical = _array_bytes(one.results) if whole else logical * n
    number, longest, ring = links(points[groups[0]], topology)
    wire = _wire_bytes(kind, logical, n)
    seconds = wire / (number * link)
    if "all-to-all" in kind:
        # Half of everything crosses the middle of the longest axis: over two links of a ring, in each
        # direction, or one of a line.
        seconds = logical * longest / ((8 if ring else 4) * link)
    return Collective(kind, ICI, n, logical, wire, seconds, warning=warning)


def dcn_collective(one: Instruction, topology: Topology) -> Collective | None:
    """What a ``recv`` brings over DCN, which is what was gathered, reduced or exchanged across slices;
    None for a ``send``, and for transfers to the host alone."""
    attributes = one.attributes.get("frontend_attributes", "")
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    if one.opcode != "recv" or transfer is None:
        return None
    kind, slices = transfer.group(1).lower().replace("_", "-"), topology.slices
    logical = _array_bytes(one.results) * (slices if kind == "reduce-scatter" else 1)
    wire = _wire_bytes(kind, logical, slices)
    return Collective(kind, DCN, slices, logical, wire, wire / topology.chip.dcn_bandwidth)
