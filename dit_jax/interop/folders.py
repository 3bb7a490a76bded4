"""A folder as Diffusers stores a model: ``config.json`` beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.interop.safetensors_files import read_safetensors, write_safetensors
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


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of ``config.json``.

    Raises:
        ValueError: where it is absent or no JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}): give the folder of one model, with its "
            "config.json (of a pipeline that is the folder 'transformer' or 'vae' in it)."
        ) from error
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


def read_weights(folder: Path) -> tuple[dict[str, np.ndarray], Path]:
    """The folder's arrays, mapped, and the file that they are in.

    Raises:
        ValueError: where there are none, or they cannot be read.
    """
    for name in CHOICES:
        if (path := folder / name).exists():
            reads = read_torch if path.suffix in (".bin", ".pt") else read_safetensors
            return reads(path), path
    raise ValueError(f"{str(folder)!r} has no weights: none of {', '.join(CHOICES)}.")


def write_folder(folder: Path, config: dict[str, Any], arrays: Mapping[str, Any]) -> None:
    """Writes ``config.json`` and one file of safetensors; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / f"{WEIGHTS}.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
