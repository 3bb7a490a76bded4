"""Hugging Face folders of text encoders, opened: weights, tokenizer, name and hash.

A folder has ``config.json`` and weights (``model.safetensors``, its shards with their index, or
``pytorch_model.bin``); ``text_maps`` says which models are known, ``tokenizer_files`` where their
tokenizers are sought.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dit_jax.files import as_path, local_copy
from dit_jax.interop.autoencoder import weights_hash
from dit_jax.interop.folders import TRANSFORMERS, read_config, read_weights
from dit_jax.interop.maps import Arrays, Map
from dit_jax.interop.text_maps import (
    clip_from_transformers,
    clip_map,
    one_embedding,
    t5_from_transformers,
    t5_map,
)
from dit_jax.interop.tokenizer_files import (
    CLIP_FILES,
    T5_FILES,
    Tokenize,
    clip_tokenizer,
    find_tokenizer,
    t5_tokenizer,
)
from dit_jax.model.blocks import Dtype
from dit_jax.text.clip_text import CLIP_PRESETS, CLIPTextConfig, CLIPTextEncoder, CLIPTextStates
from dit_jax.text.t5 import T5_PRESETS, T5Encoder
from dit_jax.text.text_encoder import Apply, Placement, StatesEncoder, one_device
from dit_jax.types import Constrain, Params

T5_MAX_TOKENS = 512
UNCUT = 1 << 30
"""Tokens, more than any text has."""

Layer = Literal["last", "penultimate"]
Check = Callable[[str, str, int], None]
"""Name, hash and width of an encoder; raises ``ValueError`` where it is the wrong one."""


@dataclasses.dataclass(frozen=True)
class _Family:
    """What T5 and CLIP have each in their own way."""

    config: Any
    name: str
    table: Map
    network: Callable[[Any, Dtype, Constrain], nn.Module]
    inputs: int
    """Whether it is told of tokens alone (1) or of where they are, too."""
    outputs: Callable[[Any], tuple[jax.Array, jax.Array | None]]
    files: tuple[str, ...]
    tokenizer: Callable[[Path, int, int], Tokenize]
    max_tokens: int
    """If nothing else is asked for."""
    most: int | None
    """Tokens it can take; None where there is no end to them."""


def _t5(folder: Path, values: dict[str, Any], where: str) -> _Family:
    config = t5_from_transformers(values, where)
    names = [name for name, preset in T5_PRESETS.items() if preset == config]
    return _Family(
        config=config,
        name=names[0] if names else _folder_name(folder),
        table=t5_map(config),
        network=T5Encoder,
        inputs=2,
        outputs=lambda states: (states, None),
        files=T5_FILES,
        tokenizer=t5_tokenizer,
        max_tokens=T5_MAX_TOKENS,
        most=None,
    )


def _clip(folder: Path, values: dict[str, Any], where: str, layer: Layer) -> _Family:
    config = clip_from_transformers(values, where)

    def seen(one: CLIPTextConfig) -> tuple[Any, ...]:
        # Depth and projection are the file's: Stable Diffusion 2 has one layer less of OpenCLIP's.
        return one.vocabulary, one.width, one.heads, one.hidden, one.activation

    def outputs(found: CLIPTextStates) -> tuple[jax.Array, jax.Array]:
        return getattr(found, layer), found.pooled

    names = [name for name, preset in CLIP_PRESETS.items() if seen(preset) == seen(config)]
    return _Family(
        config=config,
        name=names[0] if names else _folder_name(folder),
        table=clip_map(config),
        network=CLIPTextEncoder,
        inputs=1,
        outputs=outputs,
        files=CLIP_FILES,
        tokenizer=clip_tokenizer,
        max_tokens=config.max_tokens,
        most=config.max_tokens,
    )


def _folder_name(folder: Path) -> str:
    """Of a folder, or of the pipeline that it is a part of."""
    whole = folder.resolve()  # Also of a folder on Cloud Storage.
    return whole.parent.name if whole.name.startswith("text_encoder") else whole.name


def _family(folder: Path, layer: Layer) -> _Family:
    values, where = read_config(local_copy(folder)), repr(str(folder / "config.json"))
    if values.get("model_type") in ("clip", "clip_text_model"):
        return _clip(folder, values, where, layer)
    if layer != "last":
        raise ValueError(
            f"layer {layer!r} of {str(folder)!r}: of CLIP's states alone there are those before the "
            "last layer. Leave it out."
        )
    return _t5(folder, values, where)


def _limit(family: _Family, asked: int | None) -> int:
    """Where captions are cut; ``ValueError`` where the encoder cannot take so many tokens."""
    limit = family.max_tokens if asked is None else asked
    if limit < 2 or (family.most is not None and limit > family.most):
        most = "" if family.most is None else f" and at most {family.most}"
        raise ValueError(f"max_tokens is {limit}: {family.name} takes at least 2{most}.")
    return limit


def _kept(boxed: Params, dtype: Dtype) -> Params:
    """Shapes of parameters as they are kept: kernels and embeddings in the dtype of products."""

    def leaf(path: Any, found: Any) -> Any:
        wide = path[-1].key not in ("kernel", "embedding")
        return jax.ShapeDtypeStruct(found.shape, jnp.float32 if wide else dtype)

    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(boxed))


def _read(family: _Family, folder: Path) -> tuple[Arrays, str]:
    """The arrays of a folder, checked, by the names of the table, and the file that they are in."""
    found, file = read_weights(local_copy(folder), TRANSFORMERS)
    where = repr(str(file))
    arrays = family.table.named(one_embedding(found, where))
    family.table.check(arrays, where)
    return arrays, where


def _hash(arrays: Arrays, layer: Layer) -> str:
    digest = weights_hash(arrays)
    return digest if layer == "last" else f"{digest}-{layer}"


def _loaded(
    family: _Family, arrays: Arrays, where: str, dtype: Dtype, placement: Placement
) -> tuple[Params, Apply]:
    """The parameters on their devices, and the function of them."""
    network = family.network(family.config, dtype, placement.constrain)
    given = (jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))[: family.inputs]
    boxed = jax.eval_shape(network.init, jax.random.key(0), *given)
    shardings = placement.shardings(boxed)
    params = family.table.load(arrays, where, _kept(boxed, dtype), shardings)

    def apply(params: Params, *given: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return family.outputs(network.apply(params, *given[: family.inputs]))

    return params, apply


def text_encoder_identity(path: str | Path, layer: Layer = "last") -> tuple[str, str]:
    """Name and hash of the text encoder in a folder, as ``load_text_encoder`` gives them; its weights
    are read and checked, and laid on no device.

    Raises:
        ValueError: where the folder, or what it holds, is no text encoder.
    """
    family = _family(as_path(path), layer)
    return family.name, _hash(_read(family, as_path(path))[0], layer)


def text_length(path: str | Path, layer: Layer = "last") -> tuple[Callable[[str], int], int]:
    """How many tokens a text is for the encoder in a folder (what begins and ends it included, nothing
    cut), and how many it reads if nothing else is asked for; no weights are read.

    Raises:
        ValueError: where the folder, or what it holds, is no text encoder with its tokenizer.
    """
    folder = as_path(path)
    family = _family(folder, layer)
    file = find_tokenizer(folder, family.files)
    tokenize = family.tokenizer(file, family.config.vocabulary, UNCUT)
    return lambda text: len(tokenize(text)), family.max_tokens


def load_text_encoder(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    layer: Layer = "last",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_tokens: int | None = None,
    placement: Placement | None = None,
    batch: int = 32,
    check: Check | None = None,
) -> StatesEncoder:
    """The text encoder in a folder of Hugging Face's: T5 v1.1, UMT5 or CLIP.

    Args:
        path: the folder, with ``config.json`` and the weights.
        tokenizer: the folder of its tokenizer's files, where that is neither this one nor the one
            beside it (``tokenizer_2`` for ``text_encoder_2``).
        layer: of CLIP, whose states are given: after the last layer and its norm, or before the last.
        dtype: of products, and of kernels in memory; auto is bfloat16, and float32 on CPUs.
        max_tokens: where captions are cut; 512 for T5 and all its places for CLIP, if not given.
        placement: how it lies on devices; on one of this process, if not given.
        batch: captions encoded at once.
        check: is told name, hash and width before weights are laid on devices, and may refuse them.

    The hash is ``weights_hash`` of what is read, by the table's names, so that files with and without
    the other half give one hash; that of CLIP's penultimate states ends in ``-penultimate``.

    Raises:
        ValueError: where the folder, or what it holds, is not that; and what ``check`` raises.
    """
    folder = as_path(path)
    family = _family(folder, layer)
    limit = _limit(family, max_tokens)
    if batch < 1:
        raise ValueError(f"batch is {batch}: at least 1 caption is encoded at once.")
    beside = folder if tokenizer is None else as_path(tokenizer)
    file = find_tokenizer(beside, family.files)
    tokenize = family.tokenizer(file, family.config.vocabulary, limit)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    placement = placement or one_device()
    arrays, where = _read(family, folder)
    digest = _hash(arrays, layer)
    if check is not None:
        check(family.name, digest, family.config.width)
    params, apply = _loaded(family, arrays, where, jnp.dtype(dtype), placement)
    return StatesEncoder(
        name=family.name,
        hash=digest,
        dim=family.config.width,
        max_tokens=limit,
        tokenize=tokenize,
        apply=apply,
        params=params,
        placement=placement,
        batch=batch,
    )
