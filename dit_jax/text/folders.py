"""Hugging Face folders of text encoders: T5 v1.1 and UMT5, their weights, tokenizer, name and hash.

A folder has ``config.json`` and weights (``model.safetensors``, its shards with their index, or
``pytorch_model.bin``). Of full checkpoints (``T5ForConditionalGeneration``) the decoder is not read.
The embeddings have one name or two (``shared``, ``encoder.embed_tokens``), which must then be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from dit_jax.files import InputError, as_path, local_copy
from dit_jax.interop.folders import (
    TRANSFORMERS,
    check_sizes,
    read_config,
    read_weights,
    weights_hash,
)
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Arrays, Entry, Map
from dit_jax.parallel import MeshConfig, make_constrain, make_mesh, parameter_shardings
from dit_jax.text.encoder import StatesEncoder
from dit_jax.text.t5 import T5_PRESETS, T5Encoder, T5EncoderConfig
from dit_jax.text.tokenizers import find_tokenizer, t5_tokenizer

MAX_TOKENS = 512  # where captions are cut if nothing else is asked for
UNCUT = 1 << 30
EMBEDDINGS = "shared.weight", "encoder.embed_tokens.weight"
# Fields of T5EncoderConfig, and what ``config.json`` calls them.
SIZES = {
    "vocabulary": "vocab_size",
    "width": "d_model",
    "depth": "num_layers",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "hidden": "d_ff",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
# What a ``config.json`` means by leaving a setting out, and what it must say.
DEFAULTS = {SIZES["buckets"]: 32, SIZES["max_distance"]: 128}
EXPECTED = {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "is_decoder": False}


def t5_from_transformers(config: Mapping[str, Any], where: str) -> T5EncoderConfig:
    """The encoder of a ``config.json`` of T5 v1.1 or UMT5; raises ``ValueError`` for another model."""
    values = DEFAULTS | {"layer_norm_epsilon": 1e-6, "is_decoder": False} | dict(config)
    faults = [f"{k} is {values.get(k)!r}" for k, v in EXPECTED.items() if values.get(k) != v]
    if (kind := config.get("model_type")) not in ("t5", "umt5"):
        faults.insert(0, f"model_type is {kind!r}")
    if faults:
        raise InputError(f"{where} is no encoder of T5 v1.1 or UMT5: {'; '.join(faults)}.")
    sizes: dict[str, Any] = {ours: values.get(theirs) for ours, theirs in SIZES.items()}
    check_sizes({SIZES[ours]: size for ours, size in sizes.items()}, where)
    return T5EncoderConfig(**sizes, bias="layers" if kind == "umt5" else "shared")


def t5_map(config: T5EncoderConfig) -> Map:
    """The keys of an encoder's weights; those of a decoder are left unread."""
    layered = config.bias == "layers"
    sizes = {"v": config.vocabulary, "e": config.width, "f": config.hidden, "h": config.buckets}
    sizes |= {"a": config.heads, "i": config.heads * config.head_dim}
    attention, mlp = "encoder.block.{}.layer.0.", "encoder.block.{}.layer.1."
    bias = f"{attention}SelfAttention.relative_attention_bias.weight"
    rows = {  # ours: (theirs, how axes move); a key with {} is of every layer, stacked here
        "tokens/embedding": ("shared.weight", "v e -> v e"),
        "norm/scale": ("encoder.final_layer_norm.weight", "e -> e"),
        "attention_norm/scale": (f"{attention}layer_norm.weight", "e -> e"),
        "mlp_norm/scale": (f"{mlp}layer_norm.weight", "e -> e"),
        "relative_bias/table": (bias if layered else bias.format(0), "h a -> h a"),
        "q/kernel": (f"{attention}SelfAttention.q.weight", "i e -> e i"),
        "k/kernel": (f"{attention}SelfAttention.k.weight", "i e -> e i"),
        "v/kernel": (f"{attention}SelfAttention.v.weight", "i e -> e i"),
        "out/kernel": (f"{attention}SelfAttention.o.weight", "e i -> i e"),
        "gate/kernel": (f"{mlp}DenseReluDense.wi_0.weight", "f e -> e f"),
        "up/kernel": (f"{mlp}DenseReluDense.wi_1.weight", "f e -> e f"),
        "down/kernel": (f"{mlp}DenseReluDense.wo.weight", "e f -> f e"),
    }

    def entry(ours: str, theirs: str, pattern: str) -> Entry:
        stacked, path = "{}" in theirs, tuple(ours.split("/"))
        keys = tuple(theirs.format(i) for i in range(config.depth if stacked else 1))
        layout = Layout(pattern, {axis: sizes[axis] for axis in pattern.split("->")[0].split()})
        return Entry(("blocks", *path) if stacked else path, keys, layout, stacked=stacked)

    return Map(
        f"an encoder of {'UMT5' if layered else 'T5 v1.1'} of its config.json",
        tuple(entry(ours, *row) for ours, row in rows.items()),
        aliases={EMBEDDINGS[1]: EMBEDDINGS[0]},
        ignored=("decoder.", "lm_head."),
    )


def _config(folder: Path) -> tuple[T5EncoderConfig, str]:
    """The encoder in a folder, and its name: that of its preset, of the folder, or of its pipeline."""
    values = read_config(local_copy(folder))
    config = t5_from_transformers(values, repr(str(folder / "config.json")))
    whole = folder.resolve()  # Also of a folder on Cloud Storage.
    name = whole.parent.name if whole.name.startswith("text_encoder") else whole.name
    return config, next((one for one, preset in T5_PRESETS.items() if preset == config), name)


def _read(config: T5EncoderConfig, folder: Path) -> tuple[Map, Arrays, str]:
    """The table, the arrays of a folder by its names, checked, and the file that they are in."""
    arrays, file = read_weights(local_copy(folder), TRANSFORMERS)
    where, table, (first, second) = repr(str(file)), t5_map(config), EMBEDDINGS
    if {first, second} <= arrays.keys():
        if not np.array_equal(arrays[first], arrays[second]):
            raise InputError(f"{where} has {second} that is not equal to {first}: get it again.")
        arrays = {key: array for key, array in arrays.items() if key != second}
    arrays = table.named(arrays)
    table.check(arrays, where)
    return table, arrays, where


def text_encoder_identity(path: str | Path) -> tuple[str, str]:
    """Name and hash of the text encoder in a folder, as ``load_text_encoder`` gives them; its weights
    are read and checked, and laid on no device."""
    config, name = _config(as_path(path))
    return name, weights_hash(_read(config, as_path(path))[1])


def text_length(path: str | Path) -> tuple[Callable[[str], int], int]:
    """How many tokens a text is for the encoder in a folder (its end included, nothing cut), and how
    many it reads if nothing else is asked for; no weights are read."""
    folder = as_path(path)
    config, _ = _config(folder)
    tokenize = t5_tokenizer(find_tokenizer(folder), config.vocabulary, UNCUT)
    return lambda text: len(tokenize(text)), MAX_TOKENS


def load_text_encoder(
    path: str | Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_tokens: int = MAX_TOKENS,
    mesh: Mesh | None = None,
) -> StatesEncoder:
    """The text encoder in a folder of Hugging Face's, with ``config.json``, weights and tokenizer.

    Products, and kernels in memory, are in ``dtype`` (auto is bfloat16, and float32 on CPUs). It is
    spread over ``mesh`` for all processes together, or lies on one device of this process. The hash is
    that of what is read, by the table's names: files with and without a decoder give one hash.
    """
    if max_tokens < 2:
        raise InputError(f"max_tokens is {max_tokens}: at least 2, the last of which is the end.")
    folder = as_path(path)
    config, name = _config(folder)
    tokenize = t5_tokenizer(find_tokenizer(folder), config.vocabulary, max_tokens)
    table, arrays, where = _read(config, folder)
    digest = weights_hash(arrays)
    mesh = mesh or make_mesh(MeshConfig(1, 1, 1, 1), jax.local_devices()[:1])
    on_cpu = jax.default_backend() == "cpu"
    products = jnp.dtype({"auto": "float32" if on_cpu else "bfloat16"}.get(dtype, dtype))
    network = T5Encoder(config, products, make_constrain(mesh))
    inputs = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    boxed = jax.eval_shape(network.init, jax.random.key(0), *inputs)

    def stored(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        wide = path[-1].key not in ("kernel", "embedding")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if wide else products)

    shapes = jax.tree_util.tree_map_with_path(stored, nn.unbox(boxed))
    params = table.load(arrays, where, shapes, parameter_shardings(mesh, boxed))
    return StatesEncoder(
        name, digest, config.width, max_tokens, tokenize, network.apply, params, mesh
    )
