"""Batches whose rows are streams of their own, with a state that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grain

from dit_jax.data.reader import Reader
from dit_jax.types import Source

Batch = TypeVar("Batch")
RUN = "run"
"""Key of what a saved data state holds of the run as a whole, beside the states of its rows."""


def as_reader(source: Source | Reader) -> Reader:
    """A reader of a source; by itself it leaves nothing out."""
    return source if isinstance(source, Reader) else Reader(source)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The data state of all processes, of those that each has of its own rows."""
    merged: dict[str, Any] = {}
    for state in states:
        merged.update(state)
    runs = [state[RUN] for state in states if RUN in state]
    if runs:
        left_out = {index: why for run in runs for index, why in run["left_out"].items()}
        place = max(run["place"] for run in runs)
        merged[RUN] = {**runs[0], "place": place, "left_out": left_out}
    return merged


class Lanes(Iterator[Batch], Generic[Batch]):
    """Iterates over this process's rows of the global batches.

    ``lane(row, start)`` is the endless stream of the elements of one row, from the place ``start`` of
    the endless order of samples on, and ``stack`` makes a batch of one element of each. The state is a
    dict from the number of a row to that lane's own state, JSON throughout, and says what has been
    *given out*, not what was read ahead.

    ``layout`` is what the streams were packed with. If a saved state has another, its rows have no
    state here: the order of samples goes on behind the last one given out, in new rows.
    ``place_after(batch)`` is the place behind a batch's last sample.
    """

    def __init__(
        self,
        reader: Reader,
        lane: Callable[[int, int], grain.IterDataset],
        rows: Sequence[int],
        stack: Callable[[Sequence[Any]], Batch],
        layout: Any = None,
        place_after: Callable[[Batch], int] = lambda _: 0,
    ) -> None:
        self.rows, self.reader, self.layout = tuple(rows), reader, layout
        self._lane, self._stack, self._place_after = lane, stack, place_after
        self._batches: Any = None
        self._begin(0)

    def _begin(self, start: int) -> None:
        if self._batches is not None:
            self._batches.close()
        self._start = self._place = start
        lanes = [self._lane(row, start) for row in self.rows]
        batches = grain.experimental.ZipIterDataset(lanes).map(self._stack)
        ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
        self._batches = iter(ahead)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._place = max(self._place, self._place_after(batch))
        return batch

    def get_state(self) -> dict[str, Any]:
        """The state of every row that this process reads."""
        lanes = self._batches.get_state()["parents"]
        return {str(row): state for row, state in zip(self.rows, lanes, strict=True)}

    def save(self) -> dict[str, Any]:
        """``get_state``, and under the key ``RUN`` what concerns all rows."""
        left_out = {str(index): why for index, why in dict(self.reader.left_out).items()}
        run = {"layout": self.layout, "start": self._start, "place": self._place}
        return {**self.get_state(), RUN: {**run, "left_out": left_out}}

    def set_state(self, state: dict[str, Any]) -> bool:
        """Goes on from a saved state, which may hold more rows than this process reads.

        Returns whether the rows go on as they were; False if they are packed anew.
        """
        run = state.get(RUN, {"layout": self.layout, "start": 0, "place": 0, "left_out": {}})
        self.reader.left_out.update({int(i): why for i, why in run["left_out"].items()})
        if run["layout"] != self.layout:
            self._begin(run["place"])
            return False
        missing = [row for row in self.rows if str(row) not in state]
        if missing:
            raise ValueError(
                f"the saved data state has no row {missing[0]} (it has {len(state)}): resume with "
                "the same data.packing.rows, or start a new run."
            )
        if run["start"] != self._start:
            self._begin(run["start"])
        self._batches.set_state({"parents": [state[str(row)] for row in self.rows]})
        self._place = run["place"]
        return True

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()
