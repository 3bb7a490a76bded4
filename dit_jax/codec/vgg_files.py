"""torchvision's file of VGG-16 and the linear weights of LPIPS: the perceptual network in them.

The first is ``vgg16-397923af.pth`` (or any state dict of torchvision's ``vgg16``), the second
``vgg.pth`` of the ``lpips`` package (``lpips/weights/v0.1``); either may be safetensors.
"""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.codec.vgg import PerceptualNetwork, VGGConfig
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Arrays, Entry, Map
from dit_jax.interop.safetensors_files import read_safetensors
from dit_jax.interop.torch_files import read_torch

CLASSIFIER = re.compile(r"classifier\.[036]\.(weight|bias)")
"""Keys of the linear layers behind the features, which nothing here needs."""


def vgg_map(config: VGGConfig) -> Map:
    """The keys of torchvision's features; between blocks one number is a pool's."""
    entries, at, before = [], 0, 3
    for i, (width, layers) in enumerate(zip(config.widths, config.layers, strict=True)):
        for j in range(layers):
            path, key = f"block_{i}_conv_{j}", f"features.{at}"
            kernel = Layout("o i h w -> h w i o", {"o": width, "i": before, "h": 3, "w": 3})
            entries.append(Entry((path, "kernel"), (f"{key}.weight",), kernel))
            entries.append(Entry((path, "bias"), (f"{key}.bias",), Layout("o -> o", {"o": width})))
            at, before = at + 2, width
        at += 1
    return Map("torchvision's VGG-16", tuple(entries))


def lpips_map(config: VGGConfig) -> Map:
    """The keys of LPIPS' linear layers: 1x1 convolutions to one channel."""
    entries = [
        Entry(
            (str(i),),
            (f"lin{i}.model.1.weight",),
            Layout("o c h w -> (o c h w)", {"o": 1, "c": width, "h": 1, "w": 1}),
        )
        for i, width in enumerate(config.widths)
    ]
    return Map("the linear weights of LPIPS for VGG-16", tuple(entries))


def load_vgg(
    path: str | Path,
    lpips: str | Path | None = None,
    config: VGGConfig | None = None,
    dtype: jnp.dtype | type = jnp.float32,
) -> PerceptualNetwork:
    """The network in a file of torchvision's, with the weights in a file of LPIPS' if one is given.

    Args:
        path: a ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file.
        lpips: another of those, or None: all channels count alike.
        config: VGG-16's sizes where it is None.
        dtype: what the network computes in; its parameters are float32.

    Raises:
        ValueError: where a file cannot be read, has other keys or shapes, NaN or infinite values, or
            (LPIPS) negative ones.
    """
    config = config or VGGConfig()
    arrays = _read(path)
    features = {key: array for key, array in arrays.items() if not CLASSIFIER.fullmatch(key)}
    params = _params(vgg_map(config), features, path)
    weights = None
    if lpips is not None:
        found = _params(lpips_map(config), _read(lpips), lpips)["params"]
        weights = tuple(found[str(i)] for i in range(len(config.widths)))
        if negative := [f"lin{i}" for i, weight in enumerate(weights) if (weight < 0).any()]:
            raise ValueError(
                f"{str(lpips)!r} has negative weights in {', '.join(negative)}: a distance has none. "
                "Give vgg.pth of the lpips package, version 0.1."
            )
    params, weights = jax.tree.map(jnp.asarray, (params, weights))
    return PerceptualNetwork(params, weights, config, dtype)


def _read(path: str | Path) -> dict[str, np.ndarray]:
    return read_safetensors(path) if str(path).endswith(".safetensors") else read_torch(path)


def _params(table: Map, arrays: Arrays, path: str | Path) -> dict:
    return table.read(arrays, repr(str(path)))
