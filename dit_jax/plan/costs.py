"""Flops and HBM bytes of single instructions of optimized HLO.

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
from typing import NamedTuple

import numpy as np

from dit_jax.plan.hlo import HBM, HOST, Array, Computation, Instruction, Module, parameters, root

FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
        *("partition-id", "replica-id", "while", "call", "conditional", "opt-barrier", "domain"),
        *("async-start", "async-update", "async-done", "add-dependency"),
    }
)
"""Instructions that move nothing themselves."""

COPIES = frozenset(
    {"copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"}
)
"""Asynchronous copies between memories: prefetches, offloads. They run beside computation."""

SLICES = frozenset({"dynamic-slice", "slice", "gather"})


class Transfer(NamedTuple):
    """What an asynchronous copy moves, and between which memory spaces."""

    source: int
    target: int
    bytes: float


# Flops.


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """Of one ``dot`` or ``convolution``; 0 for anything else."""
    if instruction.opcode == "dot":
        lhs = computation[instruction.operands[0]].results[0].dims
        contracted = _numbers(instruction.attributes["lhs_contracting_dims"])
        return 2.0 * math.prod(instruction.results[0].dims) * math.prod(lhs[d] for d in contracted)
    if instruction.opcode == "convolution":
        lhs, rhs = (computation[name].results[0].dims for name in instruction.operands[:2])
        return _convolution_flops(instruction, lhs, rhs)
    return 0.0


def fusion_contents(
    module: Module, instruction: Instruction
) -> Iterator[tuple[Instruction, Computation]]:
    """All instructions within a fusion, nested ones included, each with its computation."""
    computation = module.computations.get(instruction.called("calls") or "", {})
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
    """Whether the arrays that this takes and gives are only handed on within a chain."""
    return chained(instruction) or marks(instruction, "Start") or marks(instruction, "Done")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@functools.lru_cache(None)
def _taps(
    out: int, size: int, kernel: int, stride: int, pad: int, dilation: tuple[int, int]
) -> int:
    """Pairs of a window's element and an output that meet real data along one dimension."""
    base, window = dilation
    at = np.arange(out)[:, None] * stride - pad + np.arange(kernel)[None, :] * window
    return int(((at >= 0) & (at % base == 0) & (at // base < size)).sum())


def _convolution_flops(one: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """XLA:TPU writes products as convolutions, batch dimensions as dilated spatial ones: only the
    taps that meet data are multiplied."""
    of_lhs, of_rhs, of_out = re.split(r"_|->", one.attributes["dim_labels"])
    window = dict(
        part.split("=", 1) for part in one.attributes.get("window", "{}").strip("{}").split()
    )
    out = one.results[0].dims
    spatial = len(of_lhs) - 2

    def of_window(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * spatial

    strides, bases, windows = (of_window(k, "1") for k in ("stride", "lhs_dilate", "rhs_dilate"))
    pads = of_window("pad", "0_0")
    products = 1.0
    for d in range(spatial):
        label = str(d)
        products *= _taps(
            out[of_out.index(label)],
            lhs[of_lhs.index(label)],
            rhs[of_rhs.index(label)],
            int(strides[d]),
            int(pads[d].split("_")[0]),
            (int(bases[d]), int(windows[d])),
        )
    features = lhs[of_lhs.index("f")] / int(one.attributes.get("feature_group_count", 1))
    batch = lhs[of_lhs.index("b")] / int(one.attributes.get("batch_group_count", 1))
    return 2.0 * features * out[of_out.index("f")] * batch * products


# Bytes.


def hbm(arrays: Iterable[Array]) -> float:
    """Bytes of those arrays that lie in HBM."""
    return sum(array.bytes for array in arrays if array.space == HBM)


def transfer(instruction: Instruction, computation: Computation) -> Transfer:
    """What one of ``COPIES`` moves."""
    sources = [computation[name].results[0] for name in instruction.operands if name in computation]
    if instruction.opcode == "copy-start":
        target, source = instruction.results[0], instruction.results[1]
        return Transfer(source.space, target.space, target.bytes)
    if instruction.opcode == "dynamic-update-slice-start":
        return Transfer(sources[1].space, sources[0].space, sources[1].bytes)
    # (source [, indices]), slice, semaphore.
    target = [array for array in instruction.results if array.dims][-1]
    return Transfer(sources[0].space, target.space, target.bytes)


def host_bytes(instruction: Instruction, computation: Computation) -> float:
    """Bytes that an asynchronous copy moves to or from the host's memory."""
    if instruction.opcode not in COPIES:
        return 0.0
    moved = transfer(instruction, computation)
    return moved.bytes * (HOST in (moved.source, moved.target))


def hbm_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    """What one instruction reads from and writes to HBM."""
    code = instruction.opcode
    if code in FREE or code.endswith("-done"):
        return 0.0
    given = [computation[name].results for name in instruction.operands if name in computation]
    if code in COPIES:
        moved = transfer(instruction, computation)
        return moved.bytes * ((moved.source == HBM) + (moved.target == HBM))
    if code in SLICES:
        written = hbm(instruction.results)
        read = sum(a.bytes for a in instruction.results) if given[0][0].space == HBM else 0.0
        return read + written
    if code == "dynamic-update-slice":
        update = given[1]
        return hbm(update) + (
            sum(a.bytes for a in update) if instruction.results[0].space == HBM else 0
        )
    if code == "fusion":
        return _fusion_bytes(instruction, given, module)
    if code in ("send", "recv"):
        return hbm(instruction.results)
    if instruction.collective and code.endswith("-start"):
        # The result of a start is a tuple of what is read and what is written.
        return hbm(instruction.results)
    return hbm(instruction.results) + sum(hbm(arrays) for arrays in given)


def _fusion_bytes(
    instruction: Instruction, given: list[tuple[Array, ...]], module: Module
) -> float:
    body = module.computations.get(instruction.called("calls") or "", {})
    names = {i: parameter.name for i, parameter in parameters(body).items()}
    total = 0.0
    for i, arrays in enumerate(given):
        whole = hbm(arrays)
        total += min(_read(module, body, names[i]), whole) if whole and i in names else whole
    written = _outputs(body)
    if len(written) == 1 and marks(written[0], "Start"):
        # (input, output, semaphores): read and written once in the chain, here.
        return total + hbm(instruction.results[:2])
    for i, array in enumerate(instruction.results):
        if array.space == HBM:
            source = written[i] if i < len(written) else None
            if source is not None and (source.opcode == "parameter" or _carried(source)):
                continue
            if source is not None and source.opcode == "dynamic-update-slice":
                array = body[source.operands[1]].results[0]
            total += array.bytes
    return total


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
            inner = module.computations.get(user.called("calls") or "", {})
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


def _outputs(body: Computation) -> list[Instruction]:
    """What a fused computation returns, bitcasts looked through."""
    if not body:
        return []
    end = root(body)
    outputs = [body[name] for name in end.operands] if end.opcode == "tuple" else [end]
    found = []
    for output in outputs:
        while output.opcode == "bitcast" and output.operands[0] in body:
            output = body[output.operands[0]]
        found.append(output)
    return found
