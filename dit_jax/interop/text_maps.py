"""Configs and keys of ``transformers``' text encoders: T5 v1.1, UMT5 and CLIP's text transformer.

Of full checkpoints (``T5ForConditionalGeneration``, ``CLIPModel``) the tables name what belongs to the
other half, which is not read. Files have the embeddings of T5 by one name or two (``shared``,
``encoder.embed_tokens``), which must then be equal, and CLIP's keys with or without ``text_model.``
before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dit_jax.interop.folders import check_sizes
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Arrays, Entry, Fixed, Map
from dit_jax.text.clip_text import ACTIVATIONS, CLIPTextConfig
from dit_jax.text.t5 import T5EncoderConfig

LINEAR = "o i -> i o"
TABLE = "v e -> v e"
VECTOR = "o -> o"
T5_ATTENTION = {"q": "q", "k": "k", "v": "v", "out": "o"}
T5_MLP = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
CLIP_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
T5_SIZES = {
    "vocabulary": "vocab_size",
    "width": "d_model",
    "depth": "num_layers",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "hidden": "d_ff",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
CLIP_SIZES = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "max_tokens": "max_position_embeddings",
}
T5_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "is_decoder": False,
}
CLIP_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
"""What a ``config.json`` means by leaving a setting out."""


def t5_from_transformers(config: Mapping[str, Any], where: str) -> T5EncoderConfig:
    """The encoder of a ``config.json`` of T5 or UMT5.

    Raises:
        ValueError: where it is another model, or set to what is not built here.
    """
    given = {**T5_DEFAULTS, **config}
    wanted = {
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_decoder": False,
    }
    other = [f"{name} is {given.get(name)!r}" for name, v in wanted.items() if given.get(name) != v]
    if config.get("model_type") not in ("t5", "umt5"):
        other.insert(0, f"model_type is {config.get('model_type')!r}")
    if other:
        raise ValueError(
            f"{where} is no encoder of T5 v1.1 or UMT5: {'; '.join(other)}. (The first T5 has ReLUs, "
            "and is not built here.)"
        )
    sizes: dict[str, Any] = {ours: given.get(theirs) for ours, theirs in T5_SIZES.items()}
    check_sizes({T5_SIZES[ours]: size for ours, size in sizes.items()}, where)
    return T5EncoderConfig(**sizes, bias="layers" if config["model_type"] == "umt5" else "shared")


def clip_from_transformers(config: Mapping[str, Any], where: str) -> CLIPTextConfig:
    """The text transformer of a ``config.json`` of CLIP, of its text alone or of both halves.

    Raises:
        ValueError: where it is another model, or set to what is not built here.
    """
    kind, made = config.get("model_type"), config.get("architectures") or ()
    if kind not in ("clip", "clip_text_model"):
        raise ValueError(f"{where} is no text transformer of CLIP: model_type is {kind!r}.")
    given = {**CLIP_DEFAULTS, **config}
    if kind == "clip":
        of_text = {**(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
        given = {**CLIP_DEFAULTS, **of_text}
    projected = kind == "clip" or "CLIPTextModelWithProjection" in made
    projection = config.get("projection_dim", 512) if projected else None
    sizes = {ours: given[theirs] for ours, theirs in CLIP_SIZES.items()}
    named = {CLIP_SIZES[ours]: size for ours, size in sizes.items()}
    check_sizes(named | ({"projection_dim": projection} if projected else {}), where)
    eps, end = given["layer_norm_eps"], given["eos_token_id"]
    if given["hidden_act"] not in ACTIVATIONS or type(eps) is not float or type(end) is not int:
        raise ValueError(
            f"{where} has hidden_act {given['hidden_act']!r}, layer_norm_eps {eps!r} and eos_token_id "
            f"{end!r}: these are one of {sorted(ACTIVATIONS)}, a number and a token's number."
        )
    return CLIPTextConfig(
        **sizes, activation=given["hidden_act"], norm_eps=eps, end=end, projection=projection
    )


def _entry(path: str, keys: tuple[str, ...], pattern: str, stacked: bool, **sizes: int) -> Entry:
    return Entry(tuple(path.split("/")), keys, Layout(pattern, sizes), stacked=stacked)


def _layers(depth: int, path: str, key: str, pattern: str, **sizes: int) -> Entry:
    """An array of every layer; ``key`` has a ``{}`` for its number."""
    keys = tuple(key.format(i) for i in range(depth))
    return _entry(f"blocks/{path}", keys, pattern, True, **sizes)


def t5_map(config: T5EncoderConfig) -> Map:
    """The keys of an encoder's weights; those of a decoder are left unread."""
    width, inner, hidden = config.width, config.heads * config.head_dim, config.hidden
    attention, mlp = "encoder.block.{}.layer.0.", "encoder.block.{}.layer.1."
    biases = {"h": config.buckets, "a": config.heads}
    name = f"{attention}SelfAttention.relative_attention_bias.weight"

    def layers(path: str, key: str, pattern: str, **sizes: int) -> Entry:
        return _layers(config.depth, path, key, pattern, **sizes)

    entries = [
        _entry("tokens/embedding", ("shared.weight",), TABLE, False, v=config.vocabulary, e=width),
        _entry("norm/scale", ("encoder.final_layer_norm.weight",), VECTOR, False, o=width),
        layers("attention_norm/scale", f"{attention}layer_norm.weight", VECTOR, o=width),
        layers("mlp_norm/scale", f"{mlp}layer_norm.weight", VECTOR, o=width),
        layers("relative_bias/table", name, "h a -> h a", **biases)
        if config.bias == "layers"
        else _entry("relative_bias/table", (name.format(0),), "h a -> h a", False, **biases),
    ]
    for ours, theirs in T5_ATTENTION.items():
        i, o = (inner, width) if ours == "out" else (width, inner)
        key = f"{attention}SelfAttention.{theirs}.weight"
        entries.append(layers(f"{ours}/kernel", key, LINEAR, i=i, o=o))
    for ours, theirs in T5_MLP.items():
        i, o = (hidden, width) if ours == "down" else (width, hidden)
        key = f"{mlp}DenseReluDense.{theirs}.weight"
        entries.append(layers(f"{ours}/kernel", key, LINEAR, i=i, o=o))
    family = "UMT5" if config.bias == "layers" else "T5 v1.1"
    return Map(
        f"an encoder of {family} of its config.json",
        tuple(entries),
        aliases={"encoder.embed_tokens.weight": "shared.weight"},
        ignored=("decoder.", "lm_head."),
    )


def clip_map(config: CLIPTextConfig) -> Map:
    """The keys of a text transformer's weights; those of the images' half are left unread."""
    width, hidden = config.width, config.hidden
    layer = "text_model.encoder.layers.{}."
    entries: list[Entry] = []

    def linear(path: str, key: str, i: int, o: int) -> None:
        kernel = _layers(config.depth, f"{path}/kernel", f"{key}.weight", LINEAR, i=i, o=o)
        bias = _layers(config.depth, f"{path}/bias", f"{key}.bias", VECTOR, o=o)
        entries.extend([kernel, bias])

    for kind, ours in (("weight", "scale"), ("bias", "bias")):
        key = f"text_model.final_layer_norm.{kind}"
        entries.append(_entry(f"norm/{ours}", (key,), VECTOR, False, o=width))
        for path, name in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
            key = f"{layer}{name}.{kind}"
            entries.append(_layers(config.depth, f"{path}/{ours}", key, VECTOR, o=width))
    for ours, theirs in CLIP_ATTENTION.items():
        linear(ours, f"{layer}self_attn.{theirs}", width, width)
    linear("up", f"{layer}mlp.fc1", width, hidden)
    linear("down", f"{layer}mlp.fc2", hidden, width)
    counts = (("tokens", "token", config.vocabulary), ("places", "position", config.max_tokens))
    for ours, theirs, count in counts:
        key = f"text_model.embeddings.{theirs}_embedding.weight"
        entries.append(_entry(f"{ours}/embedding", (key,), TABLE, False, v=count, e=width))
    bare = {key.removeprefix("text_model."): key for entry in entries for key in entry.keys}
    if config.projection is not None:
        sizes = {"i": width, "o": config.projection}
        key = "text_projection.weight"
        entries.append(_entry("project/kernel", (key,), LINEAR, False, **sizes))
    numbers = np.arange(config.max_tokens)[None]
    return Map(
        "a text transformer of CLIP of its config.json",
        tuple(entries),
        (Fixed("text_model.embeddings.position_ids", numbers, optional=True),),
        aliases=bare | {"embeddings.position_ids": "text_model.embeddings.position_ids"},
        ignored=("vision_model.", "visual_projection.", "logit_scale"),
    )


def one_embedding(arrays: Arrays, where: str) -> Arrays:
    """The arrays without the second name of T5's embeddings, if they have both."""
    first, second = "shared.weight", "encoder.embed_tokens.weight"
    if not {first, second} <= arrays.keys():
        return arrays
    if not np.array_equal(arrays[first], arrays[second]):
        raise ValueError(
            f"{where} has {second} that is not equal to {first}, of which it is a copy in published "
            "files."
        )
    return {key: array for key, array in arrays.items() if key != second}
