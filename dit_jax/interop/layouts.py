"""How one published array becomes one of ours, in einops' words.

``"(x n e) i -> i (n x e)"`` turns the ``[3 heads dim, width]`` weight of a published attention to our
``[width, heads 3 dim]`` kernel. Every axis has a known size, so that both shapes and both directions
follow from the one line.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Layout:
    """A rearrangement, theirs to ours, with the size of each of its axes."""

    pattern: str
    sizes: Mapping[str, int]
    joined: str | None = None
    """The axis, at the head of theirs, along which theirs lies in several arrays (queries, keys and
    values apart). Their shape is then that of each."""

    def __post_init__(self) -> None:
        assert sorted(_axes(self.theirs)) == sorted(_axes(self.ours)), self.pattern

    @property
    def theirs(self) -> str:
        """Their side; a joined axis stands before the others, as the axis of a list."""
        side = self.pattern.split("->")[0].strip()
        return side.replace(f"({self.joined} ", f"{self.joined} (", 1)

    @property
    def ours(self) -> str:
        return self.pattern.split("->")[1].strip()

    @property
    def arrays(self) -> int:
        """How many of theirs make one of ours."""
        return self.sizes[self.joined] if self.joined else 1

    @property
    def their_shape(self) -> tuple[int, ...]:
        return self._shape(self.theirs)[self.joined is not None :]

    @property
    def our_shape(self) -> tuple[int, ...]:
        return self._shape(self.ours)

    def read(
        self, theirs: Sequence[np.ndarray], index: tuple[slice, ...] | None = None
    ) -> np.ndarray:
        """Our array, or a part of it, copied out of theirs, which may be views of a mapped file: of
        those no more is read than the part needs, if it is whole along what follows the first of the
        axes that are joined to one of ours."""
        known, axes, cuts, rest = self._known(), _axes(self.theirs), {}, []
        for group, part in zip(_groups(self.ours), index or (), strict=index is not None):
            first, inner = group[0], math.prod(known[axis] for axis in group[1:])
            start, stop, step = part.indices(known[first] * inner)
            whole = step == 1 and start % inner == stop % inner == 0
            if whole:
                cuts[first] = slice(start // inner, stop // inner)
            rest.append(slice(None) if whole else part)
        own = [axis for axis in axes if axis != self.joined]
        place, sizes = tuple(cuts.get(x, slice(None)) for x in own), [known[x] for x in own]
        given = theirs[cuts.get(self.joined, slice(None))]
        views: Any = [one.reshape(sizes)[place] for one in given]
        views = views if self.joined else views[0]
        return rearrange(views, f"{' '.join(axes)} -> {self.ours}")[tuple(rest)].copy()

    def write(self, ours: np.ndarray) -> list[np.ndarray]:
        """Their arrays, of all of ours."""
        theirs = rearrange(ours, f"{self.ours} -> {self.theirs}", **self._known())
        return [np.ascontiguousarray(one) for one in (theirs if self.joined else [theirs])]

    def _shape(self, side: str) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[x] for x in group) for group in _groups(side))

    def _known(self) -> dict[str, int]:
        return {name: self.sizes[name] for name in _axes(self.ours)}


def _groups(side: str) -> list[list[str]]:
    return [_axes(a or b) for a, b in re.findall(r"\(([^()]*)\)|(\w+)", side)]


def _axes(side: str) -> list[str]:
    return re.findall(r"\w+", side)
