"""A folder as Diffusers and ``transformers`` store a model: ``config.json`` beside its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.config import from_dict
from dit_jax.files import read_json, refuse_if, write_json
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
SHARD = 10_000_000_000
"""Bytes of a file at most, as Diffusers writes them."""
TRANSFORMERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The same in folders of ``transformers``."""


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of ``config.json``."""
    path = folder / "config.json"
    absent = (
        f"{str(path)!r} is not there: give the folder of one model, with its config.json (of a "
        "pipeline that is the folder 'transformer' or 'vae' in it)."
    )
    refuse_if([(not path.exists(), absent)])
    values = read_json(path)
    refuse_if([(not isinstance(values, dict), f"{str(path)!r} holds no JSON object.")])
    return values


def read_settings(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of the values of a ``config.json``; those that it does not know do not matter."""
    names = {field.name for field in dataclasses.fields(kind)}
    return from_dict(kind, {name: value for name, value in values.items() if name in names})


def check_sizes(sizes: Mapping[str, Any], where: str) -> None:
    """Refuses sizes of a ``config.json`` that are no whole numbers of at least 1."""
    odd = [f"{name} is {n!r}" for name, n in sizes.items() if type(n) is not int or n < 1]
    message = f"{where} has sizes that are no whole numbers of at least 1: {'; '.join(odd)}. "
    refuse_if([(bool(odd), f"{message}Fetch it again, from where the weights are.")])


def read_weights(
    folder: Path, choices: tuple[str, ...] = CHOICES
) -> tuple[dict[str, np.ndarray], Path]:
    """The folder's arrays, mapped, and the file that they are in, the first of ``choices``."""
    found = [folder / name for name in choices if (folder / name).exists()]
    message = f"{str(folder)!r} has no weights: none of {', '.join(choices)}."
    refuse_if([(not found, message)])
    return read_arrays(found[0]), found[0]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, or of the files that an index names, mapped."""
    if not path.name.endswith(".bin.index.json"):
        torch = path.suffix in (".bin", ".pt", ".pth")
        return read_torch(path) if torch else read_safetensors(path)
    placed, shards = read_index(path)
    arrays = {key: array for shard in shards for key, array in read_torch(shard).items()}
    missing = sorted(set(placed) - set(arrays))
    names = ", ".join(map(repr, missing[:3]))
    message = f"{str(path)!r} names {names}, which no shard has: get them again."
    refuse_if([(bool(missing), message)])
    return arrays


def write_folder(
    folder: Path, config: dict[str, Any], arrays: Mapping[str, Any], limit: int = SHARD
) -> None:
    """Writes ``config.json`` and one file of safetensors, or several of at most ``limit`` bytes and
    their index; the folder is made. Arrays of one file are in memory together."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, room = [{}], limit
    for name, array in arrays.items():
        size = math.prod(array.shape) * array.dtype.itemsize
        if shards[-1] and size > room:
            shards, room = [*shards, {}], limit
        shards[-1][name], room = array, room - size
    many = [f"{WEIGHTS}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = dict(zip(many, shards, strict=True)) if len(shards) > 1 else {CHOICES[0]: arrays}
    for file, part in files.items():
        write_safetensors(folder / file, part)
    if len(files) > 1:
        placed = {name: file for file, part in files.items() for name in part}
        write_json(folder / CHOICES[1], {"metadata": {}, "weight_map": placed})
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
