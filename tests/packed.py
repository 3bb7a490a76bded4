"""Rows of packed segments without a loader, for tests that decide which samples share a row."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.data import PackingConfig, Tokenized
from dit_jax.data.packing import check_fits
from dit_jax.types import Batch


def pack_rows(rows: Sequence[Sequence[Tokenized]], config: PackingConfig) -> Batch:
    """Packs samples into the rows that a test gives them; sample ids count the samples."""
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
