"""Codecs: pixels to latents and back, for whoever prepares data or shows samples.

A ``Codec`` works on one clip ``[t, h, w, 3]``, and an image is a clip of one frame. Latents are shifted
and scaled to about unit variance (docs/DESIGN section 6). ``ImageCodec`` is an image autoencoder that
takes every frame for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.codec.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dit_jax.codec.tiling import tiled
from dit_jax.types import Codec as Codec
from dit_jax.types import Params, check_floating
from dit_jax.types import PixelCodec as PixelCodec


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Size of what a codec has in memory at a time, in latents."""

    size: int = 64
    """Rows and columns of a tile. Smaller frames are taken whole, as many as one tile's area holds."""
    overlap: int = 16
    """Rows and columns over which neighbours are blended."""
    frames: int = 4
    """Latents in time of a part, for codecs of video."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"parts of {self.frames} latents in time: a part has at least 1.")
        if self.size < 1 or not 0 <= self.overlap <= self.size // 2:
            raise ValueError(
                f"tiles of {self.size} latents with an overlap of {self.overlap}: a tile has at least "
                "1, and the overlap is at most half of it."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageCodec:
    """An autoencoder of images, frame by frame; compiled once for every size of frame."""

    name: str
    hash: str
    config: AutoencoderKLConfig
    params: Params = dataclasses.field(repr=False)
    tiles: TileConfig = TileConfig()

    @property
    def strides(self) -> tuple[int, int, int]:
        return 1, self.config.stride, self.config.stride

    @property
    def channels(self) -> int:
        return self.config.latent_channels

    @property
    def shift(self) -> float:
        return self.config.shift

    @property
    def scale(self) -> float:
        return self.config.scale

    def encode(self, video: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
        """See ``Codec.encode``.

        Raises:
            ValueError: where the clip has other channels, or sides that a latent does not divide.
        """
        stride = self.config.stride
        self._check(video, self.config.channels, stride)
        moments = self._mapped(self._encode, video, stride)
        mean, logvar = np.split(moments, 2, -1)
        if key is not None:
            noise = np.asarray(jax.random.normal(key, mean.shape))
            mean = mean + np.exp(0.5 * logvar) * noise
        return (mean - self.shift) * np.float32(self.scale)

    def encode_many(self, videos: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
        """Clips ``[b, t, h, w, 3]`` of one size at once. Raises as ``encode`` does."""
        frames = self.encode(videos.reshape(-1, *videos.shape[2:]), key)
        return frames.reshape(*videos.shape[:2], *frames.shape[1:])

    def decode_parts(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """See ``Codec.decode_parts``."""
        for start in range(0, len(latents), self.tiles.frames):
            yield self.decode(latents[start : start + self.tiles.frames])

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """See ``Codec.decode``. Raises ``ValueError`` where the latents have other channels."""
        self._check(latents, self.channels, 1)
        plain = np.asarray(latents, np.float32) / np.float32(self.scale) + np.float32(self.shift)
        return self._mapped(self._decode, plain, 1)

    @cached_property
    def _encode(self) -> Callable[[np.ndarray], jax.Array]:
        model = AutoencoderKL(self.config)

        def moments(params: Params, images: jax.Array) -> jax.Array:
            found: Any = model.apply(params, images, method="encode")
            return jnp.concatenate(found, -1)

        jitted = jax.jit(moments)
        return lambda images: jitted(self.params, images)

    @cached_property
    def _decode(self) -> Callable[[np.ndarray], jax.Array]:
        model = AutoencoderKL(self.config)
        jitted = jax.jit(lambda params, z: model.apply(params, z, method="decode"))
        return lambda latents: jitted(self.params, latents)

    def _mapped(
        self, function: Callable[[np.ndarray], jax.Array], frames: np.ndarray, unit: int
    ) -> np.ndarray:
        """``function`` of all frames, some at a time, in tiles where they are large."""
        frames = np.asarray(frames, np.float32)
        tile = self.tiles.size * unit
        if max(frames.shape[1:3]) > tile:
            overlap = self.tiles.overlap * unit

            def each(part: np.ndarray) -> np.ndarray:
                return np.asarray(function(part))

            cut = [tiled(each, frame[None], tile, overlap, unit) for frame in frames]
            return np.concatenate(cut)
        area = frames.shape[1] * frames.shape[2]
        count = min(tile * tile // area, len(frames))
        parts = []
        for start in range(0, len(frames), count):
            part = frames[start : start + count]
            # The last part is filled up, so that one compilation serves all.
            filled = np.concatenate([part, np.repeat(part[-1:], count - len(part), 0)])
            parts.append(np.asarray(function(filled))[: len(part)])
        return np.concatenate(parts)

    def _check(self, clip: np.ndarray, channels: int, unit: int) -> None:
        fits = clip.ndim == 4 and clip.shape[-1] == channels and len(clip) > 0
        if not fits or any(size < 1 or size % unit for size in clip.shape[1:3]):
            raise ValueError(
                f"a clip of shape {tuple(clip.shape)}: {self.name} takes [t, h, w, {channels}]"
                + (f" with h and w multiples of {unit}." if unit > 1 else ".")
            )
        check_floating(clip)
