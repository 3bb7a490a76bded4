"""Batches of a few clips, packed side by side."""

from typing import NamedTuple

import numpy as np

from dit_jax.types import Batch

DIM = 4


class Clip(NamedTuple):
    """One sample to pack: its identity, its frames and the tokens of each."""

    id: int
    frames: int
    per_frame: int


def pack(rows: list[list[Clip]], length: int, slots: int) -> Batch:
    """Clips side by side; their tokens are a function of their identity."""
    segment, frame, token = np.zeros((3, len(rows), length), np.int32)
    tokens = np.zeros((len(rows), length, DIM), np.float32)
    sample, count, frames = np.zeros((3, len(rows), slots), np.int64)
    for r, row in enumerate(rows):
        start = 0
        for j, clip in enumerate(row):
            n = clip.frames * clip.per_frame
            span = slice(start, start + n)
            tokens[r, span] = np.random.default_rng(clip.id).normal(size=(n, DIM))
            segment[r, span], token[r, span] = j + 1, np.arange(n)
            frame[r, span] = np.arange(n) // clip.per_frame
            sample[r, j], count[r, j], frames[r, j] = clip.id, n, clip.frames
            start += n
    return Batch(
        tokens=tokens,
        positions=np.zeros((len(rows), length, 3), np.float32),
        segment_ids=segment,
        frame_ids=frame,
        token_ids=token,
        text=np.ones((len(rows), slots), np.int32),
        text_segment_ids=np.tile(np.arange(1, slots + 1, dtype=np.int32), (len(rows), 1)),
        sample_ids=sample.astype(np.uint32),
        num_tokens=count.astype(np.int32),
        num_frames=frames.astype(np.int32),
    )
