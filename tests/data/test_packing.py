"""Packing: nothing is lost, doubled or mixed up, and a saved stream goes on as if never stopped."""

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dit_jax.config import check_types
from dit_jax.data import Loader, PackingConfig, ShapesConfig, Tokenized
from dit_jax.data.packing import check_fits, merge_states
from dit_jax.model import ByteEncoderConfig, ModelConfig, PatchConfig
from dit_jax.training.video_task import tokenize
from dit_jax.types import PAD, Batch, Sample
from tests.packed import pack_rows

CONFIG = PackingConfig(rows=8, row_tokens=24, row_text=20, row_segments=4, bins=3)
SIZES = [(1, 2, 2), (3, 2, 2), (2, 3, 2), (1, 4, 4), (1, 1, 1), (5, 2, 2)]
FIELDS = [f.name for f in dataclasses.fields(Batch) if not f.name.endswith("_fields")]


class Clips:
    """Clips and images of several sizes whose every pixel says whose it is."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        t, h, w = SIZES[index % len(SIZES)]
        pixels = np.full((t, h, w, 1), index, np.uint8)
        return {"video": pixels, "caption": "abcdefghi"[: index % 7], "fps": 8.0}


def tokens_of(sample: Sample) -> Tokenized:
    """One token a pixel: its sample and its number in it."""
    t, h, w, _ = sample["video"].shape
    owner = sample["video"].reshape(-1).astype(np.float32)
    axes = np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
    letters = np.frombuffer(sample["caption"].encode(), np.uint8).astype(np.int32)
    return {
        "tokens": np.stack([owner, np.arange(len(owner), dtype=np.float32)], -1),
        "positions": np.stack(axes, -1).reshape(-1, 3).astype(np.float32) + 1,
        "frame_ids": np.repeat(np.arange(t, dtype=np.int32), h * w),
        "text": np.concatenate([np.array([1 + int(owner[0])], np.int32), letters]),
        "token_fields": {},
        "segment_fields": {},
    }


@pytest.fixture
def loader():
    """``loader(count, config, seed, rows)``; all are closed at the end of the test."""
    made: list[Loader] = []

    def make(
        count: int = 40,
        config: PackingConfig = CONFIG,
        seed: int = 0,
        rows: Sequence[int] | None = None,
    ) -> Loader:
        made.append(Loader(Clips(count), tokens_of, config, seed, rows))
        return made[-1]

    yield make
    for one in made:
        one.close()


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def assert_same(one: Any, other: Any) -> None:
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def segments(batch: Any) -> Any:
    """(row, slot, slice of tokens, slice of text) of every segment, by the counts alone."""
    for row, counts in enumerate(batch.num_tokens):
        start = text_start = 0
        for slot, count in enumerate(counts):
            if count == 0:
                continue
            letters = int((batch.text_segment_ids[row] == slot + 1).sum())
            yield row, slot, slice(start, start + count), slice(text_start, text_start + letters)
            start, text_start = start + count, text_start + letters


def test_every_sample_comes_whole_and_once_an_epoch(loader):
    count, epochs, padded = 40, 3, 0
    owner_of: dict[int, int] = {}
    # Each row stream gives rows out some way behind what it reads: three epochs are whole after four.
    for batch in take(loader(count), 40):
        for row, slot, span, text in segments(batch):
            place = int(batch.sample_ids[row, slot])
            owner = int(batch.tokens[row, span.start, 0])
            expected = tokens_of(Clips(count)[owner])
            for name in ("tokens", "positions", "frame_ids"):
                np.testing.assert_array_equal(getattr(batch, name)[row, span], expected[name])
            np.testing.assert_array_equal(batch.text[row, text], expected["text"])
            assert (batch.segment_ids[row, span] == slot + 1).all()
            assert (batch.text_segment_ids[row, text] == slot + 1).all()
            assert batch.token_ids[row, span].tolist() == list(range(span.stop - span.start))
            assert batch.num_frames[row, slot] == expected["frame_ids"][-1] + 1
            assert place % CONFIG.rows == row and place not in owner_of  # Every n-th sample, once.
            owner_of[place] = owner
        # Padding is zero and follows the segments.
        for row in range(CONFIG.rows):
            used = int(batch.num_tokens[row].sum())
            letters = int((batch.text_segment_ids[row] != PAD).sum())
            slots = int(batch.segment_ids[row].max())
            for name in ("tokens", "positions", "segment_ids", "frame_ids", "token_ids"):
                assert not getattr(batch, name)[row, used:].any(), name
            for name in ("text", "text_segment_ids"):
                assert not getattr(batch, name)[row, letters:].any(), name
            for name in ("num_tokens", "num_frames", "sample_ids"):
                assert not getattr(batch, name)[row, slots:].any(), name
            padded += CONFIG.row_tokens - used
    assert padded > 0
    orders = [[owner_of[epoch * count + i] for i in range(count)] for epoch in range(epochs)]
    for order in orders:
        assert Counter(order) == Counter(range(count))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_shapes_and_dtypes(loader):
    (batch,) = take(loader(rows=(2, 5)), 1)
    found = {name: (getattr(batch, name).shape, getattr(batch, name).dtype) for name in FIELDS}
    ints, floats, ids = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint32)
    assert found == {
        "tokens": ((2, 24, 2), floats),
        "positions": ((2, 24, 3), floats),
        **{name: ((2, 24), ints) for name in ("segment_ids", "frame_ids", "token_ids")},
        **{name: ((2, 20), ints) for name in ("text", "text_segment_ids")},
        "sample_ids": ((2, 4), ids),
        **{name: ((2, 4), ints) for name in ("num_tokens", "num_frames")},
    }


QUICKSTART = ModelConfig(
    patch=PatchConfig(t=2, h=8, w=8, channels=3, reference_fps=8.0),
    text=ByteEncoderConfig(max_bytes=47),
)


def test_rows_of_moving_shapes_are_mixed_and_full():
    config = PackingConfig(rows=4, row_tokens=256, row_text=192, row_segments=8)
    loader = Loader(ShapesConfig(), functools.partial(tokenize, QUICKSTART), config, 0)
    batches = take(loader, 16)
    loader.close()
    used = np.concatenate([batch.num_tokens for batch in batches])
    frames = np.concatenate([batch.num_frames for batch in batches])
    # Measured over these 64 rows: 0.899 (first fit) and more (best fit).
    assert used.sum() / (len(used) * config.row_tokens) > 0.88
    mixed = [
        len(set(counts[counts > 0])) > 1 and 1 in row and row.max() > 1
        for counts, row in zip(used, frames, strict=True)
    ]
    assert np.mean(mixed) > 0.3


# Order.


def test_rows_depend_on_the_seed_alone(loader):
    whole = take(loader(), 6)
    first, second = (take(loader(rows=rows), 6) for rows in ((0, 1, 2, 3), (4, 5, 6, 7)))
    threaded = take(loader(config=dataclasses.replace(CONFIG, threads=2)), 6)
    for batch, upper, lower, other in zip(whole, first, second, threaded, strict=True):
        both = Batch(**{n: np.concatenate([getattr(upper, n), getattr(lower, n)]) for n in FIELDS})
        assert_same(batch, both)
        assert_same(batch, other)
    other = take(loader(seed=1), 6)
    assert any((a.tokens != b.tokens).any() for a, b in zip(whole, other, strict=True))


# Saved streams.


@pytest.mark.parametrize(("threads", "given"), [(0, 0), (0, 1), (2, 7)])
def test_restored_stream_goes_on_bit_by_bit(loader, threads: int, given: int):
    config = dataclasses.replace(CONFIG, threads=threads)
    stream = loader(config=config)
    take(stream, given)
    state = json.loads(json.dumps(stream.get_state()))
    expected = take(stream, 6)
    resumed = loader(config=config)
    take(resumed, 2)  # also one that has begun
    for fresh in (loader(config=config), resumed):
        fresh.set_state(state)
        assert json.loads(json.dumps(fresh.get_state())) == state
        for a, b in zip(take(fresh, 6), expected, strict=True):
            assert_same(a, b)


def test_states_of_two_processes_restore_into_one_and_back(loader):
    stream = loader()
    take(stream, 5)
    halves = [loader(rows=rows) for rows in ((0, 1, 2, 3), (4, 5, 6, 7))]
    for half in halves:
        take(half, 5)
    states = [half.get_state() for half in halves]
    merged = merge_states(states)
    assert merged == stream.get_state()
    expected = take(stream, 3)

    one = loader()
    one.set_state({k: v for k, v in merged.items() if k != "run"})  # As old runs saved it.
    for a, b in zip(take(one, 3), expected, strict=True):
        assert_same(a, b)
    other = loader(rows=(3, 6))
    other.set_state(merged)
    for batch, whole in zip(take(other, 3), expected, strict=True):
        np.testing.assert_array_equal(batch.tokens, whole.tokens[[3, 6]])
    with pytest.raises(ValueError, match=r"no rows \[4, "):
        loader().set_state(states[0])


# What does not fit.


def test_sample_larger_than_a_row_is_refused():
    check_fits(CONFIG, 24, 20, "a clip")
    for tokens, text, message in (
        (25, 3, "a clip has 25 tokens and a row holds 24: raise data.packing.row_tokens"),
        (24, 21, "a clip has 21 text tokens and a row holds 20: raise data.packing.row_text"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fits(CONFIG, tokens, text, "a clip")


@pytest.mark.parametrize(
    ("threads", "change", "message"),
    [
        (0, {"row_tokens": 19}, r"sample \d+ \('a?b?c?d?e?f?'\) has 20 tokens and a row holds 19"),
        (2, {"row_text": 6}, r"sample \d+ \('abcdef'\) has 7 text tokens and a row holds 6"),
    ],
)
def test_loader_names_the_sample_that_does_not_fit(loader, threads: int, change: Any, message: str):
    stream = loader(config=dataclasses.replace(CONFIG, threads=threads, **change))
    with pytest.raises(ValueError, match=message):
        take(stream, 10)


def test_text_and_segments_alone_can_fill_a_row(loader):
    plain = take(loader(), 10)
    texts = take(loader(config=dataclasses.replace(CONFIG, row_text=7)), 10)
    few = take(loader(config=dataclasses.replace(CONFIG, row_segments=2)), 10)

    def letters(batches):
        return max((batch.text_segment_ids != PAD).sum(1).max() for batch in batches)

    def count(batches):
        return max((batch.num_tokens > 0).sum(1).max() for batch in batches)

    assert letters(texts) <= 7 < letters(plain)
    assert count(texts) <= 3  # Four captions need at least 1 + 2 + 3 + 4.
    assert count(few) == 2 < count(plain)


def test_empty_source_is_refused():
    with pytest.raises(ValueError, match="the dataset is empty"):
        Loader(Clips(0), tokens_of, CONFIG, 0)


def test_one_sample_repeats(loader):
    batches = take(loader(count=1), 2)
    owners = np.concatenate([b.tokens[b.segment_ids != PAD][:, 0] for b in batches])
    assert not owners.any()
    numbers = np.concatenate([b.sample_ids[b.num_tokens > 0] for b in batches])
    assert len(np.unique(numbers)) == len(numbers)  # each time it has noise of its own


def test_config_refuses_what_is_below_one():
    with pytest.raises(ValueError, match="row_tokens is -1"):
        check_types(PackingConfig(row_tokens=-1))


# Packing by hand, for other tests.


def test_pack_rows_makes_what_the_loader_makes(loader):
    for batch in take(loader(), 3):
        rows: list[list[Tokenized]] = [[] for _ in range(CONFIG.rows)]
        for row, _, span, _ in segments(batch):
            rows[row].append(tokens_of(Clips(40)[int(batch.tokens[row, span.start, 0])]))
        made = pack_rows(rows, CONFIG)
        count = int((batch.num_tokens > 0).sum())
        np.testing.assert_array_equal(made.sample_ids[made.num_tokens > 0], np.arange(count))
        assert_same(dataclasses.replace(made, sample_ids=batch.sample_ids), batch)
    empty = pack_rows([[tokens_of(Clips(40)[3])], []], CONFIG)
    assert not empty.segment_ids[1].any() and not empty.num_tokens[1].any()
    clip = tokens_of(Clips(40)[5])
    with pytest.raises(ValueError, match="row 1 has 40 tokens and a row holds 24"):
        pack_rows([[clip], [clip, clip]], CONFIG)
