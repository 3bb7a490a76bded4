"""Batches of a few clips, packed side by side."""

import dataclasses
from typing import NamedTuple

import numpy as np

from dit_jax.data import PackingConfig, Tokenized
from dit_jax.types import Batch
from tests.packed import pack_rows

DIM = 4


class Clip(NamedTuple):
    """One sample to pack: its identity, its frames and the tokens of each."""

    id: int
    frames: int
    per_frame: int

    def tokens(self) -> Tokenized:
        count = self.frames * self.per_frame
        return {
            "tokens": np.random.default_rng(self.id).normal(size=(count, DIM)),
            "positions": np.zeros((count, 3), np.float32),
            "frame_ids": np.arange(count) // self.per_frame,
            "text": np.ones(1, np.int32),
            "token_fields": {},
            "segment_fields": {},
        }


def pack(rows: list[list[Clip]], length: int, slots: int) -> Batch:
    """Clips side by side; their tokens are a function of their identity."""
    config = PackingConfig(row_tokens=length, row_text=slots, row_segments=slots)
    batch = pack_rows([[clip.tokens() for clip in row] for row in rows], config)
    ids = np.array([clip.id for row in rows for clip in row], np.uint32)
    return dataclasses.replace(batch, sample_ids=ids[batch.sample_ids] * (batch.num_tokens > 0))
