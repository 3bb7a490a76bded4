"""Which task a config is of."""

from __future__ import annotations

from jax.sharding import Mesh

from dit_jax.codec.opening import with_codec_hash
from dit_jax.codec.run import CodecRun
from dit_jax.codec.train import build_codec
from dit_jax.config import Config, Run
from dit_jax.text.opening import with_text_hash
from dit_jax.training import Task
from dit_jax.training.video_task import build_text_to_video


def recorded(config: Run) -> Run:
    """The config as a new run stores it: with the hashes of its codec and its text encoder.

    Raises:
        ValueError: where the data, the folders and the config name different ones.
    """
    if not isinstance(config, Config):
        return config
    return with_text_hash(with_codec_hash(config))


def build(config: Run, mesh: Mesh) -> Task:
    """The task of a run on a mesh; opens the data, and makes nothing else yet."""
    if isinstance(config, CodecRun):
        return build_codec(config, mesh)
    assert isinstance(config, Config)
    return build_text_to_video(config, mesh)
