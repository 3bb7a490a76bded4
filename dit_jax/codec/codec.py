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
import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.codec.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dit_jax.codec.causal_autoencoder import CACHE, CausalAutoencoder, CausalAutoencoderConfig
from dit_jax.files import refuse_if
from dit_jax.parallel.mesh import ROWS
from dit_jax.types import Codec as Codec
from dit_jax.types import (
    FrameGrid,
    NonNegativeInt,
    Params,
    PositiveInt,
    check_floating,
    require,
)
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
    total = weight = np.zeros(0)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            part = np.asarray(function(images[..., top : top + tall, left : left + wide, :]))
            scale = part.shape[-3] / tall
            if not total.size:
                shape = (round(height * scale), round(width * scale))
                total = np.zeros((*part.shape[:-3], *shape, part.shape[-1]), np.float32)
                weight = np.zeros((*shape, 1), np.float32)
            down = ramp(rows, i, tall, scale)[:, None]
            faded = (down * ramp(columns, j, wide, scale))[..., None]
            y, x = round(top * scale), round(left * scale)
            place = (slice(y, y + part.shape[-3]), slice(x, x + part.shape[-2]), slice(None))
            total[..., *place] += part * faded
            weight[place] += faded
    return total / weight


# ---------------------------------------------------------------------------------------------------
# Meshes
# ---------------------------------------------------------------------------------------------------

Constrain = Callable[[jax.Array], jax.Array]


def clip_sharding(mesh: Mesh, clips: int, h: int, w: int) -> NamedSharding:
    """The sharding of ``clips`` activations ``[b, t, rows, columns, c]`` of an autoencoder.

    Clips lie over data and fsdp; the rows, a multiple of ``h``, over context, or the columns, a
    multiple of ``w``, if context divides only those.
    """
    context, shards = mesh.shape["context"], math.prod(mesh.shape[axis] for axis in ROWS)
    over = ("context", None) if h % context == 0 else (None, None if w % context else "context")
    return NamedSharding(mesh, PartitionSpec(None if clips % shards else ROWS, None, *over, None))


def make_clip_constrain(mesh: Mesh) -> Callable[[int, int], Constrain]:
    """``make_clip_constrain(mesh)(h, w)`` shards activations by ``clip_sharding``; the compiler sends
    edges to the neighbours."""

    def of_size(h: int, w: int) -> Constrain:
        return lambda x: jax.lax.with_sharding_constraint(x, clip_sharding(mesh, len(x), h, w))

    return of_size


def make_gather(mesh: Mesh) -> Constrain:
    """Replicates an array on every device: kernels of convolutions, before they are used.

    Of kernels whose channels lie over fsdp and context, and clips over data, fsdp and context, XLA (of
    jax 0.10.2) makes convolutions with wrong numbers, without a warning, if all three are above 1.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return lambda x: jax.lax.with_sharding_constraint(x, whole)


# ---------------------------------------------------------------------------------------------------
# The codecs
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCodec:
    """What codecs of images and of video share; see ``Codec``."""

    name: str
    hash: str
    config: Any
    params: Params = dataclasses.field(repr=False)
    tiles: TileConfig = TileConfig()

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

    def _moments(self, videos: np.ndarray) -> np.ndarray:
        """Mean and, if there is one, log-variance of latents ``[b, t, h, w, z]`` along the channels."""
        raise NotImplementedError

    def _unscaled(self, latents: np.ndarray) -> np.ndarray:
        self._check(latents[None], self.channels, (1, 1, 1))
        return np.asarray(latents, np.float32) / self.scale + self.shift

    def _check(self, clips: np.ndarray, channels: int, strides: tuple[int, int, int]) -> None:
        def faults() -> Iterator[tuple[bool, str]]:
            wrong = clips.ndim != 5 or clips.shape[-1] != channels or 0 in clips.shape
            shape, (time, space, _) = clips.shape[1:], strides
            yield (
                wrong,
                f"{len(clips)} clips of shape {shape}: {self.name} takes [t, h, w, {channels}].",
            )
            (frames, *sides), near = shape[:3], FrameGrid(time).whole(shape[0])
            down = [max(side // space, 1) * space for side in sides]
            yield (
                (frames - 1) % time > 0 or any(side % space for side in sides),
                f"a clip of {frames} frames of {sides[0]} x {sides[1]}: {self.name} takes 1 + {time}n "
                f"frames with sides that are multiples of {space}. Cut it to {near} of {down[0]} x "
                f"{down[1]}.",
            )

        refuse_if(faults())
        check_floating(clips)


class ImageCodec(LatentCodec):
    """An autoencoder of images, frame by frame; compiled once for every size of frame."""

    config: AutoencoderKLConfig

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self._map("decode", self._unscaled(latents), 1)

    def decode_parts(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(latents), self.tiles.frames):
            yield self.decode(latents[start : start + self.tiles.frames])

    def _moments(self, videos: np.ndarray) -> np.ndarray:
        frames = self._map("encode", videos.reshape(-1, *videos.shape[2:]), self.strides[1])
        return frames.reshape(*videos.shape[:2], *frames.shape[1:])

    @cached_property
    def _step(self) -> Callable[..., jax.Array]:
        def step(params: Params, images: jax.Array, method: str) -> jax.Array:
            out: Any = AutoencoderKL(self.config).apply(params, images, method=method)
            return jnp.concatenate(out, -1) if method == "encode" else out

        return jax.jit(step, static_argnames="method")

    def _map(self, method: str, frames: np.ndarray, unit: int) -> np.ndarray:
        """A method of all frames, some at a time, in tiles if they are large."""
        frames = np.asarray(frames, np.float32)
        step = partial(self._step, self.params, method=method)
        tile, (height, width) = self.tiles.size * unit, frames.shape[1:3]
        if max(height, width) > tile:
            overlap = self.tiles.overlap * unit
            return np.concatenate([tiled(step, x[None], tile, overlap, unit) for x in frames])
        count, parts = min(tile * tile // (height * width), len(frames)), []
        for start in range(0, len(frames), count):
            part = frames[start : start + count]
            # The last part is filled up, so that one compilation serves all.
            filled = np.concatenate([part, np.repeat(part[-1:], count - len(part), 0)])
            parts.append(np.asarray(step(filled))[: len(part)])
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True, eq=False)
class VideoCodec(LatentCodec):
    """A causal autoencoder of video; compiled for every size of tile and of part."""

    config: CausalAutoencoderConfig
    constrain: Callable[[int, int], Constrain] | None = None
    """``constrain(h, w)`` shards activations of so many rows and columns of latents over a mesh; frames
    are then not tiled."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return np.concatenate(list(self.decode_parts(latents)))

    def decode_parts(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        for part in self._parts("decode", self._unscaled(latents)[None], len(latents)):
            yield part[0]

    def _moments(self, videos: np.ndarray) -> np.ndarray:
        latents = FrameGrid(self.strides[0]).latents(videos.shape[1])
        return np.concatenate(list(self._parts("encode", videos, latents)), 1)

    def _parts(self, method: str, clips: np.ndarray, latents: int) -> Iterator[np.ndarray]:
        """Moments or pixels of ``clips [b, t, h, w, c]``, which have so many latents in time."""
        encodes, n = method == "encode", self.tiles.frames
        time, unit, _ = self.strides if encodes else (1, 1, 1)
        tile, overlap, size = self.tiles.size * unit, self.tiles.overlap * unit, None
        if self.constrain is not None:
            tile, overlap = max(clips.shape[2:4]), 0
            size = tuple(side // unit for side in clips.shape[2:4])
        # Of every tile, in the order in which they are taken.
        caches: collections.deque[Any] = collections.deque()

        def step(part: np.ndarray, first: bool) -> np.ndarray:
            cache = None if first else caches.popleft()
            out, left = self._step(self.params, cache, part, method, first, size)
            caches.append(left)
            return np.asarray(out)

        for start in range(0, latents, n):
            # The first latent holds one frame.
            begin, end = (max(1 + (at - 1) * time, 0) for at in (start, min(start + n, latents)))
            part = np.asarray(clips[:, begin:end], np.float32)
            yield tiled(partial(step, first=start == 0), part, tile, overlap, unit)

    @cached_property
    def _step(self) -> Any:
        """The jitted step of a clip's part. ``size`` is static: frames of one layout share one."""

        def step(
            params: Params,
            cache: Any,
            x: jax.Array,
            method: str,
            first: bool,
            size: tuple[int, int] | None,
        ) -> tuple[jax.Array, Any]:
            over: Any = {"constrain": self.constrain(*size)} if self.constrain and size else {}
            model = CausalAutoencoder(self.config, self.config.computation(**over))
            return part_step(model, params, cache, x, method, first)

        static = ("method", "first", "size")
        return jax.jit(step, static_argnames=static, donate_argnames=("cache",))


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
