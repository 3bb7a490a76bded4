"""How one published array becomes one of ours: a rearrangement of named axes, read in parts.

A layout is written as einops writes it, theirs -> ours: ``"(x n e) i -> i (n x e)"`` turns the
``[3 heads dim, width]`` weight of a published attention to our ``[width, heads 3 dim]`` kernel. Every
axis has a known size, so both shapes are known, both directions follow from the one line, and any
rectangle of ours can be read from a mapped file without touching the rest of it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

Group = tuple[str, ...]


def _parse(side: str) -> tuple[Group, ...]:
    found = re.findall(r"\(([^()]*)\)|(\w+)", side)
    return tuple(tuple(inner.split()) if inner else (name,) for inner, name in found)


def _atoms(groups: tuple[Group, ...]) -> list[str]:
    return [atom for group in groups for atom in group]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A rearrangement, with the size of each of its axes."""

    pattern: str
    sizes: Mapping[str, int]
    joined: str | None = None
    """The axis, at the head of theirs, along which theirs lies in several arrays (queries, keys and
    values apart). Their shape is then that of each."""

    def __post_init__(self) -> None:
        theirs, ours = _atoms(self._theirs), _atoms(self._ours)
        assert sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours), self.pattern
        assert set(ours) <= set(self.sizes), (self.pattern, self.sizes)
        assert self.joined in (None, theirs[0]), (self.pattern, self.joined)

    @cached_property
    def _theirs(self) -> tuple[Group, ...]:
        return _parse(self.pattern.split("->")[0])

    @cached_property
    def _ours(self) -> tuple[Group, ...]:
        return _parse(self.pattern.split("->")[1])

    def _sizes(self, atoms: Iterable[str]) -> list[int]:
        return [self.sizes[atom] for atom in atoms]

    @property
    def arrays(self) -> int:
        """How many of theirs make one of ours."""
        return self.sizes[self.joined] if self.joined else 1

    @property
    def their_shape(self) -> tuple[int, ...]:
        return tuple(
            math.prod(self.sizes[atom] for atom in group if atom != self.joined)
            for group in self._theirs
        )

    @property
    def our_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self._sizes(group)) for group in self._ours)

    def read(
        self, theirs: Sequence[np.ndarray], index: tuple[slice, ...] | None = None
    ) -> np.ndarray:
        """Our array, or the rectangle ``index`` of it, copied out of theirs.

        Of an axis made of several, whole runs of its first are read and the ends cut off.
        """
        assert len(theirs) == self.arrays and theirs[0].shape == self.their_shape
        index = index or (slice(None),) * len(self._ours)
        parts: dict[str, slice] = {}
        cuts, shape = [], []
        for group, size, part in zip(self._ours, self.our_shape, index, strict=True):
            start, stop, step = part.indices(size)
            assert step == 1 and group[0] != self.joined
            inner = math.prod(self._sizes(group[1:]))
            first, last = start // inner, -(-stop // inner)
            parts[group[0]] = slice(first, last)
            cuts.append(slice(start - first * inner, stop - first * inner))
            shape.append((last - first) * inner)
        atoms = [atom for atom in _atoms(self._theirs) if atom != self.joined]
        wanted = [atom for atom in _atoms(self._ours) if atom != self.joined]
        order = [atoms.index(atom) for atom in wanted]
        chosen = tuple(parts.get(atom, slice(None)) for atom in wanted)
        views = [a.reshape(self._sizes(atoms)).transpose(order)[chosen] for a in theirs]
        if self.joined is not None:
            views = [np.stack(views, _atoms(self._ours).index(self.joined))]
        return views[0].reshape(shape)[tuple(cuts)].copy()

    def write(self, ours: np.ndarray) -> list[np.ndarray]:
        """Their arrays, of all of ours."""
        assert ours.shape == self.our_shape, (ours.shape, self.pattern)
        atoms = _atoms(self._ours)
        order = [atoms.index(atom) for atom in _atoms(self._theirs)]
        view = ours.reshape(self._sizes(atoms)).transpose(order)
        parts = view if self.joined else view[None]
        return [np.ascontiguousarray(part.reshape(self.their_shape)) for part in parts]
