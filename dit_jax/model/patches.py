"""Spacetime patches: latents cut into tokens and put together again, and where a token stands.

A grid of latents ``[t, h, w, c]`` becomes ``l`` tokens of ``p = pt ph pw c`` numbers in raster order
(ViT, Dosovitskiy et al. 2020). If a patch spans several frames the first frame stands alone, repeated
to fill its patch, as in causal codecs: a clip has ``1 + pt n`` frames, and an image is one frame.

Positions are rotary (Su et al. 2021, "RoFormer", eq. 34): the pairs of a head (element i of its first
half and of its second) are shared out among time, height and width, and the i-th of an axis's n pairs
is turned by an angle proportional to the token's coordinate::

    angle_i = coordinate theta^(-i / n)                                                       (1)
    (x, y)  = (x cos angle - y sin angle,  y cos angle + x sin angle)                         (2)

Scores then depend on differences of coordinates alone, whatever sizes training saw.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float

from dit_jax.types import FrameGrid, PositiveFloat, PositiveInt

Places = Float[Array, "b l 3"]
Angles = Float[Array, "b l f"]


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """Patch size in latent frames, rows and columns, and the unit of time."""

    t: PositiveInt = 1
    h: PositiveInt = 2
    w: PositiveInt = 2
    channels: PositiveInt = 4  # Channels of a latent (3 for pixels).
    # The frame rate at which one latent frame is one unit of time.
    reference_fps: PositiveFloat = 24.0

    @property
    def dim(self) -> int:  # p
        return self.t * self.h * self.w * self.channels

    def grid(
        self, frames: int, height: int, width: int, loop: bool = False
    ) -> tuple[int, int, int]:
        """Tokens along (t, h, w) of a clip, or ``ValueError`` with the nearest sizes that divide. Of a
        ``loop`` (``pt n`` frames, which go round) no frame is the first."""
        if not loop:
            FrameGrid(multiple=self.t).check(frames)
        elif frames < 1 or frames % self.t:
            raise ValueError(f"a loop of {frames} frames: give a multiple of {self.t}.")
        for name, size, patch in (("height", height, self.h), ("width", width, self.w)):
            if size < 1 or size % patch:
                low = max(size // patch * patch, patch)
                raise ValueError(
                    f"{name} {size} is not a multiple of the patch's {patch}. "
                    f"The nearest are {low} and {low + patch}."
                )
        # Rounded up: the first frame, which a loop lacks, has a token of its own.
        return -(-frames // self.t), height // self.h, width // self.w

    def num_tokens(self, frames: int, height: int, width: int, loop: bool = False) -> int:
        return math.prod(self.grid(frames, height, width, loop))


def patchify(config: PatchConfig, video: np.ndarray, loop: bool = False) -> np.ndarray:
    """Cuts a clip ``[t, h, w, c]``, or one that goes round, into tokens ``[l, p]``."""
    frames, height, width, channels = video.shape
    config.grid(frames, height, width, loop)
    if channels != config.channels:
        raise ValueError(
            f"the clip has {channels} channels and the model's patches {config.channels}: "
            "set model.patch.channels, or prepare the data with the codec of this model."
        )
    first = repeat(video[:1], "1 h w c -> pt h w c", pt=config.t)
    sizes = {"pt": config.t, "ph": config.h, "pw": config.w}
    filled = video if loop or config.t == 1 else np.concatenate([first, video[1:]])
    return rearrange(filled, "(t pt) (h ph) (w pw) c -> (t h w) (pt ph pw c)", **sizes)


def unpatchify(
    config: PatchConfig,
    tokens: np.ndarray,
    frames: int,
    height: int,
    width: int,
    loop: bool = False,
) -> np.ndarray:
    """Puts tokens ``[l, p]`` together to a clip; its first frame is the mean of the copies."""
    t, h, _ = config.grid(frames, height, width, loop)
    sizes = {"t": t, "h": h, "pt": config.t, "ph": config.h, "pw": config.w}
    video = rearrange(tokens, "(t h w) (pt ph pw c) -> (t pt) (h ph) (w pw) c", **sizes)
    if loop or config.t == 1:
        return video
    return np.concatenate([video[: config.t].mean(0, keepdims=True), video[config.t :]])


def positions(
    config: PatchConfig, frames: int, height: int, width: int, fps: float, loop: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates float32 ``[l, 3]`` and places along time int32 ``[l]`` of a clip's tokens: time in
    latent frames at ``reference_fps``, at the middle of a patch's frames (those of a loop begin behind
    the first frame, which it lacks); rows and columns in patches."""
    if not fps > 0:  # NaN too
        raise ValueError(f"fps is {fps}: a frame rate is above 0; give the clip's own.")
    t, h, w = config.grid(frames, height, width, loop)
    index = np.arange(t, dtype=np.float32) + loop
    middle = np.where(index == 0, 0.0, (index - 1) * config.t + 1 + (config.t - 1) / 2)
    time = middle / config.t * (config.reference_fps / fps)
    axes = np.meshgrid(time, np.arange(h), np.arange(w), indexing="ij")
    coordinates = np.stack(axes, -1).reshape(-1, 3).astype(np.float32)
    return coordinates, np.repeat(np.arange(t, dtype=np.int32), h * w)


def field_tokens(
    config: PatchConfig,
    stride: int,
    size: tuple[int, int, int],
    frame_fields: Mapping[str, np.ndarray],
    pixel_fields: Mapping[str, np.ndarray],
    loop: bool = False,
) -> dict[str, np.ndarray]:
    """The fields of a clip of ``size`` latent frames, rows and columns, by token ``[l, ...]``.

    A token has the values of its frames of ``frame_fields [t, ...]`` (one for each frame of pixels;
    ``stride`` is the codec's in time) and its patch of ``pixel_fields [t, h, w, c]`` (on the latents'
    grid). In a ``loop`` no frame is a first one.
    """
    grid, (_, h, w) = FrameGrid(stride, config.t), config.grid(1, *size[1:])
    of_frames = (size[0] * stride if loop else grid.frames(size[0]),)
    fields = {}
    for name, values in [*frame_fields.items(), *pixel_fields.items()]:
        expected = of_frames if name in frame_fields else size
        if np.shape(values)[: len(expected)] != expected:
            raise ValueError(
                f"the field {name!r} is of the shape {np.shape(values)}, and the clip asks for "
                f"{expected} (frames of pixels; or latent frames, rows and columns): give as many."
            )
        if name in frame_fields:
            fields[name] = np.repeat(grid.per_token(np.asarray(values), loop), h * w, 0)
        else:
            patch = dataclasses.replace(config, channels=values.shape[3])
            fields[name] = patchify(patch, values.astype(np.float32), loop)
    return fields


# --- Positions ---


def frequencies(head_dim: int, theta: float) -> Float[np.ndarray, "3 f"]:
    """Angle per unit of each coordinate (1) for the ``f = head_dim / 2`` pairs; a row for each axis."""
    # Height and width get as many pairs each, and time the rest. The shortest wavelength is 2 pi units,
    # and theta (nearly) the ratio of the longest to it.
    side = head_dim // 6
    rows, start = np.zeros((3, head_dim // 2), np.float32), 0
    for axis, pairs in enumerate((head_dim // 2 - 2 * side, side, side)):
        rows[axis, start : start + pairs] = theta ** (-np.arange(pairs) / pairs)
        start += pairs
    return rows


def absolute_features(
    kind: Literal["thw", "wh", "wht"], positions: Places, width: int, theta: float
) -> Float[Array, "b l d"]:
    """Sines and cosines of the coordinates, float32 (see ``DiTConfig.absolute_positions``)."""

    def angles(coordinates: jax.Array, pairs: int, dtype: Any = np.float32) -> jax.Array:
        rates = theta ** (-np.arange(pairs, dtype=dtype) / pairs)
        return coordinates[..., None] * rates.astype(np.float32)

    if kind == "thw":
        # A third for each (Vaswani et al. 2017, section 3.5); zero where 6 does not divide.
        by_axis = angles(positions, width // 6).reshape(*positions.shape[:2], -1)
        features = jnp.concatenate([jnp.sin(by_axis), jnp.cos(by_axis)], -1)
        return jnp.pad(features, ((0, 0), (0, 0), (0, width - features.shape[-1])))
    # Half for the column, then half for the row (MAE, He et al. 2022, section A.1). Rates are float64
    # as in published tables, so that published weights see the numbers they were trained with.
    by_axis = angles(positions[..., [2, 1]], width // 4, np.float64)  # [b, l, 2, width / 4]
    features = jnp.concatenate([jnp.sin(by_axis), jnp.cos(by_axis)], -1)
    features = features.reshape(*positions.shape[:2], width)
    if kind == "wht":
        # Less those of time 0, so that a clip's first frame is placed as an image is.
        of_time = angles(positions[..., 0], width // 2)
        features = features + jnp.concatenate([jnp.sin(of_time), jnp.cos(of_time) - 1], -1)
    return features


def rotary_angles(positions: Places, head_dim: int, theta: float) -> tuple[Angles, Angles]:
    """Cosine and sine, float32, of every token's angles; computed once for all layers."""
    angles = jnp.einsum("blx,xf->blf", positions, frequencies(head_dim, theta), precision="highest")
    # XLA would compute both again wherever they are used, in every layer for every head (for CPUs it
    # drops barriers before it fuses); the result of a product it keeps.
    one = np.eye(angles.shape[-1], dtype=np.float32)
    cos, sin = (jnp.matmul(f(angles), one, precision="highest") for f in (jnp.cos, jnp.sin))
    return cos, sin


def rotate(x: Float[Array, "b l a d"], cos: Angles, sin: Angles) -> Float[Array, "b l a d"]:
    """Turns the pairs of queries or keys by their token's angles (2), in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]  # [b, l, 1, f], for all heads
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
