"""Optimized HLO text as computations of instructions, and how often its loops run.

The text is what ``compiled.as_text()`` gives: one module, scheduled and partitioned, so that every
shape is one device's. JAX has no reader of it (that of XLA's protocol buffers comes with TensorFlow).
Only what costs are counted from is kept: shapes with their memory spaces, operands, attributes as text.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Memory spaces of XLA:TPU layouts, the n of ``S(n)``; the others hold scalars and semaphores.
HBM, VMEM, HOST = 0, 1, 5
# Other types, truth values and the floats of 8 bits, take a byte.
ITEM_BYTES = {
    **{f"{kind}{bits}": bits / 8 for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)},
    **{"bf16": 2.0, "c64": 8.0, "c128": 16.0, "f4e2m1fn": 0.5, "token": 0.0, "opaque": 0.0},
}
COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}
MAX_TRIPS = 10**6  # A loop that still goes on is one that is not understood.

# The beginning of an instruction, which may go on over several lines, or of a computation.
_HEAD = re.compile(
    r"^(?:[ \t]+(ROOT )?%?([\w.\-]+) = |(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{[ \t]*$)", re.MULTILINE
)
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=?]*)\](?:\{([^{}]*)\})?")
# Quoted text is skipped whole: kernels are embedded in it, brackets and all.
_MARK = re.compile(r'"(?:\\.|[^"\\])*"|[(){}\[\],]')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_SAME = {"copy", "bitcast", "convert", "copy-start", "copy-done", "reshape"}
_FUNCTIONS = {
    **{name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "NE")},
    **{"add": operator.add, "subtract": operator.sub},
}


class Array(NamedTuple):
    """One array of an instruction's result, on one device."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Logical size: the padding of tiled layouts is left out."""
        return ITEM_BYTES.get(self.dtype, 1.0) * math.prod(self.dims)


class Instruction(NamedTuple):
    """One instruction; a tuple's arrays are flattened."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str  # What stands between the parentheses, of a constant or a parameter.
    attributes: dict[str, str]
    root: bool

    def called(self, *keys: str) -> str:
        """The computation that the first of these attributes names, or ''."""
        return next((self.attributes[k].lstrip("%") for k in keys if k in self.attributes), "")

    @property
    def collective(self) -> str | None:
        """The kind of collective that this begins, if it is one."""
        name = self.opcode.removesuffix("-start")
        return name if name in COLLECTIVES else None


Computation = dict[str, Instruction]  # By name, in the order in which they are scheduled.


class Module(NamedTuple):
    """A program."""

    entry: str
    computations: dict[str, Computation]

    def inside(self, instruction: Instruction, key: str = "calls") -> Computation:
        """The computation that an attribute of an instruction names; empty if none does."""
        return self.computations.get(instruction.called(key), {})


def numbers(text: str) -> list[int]:
    """The whole numbers in a text."""
    return [int(n) for n in re.findall(r"\d+", text)]


def arrays(text: str) -> tuple[Array, ...]:
    """All arrays of a shape, tuples flattened."""
    out = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        out.append(Array(dtype, tuple(numbers(dims)), int(space.group(1)) if space else HBM))
    return tuple(out)


def root(computation: Computation) -> Instruction:
    """What a computation returns."""
    return next(instruction for instruction in computation.values() if instruction.root)


def parameters(computation: Computation) -> dict[int, Instruction]:
    """The parameters by their number."""
    return {int(i.literal): i for i in computation.values() if i.opcode == "parameter"}


def split(text: str) -> Iterator[str]:
    """The parts between commas that no bracket or quotation encloses."""
    depth = start = 0
    for mark in _MARK.finditer(text):
        token = mark.group()
        depth += (token in "([{") - (token in ")]}")
        if token == "," and depth == 0:
            yield text[start : mark.start()].strip()
            start = mark.end()
    yield text[start:].strip()


def parse(text: str) -> Module:
    """Reads a module."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    heads = list(_HEAD.finditer(text))
    for head, end in zip(heads, [*(h.start() for h in heads[1:]), len(text)], strict=True):
        is_root, name, is_entry, computation = head.groups()
        if computation:
            current = computations[computation] = {}
            entry = computation if is_entry else entry
            continue
        # The last one of a computation is followed by the bracket that closes it.
        line = " " + text[head.end() : end].rstrip().removesuffix("\n}")
        opcode = _OPCODE.search(line)
        assert opcode is not None, line[:120]
        call, *attributes = split(line[opcode.start() :])  # "add(%a, %b)", "metadata={...}"
        literal = call[len(opcode.group()) - 1 : -1]
        leaf = opcode.group(1) in ("constant", "parameter")
        pairs = (part.partition("=") for part in attributes if "=" in part)
        current[name] = Instruction(
            name=name,
            opcode=opcode.group(1),
            results=arrays(line[: opcode.start()]),
            operands=() if leaf else tuple(re.findall(r"%([\w.\-]+)", literal)),
            literal=literal if leaf else "",
            attributes={key: value for key, _, value in pairs},
            root=is_root is not None,
        )
    assert entry, "the text has no ENTRY computation"
    return Module(entry, computations)


def _integer(
    module: Module, computation: Computation, name: str, known: Mapping[int, int | None]
) -> int | None:
    """The value of a scalar that is made by what moves a counter, from the ``known`` elements of a
    loop's state or parameters of a fusion; None if it is made otherwise."""
    one = computation.get(name)
    if one is None:
        return None
    code = one.opcode
    if code == "constant":
        return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None
    if code == "parameter":
        return known.get(int(one.literal))
    if code == "get-tuple-element":
        source = computation.get(one.operands[0])
        whole = source is not None and source.opcode == "parameter"
        return known.get(int(one.attributes["index"])) if whole else None
    if code not in (*_SAME, *_FUNCTIONS, "compare", "fusion"):
        return None
    values = [_integer(module, computation, other, known) for other in one.operands]
    if code == "fusion":
        inner = module.inside(one)
        return _integer(module, inner, root(inner).name, dict(enumerate(values)))
    if code in _SAME:
        return values[0]
    function = _FUNCTIONS.get(one.attributes.get("direction", code))
    return None if function is None or None in values else function(*values)


def trip_count(module: Module, loop: Instruction, around: Computation) -> int | None:
    """How often a ``while`` in the computation ``around`` runs; None if that cannot be seen.

    TPU programs mostly leave XLA's own count out; then the loop's counter is followed to its end.
    """
    if known := _KNOWN_TRIPS.search(loop.attributes.get("backend_config", "")):
        return int(known.group(1))
    condition, body = module.inside(loop, "condition"), module.inside(loop, "body")
    before, after = around.get(loop.operands[0]), root(body)
    if before is None or before.opcode != "tuple" or after.opcode != "tuple":
        return None
    state = {i: _integer(module, around, name, {}) for i, name in enumerate(before.operands)}
    for trips in range(MAX_TRIPS):
        going = _integer(module, condition, root(condition).name, state)
        if not going:
            return None if going is None else trips
        known = [i for i, value in state.items() if value is not None]
        state = {i: _integer(module, body, after.operands[i], state) for i in known}
    return None
