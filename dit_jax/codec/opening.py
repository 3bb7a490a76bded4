"""The autoencoder of a run of latents: opened, and held against the config and the data."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.codec.codec import Codec, ImageCodec, PixelCodec
from dit_jax.codec.config import LatentCodecConfig
from dit_jax.codec.folders import load_codec
from dit_jax.codec.video_codec import VideoCodec
from dit_jax.config import VideoRun
from dit_jax.data import RecordsSource
from dit_jax.parallel import make_clip_constrain
from dit_jax.types import Source


def open_codec(config: VideoRun, mesh: Mesh | None = None) -> Codec | None:
    """The codec at ``codec.run.path``; without one pixels are their own, and latents have none.

    A codec of video spreads clips over a mesh, where one is given that is this process's alone.

    Raises:
        ValueError: where it is absent, or makes other latents than the model does.
    """
    if config.codec.path is None:
        return PixelCodec() if config.model.patch.channels == PixelCodec.channels else None
    assert isinstance(config.codec, LatentCodecConfig)
    codec = load_codec(config.codec.path, config.codec.tiles)
    wanted = (config.codec.t, config.codec.h, config.codec.w)
    if codec.strides != wanted or codec.channels != config.model.patch.channels:
        raise ValueError(
            f"the codec {config.codec.path!r} makes latents of {codec.channels} channels with strides "
            f"{codec.strides}, and the config has model.patch.channels {config.model.patch.channels} "
            f"and codec.t, h, w = {wanted}: make them the same."
        )
    if config.codec.hash not in (None, codec.hash):
        raise ValueError(
            f"the codec {config.codec.path!r} is {codec.hash!r}, and the run's latents are of "
            f"{config.codec.hash!r} (codec.hash): give the codec that made them."
        )
    alone = jax.process_count() == 1
    if mesh is not None and mesh.size > 1 and alone and isinstance(codec, VideoCodec):
        params = jax.device_put(codec.params, NamedSharding(mesh, PartitionSpec()))
        return dataclasses.replace(codec, params=params, lay=make_clip_constrain(mesh))
    return codec


def codec_copies(codec: Codec, mesh: Mesh) -> list[Codec]:
    """The codec on every device of a mesh, each by itself; compiled for each that is used."""
    if mesh.size == 1 or not isinstance(codec, ImageCodec | VideoCodec):
        return [codec]
    return [
        dataclasses.replace(codec, params=jax.device_put(codec.params, device))
        for device in mesh.devices.flat
    ]


def with_codec_hash(config: VideoRun) -> VideoRun:
    """The config with the hash of the codec whose latents are trained on, as far as that is known: the
    data's, or else the folder's.

    Raises:
        ValueError: where the data, the folder and the config name different codecs.
    """
    told, source = config.codec, config.data.source
    known = [told.hash] if told.hash else []
    known += [
        made for one in getattr(source, "record_sets", ()) if (made := RecordsSource(one).codec)
    ]
    if told.path is not None:
        known.append(load_codec(told.path).hash)
    if len(set(known)) > 1:
        raise ValueError(
            f"codec.hash {told.hash!r}, the latents of the data and the codec {told.path!r} are not of "
            f"one codec: {', '.join(map(repr, known))}. Give the one that made the latents."
        )
    if not known:
        return config
    return dataclasses.replace(config, codec=dataclasses.replace(told, hash=known[0]))


def check_codec(codec: Codec | None, source: Source) -> None:
    """Raises ``ValueError`` where the latents of the data are another codec's."""
    for records in getattr(source, "record_sets", ()):
        if codec is not None and records.codec not in (None, codec.hash):
            raise ValueError(
                f"the latents of {records.config.path!r} were made by the codec {records.codec!r}, "
                f"and codec.path is {codec.hash!r} ({codec.name}): give the one that made them."
            )
