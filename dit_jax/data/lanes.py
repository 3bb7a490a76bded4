"""Batches whose rows are streams of their own, with a state that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grain

from dit_jax.types import Source

Batch = TypeVar("Batch")


class Lanes(Iterator[Batch], Generic[Batch]):
    """Iterates over this process's rows of the global batches.

    ``lane(row)`` is the endless stream of the elements of one row, and ``stack`` makes a batch of one
    element of each. The state is a dict from the number of a row to that lane's own state, JSON
    throughout, and says what has been *given out*, not what was read ahead.
    """

    def __init__(
        self,
        source: Source,
        lane: Callable[[int], grain.IterDataset],
        rows: Sequence[int],
        stack: Callable[[Sequence[Any]], Batch],
    ) -> None:
        if len(source) < 1:
            raise ValueError("the dataset is empty: check data.source's path, split and filters.")
        self.rows = tuple(rows)
        batches = grain.experimental.ZipIterDataset([lane(row) for row in self.rows]).map(stack)
        ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
        self._batches = iter(ahead)

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        lanes = self._batches.get_state()["parents"]
        return {str(row): state for row, state in zip(self.rows, lanes, strict=True)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state, which may hold more rows than this process reads."""
        missing = [row for row in self.rows if str(row) not in state]
        if missing:
            raise ValueError(
                f"the saved data state has no row {missing[0]} (it has {len(state)}): resume with "
                "the same data.packing.rows, or start a new run."
            )
        self._batches.set_state({"parents": [state[str(row)] for row in self.rows]})

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()
