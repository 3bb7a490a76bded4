"""The codec of a run of latents, as configs name it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from dit_jax.codec.codec import TileConfig
from dit_jax.config import CodecConfig


@dataclasses.dataclass(frozen=True)
class LatentCodecConfig(CodecConfig):
    """A folder of weights that turns pixels into the latents that the model makes, and back."""

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """The folder of an autoencoder (``python -m dit_jax.convert`` says which). Pixels of the data are
    encoded by it as they are read, and what the model makes is decoded by it."""
    tiles: TileConfig = TileConfig()
    """In what parts it takes clips: how much memory encoding and decoding need."""
