"""How often the loops of an HLO module run.

XLA's own count is used where it is written down; TPU programs mostly leave it out, and then it is
worked out from the condition, the first value and the step of the counter. Only counters that grow or
shrink by a constant towards a constant are understood, which is what scans compile to.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dit_jax.plan.hlo import Computation, Instruction, Module, parameters, root, tuple_index

_KNOWN = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_SAME = {"copy", "bitcast", "convert", "copy-start", "copy-done", "reshape"}


class Linear(NamedTuple):
    """A scalar: an element of the loop's state plus a constant, or a constant alone."""

    element: int | None
    offset: int


def _linear(
    module: Module, body: Computation, name: str, given: dict[str, Linear | None]
) -> Linear | None:
    """What the scalar ``name`` of a computation is; ``given`` are a fusion's parameters."""
    if name in given:
        return given[name]
    one = body.get(name)
    if one is None:
        return None

    def operand(i: int) -> Linear | None:
        return _linear(module, body, one.operands[i], given)

    if one.opcode == "constant":
        return Linear(None, int(one.literal)) if re.fullmatch(r"-?\d+", one.literal) else None
    if one.opcode == "get-tuple-element":
        source = body.get(one.operands[0])
        whole = source is not None and source.opcode == "parameter"
        return Linear(tuple_index(one), 0) if whole else None
    if one.opcode in _SAME:
        return operand(0)
    if one.opcode in ("add", "subtract"):
        a, b = operand(0), operand(1)
        if a is None or b is None or (b.element is not None and one.opcode == "subtract"):
            return None
        if a.element is not None and b.element is not None:
            return None
        element = a.element if a.element is not None else b.element
        return Linear(element, a.offset + (b.offset if one.opcode == "add" else -b.offset))
    if one.opcode == "fusion":
        inner, bound = _enter(module, body, one, given)
        return _linear(module, inner, root(inner).name, bound)
    return None


def _enter(
    module: Module, body: Computation, fusion: Instruction, given: dict[str, Linear | None]
) -> tuple[Computation, dict[str, Linear | None]]:
    """A fusion's computation, and what its parameters are in the terms of the caller."""
    inner = module.computations[fusion.called("calls") or ""]
    bound = {
        parameter.name: _linear(module, body, fusion.operands[i], given)
        for i, parameter in parameters(inner).items()
    }
    return inner, bound


def _comparison(
    module: Module, condition: Computation
) -> tuple[str, Linear | None, Linear | None] | None:
    """The direction and both sides of the comparison that keeps a loop going."""
    body, given = condition, {}
    test = root(condition)
    while test.opcode == "fusion":
        body, given = _enter(module, body, test, given)
        test = root(body)
    if test.opcode != "compare":
        return None
    left, right = (_linear(module, body, name, given) for name in test.operands)
    return test.attributes["direction"], left, right


def _first(
    module: Module, loop: Instruction, around: Computation, element: int | None
) -> int | None:
    """The constant that an element of the state begins as."""
    state = around.get(loop.operands[0])
    if state is None or state.opcode != "tuple" or element is None:
        return None
    value = _linear(module, around, state.operands[element], {})
    return value.offset if value is not None and value.element is None else None


def trip_count(module: Module, loop: Instruction, around: Computation) -> int | None:
    """How often a ``while`` in the computation ``around`` runs; None where that is not to be seen."""
    if known := _KNOWN.search(loop.attributes.get("backend_config", "")):
        return int(known.group(1))
    comparison = _comparison(module, module.computations[loop.called("condition") or ""])
    if comparison is None:
        return None
    direction, left, right = comparison
    if left is None or right is None:
        return None
    body = module.computations[loop.called("body") or ""]
    after = root(body)
    if after.opcode != "tuple":
        return None

    def step(value: Linear) -> int | None:
        """By how much the element changes in an iteration."""
        if value.element is None:
            return 0
        new = _linear(module, body, after.operands[value.element], {})
        same = new is not None and new.element == value.element
        return new.offset if new is not None and same else None

    if direction in ("GT", "GE"):
        left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
    moving = [step(left), step(right)]
    start = [
        v.offset if v.element is None else _first(module, loop, around, v.element)
        for v in (left, right)
    ]
    if None in moving or None in start:
        return None
    offsets = [0 if v.element is None else v.offset for v in (left, right)]
    distance = (start[1] + offsets[1]) - (start[0] + offsets[0])  # pyright: ignore
    speed = moving[0] - moving[1]  # pyright: ignore
    if speed == 0:
        return None
    if direction == "LE":
        distance += 1
    return max(-(-distance // speed), 0)
