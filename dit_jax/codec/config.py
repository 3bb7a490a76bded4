"""The codec of a run of latents, as configs name it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.codec.codec import LatentCodec, TileConfig, VideoCodec
from dit_jax.codec.folders import load_codec
from dit_jax.config import CodecConfig
from dit_jax.files import refuse_if
from dit_jax.types import Codec


@dataclasses.dataclass(frozen=True)
class LatentCodecConfig(CodecConfig):
    """A folder of weights that turns pixels into the latents that the model makes, and back."""

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """The folder of an autoencoder (``python -m dit_jax.convert`` says which). Pixels of the data are
    encoded by it as they are read, and what the model makes is decoded by it."""
    tiles: TileConfig = TileConfig()
    """In what parts it takes clips: how much memory encoding and decoding need."""

    def open(self, channels: int, mesh: Mesh | None = None) -> Codec | None:
        """The codec in the folder. One of video spreads clips over the mesh of a lone process."""
        if self.path is None:
            return super().open(channels, mesh)
        codec, strides = load_codec(self.path, self.tiles), (self.t, self.h, self.w)
        other = (codec.strides, codec.channels) != (strides, channels)
        message = (
            f"the codec {self.path!r} makes latents of {codec.channels} channels with strides "
            f"{codec.strides}, and the config has model.patch.channels {channels} and codec.t, h, w = "
            f"{strides}: make them the same."
        )
        unlike = (
            f"the codec {self.path!r} is {codec.hash!r}, and the run's latents are of {self.hash!r} "
            "(codec.hash): give the codec that made them."
        )
        refuse_if([(other, message), (self.hash not in (None, codec.hash), unlike)])
        alone = jax.process_count() == 1
        if mesh is not None and mesh.size > 1 and alone and isinstance(codec, VideoCodec):
            params = jax.device_put(codec.params, NamedSharding(mesh, PartitionSpec()))
            return dataclasses.replace(codec, params=params, mesh=mesh)
        return codec

    def weights_hash(self) -> str | None:
        return None if self.path is None else load_codec(self.path).hash


def codec_copies(codec: Codec, mesh: Mesh) -> list[Codec]:
    """The codec on every device of a mesh, each by itself; compiled for each that is used."""
    if mesh.size == 1 or not isinstance(codec, LatentCodec):
        return [codec]
    put = [jax.device_put(codec.params, device) for device in mesh.devices.flat]
    return [dataclasses.replace(codec, params=params) for params in put]
