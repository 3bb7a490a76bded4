"""What Pallas kernels cost, read from the traced program: XLA sees them as opaque calls of no flops.

Flops are the products in a kernel's body times its grid. HBM bytes are the blocks that the pipeline
fetches and writes: a block is moved again whenever its index changes from one grid step to the next, so
that keys streamed once for every block of queries are counted as often. The dearest branch counts as
taken, but where splash attention is told by a constant which blocks its mask hides, those count
nothing. Copies that a kernel starts by hand, and its vector operations, are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dit_jax.model.flops import traced_flops
from dit_jax.plan.hlo import Instruction

Signature = tuple[tuple[int, ...], ...]
"""Shapes of a call's operands."""


class Kernel(NamedTuple):
    """One call of a kernel on one device."""

    name: str
    operands: Signature
    flops: float
    block_bytes: tuple[float, ...]
    """Of each operand, then each result: what is moved if it lies in HBM."""


def _grid_size(grid: Iterable[Any]) -> int:
    return math.prod(int(size) for size in grid if isinstance(size, int | np.integer))


def find_kernels(jaxpr: Any, arguments: Iterable[Any] = ()) -> list[Kernel]:
    """Every Pallas call in a traced program, in the shapes of one device.

    ``arguments`` are the values of the program's inputs that are known, None for others: constants are
    handed down to kernels this way.
    """
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    given = (
        *zip(jaxpr.constvars, consts, strict=False),
        *zip(jaxpr.invars, arguments, strict=False),
    )
    known = {id(v): value for v, value in given if _is_mask(value) and value.shape == v.aval.shape}
    found = []
    for equation in jaxpr.eqns:
        values = [known.get(id(v)) for v in equation.invars]
        if equation.primitive.name == "pallas_call":
            found.append(_kernel(equation, values))
        else:
            for value in equation.params.values():
                for one in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(one, "jaxpr", one)
                    if hasattr(inner, "eqns"):
                        # A branch is not given the predicate, which comes first.
                        skipped = max(len(values) - len(inner.invars), 0)
                        found += find_kernels(one, values[skipped:])
    return found


def _is_mask(value: Any) -> bool:
    """Whether a constant may be a block mask of splash attention, int8 [heads or 1, rows, columns]."""
    return getattr(value, "ndim", 0) == 3 and value.dtype == np.int8


def _kernel(equation: Any, values: list[Any]) -> Kernel:
    params = equation.params
    mapping = params["grid_mapping"]
    steps = float(_grid_size(mapping.grid))
    shown = 1.0
    # The prefetched scalars of a splash kernel: where the next block is, and which are hidden (0).
    if str(params["name"]).startswith("splash") and mapping.num_index_operands > 1:
        shown = 1.0 if values[1] is None else float((np.asarray(values[1]) > 0).mean())
    moved: list[float] = []
    for block in mapping.block_mappings:
        aval = block.transformed_block_aval
        size = math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
        axes = _depends(block.index_map_jaxpr)
        told = any(axis >= len(mapping.grid) for axis in axes)
        moved.append(size * _fetches(axes, mapping.grid) * (shown if told else 1.0))
    # Prefetched scalars come first, and are small.
    prefetched = [0.0] * mapping.num_index_operands
    return Kernel(
        name=str(params["name"]),
        operands=tuple(tuple(map(int, v.aval.shape)) for v in equation.invars),
        flops=steps * shown * traced_flops(params["jaxpr"]),
        block_bytes=(*prefetched, *moved),
    )


def _fetches(axes: set[int], grid: tuple[Any, ...]) -> int:
    """How often a block is moved: its index changes with the innermost grid axis that it depends on,
    and with all axes around that one."""
    sizes = [int(size) for size in grid]
    inner = max((a for a in axes if a < len(sizes) and sizes[a] > 1), default=-1)
    return math.prod(sizes[: inner + 1])


def _depends(index_map: Any) -> set[int]:
    """Which of its arguments, by position, an index map's results depend on."""
    jaxpr = getattr(index_map, "jaxpr", index_map)
    sources = {id(v): {i} for i, v in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        used = set().union(*(sources.get(id(v), set()) for v in equation.invars))
        sources.update((id(v), used) for v in equation.outvars)
    return set().union(*(sources.get(id(v), set()) for v in jaxpr.outvars))


def match(kernels: list[Kernel], instruction: Instruction, operands: Signature) -> Kernel | None:
    """The kernel that a custom call of HLO runs: of the same operand shapes, the name deciding between
    several. Calls that differ in nothing but their masks, as the parts of a ring do, cost the mean."""
    text = instruction.name + " " + instruction.attributes.get("metadata", "")
    fitting = [k for k in kernels if k.operands == operands]
    chosen = [k for k in fitting if k.name in text] or fitting
    alike = [k for k in chosen if len(k.block_bytes) == len(chosen[0].block_bytes)]
    if not alike:
        return None
    flops = sum(k.flops for k in alike) / len(alike)
    moved = (sum(sizes) / len(alike) for sizes in zip(*(k.block_bytes for k in alike), strict=True))
    return alike[0]._replace(flops=flops, block_bytes=tuple(moved))
