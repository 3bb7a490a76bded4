"""CLIP's vision tower: pictures to the states that Wan's image-to-video models read.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (section
2.4): a class token and square patches with learned places, then pre-norm layers ::

    x <- x + O softmax(q k^T / sqrt(d)) v,     q, k, v = (Q, K, V) norm(x)                     (1)
    x <- x + D act(U norm(x))                                                                  (2)

Read are the states before the last layer, so that this and what follows it are not computed. Pictures
are resized as Pillow does (each axis by cubic convolution, Keys 1981, whose kernel is stretched if the
picture shrinks), rows first, with 8 bits kept between and behind the two axes::

    k(x) = 1.5 x^3 - 2.5 x^2 + 1               for x < 1,                                      (3)
           -0.5 x^3 + 2.5 x^2 - 4 x + 2        for 1 <= x < 2

Axis letters: n pictures, s tokens (the class, then patches row by row), e width, a heads.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from dit_jax.files import as_path, local_copy, read_json, refuse_if
from dit_jax.interop import folders
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Entry, Fixed, Map
from dit_jax.parallel import MeshConfig, batch_sharding, make_constrain, make_mesh
from dit_jax.parallel import parameter_shardings as shardings_of
from dit_jax.types import Constrain, Params, unconstrained

NORMAL = nn.initializers.lecun_normal()
ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
PROCESSOR = "preprocessor_config.json"
# What a ``preprocessor_config.json`` must say, or mean by leaving it out; 3 is Pillow's bicubic.
STEPS = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
STEPS |= {"resample": 3, "rescale_factor": 1 / 255}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The settings of a ``config.json``, which may leave them out, by their published names."""

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = {name: n for name, n in vars(self).items() if type(n) is int}
        folders.check_sizes(sizes, f"{self}")
        odd = self.image_size % self.patch_size or self.hidden_size % self.num_attention_heads
        odd = odd or self.num_channels != 3 or self.num_hidden_layers < 2
        rule = "image_size is a multiple of patch_size and hidden_size of num_attention_heads, "
        rule += "num_channels is 3 and num_hidden_layers at least 2"
        refuse_if([(bool(odd), f"{self}: {rule}.")])

    @property
    def tokens(self) -> int:
        """The class and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How pictures become the network's input."""

    size: int  # Of the shorter side after resizing.
    crop: int  # Side of the square in the middle that is read.
    mean: tuple[float, ...]  # Of each channel, of values in [0, 1].
    std: tuple[float, ...]

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n c c 3"]:
        short = min(images.shape[1:3])
        height, width = (int(self.size * side / short) for side in images.shape[1:3])
        out = resize(images, height, width)
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        out = out[:, top : top + self.crop, left : left + self.crop].astype(np.float32) / 255
        return (out - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


def resize(
    images: UInt8[np.ndarray, "n h w c"], height: int, width: int
) -> UInt8[np.ndarray, "n y x c"]:
    """Pictures of another size, as the bicubic filter of Pillow up to 12 makes them."""
    # (jax.image.resize, which keeps no 8 bits between the axes, differs in 12 to 20 % of all values.)
    for axis, size in ((2, width), (1, height)):
        pixels, scale = images.shape[axis], images.shape[axis] / size
        centres = (np.arange(size)[:, None] + 0.5) * scale
        x = np.abs(np.arange(pixels) + 0.5 - centres) / max(scale, 1)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))  # (3)
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        out = np.moveaxis(np.tensordot(weights, images.astype(np.float32), (1, axis)), 0, axis)
        images = np.clip(np.floor(out + 0.5), 0, 255).astype(np.uint8)
    return images


class VisionBlock(nn.Module):
    """A layer; returns ``(x, None)``, so that ``nn.scan`` can carry ``x``."""

    config: CLIPVisionConfig
    dtype: Any
    constrain: Constrain

    @nn.compact
    def __call__(self, x: Float[Array, "n s e"]) -> tuple[Float[Array, "n s e"], None]:
        config, (n, s, width) = self.config, x.shape
        # Residual stream and norms are float32, products are in ``dtype``.
        norm = partial(nn.LayerNorm, config.layer_norm_eps, use_fast_variance=False)

        def linear(y: jax.Array, features: int, axes: tuple[str, str], name: str) -> jax.Array:
            init = nn.with_logical_partitioning(NORMAL, axes)
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)(y)

        h = norm(name="attention_norm")(x)
        heads = [linear(h, width, ("embed", "heads"), name) for name in ("q", "k", "v")]
        heads = [y.reshape(n, s, config.num_attention_heads, -1) for y in heads]
        heads = [self.constrain(y, "batch", None, "heads", None) for y in heads]
        out = jax.nn.dot_product_attention(*heads).reshape(n, s, width)
        x = x + linear(out, width, ("heads", "embed"), "out").astype(jnp.float32)  # (1)
        h = linear(norm(name="mlp_norm")(x), config.intermediate_size, ("embed", "mlp"), "up")
        h = self.constrain(ACTIVATIONS[config.hidden_act](h), "batch", None, "mlp")
        x = x + linear(h, width, ("mlp", "embed"), "down").astype(jnp.float32)  # (2)
        return self.constrain(x, "batch", None, "width"), None


class VisionTower(nn.Module):
    """Pictures ``[n, h, w, 3]`` to states ``[n, s, e]`` before the last layer."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n s e"]:
        config = self.config
        side, width = config.patch_size, config.hidden_size
        patches = rearrange(images, "n (y p) (x q) c -> n (y x) (p q c)", p=side, q=side)
        init = nn.with_logical_partitioning(NORMAL, ("patch", "embed"))
        patch = nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=init, name="patch")
        x = patch(patches).astype(jnp.float32)
        first: Any = self.param("class_token", nn.initializers.normal(), (width,))
        places: Any = self.param("places", nn.initializers.normal(), (config.tokens, width))
        first = jnp.broadcast_to(first, (len(x), 1, width))
        x = jnp.concatenate([first, x], 1) + places
        x = nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name="norm")(x)
        stacked: Any = nn.scan(
            VisionBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_hidden_layers - 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stacked(config, self.dtype, self.constrain, name="blocks")(x)[0]


def vision_map(config: CLIPVisionConfig) -> Map:
    """The keys of ``CLIPVisionModel``'s weights, with or without ``vision_model.`` before them."""
    whole, layer = "vision_model.", "vision_model.encoder.layers.{}."
    sizes = {"e": config.hidden_size, "f": config.intermediate_size, "s": config.tokens}
    sizes |= {"i": config.hidden_size, "c": 3, "p": config.patch_size, "q": config.patch_size}
    rows = {  # ours: (theirs, how axes move); a key with {} is of every layer, stacked here
        "class_token": (f"{whole}embeddings.class_embedding", "e -> e"),
        "places": (f"{whole}embeddings.position_embedding.weight", "s e -> s e"),
        "patch/kernel": (f"{whole}embeddings.patch_embedding.weight", "e c p q -> (p q c) e"),
    }

    def affine(ours: str, theirs: str, kernel: str, bias: str, name: str = "kernel") -> None:
        rows[f"{ours}/{name}"] = f"{theirs}.weight", kernel
        rows[f"{ours}/bias"] = f"{theirs}.bias", bias

    affine("norm", f"{whole}pre_layrnorm", "e -> e", "e -> e", "scale")
    affine("attention_norm", f"{layer}layer_norm1", "e -> e", "e -> e", "scale")
    affine("mlp_norm", f"{layer}layer_norm2", "e -> e", "e -> e", "scale")
    for ours, theirs in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}.items():
        affine(ours, f"{layer}self_attn.{theirs}", "i e -> e i", "i -> i")
    affine("up", f"{layer}mlp.fc1", "f e -> e f", "f -> f")
    affine("down", f"{layer}mlp.fc2", "e f -> f e", "e -> e")
    depth, entries = config.num_hidden_layers - 1, []
    for ours, (theirs, pattern) in rows.items():
        stacked, path = "{}" in theirs, tuple(ours.split("/"))
        keys = tuple(theirs.format(i) for i in range(depth if stacked else 1))
        used = {axis: n for axis, n in sizes.items() if axis in pattern}
        layout = Layout(pattern, used)
        entries.append(Entry(("blocks", *path) if stacked else path, keys, layout, stacked=stacked))
    numbers = Fixed(f"{whole}embeddings.position_ids", np.arange(config.tokens)[None], 0, True)
    known = [*(key for entry in entries for key in entry.keys), numbers.key]
    # The last layer and what follows it.
    unread = (layer.format(depth), f"{whole}post_layernorm.", "visual_projection.")
    return Map(
        "the vision tower of CLIP of its config.json",
        tuple(entries),
        fixed=(numbers,),
        aliases={key.removeprefix(whole): key for key in known},
        ignored=(*unread, *(key.removeprefix(whole) for key in unread)),
    )


def read_preprocessing(folder: Path, config: CLIPVisionConfig) -> Preprocessing:
    """What ``CLIPImageProcessor`` would do by its file in a folder of weights, or in the folder
    ``image_processor`` beside it; another processor's settings are refused."""
    places = [folder / PROCESSOR, folder.parent / "image_processor" / PROCESSOR]
    file = next((one for one in places if one.exists()), places[0])
    side = config.image_size
    values: dict[str, Any] = {
        "size": side,
        "crop_size": side,
        "image_mean": None,
        "image_std": None,
    } | STEPS
    values |= read_json(file, f"{PROCESSOR}, there or in ../image_processor,")
    size: Any = values["size"]
    crop: Any = values["crop_size"]
    if isinstance(size, dict):
        size = size["shortest_edge"] if [*size] == ["shortest_edge"] else 0
    if isinstance(crop, dict):
        crop = crop.get("height") if crop.get("height") == crop.get("width") else None
    wanted = [(name, values[name] == value) for name, value in STEPS.items()]
    wanted += [("crop_size", crop == side), ("size", type(size) is int and size >= side)]
    for name in ("image_mean", "image_std"):
        wanted.append((name, isinstance(values[name], list) and len(values[name]) == 3))
    faults = [f"{name} is {values[name]!r}" for name, right in wanted if not right]
    about = f"read are the steps of CLIPImageProcessor, for squares of {side}"
    refuse_if([(bool(faults), f"{str(file)!r}: {'; '.join(faults)}: {about}.")])
    return Preprocessing(size, side, tuple(values["image_mean"]), tuple(values["image_std"]))


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEncoder:
    """Pictures to states; all processes of the mesh encode the same pictures together."""

    config: CLIPVisionConfig
    preprocess: Preprocessing
    network: VisionTower = dataclasses.field(repr=False)
    params: Params = dataclasses.field(repr=False)
    mesh: Mesh = dataclasses.field(repr=False)

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n s e"]:
        """The states before the last layer, float32; pictures of one size."""
        pixels = self.preprocess(images)
        sharding = batch_sharding(self.mesh, 4, tokens=False, rows=len(pixels))
        placed = jax.make_array_from_callback(pixels.shape, sharding, pixels.__getitem__)
        # On TPUs a product of float32 is one only so.
        exact = "highest" if self.network.dtype == jnp.float32 else None
        with jax.default_matmul_precision(exact):
            return np.asarray(jax.device_get(self._run(self.params, placed)))

    @cached_property
    def _run(self) -> Any:
        # Whole on every device: every process reads the states.
        return jax.jit(self.network.apply, out_shardings=NamedSharding(self.mesh, PartitionSpec()))


def load_image_encoder(
    path: str | Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    mesh: Mesh | None = None,
) -> ImageEncoder:
    """The vision tower in a folder of ``transformers`` (``CLIPVisionModel``), with its preprocessing.

    Products, and kernels in memory, are in ``dtype`` (auto is bfloat16, and float32 on CPUs). It is
    spread over ``mesh`` for all processes together, or lies on one device of this process.
    """
    folder = as_path(path)
    config = folders.read_settings(CLIPVisionConfig, folders.read_config(local_copy(folder)))
    preprocess = read_preprocessing(folder, config)
    arrays, file = folders.read_weights(local_copy(folder), folders.TRANSFORMERS)
    mesh = mesh or make_mesh(MeshConfig(1, 1, 1, 1), jax.local_devices()[:1])
    on_cpu = jax.default_backend() == "cpu"
    products = jnp.dtype({"auto": "float32" if on_cpu else "bfloat16"}.get(dtype, dtype))
    network = VisionTower(config, products, make_constrain(mesh))
    side = config.image_size
    boxed = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))

    def stored(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        kind = products if path[-1].key == "kernel" else jnp.float32
        return jax.ShapeDtypeStruct(leaf.shape, kind)

    shapes = jax.tree_util.tree_map_with_path(stored, nn.unbox(boxed))
    table, where = vision_map(config), repr(str(file))
    params = table.load(arrays, where, shapes, shardings_of(mesh, boxed))
    return ImageEncoder(config, preprocess, network, params, mesh)
