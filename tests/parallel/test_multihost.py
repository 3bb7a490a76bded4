"""Batches put together from rows. (Several real processes are in tests/test_multiprocess.py.)"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import struct

from dit_jax.files import InputError
from dit_jax.parallel import (
    MeshConfig,
    global_batch,
    initialize,
    joined,
    local_rows,
    make_mesh,
    multihost,
)
from dit_jax.parallel.cluster import FLAGS, VARIABLES
from dit_jax.types import PackedBatch

MESHES = [
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 1, 8, 1),
    (1, 1, 1, 8),
    (2, 2, 2, 1),
    (1, 2, 2, 2),
    (2, 1, 2, 2),
    (2, 2, 1, 2),
    (4, 1, 2, 1),
]


def packed_batch(rows=8, length=16):
    """Numbers that all differ, so that each tells its place."""
    rng = np.random.default_rng(0)
    whole = {"tokens": (length, 6), "positions": (length, 3)}
    whole |= dict.fromkeys(("segment_ids", "frame_ids", "token_ids"), (length,))
    whole |= dict.fromkeys(("text", "text_segment_ids"), (12,))
    whole |= dict.fromkeys(("sample_ids", "num_tokens", "num_frames"), (3,))
    fields = {
        name: rng.permutation(rows * np.prod(s)).reshape(rows, *s) for name, s in whole.items()
    }
    return PackedBatch(**{name: value.astype(np.float32) for name, value in fields.items()})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_assembled_arrays_equal_the_batch(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    batch = packed_batch()
    rows = local_rows(mesh, 8)
    assert rows == tuple(range(8))  # this process has all devices
    placed = global_batch(mesh, batch, rows, 8)
    data, fsdp, context, _ = sizes
    for field in dataclasses.fields(batch):
        value, array = getattr(batch, field.name), getattr(placed, field.name)
        if field.name == "low":
            assert value is None and array is None
            continue
        assert isinstance(array, jax.Array) and array.shape == value.shape
        np.testing.assert_array_equal(array, value, err_msg=field.name)
        # Each device holds the part that its index says, and no more.
        for part in array.addressable_shards:
            np.testing.assert_array_equal(part.data, value[part.index])
            assert part.data.shape[0] == 8 // (data * fsdp)
            along = field.name in ("tokens", "positions", "segment_ids", "frame_ids", "token_ids")
            assert part.data.shape[1] == value.shape[1] // (context if along else 1)


def test_length_that_context_does_not_divide_stays_whole():
    mesh = make_mesh(MeshConfig(2, 1, 4, 1))
    batch = packed_batch(length=6)
    placed = global_batch(mesh, batch, tuple(range(8)), 8)
    np.testing.assert_array_equal(placed.tokens, batch.tokens)
    assert placed.tokens.sharding.shard_shape(placed.tokens.shape) == (4, 6, 6)


@struct.dataclass
class Clean:
    """As sampling's conditions: the field of tokens is named ``clean``."""

    clean: np.ndarray
    seeds: np.ndarray


def test_conditions_are_placed_too():
    mesh = make_mesh(MeshConfig(2, 1, 4, 1))
    condition = Clean(np.arange(64.0).reshape(4, 8, 2), np.arange(4.0).reshape(4, 1))
    placed = global_batch(mesh, condition, (0, 1, 2, 3), 4)
    np.testing.assert_array_equal(placed.clean, condition.clean)
    np.testing.assert_array_equal(placed.seeds, condition.seeds)
    assert placed.clean.sharding.shard_shape((4, 8, 2)) == (2, 2, 2)


@pytest.mark.parametrize(
    ("sizes", "rows"), [((8, 1, 1, 1), 4), ((2, 2, 2, 1), 6), ((1, 8, 1, 1), 9)]
)
def test_rows_that_do_not_divide_are_refused(sizes, rows):
    parts = sizes[0] * sizes[1]
    with pytest.raises(ValueError) as error:
        local_rows(make_mesh(MeshConfig(*sizes)), rows)
    text = str(error.value)
    assert f"{rows} rows of a batch do not divide over mesh.data x mesh.fsdp = {parts}" in text
    assert f"a multiple of {parts}" in text and "mesh.context" in text


def test_rows_of_other_devices_are_not_local():
    """A mesh of some of the devices: still all rows, for every row has a part here."""
    mesh = make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4])
    assert local_rows(mesh, 6) == (0, 1, 2, 3, 4, 5)


def test_alone_nothing_is_joined(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert initialize() is None and jax.process_count() == 1
    # Errors pass: the verb prints them.
    with pytest.raises(ValueError, match="no rows"), joined(None, "prog"):
        raise ValueError("no rows")


def test_others_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="--process-id=2 is not in 0..1"):
        initialize(dict(zip(FLAGS, ("host:1", "2", "2"), strict=True)))


class FailsWith:
    """In place of a lifeline: notes with which status the process would have ended."""

    def fail(self, error, prog, user_error):
        raise SystemExit(2 if user_error else 1)


@pytest.mark.parametrize(
    ("user_errors", "error", "status"),
    [
        ((), ValueError("rows"), 2),
        ((), InputError("rows"), 2),
        ((), OSError("disk full"), 1),
        ((InputError,), InputError("rows"), 2),
        ((InputError,), ValueError("from the middle of a run"), 1),
    ],
)
def test_only_errors_of_the_user_end_with_2(monkeypatch, user_errors, error, status):
    monkeypatch.setattr(multihost, "initialize", lambda flags: FailsWith())
    with pytest.raises(SystemExit) as ended, joined(None, "prog", *user_errors):
        raise error
    assert ended.value.code == status


def test_others_that_are_not_there_may_be_there_next_time(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    flags = dict(zip(FLAGS, ("host:1", "2", "1"), strict=True))
    with pytest.raises(SystemExit) as ended, joined(flags, "prog"):
        pass
    # Python prints a text and ends with status 1.
    assert "prog: error: process 1 of 2 could not join the others at host:1" in ended.value.code
