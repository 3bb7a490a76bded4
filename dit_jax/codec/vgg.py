"""VGG-16's convolutional features, and the distance between frames that is taken in them.

Simonyan & Zisserman 2015, "Very deep convolutional networks for large-scale image recognition",
configuration D, without its linear layers; Zhang et al. 2018, "The unreasonable effectiveness of deep
features as a perceptual metric" (LPIPS), equation 1. The network is frozen: it measures what an
autoencoder learns. Its weights are read by ``vgg_files.load_vgg``; fitting LPIPS is not here.

Axis letters: b frames, h w pixels or places of a feature map, c channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from dit_jax.types import Params

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
"""Of ImageNet's pixels in [0, 1], as torchvision's networks expect them; LPIPS' own shift and scale
are the same numbers for pixels in [-1, 1]."""
NORM_EPS = 1e-10
"""Beside a sum of squares: where no channel is active, features and their gradient are 0."""


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """Sizes of the network; the defaults are VGG-16's."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Channels of each block; before each but the first, height and width are halved."""
    layers: tuple[int, ...] = (2, 2, 3, 3, 3)
    """Convolutions of each block."""

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.layers):
            raise ValueError(
                f"VGG has {len(self.widths)} widths and {len(self.layers)} layers: give one of each "
                "for every block, of which there is at least one."
            )
        if min(*self.widths, *self.layers) < 1:
            raise ValueError(
                f"VGG widths {self.widths} and layers {self.layers}: each is at least 1."
            )

    @property
    def smallest(self) -> int:
        """Rows and columns that a frame has at least."""
        return 2 ** (len(self.widths) - 1)


class VGG(nn.Module):
    """Frames to the feature maps after the last ReLU of each block (relu1_2, 2_2, 3_3, 4_3, 5_3).

    Products are in ``dtype`` (in float32 they are that on every accelerator), maps too.
    """

    config: VGGConfig = VGGConfig()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, frames: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        """Frames in [-1, 1].

        Raises:
            ValueError: for frames so small that a later map would be empty.
        """
        if min(frames.shape[1:3]) < self.config.smallest:
            raise ValueError(
                f"frames of {frames.shape[1]} x {frames.shape[2]} pixels: VGG of "
                f"{len(self.config.widths)} blocks takes at least {self.config.smallest} of each."
            )
        x = ((frames.astype(jnp.float32) + 1) / 2 - MEAN) / STD
        maps = []
        for i, (width, layers) in enumerate(
            zip(self.config.widths, self.config.layers, strict=True)
        ):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for j in range(layers):
                x = nn.relu(self._conv(width, f"block_{i}_conv_{j}")(x))
            maps.append(x)
        return maps

    def _conv(self, features: int, name: str) -> nn.Conv:
        kernel, zeros = nn.initializers.he_normal(), nn.initializers.zeros_init()
        return nn.Conv(
            features,
            (3, 3),
            padding=1,
            dtype=self.dtype,
            precision="highest" if self.dtype == jnp.float32 else None,
            kernel_init=nn.with_logical_partitioning(kernel, (None, None, "embed", "embed_out")),
            bias_init=nn.with_logical_partitioning(zeros, ("embed_vector",)),
            name=name,
        )


def perceptual_distance(
    features_a: Sequence[Float[Array, "b _ _ _"]],
    features_b: Sequence[Float[Array, "b _ _ _"]],
    weights: Sequence[Float[Array, "_"]] | None = None,
) -> Float[Array, "b"]:
    """LPIPS (equation 1) of each pair of frames, of their feature maps; float32, 0 for equal ones.

    At every place the features are scaled to length 1 along the channels; squared differences are
    weighted by ``weights`` (for each map ``[c]``, not negative; None: each 1), summed over channels,
    averaged over places and summed over maps.
    """
    total = jnp.zeros(features_a[0].shape[0])
    each = weights if weights is not None else [jnp.ones(())] * len(features_a)
    for a, b, weight in zip(features_a, features_b, each, strict=True):
        difference = jnp.square(_unit(a) - _unit(b)) * weight
        total += difference.sum(-1).mean((1, 2))
    return total


def _unit(features: jax.Array) -> jax.Array:
    wide = features.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + NORM_EPS)


@struct.dataclass
class PerceptualNetwork:
    """A frozen network and, where there are any, the weights of LPIPS: a tree of arrays, to be handed
    to a compiled function as an argument (closed over, it would be part of the program)."""

    params: Params
    """Of ``VGG``."""
    weights: Params = None
    """For each map ``[c]``, or None."""
    config: VGGConfig = struct.field(pytree_node=False, default=VGGConfig())
    dtype: Any = struct.field(pytree_node=False, default=jnp.float32)

    def __call__(
        self, a: Float[Array, "*b h w 3"], b: Float[Array, "*b h w 3"]
    ) -> Float[Array, "*b"]:
        """The distance of each frame of ``a`` to that of ``b``, in [-1, 1] both."""
        network = VGG(self.config, self.dtype)
        flat = (frames.reshape(-1, *frames.shape[-3:]) for frames in (a, b))
        # Flax types what else a module may return too.
        of_a, of_b = (cast(list[jax.Array], network.apply(self.params, frames)) for frames in flat)
        return perceptual_distance(of_a, of_b, self.weights).reshape(a.shape[:-3])
