"""The autoencoder of a run of latents: opened, and held against the config and the data."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import Config
from dit_jax.data import RecordsSource
from dit_jax.interop import load_codec
from dit_jax.models import Codec, VideoCodec
from dit_jax.parallel import make_lay
from dit_jax.types import Source


def open_codec(config: Config, mesh: Mesh | None = None) -> Codec | None:
    """The codec at ``config.codec.path``, if there is one.

    A codec of video spreads clips over a mesh, where one is given that is this process's alone.

    Raises:
        ValueError: where it is absent, or makes other latents than the model does.
    """
    if config.codec.path is None:
        return None
    codec = load_codec(config.codec.path, config.codec.tiles)
    wanted = (config.codec.t, config.codec.h, config.codec.w)
    if codec.strides != wanted or codec.channels != config.model.patch.channels:
        raise ValueError(
            f"the codec {config.codec.path!r} makes latents of {codec.channels} channels with strides "
            f"{codec.strides}, and the config has model.patch.channels {config.model.patch.channels} "
            f"and codec.t, h, w = {wanted}: make them the same."
        )
    alone = jax.process_count() == 1
    if mesh is not None and mesh.size > 1 and alone and isinstance(codec, VideoCodec):
        params = jax.device_put(codec.params, NamedSharding(mesh, PartitionSpec()))
        return dataclasses.replace(codec, params=params, lay=make_lay(mesh))
    return codec


def check_codec(codec: Codec | None, source: Source) -> None:
    """Raises ``ValueError`` where the latents of the data are another codec's."""
    if codec is None or not isinstance(source, RecordsSource) or source.codec is None:
        return
    if source.codec != codec.hash:
        raise ValueError(
            f"the latents of {source.config.path!r} were made by the codec {source.codec!r}, "
            f"and codec.path is {codec.hash!r} ({codec.name}): give the one that made them."
        )
