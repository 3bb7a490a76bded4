"""VGG-16's convolutional features, and the distance between frames that is taken in them.

Simonyan & Zisserman 2015, "Very deep convolutional networks for large-scale image recognition",
configuration D without its linear layers, and Zhang et al. 2018, "The unreasonable effectiveness of
deep features as a perceptual metric" (LPIPS), with f̂ = f / |f| along the channels of each place::

    d(a, b) = Σ_maps mean_places Σ_channels w (f̂(a) - f̂(b))^2                                     (1)

The network is frozen. Its weights are torchvision's (``vgg16-397923af.pth``) and, for w, those of the
``lpips`` package (``vgg.pth`` of version 0.1); either may be safetensors.

Axis letters: b frames, h w pixels or places of a feature map, c channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from dit_jax.files import refuse_if
from dit_jax.interop import read_safetensors, read_torch
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry, Map
from dit_jax.types import Params

# Of ImageNet's pixels in [0, 1], as torchvision's networks expect them; LPIPS' own shift and scale are
# the same numbers for pixels in [-1, 1].
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


Maps = Sequence[Float[Array, "b _ _ _"]]


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """Sizes of the network; the defaults are VGG-16's."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Channels of each block; before each but the first, height and width are halved."""
    layers: tuple[int, ...] = (2, 2, 3, 3, 3)
    """Convolutions of each block."""

    @property
    def smallest(self) -> int:
        """Rows and columns that a frame has at least."""
        return 2 ** (len(self.widths) - 1)


VGG16 = VGGConfig()


class VGG(nn.Module):
    """Frames in [-1, 1] to the feature maps after the last ReLU of each block (relu1_2, 2_2, 3_3, 4_3,
    5_3), computed in ``dtype`` (float32 is that on every accelerator)."""

    config: VGGConfig = VGG16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, frames: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        config, maps = self.config, []
        x = ((frames.astype(jnp.float32) + 1) / 2 - MEAN) / STD
        for i, (width, layers) in enumerate(zip(config.widths, config.layers, strict=True)):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for j in range(layers):
                name, init = f"block_{i}_conv_{j}", nn.initializers.he_normal()
                x = nn.relu(conv(width, (3, 3), self.dtype, init, padding=1, name=name)(x))
            maps.append(x)
        return maps


def conv(features: int, size: tuple[int, ...], dtype: Any, init: Any, **settings: Any) -> nn.Conv:
    """A convolution whose parameters carry logical axes, with products in ``dtype``."""
    axes, zeros = (*(None for _ in size), "embed", "embed_out"), nn.initializers.zeros_init()
    settings["precision"] = "highest" if dtype == jnp.float32 else None
    settings["kernel_init"] = nn.with_logical_partitioning(init, axes)
    settings["bias_init"] = nn.with_logical_partitioning(zeros, ("embed_vector",))
    return nn.Conv(features, size, dtype=dtype, **settings)


def perceptual_distance(
    features_a: Maps, features_b: Maps, weights: Sequence[Float[Array, "_"]] | None = None
) -> Float[Array, "b"]:
    """LPIPS (1) of each pair of frames, of their feature maps; without weights each is 1."""

    def unit(features: jax.Array) -> jax.Array:
        wide = features.astype(jnp.float32)
        # If no channel is active, features and their gradient are 0.
        return wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + 1e-10)

    total, each = jnp.zeros(features_a[0].shape[0]), weights or [jnp.ones(())] * len(features_a)
    for a, b, weight in zip(features_a, features_b, each, strict=True):
        total += (jnp.square(unit(a) - unit(b)) * weight).sum(-1).mean((1, 2))
    return total


@struct.dataclass
class PerceptualNetwork:
    """A frozen network and, if there are any, the weights of LPIPS: a tree of arrays, to be handed to a
    compiled function as an argument (closed over, it would be part of the program)."""

    params: Params
    weights: Params = None
    config: VGGConfig = struct.field(pytree_node=False, default=VGG16)
    dtype: Any = struct.field(pytree_node=False, default=jnp.float32)

    def __call__(
        self, a: Float[Array, "*b h w 3"], b: Float[Array, "*b h w 3"]
    ) -> Float[Array, "*b"]:
        """The distance of each frame of ``a`` to that of ``b``, in [-1, 1] both."""
        network: Any = VGG(self.config, self.dtype)
        of_a, of_b = (network.apply(self.params, x.reshape(-1, *x.shape[-3:])) for x in (a, b))
        return perceptual_distance(of_a, of_b, self.weights).reshape(a.shape[:-3])


def vgg_map(config: VGGConfig) -> Map:
    """The keys of torchvision's features; between blocks one number is a pool's."""
    entries, place, before = [], 0, 3
    for i, (width, layers) in enumerate(zip(config.widths, config.layers, strict=True)):
        for j in range(layers):
            sizes = {"o": width, "i": before, "h": 3, "w": 3}
            kernel, bias = Layout("o i h w -> h w i o", sizes), Layout("o -> o", sizes)
            path, key = f"block_{i}_conv_{j}", f"features.{place}"
            entries += [Entry((path, "kernel"), (f"{key}.weight",), kernel)]
            entries += [Entry((path, "bias"), (f"{key}.bias",), bias)]
            place, before = place + 2, width
        place += 1
    # The linear layers behind the features are not needed.
    classifier = ("classifier.0.", "classifier.3.", "classifier.6.")
    return Map("torchvision's VGG-16", tuple(entries), ignored=classifier)


def lpips_map(config: VGGConfig) -> Map:
    """The keys of LPIPS' linear layers: 1x1 convolutions to one channel."""
    entries = []
    for i, width in enumerate(config.widths):
        layout = Layout("o c h w -> (o c h w)", {"o": 1, "c": width, "h": 1, "w": 1})
        entries += [Entry((str(i),), (f"lin{i}.model.1.weight",), layout)]
    return Map("the linear weights of LPIPS for VGG-16", tuple(entries))


def load_vgg(
    path: str | Path,
    lpips: str | Path | None = None,
    config: VGGConfig = VGG16,
    dtype: Any = jnp.float32,
) -> PerceptualNetwork:
    """The network in a file of torchvision's (``.pth``, ``.pt``, ``.bin`` or ``.safetensors``), with
    the weights in a file of LPIPS' if one is given, else all channels count alike."""

    def read(table: Map, path: str | Path) -> Params:
        reader = read_safetensors if str(path).endswith(".safetensors") else read_torch
        return table.read(reader(path), repr(str(path)))

    params, weights = read(vgg_map(config), path), None
    if lpips is not None:
        linear = read(lpips_map(config), lpips)["params"]
        weights = tuple(linear[str(i)] for i in range(len(config.widths)))
        negative = ", ".join(f"lin{i}" for i, weight in enumerate(weights) if (weight < 0).any())
        message = f"{str(lpips)!r} has negative weights in {negative}: give the package's vgg.pth."
        refuse_if([(bool(negative), message)])
    params, weights = jax.tree.map(jnp.asarray, (params, weights))
    return PerceptualNetwork(params, weights, config, dtype)
