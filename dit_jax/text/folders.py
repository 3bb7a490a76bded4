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

from dit_jax.files import as_path, local_copy
from dit_jax.interop.folders import (
    TRANSFORMERS,
    check_sizes,
    read_config,
    read_weights,
    weights_hash,
)
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Arrays, Entry, Map
from dit_jax.model.layers import Dtype
from dit_jax.text.t5 import T5_PRESETS, T5Encoder, T5EncoderConfig
from dit_jax.text.text_encoder import Placement, StatesEncoder, one_device
from dit_jax.text.tokenizers import find_tokenizer, t5_tokenizer
from dit_jax.types import Params

MAX_TOKENS = 512
"""Where captions are cut if nothing else is asked for."""
UNCUT = 1 << 30
"""More tokens than any text has."""
Check = Callable[[str, str, int], None]
"""Takes the name, hash and width of an encoder; raises ``ValueError`` if it is the wrong one."""

LINEAR = "o i -> i o"
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
"""Fields of ``T5EncoderConfig``, and what ``config.json`` calls them."""
DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "is_decoder": False,
}
"""What a ``config.json`` means by leaving a setting out."""
EXPECTED = {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "is_decoder": False}


def t5_from_transformers(config: Mapping[str, Any], where: str) -> T5EncoderConfig:
    """The encoder of a ``config.json`` of T5 or UMT5.

    Raises:
        ValueError: if it is another model, or set to what is not built here.
    """
    values = {**DEFAULTS, **config}
    other = [f"{k} is {values.get(k)!r}" for k, v in EXPECTED.items() if values.get(k) != v]
    if config.get("model_type") not in ("t5", "umt5"):
        other.insert(0, f"model_type is {config.get('model_type')!r}")
    if other:
        raise ValueError(
            f"{where} is no encoder of T5 v1.1 or UMT5: {'; '.join(other)}. (The first T5 has ReLUs, "
            "and is not built here.)"
        )
    sizes: dict[str, Any] = {ours: values.get(theirs) for ours, theirs in SIZES.items()}
    check_sizes({SIZES[ours]: size for ours, size in sizes.items()}, where)
    return T5EncoderConfig(**sizes, bias="layers" if config["model_type"] == "umt5" else "shared")


def t5_map(config: T5EncoderConfig) -> Map:
    """The keys of an encoder's weights; those of a decoder are left unread."""
    width, inner, hidden = config.width, config.heads * config.head_dim, config.hidden
    attention, mlp = "encoder.block.{}.layer.0.", "encoder.block.{}.layer.1."
    biases = {"h": config.buckets, "a": config.heads}
    bias_key = f"{attention}SelfAttention.relative_attention_bias.weight"
    entries: list[Entry] = []

    def one(path: str, key: str, pattern: str, **sizes: int) -> None:
        entries.append(Entry(tuple(path.split("/")), (key,), Layout(pattern, sizes)))

    def layers(path: str, key: str, pattern: str, **sizes: int) -> None:
        """An array of every layer, stacked here; ``key`` has a ``{}`` for the layer's number."""
        keys = tuple(key.format(i) for i in range(config.depth))
        whole = ("blocks", *path.split("/"))
        entries.append(Entry(whole, keys, Layout(pattern, sizes), stacked=True))

    one("tokens/embedding", "shared.weight", "v e -> v e", v=config.vocabulary, e=width)
    one("norm/scale", "encoder.final_layer_norm.weight", "o -> o", o=width)
    layers("attention_norm/scale", f"{attention}layer_norm.weight", "o -> o", o=width)
    layers("mlp_norm/scale", f"{mlp}layer_norm.weight", "o -> o", o=width)
    if config.bias == "layers":
        layers("relative_bias/table", bias_key, "h a -> h a", **biases)
    else:
        one("relative_bias/table", bias_key.format(0), "h a -> h a", **biases)
    for ours, theirs in {"q": "q", "k": "k", "v": "v", "out": "o"}.items():
        i, o = (inner, width) if ours == "out" else (width, inner)
        layers(f"{ours}/kernel", f"{attention}SelfAttention.{theirs}.weight", LINEAR, i=i, o=o)
    for ours, theirs in {"gate": "wi_0", "up": "wi_1", "down": "wo"}.items():
        i, o = (hidden, width) if ours == "down" else (width, hidden)
        layers(f"{ours}/kernel", f"{mlp}DenseReluDense.{theirs}.weight", LINEAR, i=i, o=o)
    family = "UMT5" if config.bias == "layers" else "T5 v1.1"
    return Map(
        f"an encoder of {family} of its config.json",
        tuple(entries),
        aliases={"encoder.embed_tokens.weight": "shared.weight"},
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
    where, table = repr(str(file)), t5_map(config)
    first, second = "shared.weight", "encoder.embed_tokens.weight"
    if {first, second} <= arrays.keys():
        if not np.array_equal(arrays[first], arrays[second]):
            raise ValueError(
                f"{where} has {second} that is not equal to {first}, of which it is a copy in "
                "published files."
            )
        arrays = {key: array for key, array in arrays.items() if key != second}
    arrays = table.named(arrays)
    table.check(arrays, where)
    return table, arrays, where


def text_encoder_identity(path: str | Path) -> tuple[str, str]:
    """Name and hash of the text encoder in a folder, as ``load_text_encoder`` gives them; its weights
    are read and checked, and laid on no device.

    Raises:
        ValueError: if the folder, or what it holds, is no text encoder.
    """
    config, name = _config(as_path(path))
    return name, weights_hash(_read(config, as_path(path))[1])


def text_length(path: str | Path) -> tuple[Callable[[str], int], int]:
    """How many tokens a text is for the encoder in a folder (its end included, nothing cut), and how
    many it reads if nothing else is asked for; no weights are read.

    Raises:
        ValueError: if the folder, or what it holds, is no text encoder with its tokenizer.
    """
    folder = as_path(path)
    config, _ = _config(folder)
    tokenize = t5_tokenizer(find_tokenizer(folder), config.vocabulary, UNCUT)
    return lambda text: len(tokenize(text)), MAX_TOKENS


def load_text_encoder(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_tokens: int = MAX_TOKENS,
    placement: Placement | None = None,
    batch: int = 32,
    check: Check | None = None,
) -> StatesEncoder:
    """The text encoder in a folder of Hugging Face's: T5 v1.1 or UMT5.

    Args:
        path: The folder, with ``config.json`` and the weights.
        tokenizer: The folder of its tokenizer's files, if that is neither this one nor the one beside
            it (``tokenizer_2`` for ``text_encoder_2``).
        dtype: Of products, and of kernels in memory; auto is bfloat16, and float32 on CPUs.
        max_tokens: Where captions are cut.
        placement: How it lies on devices; by default on one of this process.
        batch: Captions that are encoded at once.
        check: Takes name, hash and width before weights are laid on devices, and may refuse them.

    The hash is ``weights_hash`` of what is read, by the table's names, so that files with and without
    a decoder give one hash.

    Raises:
        ValueError: if the folder, or what it holds, is not that; and what ``check`` raises.
    """
    folder = as_path(path)
    config, name = _config(folder)
    if max_tokens < 2 or batch < 1:
        raise ValueError(f"max_tokens is {max_tokens} and batch {batch}: at least 2 and 1.")
    file = find_tokenizer(folder if tokenizer is None else as_path(tokenizer))
    tokenize = t5_tokenizer(file, config.vocabulary, max_tokens)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    placement = placement or one_device()
    table, arrays, where = _read(config, folder)
    digest = weights_hash(arrays)
    if check is not None:
        check(name, digest, config.width)
    network = T5Encoder(config, jnp.dtype(dtype), placement.constrain)
    inputs = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    boxed = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    shapes = _stored(boxed, jnp.dtype(dtype))
    params = table.load(arrays, where, shapes, placement.shardings(boxed))
    return StatesEncoder(
        name=name,
        hash=digest,
        dim=config.width,
        max_tokens=max_tokens,
        tokenize=tokenize,
        apply=network.apply,  # pyright: ignore[reportArgumentType]
        params=params,
        placement=placement,
        batch=batch,
    )


def _stored(boxed: Params, dtype: Dtype) -> Params:
    """Shapes of parameters in memory: kernels and embeddings in the dtype of products."""

    def leaf(path: Any, shape: Any) -> Any:
        wide = path[-1].key not in ("kernel", "embedding")
        return jax.ShapeDtypeStruct(shape.shape, jnp.float32 if wide else dtype)

    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(boxed))
