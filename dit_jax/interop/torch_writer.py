"""Writes a ``.pt`` file of named arrays as ``torch.save`` does, without PyTorch.

A zip archive of ``data.pkl`` (an ordered dictionary of tensors) and one stored, 64-byte aligned entry
a tensor, which ``torch.load(path, weights_only=True)`` reads, mapped or not. The same arrays give the
same bytes.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.interop.pickles import DTYPES, STORAGES

ALIGNMENT = 64
ROOT = "archive"
DATE = (1980, 1, 1, 0, 0, 0)
STORAGE_OF = {DTYPES[name]: kind for kind, name in STORAGES.items() if kind != "UntypedStorage"}


def write_torch(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Writes arrays by name, in their order; each is taken from ``tensors`` once, when it is written.

    Values are NumPy arrays or what ``np.asarray`` takes (one tensor at a time is in memory).

    Raises:
        ValueError: for a dtype that PyTorch's storages do not have, before anything is written.
    """
    for name, array in tensors.items():
        if np.dtype(array.dtype) not in STORAGE_OF:
            raise ValueError(f"{name!r} is of {array.dtype}, which a .pt file does not hold.")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, "data.pkl", b"".join(_pickled(tensors)))
        _add(archive, ".format_version", b"1")
        _add(archive, "byteorder", b"little")
        for i, name in enumerate(tensors):
            _add(archive, f"data/{i}", _bytes(np.asarray(tensors[name])))
        _add(archive, "version", b"3\n")


def _bytes(array: np.ndarray) -> memoryview:
    flat = np.ascontiguousarray(array).reshape(-1)
    data: Any = flat.view(
        np.uint8
    )  # a buffer, which type checkers know of NumPy from Python 3.12 on
    return memoryview(data)


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """An entry whose data begins at a multiple of the alignment."""
    entry = zipfile.ZipInfo(f"{ROOT}/{name}", DATE)
    entry.file_size = len(data)
    large = len(data) > zipfile.ZIP64_LIMIT / 2
    assert archive.fp is not None
    begin = archive.fp.tell() + 30 + len(entry.filename) + 4 + (20 if large else 0)
    padding = -begin % ALIGNMENT
    entry.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as file:
        file.write(data)


def _pickled(tensors: Mapping[str, Any]) -> Iterator[bytes]:
    """The pickle (protocol 2) of an ordered dictionary of tensors.

    Opcodes by hand: Python's pickler writes the names of importable functions only.
    """
    yield pickle.PROTO + b"\x02" + _global("collections", "OrderedDict")
    yield pickle.EMPTY_TUPLE + pickle.REDUCE
    for i, (name, array) in enumerate(tensors.items()):
        shape = tuple(array.shape)
        count = int(np.prod(shape, dtype=np.int64))
        strides = tuple(int(np.prod(shape[k + 1 :], dtype=np.int64)) for k in range(len(shape)))
        yield _text(name) + _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK
        yield pickle.MARK + _text("storage") + _global("torch", STORAGE_OF[np.dtype(array.dtype)])
        yield _text(str(i)) + _text("cpu") + _int(count) + pickle.TUPLE + pickle.BINPERSID
        yield _int(0) + _ints(shape) + _ints(strides) + pickle.NEWFALSE
        yield _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        yield pickle.TUPLE + pickle.REDUCE + pickle.SETITEM
    yield pickle.STOP


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    data = value.to_bytes(9, "little", signed=True)
    return pickle.LONG1 + bytes([len(data)]) + data


def _ints(values: tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(map(_int, values)) + pickle.TUPLE
