"""Codecs: pixels to latents and back, of clips of any size and length in bounded memory.

A ``Codec`` works on one clip ``[t, h, w, 3]``, and an image is a clip of one frame. ``ImageCodec``
takes every frame for itself. ``VideoCodec`` takes time in parts, each beginning with what the last one
left, which is exact. Frames larger than a tile are taken in tiles that overlap and are blended, which
is not quite (attention and group norms see a tile alone), or spread over a mesh. Nothing that is held
at once grows with the length.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.codec.causal_autoencoder import CACHE, CausalAutoencoder, CausalAutoencoderConfig
from dit_jax.files import refuse_if
from dit_jax.parallel.mesh import ROWS
from dit_jax.types import Codec as Codec
from dit_jax.types import FrameGrid, NonNegativeInt, Params, PositiveInt, check_floating, require
from dit_jax.types import PixelCodec as PixelCodec

# ---------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Size of what a codec has in memory at a time, in latents."""

    size: PositiveInt = 64
    """Rows and columns of a tile. Smaller frames are taken whole, as many as one tile's area holds."""
    overlap: NonNegativeInt = 16
    """Rows and columns over which neighbours are blended."""
    frames: PositiveInt = 4
    """Latents in time of a part, for codecs of video."""

    def __post_init__(self) -> None:
        half = self.size // 2
        require("tiles.", self, ("overlap", self.overlap <= half, f"at most half of {self.size}"))


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side; the last one ends where the side does."""
    return [*range(0, size - tile, tile - overlap), max(size - tile, 0)]


def ramp(starts: list[int], at: int, tile: int, scale: float) -> np.ndarray:
    """Weights along one side of the tile that is number ``at``, at its output's resolution: they rise
    over the overlap with the tile before, and fall over that with the tile after."""
    weights = np.ones(round(tile * scale), np.float32)
    for other, side in ((at - 1, weights), (at + 1, weights[::-1])):
        if 0 <= other < len(starts):
            shared = round((tile - abs(starts[at] - starts[other])) * scale)
            side[:shared] *= (np.arange(shared, dtype=np.float32) + 0.5) / shared
    return weights


def tiled(
    function: Callable[[np.ndarray], Any],
    images: np.ndarray,
    tile: int,
    overlap: int,
    unit: int = 1,
) -> np.ndarray:
    """``function`` of images ``[..., h, w, c]``, a tile of ``[..., tile, tile, c]`` at a time, float32.

    Tiles share an overlap, over which one fades into the next; a side shorter than a tile is taken
    whole. They begin at multiples of ``unit``: the pixels of a latent if the function encodes.
    """
    height, width = images.shape[-3:-1]
    assert not (tile % unit or overlap % unit or height % unit or width % unit)
    tall, wide = min(tile, height), min(tile, width)
    rows, columns = (tile_starts(side, tile, overlap) for side in (height, width))
    total: Any = None
    weight: Any = None
    for (i, top), (j, left) in itertools.product(enumerate(rows), enumerate(columns)):
        part = np.asarray(function(images[..., top : top + tall, left : left + wide, :]))
        *lead, h, w, channels = part.shape
        scale = h / tall
        if total is None:
            size = (round(height * scale), round(width * scale))
            total = np.zeros((*lead, *size, channels), np.float32)
            weight = np.zeros((*size, 1), np.float32)
        down, across = ramp(rows, i, tall, scale), ramp(columns, j, wide, scale)
        faded = (down[:, None] * across)[..., None]
        y, x = round(top * scale), round(left * scale)
        total[..., y : y + h, x : x + w, :] += part * faded
        weight[y : y + h, x : x + w] += faded
    return total / weight


# ---------------------------------------------------------------------------------------------------
# Meshes
# ---------------------------------------------------------------------------------------------------


def clip_sharding(mesh: Mesh, clips: int, h: int, w: int) -> NamedSharding:
    """The sharding of ``clips`` activations ``[b, t, rows, columns, c]`` of an autoencoder.

    Clips lie over data and fsdp; the rows, a multiple of ``h``, over context, or the columns, a
    multiple of ``w``, if context divides only those.
    """
    context, shards = mesh.shape["context"], math.prod(mesh.shape[axis] for axis in ROWS)
    over = ("context", None) if h % context == 0 else (None, None if w % context else "context")
    return NamedSharding(mesh, PartitionSpec(None if clips % shards else ROWS, None, *over, None))


def clip_constrain(mesh: Mesh, h: int, w: int) -> Callable[[jax.Array], jax.Array]:
    """Shards activations by ``clip_sharding``; the compiler sends edges to the neighbours."""
    return lambda x: jax.lax.with_sharding_constraint(x, clip_sharding(mesh, len(x), h, w))


# ---------------------------------------------------------------------------------------------------
# The codecs
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCodec:
    """What codecs of images and of video share; see ``Codec``."""

    name: str
    hash: str
    config: CausalAutoencoderConfig
    params: Params = dataclasses.field(repr=False)
    tiles: TileConfig = TileConfig()
    mesh: Mesh | None = None
    """What activations are sharded over; frames are then not tiled."""

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
        return self.encode_many(video[None], key)[0]

    def encode_many(self, videos: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
        """Clips ``[b, t, h, w, 3]`` of one size at once."""
        self._check(videos, self.config.channels, self.strides)
        mean, logvar = np.split(self._moments(videos), [self.channels], -1)
        if key is not None and logvar.size:
            noise = np.asarray(jax.random.normal(key, mean.shape))
            mean = mean + np.exp(0.5 * logvar) * noise
        return (mean - self.shift) * self.scale

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.concatenate(list(self.decode_parts(latents)))

    def decode_parts(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        for part in self._parts("decode", self._unscaled(latents)[None]):
            yield part[0]

    def _moments(self, videos: np.ndarray) -> np.ndarray:
        """Mean and, if there is one, log-variance of latents ``[b, t, h, w, z]`` along the channels."""
        return np.concatenate(list(self._parts("encode", videos)), 1)

    def _parts(self, method: str, clips: np.ndarray) -> Iterator[np.ndarray]:
        """Moments or pixels of ``clips [b, t, h, w, c]``, some frames at a time."""
        raise NotImplementedError

    def _unscaled(self, latents: np.ndarray) -> np.ndarray:
        self._check(latents[None], self.channels, (1, 1, 1))
        return np.asarray(latents, np.float32) / self.scale + self.shift

    def _check(self, clips: np.ndarray, channels: int, strides: tuple[int, int, int]) -> None:
        shape, (time, space, _) = clips.shape[1:], strides
        wrong = clips.ndim != 5 or shape[-1] != channels or 0 in clips.shape
        takes = f"{self.name} takes [t, h, w, {channels}]"
        refuse_if([(wrong, f"{len(clips)} clips of shape {shape}: {takes}.")])
        (frames, *sides), near = shape[:3], FrameGrid(time).whole(shape[0])
        h, w = (max(side // space, 1) * space for side in sides)
        message = (
            f"a clip of {frames} frames of {sides[0]} x {sides[1]}: {self.name} takes 1 + {time}n "
            f"frames with sides that are multiples of {space}. Cut it to {near} of {h} x {w}."
        )
        refuse_if([((frames - 1) % time + sum(side % space for side in sides) > 0, message)])
        check_floating(clips)

    @cached_property
    def _step(self) -> Any:
        """The jitted step of a clip's part."""

        def step(params: Params, cache: Any, x: jax.Array, method: str, first: bool) -> Any:
            unit = self._unit(method)[1]
            over: Any = {}
            if self.mesh is not None:
                h, w = (side // unit for side in x.shape[2:4])
                over = {"constrain": clip_constrain(self.mesh, h, w)}
            model = CausalAutoencoder(self.config, self.config.computation(**over))
            return part_step(model, params, cache, x, method, first)

        return jax.jit(step, static_argnames=("method", "first"), donate_argnames="cache")

    def _unit(self, method: str) -> tuple[int, int, int]:
        """Frames, rows and columns of a latent in what the method takes."""
        return self.strides if method == "encode" else (1, 1, 1)


class ImageCodec(LatentCodec):
    """An autoencoder of images, frame by frame; compiled once for every size of frame."""

    def _moments(self, videos: np.ndarray) -> np.ndarray:
        moments = super()._moments(videos.reshape(1, -1, *videos.shape[2:]))
        return moments.reshape(*videos.shape[:2], *moments.shape[2:])

    def _parts(self, method: str, clips: np.ndarray) -> Iterator[np.ndarray]:
        """As many frames of one clip at a time as a tile's area holds; of large ones one, in tiles."""
        frames, unit = np.asarray(clips[0], np.float32), self._unit(method)[1]
        tile, overlap = self.tiles.size * unit, self.tiles.overlap * unit
        count = min(max(tile * tile // math.prod(frames.shape[1:3]), 1), len(frames))

        def step(part: np.ndarray) -> np.ndarray:
            return np.asarray(self._step(self.params, None, part[:, None], method, True)[0])[:, 0]

        for start in range(0, len(frames), count):
            # The last part is filled up by the last frame, so that one compilation serves all.
            places = np.minimum(np.arange(start, start + count), len(frames) - 1)
            part = tiled(step, frames[places], tile, overlap, unit)
            yield part[None, : len(frames) - start]


class VideoCodec(LatentCodec):
    """A causal autoencoder of video; compiled for every size of tile and of part."""

    def _parts(self, method: str, clips: np.ndarray) -> Iterator[np.ndarray]:
        """Moments or pixels of ``clips [b, t, h, w, c]``, ``tiles.frames`` latents at a time."""
        n, (time, unit, _) = self.tiles.frames, self._unit(method)
        latents = FrameGrid(time).latents(clips.shape[1])
        tile, overlap = self.tiles.size * unit, self.tiles.overlap * unit
        if self.mesh is not None:
            tile, overlap = max(clips.shape[2:4]), 0
        # Of every tile, in the order in which they are taken.
        caches: collections.deque[Any] = collections.deque()

        def step(part: np.ndarray, first: bool) -> np.ndarray:
            cache = None if first else caches.popleft()
            out, left = self._step(self.params, cache, part, method, first)
            caches.append(left)
            return np.asarray(out)

        for start in range(0, latents, n):
            # The first latent holds one frame.
            begin, end = (max(1 + (at - 1) * time, 0) for at in (start, min(start + n, latents)))
            part = np.asarray(clips[:, begin:end], np.float32)
            yield tiled(partial(step, first=start == 0), part, tile, overlap, unit)


def part_step(
    model: CausalAutoencoder, params: Params, cache: Any, x: jax.Array, method: str, first: bool
) -> tuple[jax.Array, Any]:
    """One part of clips ``x [b, t, h, w, c]``: moments or pixels, and the cache for the next part.

    ``method`` is "encode" or "decode"; ``cache`` is what the part before left, None for the first.
    """
    variables = params if first else {**params, CACHE: cache}
    out, left = model.apply(variables, x, first, method=method, mutable=[CACHE])
    if method == "encode":
        out = jnp.concatenate([moment for moment in out if moment is not None], -1)
    return out, left.get(CACHE, {})
