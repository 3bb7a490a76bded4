"""The causal autoencoder as a ``Codec``: clips of any length and size in bounded memory.

Time is taken in parts, each beginning with what the last one left, which is exact; frames larger than a
tile in tiles that overlap and are blended, which is not quite (``tiling``). What is held at once is one
part of the clip, the activations of one tile, and for every tile the few frames that its layers look
back to: nothing grows with the length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dit_jax.codec.causal_autoencoder import CausalAutoencoder, CausalAutoencoderConfig
from dit_jax.codec.causal_layers import CACHE
from dit_jax.codec.codec import TileConfig, check_floating
from dit_jax.codec.tiling import tiled
from dit_jax.types import FrameGrid, Params

Constrain = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class VideoCodec:
    """A causal autoencoder of video; compiled for every size of tile and of part."""

    name: str
    hash: str
    config: CausalAutoencoderConfig
    params: Params = dataclasses.field(repr=False)
    tiles: TileConfig = TileConfig()
    lay: Callable[[int, int], Constrain] | None = None
    """``lay(h, w)`` lays out activations ``[b, t, ...]`` of so many rows and columns of latents over a
    mesh; frames are then not tiled."""

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.config.stride

    @property
    def channels(self) -> int:
        return self.config.latent_channels

    @cached_property
    def shift(self) -> np.ndarray:
        return np.array(self.config.shift or [0.0] * self.channels, np.float32)

    @cached_property
    def scale(self) -> np.ndarray:
        return np.array(self.config.scale or [1.0] * self.channels, np.float32)

    def encode(self, video: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
        """See ``Codec.encode``.

        Raises:
            ValueError: where the clip has other channels, or a size that the strides do not divide.
        """
        return self.encode_many(video[None], key)[0]

    def encode_many(self, videos: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
        """Clips ``[b, t, h, w, 3]`` of one size at once. Raises as ``encode`` does."""
        if len(videos) == 0:
            raise ValueError(f"clips of shape {videos.shape}: {self.name} takes at least one clip.")
        self._check(videos[0])
        moments = np.concatenate(list(self._parts("encode", videos, self._lengths(videos))), 1)
        mean = moments[..., : self.channels]
        if key is not None and self.config.variational:
            noise = np.asarray(jax.random.normal(key, mean.shape))
            mean = mean + np.exp(0.5 * moments[..., self.channels :]) * noise
        return (mean - self.shift) * self.scale

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """See ``Codec.decode``. Raises ``ValueError`` where the latents have other channels."""
        return np.concatenate(list(self.decode_parts(latents)))

    def decode_parts(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """``decode``, some frames ``[n, h, w, 3]`` at a time, for clips too long to hold in memory."""
        for part in self._decode_parts(latents[None]):
            yield part[0]

    def _decode_parts(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        check_floating(latents)
        if latents.ndim != 5 or latents.shape[-1] != self.channels or 0 in latents.shape:
            raise ValueError(
                f"latents of shape {latents.shape[1:]}: {self.name} takes [t, h, w, {self.channels}]."
            )
        n = self.tiles.frames
        whole, rest = divmod(latents.shape[1], n)
        plain = np.asarray(latents, np.float32) / self.scale + self.shift
        return self._parts("decode", plain, [n] * whole + [rest] * (rest > 0))

    def _lengths(self, videos: np.ndarray) -> list[int]:
        """Frames of the parts in which pixels are encoded."""
        time, n = self.strides[0], self.tiles.frames
        latents = FrameGrid(time).latents(videos.shape[1])
        counts = [min(n, latents - start) for start in range(0, latents, n)]
        return [count * time - (time - 1) * (i == 0) for i, count in enumerate(counts)]

    def _parts(
        self, method: str, clips: np.ndarray, lengths: Iterable[int]
    ) -> Iterator[np.ndarray]:
        b, unit = clips.shape[0], self.strides[1] if method == "encode" else 1
        size, overlap = self.tiles.size * unit, self.tiles.overlap * unit
        if self.lay is not None:
            size, overlap = max(clips.shape[2:4]), 0
        step = self._step(*(side // unit for side in clips.shape[2:4]))
        caches: dict[int, Any] = {}
        start = 0
        for length in lengths:
            first = start == 0
            number = itertools.count()

            def each(
                part: np.ndarray, first: bool = first, number: Iterator[int] = number
            ) -> np.ndarray:
                i = next(number)
                tile = rearrange(part, "(b t) h w c -> b t h w c", b=b)
                made, caches[i] = step(self.params, caches.get(i), tile, method, first)
                return np.asarray(rearrange(made, "b t h w c -> (b t) h w c"))

            part = np.asarray(clips[:, start : start + length], np.float32)
            whole = tiled(each, rearrange(part, "b t h w c -> (b t) h w c"), size, overlap, unit)
            yield rearrange(whole, "(b t) h w c -> b t h w c", b=b)
            start += length

    @cached_property
    def _steps(self) -> dict[Any, Any]:
        return {}

    def _step(self, height: int, width: int) -> Any:
        """The jitted step of a clip's part; frames of one layout share one."""
        key = None if self.lay is None else (height, width)
        if key not in self._steps:
            given: dict[str, Any] = (
                {} if self.lay is None else {"constrain": self.lay(height, width)}
            )
            model = CausalAutoencoder(self.config, self.config.computation(**given))

            def step(
                params: Params, cache: Any, x: jax.Array, method: str, first: bool
            ) -> tuple[jax.Array, Any]:
                return part_step(model, params, cache, x, method, first)

            self._steps[key] = jax.jit(
                step, static_argnames=("method", "first"), donate_argnames=("cache",)
            )
        return self._steps[key]

    def _check(self, clip: np.ndarray) -> None:
        time, space, _ = self.strides
        if clip.ndim != 4 or clip.shape[-1] != self.config.channels or 0 in clip.shape:
            raise ValueError(
                f"a clip of shape {tuple(clip.shape)}: {self.name} takes [t, h, w, "
                f"{self.config.channels}]."
            )
        check_floating(clip)
        frames, height, width = clip.shape[:3]
        if (frames - 1) % time or height % space or width % space:
            near = FrameGrid(time).whole(frames)
            down = [max(side // space, 1) * space for side in (height, width)]
            raise ValueError(
                f"a clip of {frames} frames of {height} x {width}: {self.name} takes 1 + {time}n "
                f"frames with sides that are multiples of {space}. Cut it to {near} of {down[0]} x "
                f"{down[1]}."
            )


def part_step(
    model: CausalAutoencoder, params: Params, cache: Any, x: jax.Array, method: str, first: bool
) -> tuple[jax.Array, Any]:
    """One part of clips ``x [b, t, h, w, c]``: moments or pixels, and the cache for the next part.

    ``method`` is "encode" or "decode"; ``cache`` is what the part before left, None for the first.
    """
    variables = params if first else {**params, CACHE: cache}
    made, left = model.apply(variables, x, first, method=method, mutable=[CACHE])
    if method == "encode":
        made = jnp.concatenate([moment for moment in made if moment is not None], -1)
    return made, left.get(CACHE, {})
