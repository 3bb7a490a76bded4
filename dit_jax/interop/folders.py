"""A folder as Diffusers and ``transformers`` store a model: ``config.json`` beside its weights."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.files import InputError, read_json
from dit_jax.interop.safetensors_files import read_index, read_safetensors, write_safetensors
from dit_jax.interop.torch_files import read_torch

WEIGHTS = "diffusion_pytorch_model"
CHOICES = (
    f"{WEIGHTS}.safetensors",
    f"{WEIGHTS}.safetensors.index.json",
    f"{WEIGHTS}.fp16.safetensors",
    f"{WEIGHTS}.bin",
    f"{WEIGHTS}.pt",
)
"""Names of the weights, the first that is there is read."""
TRANSFORMERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The same in folders of ``transformers``."""
CODECS = {
    "AutoencoderKL": "dit_jax.codec.converting",
    "AutoencoderKLWan": "dit_jax.codec.converting",
    "CausalAutoencoder": "dit_jax.codec.converting",
}
"""Classes of ``config.json`` that are codecs, and the modules that read and write them. They are named,
and not imported: a converter of transformers needs none of them."""


TEXT_ENCODERS = "dit_jax.text.config"
"""The module that reads folders of text encoders."""


def text_tools() -> Any:
    """The module that reads folders of text encoders."""
    return importlib.import_module(TEXT_ENCODERS)


def codec_tools(name: str = "CausalAutoencoder") -> Any:
    """The module that reads and writes folders of a class of codecs."""
    return importlib.import_module(CODECS[name])


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of ``config.json``.

    Raises:
        ValueError: where it is absent or no JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(
            f"{str(path)!r} is not there: give the folder of one model, with its config.json (of a "
            "pipeline that is the folder 'transformer' or 'vae' in it)."
        )
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object.")
    return values


def check_sizes(sizes: Mapping[str, Any], where: str) -> None:
    """Raises ``ValueError`` where a size of a ``config.json`` is no whole number of at least 1."""
    odd = [name for name, size in sizes.items() if type(size) is not int or size < 1]
    if odd:
        said = "; ".join(f"{name} is {sizes[name]!r}" for name in odd)
        raise ValueError(
            f"{where} has sizes that are no whole numbers of at least 1: {said}. Fetch it again, from "
            "where the weights are."
        )


def read_weights(
    folder: Path, choices: tuple[str, ...] = CHOICES
) -> tuple[dict[str, np.ndarray], Path]:
    """The folder's arrays, mapped, and the file that they are in, the first of ``choices``.

    Raises:
        ValueError: where there are none, or they cannot be read.
    """
    for name in choices:
        if (path := folder / name).exists():
            return _reader(name)(path), path
    raise ValueError(f"{str(folder)!r} has no weights: none of {', '.join(choices)}.")


def _reader(name: str) -> Callable[[Path], dict[str, np.ndarray]]:
    if name.endswith(".bin.index.json"):
        return _read_shards
    return read_torch if name.endswith((".bin", ".pt")) else read_safetensors


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """All arrays of the files of PyTorch's that an index names."""
    placed, shards = read_index(index)
    arrays: dict[str, np.ndarray] = {}
    for shard in shards:
        arrays |= read_torch(shard)
    if missing := sorted(set(placed) - set(arrays)):
        raise ValueError(
            f"{str(index)!r} names {missing[0]!r}, which no shard has: get them again."
        )
    return arrays


def write_folder(folder: Path, config: dict[str, Any], arrays: Mapping[str, Any]) -> None:
    """Writes ``config.json`` and one file of safetensors; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / f"{WEIGHTS}.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def weights_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of all names, dtypes, sizes and bytes.

    Axes of size 1 do not count: a 1x1 convolution of old files is a linear layer of new ones.
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sizes = [size for size in array.shape if size > 1]
        digest.update(f"{name} {array.dtype} {sizes}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]
