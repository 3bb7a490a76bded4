"""Rows of packed segments, read by Grain in an order that depends on nothing but the seed.

Every row of the global batch is a *lane*: its own stream of samples (each so-many-th of the
shuffled, endlessly repeated source) and its own packing. A lane never looks at another, so the
global batch is the same whichever process makes which rows, and a run goes on with another number
of processes. Packing is Grain's: samples go whole into the first (or best) of a few open rows that
has room for their tokens and their text (NaViT, Dehghani et al. 2023, section 2.3).

How a sample becomes tokens is the caller's: this module does not know patches or text encoders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypedDict

import grain
import numpy as np

from dit_jax.data.lanes import Lanes, as_reader
from dit_jax.data.mixing import sample_order
from dit_jax.data.reader import Reader
from dit_jax.types import Batch, Sample, Source


class Tokenized(TypedDict):
    """A sample as tokens."""

    tokens: np.ndarray
    """float32 [l, p]"""
    positions: np.ndarray
    """float32 [l, 3]"""
    frame_ids: np.ndarray
    """int32 [l]"""
    text: np.ndarray
    """int32 [s], or float32 [s, e]"""
    token_fields: dict[str, np.ndarray]
    """[l, ...] by name"""
    segment_fields: dict[str, np.ndarray]
    """[...] by name"""


Tokenize = Callable[[Sample], Tokenized]
Augment = Callable[[Sample, np.random.Generator], Sample]
PACKERS = {
    "first_fit": grain.experimental.FirstFitPackIterDataset,
    "best_fit": grain.experimental.BestFitPackIterDataset,
}


TOKEN, SEGMENT = "token_fields/", "segment_fields/"
"""What Grain's flat elements put before the names of fields."""
LAYOUT = ("rows", "row_tokens", "row_text", "row_segments", "bins", "packer")
"""Fields of ``PackingConfig`` that decide which samples share a row."""


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """Shape of the global batch: everything the step is compiled for."""

    rows: int = 8
    """Rows of the global batch, over all devices."""
    row_tokens: int = 256
    """Tokens of a row; several clips and images share one."""
    row_text: int = 256
    """Text tokens of a row."""
    row_segments: int = 8
    """Clips and images in a row at most."""
    bins: int = 8
    """Rows that are open at once while packing: more leave less padding."""
    packer: Literal["first_fit", "best_fit"] = "first_fit"
    threads: int = 0
    """Threads that read ahead for each row; 0 reads and packs all rows in one thread. Reading is
    ahead of the step either way."""

    def __post_init__(self) -> None:
        for name in ("rows", "row_tokens", "row_text", "row_segments", "bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"packing.{name} is {getattr(self, name)}: it is at least 1.")
        if self.threads < 0:
            raise ValueError(f"packing.threads is {self.threads}: it is at least 0.")


def check_fits(config: PackingConfig, tokens: int, text: int, what: str) -> None:
    """Raises ``ValueError`` where a sample could never enter an empty row."""
    if tokens > config.row_tokens:
        raise ValueError(
            f"{what} has {tokens} tokens and a row holds {config.row_tokens}: raise "
            f"data.packing.row_tokens to at least {tokens}, use larger patches, or leave such "
            "clips out."
        )
    if text > config.row_text:
        raise ValueError(
            f"{what} has {text} text tokens and a row holds {config.row_text}: raise "
            f"data.packing.row_text to at least {text}, or let the text encoder cut captions."
        )


def check_finite(tokenized: Tokenized, what: str) -> None:
    """Raises ``ValueError`` if the tokens or text states of a sample are not finite."""
    named = {"tokens": tokenized["tokens"], "text": tokenized["text"]}
    named |= tokenized["token_fields"] | tokenized["segment_fields"]
    for name, values in named.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            count = int(values.size - np.isfinite(values).sum())
            raise ValueError(
                f"{what} has {count} of {values.size} {name} that are NaN or infinite."
            )


def _element(
    reader: Reader,
    tokenize: Tokenize,
    config: PackingConfig,
    augment: Augment | None,
    seed: int,
    place: int,
    index: int,
) -> dict[str, Any] | None:
    """The sample ``index`` as an element of a row, at its place in the endless order; None, which Grain
    passes over, if it is left out."""

    def make(sample: Sample, name: str) -> dict[str, Any]:
        if augment is not None:
            sample = augment(sample, np.random.default_rng((seed, place)))
        tokenized = tokenize(sample)
        count = len(tokenized["tokens"])
        what = f"{name} ({sample['caption'][:60]!r})"
        check_fits(config, count, len(tokenized["text"]), what)
        check_finite(tokenized, what)
        return {
            **{name: tokenized[name] for name in ("tokens", "positions", "frame_ids", "text")},
            **{TOKEN + name: values for name, values in tokenized["token_fields"].items()},
            **{SEGMENT + name: v[None] for name, v in tokenized["segment_fields"].items()},
            # The place in the endless shuffled order names the sample: the same clip seen again in a
            # later epoch has noise of its own even within one batch.
            "sample_ids": np.array([place % 2**32], np.uint32),
            "num_tokens": np.array([count], np.int32),
            "num_frames": np.array([tokenized["frame_ids"][-1] + 1], np.int32),
        }

    return reader.use(int(index), make)


def lane(
    reader: Reader,
    tokenize: Tokenize,
    config: PackingConfig,
    seed: int,
    row: int,
    augment: Augment | None = None,
    token_fields: Sequence[str] = (),
    segment_fields: Sequence[str] = (),
    start: int = 0,
) -> grain.IterDataset:
    """The endless stream of packed rows that fills row ``row`` of every global batch, from the place
    ``start`` of the endless order of samples on.

    ``token_fields`` and ``segment_fields`` name the fields that every sample has.
    ``augment`` changes samples at random; what it draws depends on the seed and the sample's place in
    the endless order, and on nothing else.
    """
    element = partial(_element, reader, tokenize, config, augment, seed)
    mine = sample_order(reader.source, seed).map_with_index(element)
    read = grain.ReadOptions(
        num_threads=config.threads, prefetch_buffer_size=4 * config.threads or 1
    )
    extra = {
        **dict.fromkeys([TOKEN + name for name in token_fields], config.row_tokens),
        **dict.fromkeys([SEGMENT + name for name in segment_fields], config.row_segments),
    }
    return PACKERS[config.packer](
        mine[start + row :: config.rows].to_iter_dataset(read),
        length_struct={
            "tokens": config.row_tokens,
            "positions": config.row_tokens,
            "frame_ids": config.row_tokens,
            "text": config.row_text,
            "sample_ids": config.row_segments,
            "num_tokens": config.row_segments,
            "num_frames": config.row_segments,
            **extra,
        },
        num_packing_bins=config.bins,
        seed=seed,
        meta_features=("positions", "frame_ids", "sample_ids", "num_tokens", "num_frames", *extra),
    )


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    stacked: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def fields(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in stacked.items() if k.startswith(prefix)}

    return Batch(
        tokens=stacked["tokens"],
        positions=stacked["positions"],
        segment_ids=stacked["tokens_segment_ids"],
        frame_ids=stacked["frame_ids"],
        token_ids=stacked["tokens_positions"],
        text=stacked["text"],
        text_segment_ids=stacked["text_segment_ids"],
        sample_ids=stacked["sample_ids"],
        num_tokens=stacked["num_tokens"],
        num_frames=stacked["num_frames"],
        token_fields=fields(TOKEN),
        segment_fields=fields(SEGMENT),
    )


def pack_rows(rows: Sequence[Sequence[Tokenized]], config: PackingConfig) -> Batch:
    """Packs given samples into given rows, without Grain; sample ids count the samples.

    Used where the caller decides who shares a row: sampling and tests.
    """
    b, l, s, n = len(rows), config.row_tokens, config.row_text, config.row_segments
    patch, letter = rows[0][0]["tokens"].shape[-1], rows[0][0]["text"]
    token_fields, segment_fields = rows[0][0]["token_fields"], rows[0][0]["segment_fields"]
    batch: dict[str, Any] = {
        "tokens": np.zeros((b, l, patch), np.float32),
        "positions": np.zeros((b, l, 3), np.float32),
        **{name: np.zeros((b, l), np.int32) for name in ("segment_ids", "frame_ids", "token_ids")},
        "text": np.zeros((b, s, *letter.shape[1:]), letter.dtype),
        "text_segment_ids": np.zeros((b, s), np.int32),
        "sample_ids": np.zeros((b, n), np.uint32),
        **{name: np.zeros((b, n), np.int32) for name in ("num_tokens", "num_frames")},
        "token_fields": {
            k: np.zeros((b, l, *v.shape[1:]), v.dtype) for k, v in token_fields.items()
        },
        "segment_fields": {
            k: np.zeros((b, n, *v.shape), v.dtype) for k, v in segment_fields.items()
        },
    }
    number = 0
    for r, row in enumerate(rows):
        start = text_start = 0
        for j, sample in enumerate(row):
            count, letters = len(sample["tokens"]), len(sample["text"])
            check_fits(config, start + count, text_start + letters, f"row {r}")
            span, letter_span = slice(start, start + count), slice(text_start, text_start + letters)
            for name in ("tokens", "positions", "frame_ids"):
                batch[name][r, span] = sample[name]
            for name, values in sample["token_fields"].items():
                batch["token_fields"][name][r, span] = values
            for name, value in sample["segment_fields"].items():
                batch["segment_fields"][name][r, j] = value
            batch["segment_ids"][r, span], batch["token_ids"][r, span] = j + 1, np.arange(count)
            batch["text"][r, letter_span] = sample["text"]
            batch["text_segment_ids"][r, letter_span] = j + 1
            batch["sample_ids"][r, j], batch["num_tokens"][r, j] = number, count
            batch["num_frames"][r, j] = sample["frame_ids"][-1] + 1
            start, text_start, number = start + count, text_start + letters, number + 1
    return Batch(**batch)


def _place_after(batch: Batch) -> int:
    """The place behind the last sample of a batch in the endless order."""
    ids = np.asarray(batch.sample_ids)[np.asarray(batch.num_tokens) > 0]
    return int(ids.max()) + 1 if ids.size else 0


class Loader(Lanes[Batch]):
    """Packed rows: this process's of the global batches."""

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
        reader = as_reader(source)

        def row(number: int, start: int) -> grain.IterDataset:
            fields = token_fields, segment_fields
            return lane(reader, tokenize, config, seed, number, augment, *fields, start)

        rows = tuple(range(config.rows) if rows is None else rows)
        layout = {name: getattr(config, name) for name in LAYOUT}
        super().__init__(reader, row, rows, _stack, layout, _place_after)
