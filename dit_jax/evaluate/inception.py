"""Inception-v3 as FID uses it: TensorFlow's graph of 2015-12-05, in its PyTorch ports' key layout.

Not the network of Szegedy et al. 2015 ("Rethinking the Inception architecture") to the letter: 1008
logits; average pools of the mixed blocks leave out what lies outside the image; and the last block
(``Mixed_7c``) pools by maximum where its twin ``Mixed_7b`` takes the mean. Images are resized by TF1's
bilinear rule to 299 x 299 and scaled as ``(x - 128) / 128``, inside the graph. That is what the FID
of Heusel et al. 2017, OpenAI's evaluation suite and torch-fidelity see. pytorch-fid has the same
weights but resizes by PyTorch's rule (half-pixel centres) and scales by ``2x/255 - 1``; its FIDs differ
in the second decimal, and are not computed here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dit_jax.evaluate.layers import ConvNorm, average_pool, resize_bilinear

SIZE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7


class InceptionFeatures(NamedTuple):
    """What the metrics read of ``b`` images."""

    pool: jax.Array
    """``[b, 2048]``: ``pool_3``, for FID, precision and recall."""
    spatial: jax.Array
    """``[b, 2023]``: the first 7 channels of ``mixed_6/conv`` (17 x 17), for sFID."""
    logits: jax.Array
    """``[b, 1008]`` without their bias, which the Inception Score leaves out."""


def _conv(features: int, *kernel: int, stride: int = 1, name: str, same: bool = False) -> ConvNorm:
    height, width = kernel if len(kernel) == 2 else (kernel[0], kernel[0])
    padding = "SAME" if same else "VALID"
    return ConvNorm(features, (height, width), stride, padding, name=name)


def _join(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


class Mixed35(nn.Module):
    """Mixed_5b, 5c, 5d: 35 x 35."""

    pooled: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(64, 1, name="branch1x1")(x)
        five = _conv(48, 1, name="branch5x5_1")(x)
        five = _conv(64, 5, name="branch5x5_2", same=True)(five)
        three = _conv(64, 1, name="branch3x3dbl_1")(x)
        three = _conv(96, 3, name="branch3x3dbl_2", same=True)(three)
        three = _conv(96, 3, name="branch3x3dbl_3", same=True)(three)
        pooled = _conv(self.pooled, 1, name="branch_pool")(average_pool(x))
        return _join(one, five, three, pooled)


class Shrink17(nn.Module):
    """Mixed_6a: 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv(384, 3, stride=2, name="branch3x3")(x)
        double = _conv(64, 1, name="branch3x3dbl_1")(x)
        double = _conv(96, 3, name="branch3x3dbl_2", same=True)(double)
        double = _conv(96, 3, stride=2, name="branch3x3dbl_3")(double)
        return _join(three, double, _max_pool(x))


class Mixed17(nn.Module):
    """Mixed_6b to 6e: 17 x 17, kernels of 7 in one axis at a time."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(192, 1, name="branch1x1")(x)
        seven = _conv(self.width, 1, name="branch7x7_1")(x)
        seven = _conv(self.width, 1, 7, name="branch7x7_2", same=True)(seven)
        seven = _conv(192, 7, 1, name="branch7x7_3", same=True)(seven)
        double = _conv(self.width, 1, name="branch7x7dbl_1")(x)
        double = _conv(self.width, 7, 1, name="branch7x7dbl_2", same=True)(double)
        double = _conv(self.width, 1, 7, name="branch7x7dbl_3", same=True)(double)
        double = _conv(self.width, 7, 1, name="branch7x7dbl_4", same=True)(double)
        double = _conv(192, 1, 7, name="branch7x7dbl_5", same=True)(double)
        pooled = _conv(192, 1, name="branch_pool")(average_pool(x))
        return _join(one, seven, double, pooled)


class Shrink8(nn.Module):
    """Mixed_7a: 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv(192, 1, name="branch3x3_1")(x)
        three = _conv(320, 3, stride=2, name="branch3x3_2")(three)
        seven = _conv(192, 1, name="branch7x7x3_1")(x)
        seven = _conv(192, 1, 7, name="branch7x7x3_2", same=True)(seven)
        seven = _conv(192, 7, 1, name="branch7x7x3_3", same=True)(seven)
        seven = _conv(192, 3, stride=2, name="branch7x7x3_4")(seven)
        return _join(three, seven, _max_pool(x))


class Mixed8(nn.Module):
    """Mixed_7b and 7c: 8 x 8, kernels of 3 that fork into both axes."""

    max_pooled: bool
    """Pools by maximum: the slip of the graph's last block."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(320, 1, name="branch1x1")(x)
        three = _conv(384, 1, name="branch3x3_1")(x)
        wide = _conv(384, 1, 3, name="branch3x3_2a", same=True)(three)
        high = _conv(384, 3, 1, name="branch3x3_2b", same=True)(three)
        double = _conv(448, 1, name="branch3x3dbl_1")(x)
        double = _conv(384, 3, name="branch3x3dbl_2", same=True)(double)
        double_wide = _conv(384, 1, 3, name="branch3x3dbl_3a", same=True)(double)
        double_high = _conv(384, 3, 1, name="branch3x3dbl_3b", same=True)(double)
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.max_pooled else average_pool(x)
        pooled = _conv(192, 1, name="branch_pool")(pooled)
        return _join(one, wide, high, double_wide, double_high, pooled)


class InceptionV3(nn.Module):
    """uint8 (or float in 0..255) images ``[b, h, w, 3]`` of any size to ``InceptionFeatures``."""

    @nn.compact
    def __call__(self, images: jax.Array) -> InceptionFeatures:
        x = resize_bilinear(images.astype(jnp.float32), SIZE, SIZE)
        x = (x - 128) / 128
        x = _conv(32, 3, stride=2, name="Conv2d_1a_3x3")(x)
        x = _conv(32, 3, name="Conv2d_2a_3x3")(x)
        x = _max_pool(_conv(64, 3, name="Conv2d_2b_3x3", same=True)(x))
        x = _conv(80, 1, name="Conv2d_3b_1x1")(x)
        x = _max_pool(_conv(192, 3, name="Conv2d_4a_3x3")(x))
        for letter, pooled in zip("bcd", (32, 64, 64), strict=True):
            x = Mixed35(pooled, name=f"Mixed_5{letter}")(x)
        x = Shrink17(name="Mixed_6a")(x)
        x = Mixed17(128, name="Mixed_6b")(x)
        x = Mixed17(160, name="Mixed_6c")(x)
        x = Mixed17(160, name="Mixed_6d")(x)
        # TensorFlow's "mixed_6/conv": the first branch of this block.
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = Mixed17(192, name="Mixed_6e")(x)
        x = Shrink8(name="Mixed_7a")(x)
        x = Mixed8(max_pooled=False, name="Mixed_7b")(x)
        x = Mixed8(max_pooled=True, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        precise = jax.lax.Precision.HIGHEST
        logits = nn.Dense(CLASSES, use_bias=False, precision=precise, name="fc")(pool)
        return InceptionFeatures(pool, spatial, logits)
