"""I3D on RGB (Carreira & Zisserman 2017, "Quo vadis, action recognition?"): what FVD looks with.

The two-dimensional Inception-v1 inflated to three axes; 400 logits of Kinetics-400 are the features
(Unterthiner et al. 2018). Keys are those of pytorch-i3d, whose padding is TensorFlow's "SAME". Clips
are resized to 224 x 224 frame by frame (TF1's bilinear rule, as FVD's own code does) and scaled to
[-1, 1]. Logits of several moments, which clips longer than 16 frames have, are averaged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dit_jax.evaluate.layers import ConvNorm, resize_bilinear

SIZE = 224
CLASSES = 400
I3D_FRAMES = 16
"""Usual length of a clip; those of at least 9 frames can be read."""
I3D_MIN_FRAMES = 9


def _conv(features: int, size: int, name: str, stride: int = 1) -> ConvNorm:
    return ConvNorm(features, (size,) * 3, stride, "SAME", name=name)


def _max_pool(x: jax.Array, size: tuple[int, int, int], stride: tuple[int, int, int]) -> jax.Array:
    return nn.max_pool(x, size, stride, "SAME")


class Mixed(nn.Module):
    """Four branches side by side: 1, 1-3, 1-3 and pool-1."""

    widths: tuple[int, int, int, int, int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b0, b1a, b1b, b2a, b2b, b3b = self.widths
        branches = (
            _conv(b0, 1, "b0")(x),
            _conv(b1b, 3, "b1b")(_conv(b1a, 1, "b1a")(x)),
            _conv(b2b, 3, "b2b")(_conv(b2a, 1, "b2a")(x)),
            _conv(b3b, 1, "b3b")(_max_pool(x, (3, 3, 3), (1, 1, 1))),
        )
        return jnp.concatenate(branches, axis=-1)


class I3D(nn.Module):
    """uint8 (or float in 0..255) clips ``[b, t, h, w, 3]`` to logits ``[b, 400]``."""

    @nn.compact
    def __call__(self, clips: jax.Array) -> jax.Array:
        if clips.shape[1] < I3D_MIN_FRAMES:
            raise ValueError(
                f"clips of {clips.shape[1]} frames are too short for I3D: it takes at least "
                f"{I3D_MIN_FRAMES}, and {I3D_FRAMES} are usual."
            )
        x = resize_bilinear(clips.astype(jnp.float32), SIZE, SIZE)
        x = x * (2 / 255) - 1
        x = _conv(64, 7, "Conv3d_1a_7x7", stride=2)(x)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = _conv(192, 3, "Conv3d_2c_3x3")(_conv(64, 1, "Conv3d_2b_1x1")(x))
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = Mixed((64, 96, 128, 16, 32, 32), name="Mixed_3b")(x)
        x = Mixed((128, 128, 192, 32, 96, 64), name="Mixed_3c")(x)
        x = _max_pool(x, (3, 3, 3), (2, 2, 2))
        x = Mixed((192, 96, 208, 16, 48, 64), name="Mixed_4b")(x)
        x = Mixed((160, 112, 224, 24, 64, 64), name="Mixed_4c")(x)
        x = Mixed((128, 128, 256, 24, 64, 64), name="Mixed_4d")(x)
        x = Mixed((112, 144, 288, 32, 64, 64), name="Mixed_4e")(x)
        x = Mixed((256, 160, 320, 32, 128, 128), name="Mixed_4f")(x)
        x = _max_pool(x, (2, 2, 2), (2, 2, 2))
        x = Mixed((256, 160, 320, 32, 128, 128), name="Mixed_5b")(x)
        x = Mixed((384, 192, 384, 48, 128, 128), name="Mixed_5c")(x)
        x = nn.avg_pool(x, (2, 7, 7), (1, 1, 1), "VALID")
        precise = jax.lax.Precision.HIGHEST
        logits = nn.Conv(CLASSES, (1, 1, 1), precision=precise, name="logits")(x)
        return logits.mean((1, 2, 3))
