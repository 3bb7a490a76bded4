"""Reads and writes safetensors: a file, or a folder of shards with their index.

The library checks a file's header; arrays are then views of the mapped file, as ``read_torch`` gives
them, so that slices of them cost what they hold. Written files are what the library writes: the same
arrays and metadata give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as st

from dit_jax.files import InputError, as_path, local_copy, read_json
from dit_jax.interop.torch_files import DTYPES

METADATA = {"format": "pt"}
"""What files of PyTorch's libraries carry."""
KINDS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a ``.safetensors`` file, or of the shards that a ``.index.json`` names.

    Raises:
        ValueError: where a file is absent, damaged, or of an unknown dtype; where the index and its
            shards disagree.
    """
    path = as_path(path)
    if path.suffix != ".json":
        return _read_file(local_copy(path))
    placed, shards = read_index(path)
    arrays: dict[str, np.ndarray] = {}
    for shard in map(local_copy, shards):
        for name, array in _read_file(shard).items():
            if Path(placed.get(name, "")).name != shard.name:
                raise ValueError(
                    f"{str(shard)!r} has {name!r}, which {path.name} puts in {placed.get(name)!r}."
                )
            arrays[name] = array
    if missing := sorted(set(placed) - set(arrays)):
        raise ValueError(f"{str(path)!r} names {missing[0]!r}, which no shard has: get them again.")
    return arrays


def read_index(path: Path) -> tuple[dict[str, str], list[Path]]:
    """Of a ``.index.json``: the name of each array's shard, and the shards, all beside the index.

    Raises:
        ValueError: where it is none.
    """
    values = read_json(path)
    placed = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise InputError(f"{str(path)!r} is no index of shards: it names no file for each array.")
    # A name leads nowhere else, whatever folders it has.
    return placed, sorted({path.parent / Path(name).name for name in placed.values()})


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(str(path), framework="numpy"):
            pass  # Opening it checks the header: names, dtypes, offsets without gaps or overlaps.
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as safetensors ({error}): it is absent, damaged or "
            "truncated. Get it again."
        ) from error
    begin = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:begin].tobytes())
    header.pop("__metadata__", None)
    arrays = {}
    for name, told in header.items():
        if told["dtype"] not in KINDS:
            raise ValueError(f"{str(path)!r} has {name!r} in {told['dtype']}, which is not read.")
        start, stop = told["data_offsets"]
        raw = data[begin + start : begin + stop]
        arrays[name] = np.ndarray(told["shape"], DTYPES[KINDS[told["dtype"]]], raw)
    return arrays


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a ``.safetensors`` file says beside its arrays."""
    with safetensors.safe_open(str(local_copy(path)), framework="numpy") as file:
        return file.metadata() or {}


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays, by name, to one file. All of them are in memory while it is written."""
    made = {name: np.ascontiguousarray(np.asarray(array)) for name, array in tensors.items()}
    # ascontiguousarray makes scalars vectors.
    made = {name: array.reshape(tensors[name].shape) for name, array in made.items()}
    st.save_file(made, str(path), metadata={**METADATA, **(metadata or {})})
