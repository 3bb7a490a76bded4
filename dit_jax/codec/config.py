"""The codec of a run of latents, as configs name it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.codec.codec import ImageCodec, TileConfig
from dit_jax.codec.folders import load_codec
from dit_jax.codec.sharding import make_clip_constrain
from dit_jax.codec.video_codec import VideoCodec
from dit_jax.config import CodecConfig
from dit_jax.files import InputError
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
        """The codec in the folder. One of video spreads clips over a mesh that is this process's alone.

        Raises:
            ValueError: if it is absent, or makes other latents than the model does.
        """
        if self.path is None:
            return super().open(channels, mesh)
        codec = load_codec(self.path, self.tiles)
        strides = (self.t, self.h, self.w)
        if codec.strides != strides or codec.channels != channels:
            raise InputError(
                f"the codec {self.path!r} makes latents of {codec.channels} channels with strides "
                f"{codec.strides}, and the config has model.patch.channels {channels} and codec.t, "
                f"h, w = {strides}: make them the same."
            )
        if self.hash not in (None, codec.hash):
            raise InputError(
                f"the codec {self.path!r} is {codec.hash!r}, and the run's latents are of "
                f"{self.hash!r} (codec.hash): give the codec that made them."
            )
        alone = jax.process_count() == 1
        if mesh is not None and mesh.size > 1 and alone and isinstance(codec, VideoCodec):
            params = jax.device_put(codec.params, NamedSharding(mesh, PartitionSpec()))
            return dataclasses.replace(codec, params=params, lay=make_clip_constrain(mesh))
        return codec

    def weights_hash(self) -> str | None:
        """Of the folder's weights."""
        return None if self.path is None else load_codec(self.path).hash


def codec_copies(codec: Codec, mesh: Mesh) -> list[Codec]:
    """The codec on every device of a mesh, each by itself; compiled for each that is used."""
    if mesh.size == 1 or not isinstance(codec, ImageCodec | VideoCodec):
        return [codec]
    return [
        dataclasses.replace(codec, params=jax.device_put(codec.params, device))
        for device in mesh.devices.flat
    ]
