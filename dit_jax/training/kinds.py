"""The hashes of frozen weights that a run depends on."""

from __future__ import annotations

from dit_jax.config import VideoRun
from dit_jax.training.frozen import with_codec_hash, with_text_hash


def with_hashes(config: VideoRun) -> VideoRun:
    """The config with the hashes of its codec and its text encoder.

    Raises:
        ValueError: if the data, the folders and the config name different ones.
    """
    return with_text_hash(with_codec_hash(config))
