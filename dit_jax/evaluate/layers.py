"""What the feature networks are made of: convolutions with frozen norms, pools, TF1's resize.

These networks are only ever run, never trained: batch norms use their stored moments. Products are
asked for in full float32, which accelerators would otherwise round to bfloat16: the published numbers
were computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

NORM_EPS = 1e-3
ZEROS, ONES = nn.initializers.zeros_init(), nn.initializers.ones_init()

Padding = str | Sequence[tuple[int, int]]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with stored moments, ReLU; over 2 or 3 axes."""

    features: int
    kernel: tuple[int, ...]
    stride: int = 1
    padding: Padding = "VALID"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[b, *space, c]`` to ``[b, *space', features]``."""
        convolution = nn.Conv(
            self.features,
            self.kernel,
            (self.stride,) * len(self.kernel),
            self.padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )
        y = convolution(x)
        shape = (self.features,)
        # Flax types boxed values too; these are arrays.
        scale: Any = self.param("scale", ONES, shape)
        bias: Any = self.param("bias", ZEROS, shape)
        mean: Any = self.param("mean", ZEROS, shape)
        var: Any = self.param("var", ONES, shape)
        return nn.relu((y - mean) * (scale * jax.lax.rsqrt(var + NORM_EPS)) + bias)


def average_pool(x: jax.Array) -> jax.Array:
    """3x3 means with stride 1 that keep the size; what lies outside is left out of the mean."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """``[..., h, w, c]`` float32 resized as TensorFlow 1's ``resize_bilinear`` does.

    Output pixel i looks at i · in/out, from the corner, not from the pixel's centre, and however small
    the output, only at the two nearest input pixels: shrinking aliases. That is a fault, but FID and
    FVD are defined with it.
    """
    x = _resize_axis(x, width, -2)
    return _resize_axis(x, height, -3)


def _resize_axis(x: jax.Array, size: int, axis: int) -> jax.Array:
    before = x.shape[axis]
    at = np.arange(size, dtype=np.float32) * np.float32(before / size)
    low = np.minimum(at.astype(np.int32), before - 1)
    high = np.minimum(low + 1, before - 1)
    weight = (at - low.astype(np.float32)).reshape((-1,) + (1,) * (-axis - 1))
    below, above = jnp.take(x, low, axis=axis), jnp.take(x, high, axis=axis)
    return below + (above - below) * weight
