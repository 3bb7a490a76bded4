"""What Pallas kernels cost, read from the traced program: XLA sees them as opaque calls of no flops.

Flops are the products in a kernel's body times its grid. HBM bytes are the blocks that the pipeline
fetches and writes: a block is moved again whenever its index changes from one grid step to the next, so
that keys streamed once for every block of queries are counted as often. The dearest branch counts as
taken, but if a constant tells splash attention which blocks its mask hides, those count nothing. Copies
that a kernel starts by hand, and its vector operations, are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dit_jax.model.flops import traced_flops
from dit_jax.plan.hlo import Instruction

Shapes = tuple[tuple[int, ...], ...]


class Kernel(NamedTuple):
    """One call of a kernel on one device."""

    name: str
    operands: Shapes
    flops: float
    block_bytes: tuple[float, ...]  # Of each operand and result: what is moved if it lies in HBM.


def find_kernels(jaxpr: Any, arguments: Iterable[Any] = ()) -> list[Kernel]:
    """Every Pallas call in a traced program, in the shapes of one device.

    ``arguments`` are the values of the program's inputs that are known, None for others: constants are
    handed down to kernels this way.
    """
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    pairs = [*zip(jaxpr.constvars, consts, strict=False)]
    pairs += zip(jaxpr.invars, arguments, strict=False)
    known = {id(v): value for v, value in pairs if _is_mask(value) and value.shape == v.aval.shape}
    kernels = []
    for equation in jaxpr.eqns:
        values = [known.get(id(v)) for v in equation.invars]
        if equation.primitive.name == "pallas_call":
            kernels.append(_kernel(equation, values))
            continue
        for value in equation.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    # A branch is not given the predicate, which comes first.
                    skipped = max(len(values) - len(inner.invars), 0)
                    kernels += find_kernels(one, values[skipped:])
    return kernels


def _is_mask(value: Any) -> bool:
    """Whether a constant may be a block mask of splash attention, int8 [heads or 1, rows, columns]."""
    return getattr(value, "ndim", 0) == 3 and value.dtype == np.int8


def _kernel(equation: Any, values: list[Any]) -> Kernel:
    params, name = equation.params, str(equation.params["name"])
    mapping = params["grid_mapping"]
    grid, prefetched, shown = mapping.grid, mapping.num_index_operands, 1.0
    # The prefetched scalars of a splash kernel: where the next block is, and which are hidden (0).
    if name.startswith("splash") and prefetched > 1 and values[1] is not None:
        shown = float((np.asarray(values[1]) > 0).mean())
    moved = [0.0] * prefetched  # They come first, and are small.
    for block in mapping.block_mappings:
        aval = block.transformed_block_aval
        axes = _depends(block.index_map_jaxpr)
        # A block is moved again when the index changes of the innermost axis that it depends on, or of
        # any axis around that one.
        inner = max((a for a in axes if a < len(grid) and int(grid[a]) > 1), default=-1)
        fetches = math.prod(int(n) for n in grid[: inner + 1])
        scalars = any(axis >= len(grid) for axis in axes)
        size = math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
        moved.append(size * fetches * (shown if scalars else 1.0))
    steps = float(math.prod(int(n) for n in grid if isinstance(n, int | np.integer)))
    operands = tuple(tuple(map(int, v.aval.shape)) for v in equation.invars)
    return Kernel(name, operands, steps * shown * traced_flops(params["jaxpr"]), tuple(moved))


def _depends(index_map: Any) -> set[int]:
    """Which of its arguments, by position, an index map's results depend on."""
    jaxpr = getattr(index_map, "jaxpr", index_map)
    sources = {id(v): {i} for i, v in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        used = set().union(*(sources.get(id(v), set()) for v in equation.invars))
        sources.update((id(v), used) for v in equation.outvars)
    return set().union(*(sources.get(id(v), set()) for v in jaxpr.outvars))


def match(kernels: list[Kernel], instruction: Instruction, operands: Shapes) -> Kernel | None:
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
