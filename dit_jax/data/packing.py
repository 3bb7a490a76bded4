"""From a source to rows of packed segments, in an order that depends on nothing but the seed.

Row r of the n rows of the global batch is always fed by *row stream* r. With the samples in their
endless shuffled order, place 0, 1, 2, ..., it takes those at the places

    start + r + n k,  k = 0, 1, 2, ...                                                            (1)

and packs them by itself. A row stream never looks at another, so the global batch is the same
whichever process makes which rows, and a run goes on with another number of processes. Packing is
Grain's: samples go whole into the first of a few open rows that has room for their tokens and their
text (NaViT, Dehghani et al. 2023, section 2.3).

Nothing in the data ends a run. A record that cannot be read, does not fit a row or is not finite is
left out, and is named once. Whether it is left out depends on the record alone, so a run that is killed
and resumed trains on the same samples. Errors of the world (a disk that answers EIO) are not the
record's: they are tried again, and then end the run, which can be resumed.

How a sample becomes tokens is the caller's: this module does not know patches or text encoders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypedDict, TypeVar

import grain
import jax
import numpy as np
from tqdm import tqdm

from dit_jax.data.mixing import sample_name, sample_order
from dit_jax.files import InputError, explain, refuse_if, retry
from dit_jax.types import Batch, NonNegativeInt, PositiveInt, Sample, Source

# Key of what a saved data state holds of the run as a whole, beside the states of its rows.
RUN = "run"
# Samples that are tried until one can be used, when a run begins.
FIRST_TRIES = 64
T = TypeVar("T")
AnyBatch = TypeVar("AnyBatch")


# ---------------------------------------------------------------------------------------------------
# Samples that can be used
# ---------------------------------------------------------------------------------------------------


class DataError(ValueError):
    """More records than the limit cannot be used; this ends a run in its middle."""


def open_source(config: Any) -> Source:
    """The source of a run: what ``config.open()`` returns, or the config itself if it is a source."""
    return config.open() if hasattr(config, "open") else config


class Reader:
    """Hands the samples of a source to functions, and collects the records that are left out.

    ``limit`` records may be left out in the middle of a run; one more raises ``DataError``. Those of
    ``unfit``, bool ``[len(source)]``, are known beforehand: they are not read, and do not count.
    A ``quiet`` reader names none on the terminal: another reader of the same records does.
    """

    def __init__(
        self, source: Source, limit: int = 0, unfit: np.ndarray | None = None, quiet: bool = False
    ) -> None:
        refuse_if([(not len(source), "the dataset is empty: check data.source's path and split.")])
        self.source, self.limit, self.unfit, self.quiet = source, limit, unfit, quiet
        # Why each record was left out, by its index in the data set.
        self.left_out: dict[int, str] = {}
        # Captions, each time one is read, of which the end was cut off.
        self.cut_captions = 0
        self._lock = threading.Lock()

    def use(self, index: int, function: Callable[[Sample, str], T]) -> T | None:
        """``function(sample, name)`` or None if it is left out; ``DataError`` past the limit."""
        if self.unfit is not None and self.unfit[index]:
            return None
        name = sample_name(self.source, index)
        try:
            sample = retry(lambda: self.source[index], f"reading {name}")
        except Exception as error:  # A source of one's own may raise anything for a damaged record.
            return self._leave_out(index, name, error)
        try:
            return function(sample, name)
        except ValueError as error:
            return self._leave_out(index, name, error)

    def _leave_out(self, index: int, name: str, error: Exception) -> None:
        if isinstance(error, OSError | MemoryError):
            raise error
        reason = explain(error)
        reason = reason if name in reason else f"{name}: {reason}"
        with self._lock:
            if index in self.left_out:  # In an earlier epoch, or by the run that is resumed.
                return
            self.left_out[index] = reason
            count = len(self.left_out)
        # Without the second condition, a stream without any sample would search for ever.
        if count > self.limit or count >= len(self.source):
            text = f"{count} of {len(self.source)} records cannot be used, and at most "
            text += f"{self.limit} may be left out (data.max_bad_records). The last: {reason}"
            raise DataError(text) from error
        if not self.quiet:
            tqdm.write(f"left out: {reason}")

    def note_cut(self, caption: str, length: int, limit: int) -> None:
        """Counts a caption that is longer than the text encoder reads; the first is printed."""
        self.cut_captions += 1
        if self.cut_captions == 1:
            text = (
                f"a caption of {length} tokens is cut to the {limit} that the text encoder reads: "
            )
            tqdm.write(f"{text}{caption[:60]!r}... (others are counted as captions_cut)")

    def unfit_names(self, limit: int) -> list[str]:
        """Names of the first ``limit`` records that were known not to fit before training began."""
        indices = [] if self.unfit is None else np.flatnonzero(self.unfit)[:limit].tolist()
        return [sample_name(self.source, index) for index in indices]


def first_sample(source: Source, function: Callable[[Sample, str], T]) -> T:
    """``function`` of the first sample that can be used; ``InputError`` if none of some can."""
    total = len(source)
    count, reader = min(total, FIRST_TRIES), Reader(source, total, quiet=True)
    with contextlib.suppress(DataError):  # None is left.
        for i in range(count):  # Spread over the source: all records of one shard may be damaged.
            if (result := reader.use(i * total // count, function)) is not None:
                return result
    why = next(iter(reader.left_out.values()))
    raise InputError(f"none of {count} records can be used. The first: {why}")


def checked_reader(
    source: Source, check: Callable[[int, int, int], None], policy: str, limit: int
) -> Reader:
    """A reader under ``data.bad_records`` and ``data.max_bad_records``.

    ``check(frames, height, width)`` raises ``ValueError`` for a size that cannot be trained on. Records
    of such sizes are not read, but known by ``source.sizes``, if it has that: int32 ``[n, 3]``, zeros
    if unknown. Raises ``InputError`` if there are some under the policy "refuse", or if none fits.
    """
    limit = limit if policy == "skip" else 0
    sizes = getattr(source, "sizes", None)
    if not isinstance(sizes, np.ndarray):  # A source of one's own may call anything so.
        return Reader(source, limit)
    # One number for each size: np.unique of rows takes ten times as long, and there may be millions.
    codes = sizes.astype(np.int64) @ np.array([1 << 40, 1 << 20, 1])
    _, firsts, inverse, counts = np.unique_all(codes)
    bad, lines = np.zeros(len(firsts), bool), []
    for i, first in enumerate(firsts.tolist()):
        size = sizes[first].tolist()
        try:
            if size[0]:
                check(*size)
        except ValueError as error:
            bad[i] = True
            name, shape = sample_name(source, first), " x ".join(map(str, size))
            lines.append(f"{counts[i]} of {shape} (the first: {name}): {explain(error)}")
    if not lines:
        return Reader(source, limit)
    unfit = bad[inverse]
    text = f"{int(unfit.sum())} of {len(unfit)} records cannot be packed:\n  "
    text += "\n  ".join(lines[:5]) + ("\n  ..." if len(lines) > 5 else "")
    refuse_if([(bool(unfit.all()), f"{text}\nNone is left to train on.")])
    refuse_if([(policy == "refuse", f"{text}\nLeave them out with --data.bad-records skip.")])
    if jax.process_index() == 0:
        print(f"{text}\nThey are left out.", flush=True)
    return Reader(source, limit, unfit)


# ---------------------------------------------------------------------------------------------------
# Streams of rows
# ---------------------------------------------------------------------------------------------------


class RowStreams(Iterator[AnyBatch], Generic[AnyBatch]):
    """Iterates over this process's rows of the global batches, with a state that can be saved.

    ``element(sample, name, place)`` makes an element of a sample; ``pack`` packs the elements of a row,
    by what ``layout`` says; ``stack`` makes a batch of one packed element of each row. ``config`` has
    the number of ``rows`` of the global batch, and of the ``threads`` that read ahead for each.
    """

    def __init__(
        self,
        source: Source | Reader,
        element: Callable[[Sample, str, int], Any],
        config: Any,
        seed: int,
        rows: Sequence[int] | None,
        stack: Callable[[Sequence[Any]], AnyBatch],
        pack: Callable[[grain.IterDataset], grain.IterDataset] = lambda elements: elements,
        layout: Any = None,
    ) -> None:
        self.reader = source if isinstance(source, Reader) else Reader(source)
        self._rows, self._layout = tuple(range(config.rows) if rows is None else rows), layout

        def read(place: int, index: int) -> Any:
            # None, which Grain passes over, for samples that are left out.
            return self.reader.use(int(index), lambda sample, name: element(sample, name, place))

        elements = sample_order(self.reader.source, seed).map_with_index(read)
        buffer = 4 * config.threads or 1
        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=buffer)

        def begin(start: int) -> Any:
            streams = [elements[start + row :: config.rows] for row in self._rows]  # Equation (1).
            packed = [pack(stream.to_iter_dataset(options)) for stream in streams]
            batches = grain.experimental.ZipIterDataset(packed).map(stack)
            # One batch waits while the device computes, and the next is read.
            ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
            return iter(ahead)

        self._begin, self._batches = begin, begin(0)
        self._start = self._place = 0

    def __next__(self) -> AnyBatch:
        batch: Any = next(self._batches)
        if self._layout is not None:  # Else nothing is packed that could be packed anew.
            ids = batch.sample_ids[batch.num_tokens > 0]
            self._place = max(self._place, int(ids.max()) + 1)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The states of this process's rows by their numbers, and under ``RUN`` what concerns all, as
        JSON: of what has been *handed out*, not of what was read ahead."""
        states = zip(map(str, self._rows), self._batches.get_state()["parents"], strict=True)
        # A copy: threads that read ahead may leave out another record meanwhile.
        left_out = {str(index): why for index, why in dict(self.reader.left_out).items()}
        run = {"layout": self._layout, "start": self._start, "place": self._place}
        return {**dict(states), RUN: {**run, "left_out": left_out}}

    def set_state(self, state: dict[str, Any]) -> bool:
        """Goes on from a saved state, which may hold more rows than this process reads.

        Returns whether the rows go on as they were. Those of another layout hold other samples: False,
        and the order of samples goes on in new rows, behind the last one that was handed out.
        """
        # States of old runs lack what concerns the run.
        run = {"layout": self._layout, "start": 0, "place": 0, "left_out": {}, **state.get(RUN, {})}
        self.reader.left_out.update({int(i): why for i, why in run["left_out"].items()})
        same = run["layout"] == self._layout
        missing = [row for row in self._rows if str(row) not in state]
        message = f"the saved data state has no rows {missing[:4]}: keep data.packing.rows."
        refuse_if([(same and bool(missing), message)])
        start = run["start"] if same else run["place"]
        if start != self._start or not same:
            self.close()
            self._batches = self._begin(start)
        if same:
            self._batches.set_state({"parents": [state[str(row)] for row in self._rows]})
        self._start, self._place = start, run["place"]
        return same

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The data state of all processes, of those that each has of its own rows."""
    runs = [state[RUN] for state in states]
    left_out = {index: why for run in runs for index, why in run["left_out"].items()}
    place = max(run["place"] for run in runs)
    merged = {row: one for state in states for row, one in state.items()}
    return {**merged, RUN: {**runs[0], "place": place, "left_out": left_out}}


# ---------------------------------------------------------------------------------------------------
# Rows of packed tokens
# ---------------------------------------------------------------------------------------------------


class Tokenized(TypedDict):
    """A sample as tokens."""

    tokens: np.ndarray  # float32 [l, p]
    positions: np.ndarray  # float32 [l, 3]
    frame_ids: np.ndarray  # int32 [l]
    text: np.ndarray  # int32 [s], or float32 [s, e]
    token_fields: dict[str, np.ndarray]  # [l, ...] by name
    segment_fields: dict[str, np.ndarray]  # [...] by name


Augment = Callable[[Sample, np.random.Generator], Sample]


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """Shape of the global batch: everything the step is compiled for."""

    rows: PositiveInt = 8
    """Rows of the global batch, over all devices."""
    row_tokens: PositiveInt = 256
    """Tokens of a row; several clips and images share one."""
    row_text: PositiveInt = 256
    """Text tokens of a row."""
    row_segments: PositiveInt = 8
    """Clips and images in a row at most."""
    bins: PositiveInt = 8
    """Rows that are open at once while packing: more leave less padding."""
    threads: NonNegativeInt = 0
    """Threads that read ahead for each row; 0 reads and packs all rows in one thread. Reading is
    ahead of the step either way."""


def check_fits(config: PackingConfig, tokens: int, text: int, what: str) -> None:
    """Raises ``InputError`` if a sample could never enter an empty row."""
    for name, count, field in (("tokens", tokens, "row_tokens"), ("text tokens", text, "row_text")):
        room = getattr(config, field)
        message = f"{what} has {count} {name} and a row holds {room}: raise data.packing.{field}."
        refuse_if([(count > room, message)])


def check_tokenized(config: PackingConfig, tokenized: Tokenized, what: str) -> None:
    """Raises ``InputError`` if a sample does not fit, or if a value of it is not finite."""
    check_fits(config, len(tokenized["tokens"]), len(tokenized["text"]), what)
    named = {name: tokenized[name] for name in ("tokens", "positions", "text")}
    for name, values in (named | tokenized["token_fields"] | tokenized["segment_fields"]).items():
        bad = int((~np.isfinite(values)).sum()) if values.dtype.kind == "f" else 0
        message = f"{what} has {bad} of {values.size} {name} that are NaN or infinite."
        refuse_if([(bad > 0, message)])


class Loader(RowStreams[Batch]):
    """Packed rows: this process's of the global batches.

    ``token_fields`` and ``segment_fields`` name the fields that every sample has. ``augment`` changes
    samples at random; that depends on the seed and the sample's place in the endless order alone.
    """

    def __init__(
        self,
        source: Source | Reader,
        tokenize: Callable[[Sample], Tokenized],
        config: PackingConfig,
        seed: int,
        rows: Sequence[int] | None = None,
        augment: Augment | None = None,
        token_fields: Sequence[str] = (),
        segment_fields: Sequence[str] = (),
    ) -> None:
        def element(sample: Sample, name: str, place: int) -> dict[str, Any]:
            if augment is not None:
                sample = augment(sample, np.random.default_rng((seed, place)))
            out = tokenize(sample)
            check_tokenized(config, out, f"{name} ({sample['caption'][:60]!r})")
            return {
                **out,
                "segment_fields": {k: value[None] for k, value in out["segment_fields"].items()},
                # The place in the endless shuffled order names the sample: the same clip seen again in
                # a later epoch has noise of its own even within one batch.
                "sample_ids": np.array([place % 2**32], np.uint32),
                "num_tokens": np.array([len(out["tokens"])], np.int32),
                "num_frames": np.array([out["frame_ids"][-1] + 1], np.int32),
            }

        # A sample enters a row that has room for it in each of these.
        tokens, segments = config.row_tokens, config.row_segments
        room: dict[str, Any] = {
            **dict.fromkeys(("tokens", "positions", "frame_ids"), tokens),
            "text": config.row_text,
            **dict.fromkeys(("sample_ids", "num_tokens", "num_frames"), segments),
            "token_fields": dict.fromkeys(token_fields, tokens),
            "segment_fields": dict.fromkeys(segment_fields, segments),
        }
        room = {name: size for name, size in room.items() if size}  # Grain takes no empty dict.

        def pack(elements: grain.IterDataset) -> grain.IterDataset:
            return grain.experimental.FirstFitPackIterDataset(
                elements,
                length_struct=room,
                num_packing_bins=config.bins,
                seed=seed,
                # Fields without positions and segment ids of their own.
                meta_features=[name for name in room if name not in ("tokens", "text")],
            )

        # All that decides which samples share a row: reading ahead does not.
        layout = {k: v for k, v in dataclasses.asdict(config).items() if k != "threads"}
        super().__init__(source, element, config, seed, rows, _stack, pack, layout)


def _stack(rows: Sequence[dict[str, Any]]) -> Batch:
    """A batch of one packed element a row; Grain adds ``NAME_segment_ids`` and ``NAME_positions``."""
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *rows)
    stacked["segment_ids"] = stacked.pop("tokens_segment_ids")
    stacked["token_ids"] = stacked.pop("tokens_positions")
    del stacked["text_positions"]
    return Batch(**{"segment_fields": {}, **stacked})
