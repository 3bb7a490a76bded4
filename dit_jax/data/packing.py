"""From a source to rows of packed segments, in an order that depends on nothing but the seed.

Every row of the global batch has a *row stream*: its own samples (every n-th of the shuffled, endlessly
repeated source, for n rows) and its own packing. A row stream never looks at another, so the global
batch is the same whichever process makes which rows, and a run goes on with another number of
processes. Packing is Grain's: samples go whole into the first of a few open rows that has room for
their tokens and their text (NaViT, Dehghani et al. 2023, section 2.3).

Nothing in the data ends a run. A record that cannot be read, does not fit a row or is not finite is
left out, and is named once by its index in the data set. Whether a record is left out depends on the
record alone, so a run that is killed and resumed trains on the same samples. Errors of the world (a
disk that answers EIO) are not the record's: they are tried again, and then end the run, which can be
resumed.

How a sample becomes tokens is the caller's: this module does not know patches or text encoders.
"""

from __future__ import annotations

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

RUN = "run"
"""Key of what a saved data state holds of the run as a whole, beside the states of its rows."""
TOKEN, SEGMENT = "token_fields/", "segment_fields/"
"""What Grain's flat elements put before the names of fields."""
LAYOUT = ("rows", "row_tokens", "row_text", "row_segments", "bins")
"""Fields of ``PackingConfig`` that decide which samples share a row."""
FIRST_TRIES = 64
"""Samples that are tried until one can be used, when a run begins."""
GROUPS_SHOWN = 5
"""Sizes that cannot be packed, of which a line is printed each."""
SizeCheck = Callable[[int, int, int], None]
"""``check(frames, height, width)`` raises ``ValueError`` for a size that cannot be trained on."""
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
    """Hands the samples of a source to functions, and collects the indices of those left out.

    ``limit`` records may be left out in the middle of a run; one more raises ``DataError``. Those of
    ``unfit``, bool ``[len(source)]``, are known beforehand: they are not read, and do not count.
    A ``quiet`` reader names none on the terminal: another reader of the same records does.
    """

    def __init__(
        self,
        source: Source,
        limit: int = 0,
        unfit: np.ndarray | None = None,
        quiet: bool = False,
    ) -> None:
        message = "the dataset is empty: check data.source's path, split and filters."
        refuse_if([(not len(source), message)])
        self.source, self.limit, self.unfit, self.quiet = source, limit, unfit, quiet
        self.left_out: dict[int, str] = {}
        """Why each record was left out, by its index in the data set."""
        self.cut_captions = 0
        """Captions, each time one is read, of which the end was cut off."""
        self._lock = threading.Lock()

    def _is_unfit(self, index: int) -> bool:
        return self.unfit is not None and bool(self.unfit[index])

    def use(self, index: int, function: Callable[[Sample, str], T]) -> T | None:
        """``function(sample, name)`` of the sample; None if the record is left out.

        Raises ``DataError`` if the limit is passed, ``OSError`` if storage fails repeatedly.
        """
        if self._is_unfit(index):
            return None
        name = sample_name(self.source, index)
        try:
            sample = retry(lambda: self.source[index], f"reading {name}")
        except (OSError, MemoryError):
            raise
        except Exception as error:  # A source of one's own may raise anything for a damaged record.
            return self._leave_out(index, name, error)
        try:
            return function(sample, name)
        except ValueError as error:
            return self._leave_out(index, name, error)

    def _leave_out(self, index: int, name: str, error: Exception) -> None:
        reason = explain(error)
        reason = reason if name in reason else f"{name}: {reason}"
        with self._lock:
            if index in self.left_out:  # In an earlier epoch, or by the run that is resumed.
                return
            self.left_out[index] = reason
            count = len(self.left_out)
        # Without the second condition, a stream without any sample would search for ever.
        if count > self.limit or count >= len(self.source):
            raise DataError(
                f"{count} of {len(self.source)} records cannot be used, and at most {self.limit} may "
                f"be left out (data.max_bad_records). The last: {reason}"
            ) from error
        if not self.quiet:
            tqdm.write(f"left out: {reason}")

    def first(self, function: Callable[[Sample, str], T]) -> T:
        """``function`` of the first sample that can be used.

        Raises ``InputError`` if none of the first ``FIRST_TRIES`` can, with the reason of the first.
        """
        reason = None
        for index in range(min(len(self.source), FIRST_TRIES)):
            if self._is_unfit(index):
                continue
            try:
                return function(self.source[index], sample_name(self.source, index))
            except (OSError, MemoryError):
                raise
            except Exception as error:
                reason = reason or error
        raise InputError(
            f"none of the first {FIRST_TRIES} records can be used. The first: {reason}"
        ) from reason

    def note_cut(self, caption: str, length: int, limit: int) -> None:
        """Counts a caption that is longer than the text encoder reads; the first is printed."""
        with self._lock:
            self.cut_captions += 1
            first = self.cut_captions == 1
        if first:
            tqdm.write(
                f"a caption of {length} tokens is cut to the {limit} that the text encoder reads: "
                f"{caption[:60]!r}... (model.text says how many; others are counted as captions_cut)"
            )

    def unfit_names(self, limit: int) -> list[str]:
        """Names of the first ``limit`` records that were known not to fit before training began."""
        indices = [] if self.unfit is None else np.flatnonzero(self.unfit)[:limit].tolist()
        return [sample_name(self.source, index) for index in indices]


def find_unfit(source: Source, check: SizeCheck) -> tuple[np.ndarray | None, list[str]]:
    """Which records cannot be used, by their stored sizes, without reading them.

    Returns bool ``[n]`` and a line for each size that does not fit; None if the source has no ``sizes``
    (int32 ``[n, 3]``: frames, height and width; zeros if they are unknown).
    """
    sizes = getattr(source, "sizes", None)
    if sizes is None:
        return None, []
    t, h, w = (np.asarray(sizes[:, i], np.int64) for i in range(3))
    # One number for each size: np.unique of rows takes ten times as long, and there may be millions.
    unique, first, inverse, counts = np.unique(
        (t << 40) | (h << 20) | w, return_index=True, return_inverse=True, return_counts=True
    )
    bad, lines = np.zeros(len(unique), bool), []
    for i, code in enumerate(unique.tolist()):
        size = code >> 40, (code >> 20) & 0xFFFFF, code & 0xFFFFF
        try:
            if size[0]:
                check(*size)
        except ValueError as error:
            bad[i] = True
            name = sample_name(source, int(first[i]))
            shape = " x ".join(map(str, size))
            lines.append(f"{counts[i]} of {shape} (the first: {name}): {explain(error)}")
    return bad[inverse], lines


def checked_reader(source: Source, check: SizeCheck, policy: str, limit: int) -> Reader:
    """A reader under ``data.bad_records`` and ``data.max_bad_records``; what does not fit is printed.

    Raises ``InputError`` if records do not fit and the policy is "refuse", or if none fits.
    """
    limit = limit if policy == "skip" else 0
    unfit, lines = find_unfit(source, check)
    if unfit is None or not unfit.any():
        return Reader(source, limit)
    more = len(lines) - GROUPS_SHOWN
    lines = lines[:GROUPS_SHOWN] + ([f"and of {more} other sizes"] if more > 0 else [])
    text = f"{int(unfit.sum())} of {len(unfit)} records cannot be packed:\n  " + "\n  ".join(lines)
    refuse_if(
        [
            (bool(unfit.all()), f"{text}\nNone is left to train on."),
            (policy == "refuse", f"{text}\nLeave them out with --data.bad-records skip."),
        ]
    )
    if jax.process_index() == 0:
        print(f"{text}\nThey are left out.", flush=True)
    return Reader(source, limit, unfit)


# ---------------------------------------------------------------------------------------------------
# Streams of rows
# ---------------------------------------------------------------------------------------------------


class RowStreams(Iterator[AnyBatch], Generic[AnyBatch]):
    """Iterates over this process's rows of the global batches, with a state that can be saved.

    Row i of the global batch is always fed by stream i: ``stream(row, start)`` is the endless stream of
    one row's elements, from the place ``start`` of the endless order of samples on, and ``stack`` makes
    a batch of one element of each. The state is a dict from the number of a row to that stream's own
    state, JSON throughout, and says what has been *handed out*, not what was read ahead.

    ``layout`` is what the streams were packed with. If a saved state has another, its rows have no
    state here: the order of samples goes on behind the last one handed out, in new rows.
    ``place_after(batch)`` is the place behind a batch's last sample.
    """

    def __init__(
        self,
        reader: Reader,
        stream: Callable[[int, int], grain.IterDataset],
        rows: Sequence[int],
        stack: Callable[[Sequence[Any]], AnyBatch],
        layout: Any = None,
        place_after: Callable[[AnyBatch], int] = lambda _: 0,
    ) -> None:
        self.rows, self.reader, self.layout = tuple(rows), reader, layout
        self._stream, self._stack, self._place_after = stream, stack, place_after
        self._batches: Any = None
        self._begin(0)

    def _begin(self, start: int) -> None:
        if self._batches is not None:
            self._batches.close()
        self._start = self._place = start
        streams = [self._stream(row, start) for row in self.rows]
        batches = grain.experimental.ZipIterDataset(streams).map(self._stack)
        # One batch waits while the device computes, and the next is read.
        ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
        self._batches = iter(ahead)

    def __next__(self) -> AnyBatch:
        batch = next(self._batches)
        self._place = max(self._place, self._place_after(batch))
        return batch

    def get_state(self) -> dict[str, Any]:
        """The state of every row that this process reads."""
        states = self._batches.get_state()["parents"]
        return {str(row): state for row, state in zip(self.rows, states, strict=True)}

    def save(self) -> dict[str, Any]:
        """``get_state``, and under the key ``RUN`` what concerns all rows."""
        left_out = {str(index): why for index, why in dict(self.reader.left_out).items()}
        run = {"layout": self.layout, "start": self._start, "place": self._place}
        return {**self.get_state(), RUN: {**run, "left_out": left_out}}

    def set_state(self, state: dict[str, Any]) -> bool:
        """Goes on from a saved state, which may hold more rows than this process reads.

        Returns whether the rows go on as they were; False if they are packed anew.
        """
        # ``get_state`` alone has no RUN.
        run = state.get(RUN, {"layout": self.layout, "start": 0, "place": 0, "left_out": {}})
        self.reader.left_out.update({int(i): why for i, why in run["left_out"].items()})
        # Rows of another layout hold other samples: none of their states fits.
        if run["layout"] != self.layout:
            self._begin(run["place"])
            return False
        missing = [row for row in self.rows if str(row) not in state]
        message = (
            f"the saved data state has {len(state)} rows and not rows {missing[:4]}: resume with "
        )
        refuse_if([(bool(missing), f"{message}the same data.packing.rows, or start a new run.")])
        if run["start"] != self._start:
            self._begin(run["start"])
        self._batches.set_state({"parents": [state[str(row)] for row in self.rows]})
        self._place = run["place"]
        return True

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()


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


def sample_stream(
    reader: Reader, function: Callable[[Sample, str, int], Any], seed: int
) -> grain.MapDataset:
    """``function(sample, name, place)`` of the samples in their endless order; None, which Grain passes
    over, for those that are left out."""

    def element(place: int, index: int) -> Any:
        return reader.use(int(index), lambda sample, name: function(sample, name, place))

    return sample_order(reader.source, seed).map_with_index(element)


def read_options(threads: int) -> grain.ReadOptions:
    """Grain's, of so many threads for each row."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads or 1)


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


Tokenize = Callable[[Sample], Tokenized]
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
    """Raises ``ValueError`` if a sample could never enter an empty row."""
    for name, count, field, remedy in (
        ("tokens", tokens, "row_tokens", "use larger patches, or leave such clips out"),
        ("text tokens", text, "row_text", "or let the text encoder cut captions"),
    ):
        if count > (room := getattr(config, field)):
            raise ValueError(
                f"{what} has {count} {name} and a row holds {room}: raise data.packing.{field} to at "
                f"least {count}, {remedy}."
            )


def check_tokenized(config: PackingConfig, tokenized: Tokenized, what: str) -> None:
    """Raises ``ValueError`` if a sample does not fit, or if a value of it is not finite."""
    check_fits(config, len(tokenized["tokens"]), len(tokenized["text"]), what)
    named = {"tokens": tokenized["tokens"], "text": tokenized["text"]}
    named |= tokenized["token_fields"] | tokenized["segment_fields"]
    for name, values in named.items():
        if values.dtype.kind == "f" and (count := int((~np.isfinite(values)).sum())):
            raise ValueError(
                f"{what} has {count} of {values.size} {name} that are NaN or infinite."
            )


def packed_element(
    config: PackingConfig, tokenized: Tokenized, place: int, name: str
) -> dict[str, np.ndarray]:
    """A tokenized sample as an element that Grain packs, checked; ``name`` is how messages name it."""
    check_tokenized(config, tokenized, name)
    return {
        **{key: tokenized[key] for key in ("tokens", "positions", "frame_ids", "text")},
        **{TOKEN + key: values for key, values in tokenized["token_fields"].items()},
        **{SEGMENT + key: value[None] for key, value in tokenized["segment_fields"].items()},
        # The place in the endless shuffled order names the sample: the same clip seen again in a
        # later epoch has noise of its own even within one batch.
        "sample_ids": np.array([place % 2**32], np.uint32),
        "num_tokens": np.array([len(tokenized["tokens"])], np.int32),
        "num_frames": np.array([tokenized["frame_ids"][-1] + 1], np.int32),
    }


class Loader(RowStreams[Batch]):
    """Packed rows: this process's of the global batches.

    ``token_fields`` and ``segment_fields`` name the fields that every sample has. ``augment`` changes
    samples at random; that depends on the seed and the sample's place in the endless order alone.
    """

    def __init__(
        self,
        source: Source | Reader,
        tokenize: Tokenize,
        config: PackingConfig,
        seed: int,
        rows: Sequence[int] | None = None,
        augment: Augment | None = None,
        token_fields: Sequence[str] = (),
        segment_fields: Sequence[str] = (),
    ) -> None:
        reader = source if isinstance(source, Reader) else Reader(source)

        def element(sample: Sample, name: str, place: int) -> dict[str, np.ndarray]:
            if augment is not None:
                sample = augment(sample, np.random.default_rng((seed, place)))
            name = f"{name} ({sample['caption'][:60]!r})"
            return packed_element(config, tokenize(sample), place, name)

        samples = sample_stream(reader, element, seed)
        along_tokens = ("positions", "frame_ids", *(TOKEN + name for name in token_fields))
        along_segments = ("sample_ids", "num_tokens", "num_frames")
        along_segments += tuple(SEGMENT + name for name in segment_fields)
        # A sample enters a row that has room for it in each of these.
        lengths = {
            **dict.fromkeys(("tokens", *along_tokens), config.row_tokens),
            "text": config.row_text,
            **dict.fromkeys(along_segments, config.row_segments),
        }

        def stream(row: int, start: int) -> grain.IterDataset:
            # Every n-th sample of the endless order, from this row's first on.
            mine = samples[start + row :: config.rows].to_iter_dataset(read_options(config.threads))
            return grain.experimental.FirstFitPackIterDataset(
                mine,
                length_struct=lengths,
                num_packing_bins=config.bins,
                seed=seed,
                # Fields without positions and segment ids of their own.
                meta_features=(*along_tokens, *along_segments),
            )

        rows = tuple(range(config.rows) if rows is None else rows)
        layout = {name: getattr(config, name) for name in LAYOUT}
        super().__init__(reader, stream, rows, _stack, layout, _place_after)


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """A batch of one packed element a row; Grain adds ``NAME_segment_ids`` and ``NAME_positions``."""
    stacked: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def fields(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in stacked.items() if k.startswith(prefix)}

    same = ("tokens", "positions", "frame_ids", "text", "text_segment_ids")
    same += ("sample_ids", "num_tokens", "num_frames")
    return Batch(
        segment_ids=stacked["tokens_segment_ids"],
        token_ids=stacked["tokens_positions"],
        token_fields=fields(TOKEN),
        segment_fields=fields(SEGMENT),
        **{key: stacked[key] for key in same},
    )


def _place_after(batch: Batch) -> int:
    """The place behind the last sample of a batch in the endless order."""
    ids = np.asarray(batch.sample_ids)[np.asarray(batch.num_tokens) > 0]
    return int(ids.max()) + 1 if ids.size else 0
