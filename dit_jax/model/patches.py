"""Spacetime patches: latents cut into tokens and put together again.

A grid of latents ``[t, h, w, c]`` becomes ``l`` tokens of ``p = pt * ph * pw * c`` numbers
(ViT, Dosovitskiy et al. 2020; spacetime patches of the Sora report), in (t, h, w) raster
order. When the patch spans several frames the first frame stands alone, repeated to fill its
patch, as in causal video codecs: a clip has ``1 + pt * n`` frames and a still image is a clip
of one frame.

Positions are rotary (Su et al. 2021, "RoFormer", eq. 34) along time, height and width: the pairs of a
head are shared out among the three axes, and each pair is turned by an angle proportional to the
token's coordinate on its axis. Queries and keys then meet through differences of coordinates alone, so
sizes and lengths never trained on have positions too. A pair is element ``i`` of the first half and
element ``i`` of the second half of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float

from dit_jax.types import FrameGrid, PositiveFloat, PositiveInt

Places = Float[Array, "b l 3"]
Features = Float[Array, "b l d"]
Angles = Float[Array, "b l f"]


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """Patch size in latent frames, rows and columns, and the unit of time of the positions."""

    t: PositiveInt = 1
    h: PositiveInt = 2
    w: PositiveInt = 2
    channels: PositiveInt = 4
    """Channels of a latent (3 for pixels)."""
    reference_fps: PositiveFloat = 24.0
    """The frame rate at which one latent frame is one unit of time."""

    @property
    def dim(self) -> int:
        """Numbers in one patch, p."""
        return self.t * self.h * self.w * self.channels

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along (t, h, w) of a clip of that size; raises ``ValueError``, with the nearest sizes
        that fit, if the patch does not divide it."""
        FrameGrid(multiple=self.t).check(frames)
        for name, size, patch in (("height", height, self.h), ("width", width, self.w)):
            if size < 1 or size % patch:
                low = max(size // patch * patch, patch)
                raise ValueError(
                    f"{name} {size} is not a multiple of the patch's {patch}. "
                    f"The nearest are {low} and {low + patch}."
                )
        return 1 + (frames - 1) // self.t, height // self.h, width // self.w

    def num_tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of a clip of that size."""
        t, h, w = self.grid(frames, height, width)
        return t * h * w


def patchify(config: PatchConfig, video: np.ndarray) -> np.ndarray:
    """Cuts a clip ``[t, h, w, c]`` into tokens ``[l, p]``; raises ``ValueError`` as ``grid`` does."""
    frames, height, width, channels = video.shape
    config.grid(frames, height, width)
    if channels != config.channels:
        raise ValueError(
            f"the clip has {channels} channels and the model's patches {config.channels}: "
            "set model.patch.channels, or prepare the data with the codec of this model."
        )
    first = repeat(video[:1], "1 h w c -> pt h w c", pt=config.t)
    filled = np.concatenate([first, video[1:]]) if config.t > 1 else video
    sizes = {"pt": config.t, "ph": config.h, "pw": config.w}
    return rearrange(filled, "(t pt) (h ph) (w pw) c -> (t h w) (pt ph pw c)", **sizes)


def unpatchify(
    config: PatchConfig, tokens: np.ndarray, frames: int, height: int, width: int
) -> np.ndarray:
    """Puts tokens ``[l, p]`` together to a clip ``[t, h, w, c]``; its first frame is the mean of the
    copies that fill its patch."""
    t, h, _ = config.grid(frames, height, width)
    sizes = {"t": t, "h": h, "pt": config.t, "ph": config.h, "pw": config.w}
    video = rearrange(tokens, "(t h w) (pt ph pw c) -> (t pt) (h ph) (w pw) c", **sizes)
    if config.t == 1:
        return video
    return np.concatenate([video[: config.t].mean(0, keepdims=True), video[config.t :]])


def positions(
    config: PatchConfig, frames: int, height: int, width: int, fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates float32 ``[l, 3]`` and latent frames int32 ``[l]`` of a clip's tokens.

    Time is counted in latent frames at ``reference_fps``: a patch stands at the middle of the
    frames it holds, so that clips of any frame rate share one unit. Rows and columns count patches.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}: a frame rate is above 0; give the clip's own.")
    t, h, w = config.grid(frames, height, width)
    index = np.arange(t, dtype=np.float32)
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
    """The fields of a clip's frames and pixels, token by token: ``[l, ...]``.

    A token gets the values ``[frames, ...]`` of its patch's frames of ``frame_fields [t, ...]`` (a
    value for every frame of pixels), and the numbers of its patch of ``pixel_fields [t, h, w, c]``
    (float, on the grid of the latents). ``stride`` is the codec's in time, ``size`` the latent frames,
    rows and columns of the clip; in a ``loop`` no frame is a first one.
    """
    frames, height, width = size
    grid, fields, (_, h, w) = FrameGrid(stride, config.t), {}, config.grid(1, height, width)
    of_frames = (frames * stride if loop else grid.frames(frames),)
    for name, values in [*frame_fields.items(), *pixel_fields.items()]:
        expected = of_frames if name in frame_fields else size
        if np.shape(values)[: len(expected)] != expected:
            raise ValueError(
                f"the field {name!r} is of the shape {np.shape(values)}, and the clip asks for "
                f"{expected} (frames of pixels; or latent frames, rows and columns): give as many."
            )
    for name, values in frame_fields.items():
        fields[name] = np.repeat(grid.per_token(np.asarray(values), loop), h * w, 0)
    for name, values in pixel_fields.items():
        patch = dataclasses.replace(config, channels=values.shape[3])
        if loop:  # A first frame is put before, and its tokens taken away again.
            values = np.concatenate([values[:1], values])
        fields[name] = patchify(patch, values.astype(np.float32))[h * w if loop else 0 :]
    return fields


# ---------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head that turn with (t, h, w); even, and 44, 42, 42 for 128."""
    assert head_dim % 2 == 0 and head_dim >= 6, head_dim  # A pair for each; DiTConfig sees to it.
    side = head_dim // 6 * 2
    return head_dim - 2 * side, side, side


def frequencies(head_dim: int, theta: float) -> Float[np.ndarray, "3 f"]:
    """Angle per unit of each coordinate for every pair, ``f = head_dim / 2``; one row per axis.

    ``theta`` is (nearly) the ratio of the longest wavelength to the shortest, which is 2 pi units.
    """
    rows, start = np.zeros((3, head_dim // 2), np.float32), 0
    for axis, dim in enumerate(axis_dims(head_dim)):
        pairs = dim // 2
        rows[axis, start : start + pairs] = theta ** (-np.arange(pairs) / pairs)
        start += pairs
    return rows


def sincos_features(positions: Places, width: int, theta: float) -> Features:
    """Sines and cosines of the coordinates, float32, a third of ``width`` for each of t, h and w: the
    fixed embedding of Vaswani et al. 2017 (section 3.5). What does not divide by six stays zero."""
    pairs = width // 6
    rates = theta ** (-np.arange(pairs, dtype=np.float32) / pairs)
    angles = (positions[..., None] * rates).reshape(*positions.shape[:2], 3 * pairs)
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return jnp.pad(features, ((0, 0), (0, 0), (0, width - 6 * pairs)))


def grid_features(positions: Places, width: int, theta: float) -> Features:
    """Sines and cosines of the column and then of the row, float32, half of ``width`` for each: the
    fixed embedding of MAE (He et al. 2022, section A.1) and of DiT. Time does not enter."""
    pairs = width // 4
    rates = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    angles = positions[..., [2, 1], None] * rates.astype(np.float32)
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return features.reshape(*positions.shape[:2], width)


def grid_time_features(positions: Places, width: int, theta: float) -> Features:
    """``grid_features``, and sines and cosines of time less those of time 0, float32: the first frame
    of a clip is placed as ``grid_features`` places an image."""
    pairs = width // 2
    rates = theta ** (-np.arange(pairs, dtype=np.float32) / pairs)
    angles = positions[..., :1] * rates
    of_time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles) - 1], -1)
    return grid_features(positions, width, theta) + of_time


ABSOLUTE = {"thw": sincos_features, "wh": grid_features, "wht": grid_time_features}
"""Functions of ``DiTConfig.absolute_positions``."""


def rotary_angles(positions: Places, head_dim: int, theta: float) -> tuple[Angles, Angles]:
    """Cosine and sine, float32, of every token's angles; made once for all layers."""
    angles = jnp.einsum("blx,xf->blf", positions, frequencies(head_dim, theta), precision="highest")
    # XLA would compute both again wherever they are used, in every layer for every head (for CPUs it
    # drops barriers before it fuses); the result of a product it keeps.
    one = np.eye(angles.shape[-1], dtype=np.float32)
    cos, sin = (jnp.matmul(f(angles), one, precision="highest") for f in (jnp.cos, jnp.sin))
    return cos, sin


def rotate(x: Float[Array, "b l a d"], cos: Angles, sin: Angles) -> Float[Array, "b l a d"]:
    """Turns the pairs of queries or keys by their token's angles, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
