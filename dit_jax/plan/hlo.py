"""Optimized HLO text as computations of instructions.

The text is what ``compiled.as_text()`` gives: one module, scheduled and partitioned, so that every
shape is one device's. Only what costs are counted from is kept: shapes with their memory spaces,
operands, attributes as text. This module knows the grammar and nothing of costs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

HBM, VMEM, HOST = 0, 1, 5
"""Memory spaces of XLA:TPU layouts, the n of ``S(n)``; the others hold scalars and semaphores."""

ITEM_BYTES = {
    "pred": 1.0,
    "token": 0.0,
    "opaque": 0.0,
    **{f"{sign}{bits}": bits / 8 for sign in "su" for bits in (2, 4, 8, 16, 32, 64)},
    **{f"{kind}{bits}": bits / 8 for kind in ("f", "bf") for bits in (16, 32, 64)},
    **{"c64": 8.0, "c128": 16.0, "f4e2m1fn": 0.5},
}

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=?]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
# Quoted text is skipped whole: kernels are embedded in it, brackets and all.
_MARK = re.compile(r'"(?:\\.|[^"\\])*"|[(){}\[\],]')


class Array(NamedTuple):
    """One array of an instruction's result, on one device."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Logical size: the padding of tiled layouts is left out."""
        return ITEM_BYTES.get(self.dtype, 1.0) * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; a tuple's arrays are flattened."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    """What stands between the parentheses of a constant or a parameter."""
    attributes: dict[str, str]
    root: bool

    def called(self, *keys: str) -> str | None:
        """The computation that the first of these attributes names."""
        for key in keys:
            if key in self.attributes:
                return self.attributes[key].lstrip("%")
        return None

    @property
    def collective(self) -> str | None:
        """The kind of collective that this begins, if it is one."""
        name = self.opcode.removesuffix("-start")
        return name if name in COLLECTIVES else None


COLLECTIVES = frozenset(
    {
        *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
        *("collective-permute", "collective-broadcast"),
    }
)

Computation = dict[str, Instruction]
"""Instructions by name, in the order they are scheduled in."""


class Module(NamedTuple):
    """A program."""

    entry: str
    computations: dict[str, Computation]


def arrays(text: str) -> tuple[Array, ...]:
    """All arrays of a shape, tuples flattened."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, int(space.group(1)) if space else HBM))
    return tuple(found)


def closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at ``start``."""
    depth = 0
    for mark in _MARK.finditer(text, start):
        if mark.group() in "([{":
            depth += 1
        elif mark.group() in ")]}":
            depth -= 1
            if depth == 0:
                return mark.end()
    raise ValueError(f"HLO text has an unclosed bracket: {text[start : start + 80]!r}.")


def split(text: str) -> Iterator[str]:
    """The parts between commas that no bracket or quotation encloses."""
    depth, start = 0, 0
    for mark in _MARK.finditer(text):
        token = mark.group()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif token == "," and depth == 0:
            yield text[start : mark.start()]
            start = mark.end()
    yield text[start:]


def root(computation: Computation) -> Instruction:
    """What a computation returns."""
    return next(instruction for instruction in computation.values() if instruction.root)


def parameters(computation: Computation) -> dict[int, Instruction]:
    """The parameters by their number."""
    return {int(i.literal): i for i in computation.values() if i.opcode == "parameter"}


def tuple_index(instruction: Instruction) -> int:
    """Which element a ``get-tuple-element`` takes."""
    return int(instruction.attributes["index"])


def _instruction(text: str) -> Instruction:
    head = _INSTRUCTION.match(text)
    assert head is not None
    rest = text[head.end() :]
    if rest.startswith("("):
        end = closing(rest, 0)
    else:
        end = rest.index("]") + 1
        if rest[end : end + 1] == "{":
            end = closing(rest, end)
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"not an HLO instruction: {text[:120]!r}.")
    stop = closing(rest, opcode.end() - 1)
    inner = rest[opcode.end() : stop - 1]
    plain = opcode.group(1) in ("constant", "parameter")
    pairs = (part.strip().partition("=") for part in split(rest[stop:]) if "=" in part)
    return Instruction(
        name=head.group(2),
        opcode=opcode.group(1),
        results=arrays(rest[:end]),
        operands=() if plain else tuple(_OPERAND.findall(_COMMENT.sub("", inner))),
        literal=inner if plain else "",
        attributes={key: value for key, _, value in pairs},
        root=head.group(1) is not None,
    )


def _balanced(text: str) -> bool:
    depth = 0
    for mark in _MARK.finditer(text):
        depth += (mark.group() in "([{") - (mark.group() in ")]}")
    return depth <= 0


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
        ValueError: where the text has no entry computation, or an instruction cannot be read.
    """
    computations: dict[str, Computation] = {}
    entry, current, pending = None, None, ""
    for line in text.splitlines():
        if current is None:
            if head := _COMPUTATION.match(line):
                current = computations[head.group(2)] = {}
                entry = head.group(2) if head.group(1) else entry
            continue
        # An instruction may go on over several lines (large constants, attributes with quotes).
        if pending:
            pending += " " + line.strip()
        elif _INSTRUCTION.match(line):
            pending = line
        elif line.startswith("}"):
            current = None
            continue
        if pending and _balanced(pending):
            instruction = _instruction(pending)
            current[instruction.name] = instruction
            pending = ""
    if entry is None:
        raise ValueError("the text has no ENTRY computation: give optimized HLO (as_text()).")
    return Module(entry, computations)
