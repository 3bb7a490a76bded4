"""Reads PyTorch's ``.pt``, ``.pth`` and ``.bin`` files without PyTorch and without running pickles.

A file of PyTorch 1.6 and later is a zip archive: ``data.pkl`` says which tensor is which part of which
storage, and each storage is an entry of its own. The arrays are read-only views of the mapped file, so
that nothing is read before it is used. Older containers and TorchScript are not read: load them with
PyTorch and save them as safetensors (``scripts/pt_to_safetensors.py``).

A pickle is a program that may call any function it names. Here the names are looked up in a table of
what files of weights need, nothing is ever imported, and what stands for a name cannot be changed. The
format of tensors is that of ``torch/_utils.py`` (``_rebuild_tensor_v2`` and its kin).
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dit_jax.files import MiB, local_copy

PICKLE_LIMIT = 64 * MiB
"""Bytes of ``data.pkl``, which holds names and shapes alone."""
LOCAL_HEADER = 30
"""Bytes of a zip entry's header before its name."""
DEPTH = 100
"""Containers within containers, at most."""
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(name)
    for name in (
        "float64 float32 float16 complex64 complex128 "
        "int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool"
    ).split()
} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
}
"""NumPy's dtype of each of PyTorch's."""
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
INERT = (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "types.SimpleNamespace",
)
"""Classes that training checkpoints hold beside their weights; their values are left out."""


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file by their dotted path: ``{"ema": {"a.b": x}}`` as ``ema.a.b``.

    What is no tensor (numbers, strings, arguments) is left out. Arrays have the dtypes of the file
    (bfloat16 as ``ml_dtypes.bfloat16``).

    Raises:
        ValueError: if the file is absent, damaged, no zip archive of PyTorch's, or names a function or
            class that no file of weights needs.
    """
    path = local_copy(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
            if head != b"PK\x03\x04":
                raise ValueError(
                    f"{str(path)!r} begins with {head!r} and is no zip archive of PyTorch 1.6 or "
                    "later: load it with PyTorch and save it as safetensors "
                    "(scripts/pt_to_safetensors.py)."
                )
            try:
                archive = zipfile.ZipFile(file)
            except _DAMAGE as error:
                raise ValueError(
                    f"{str(path)!r} is truncated or damaged ({error}): get it again."
                ) from error
            tree = _Archive(path, archive).tree()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror or error}).") from error
    out: dict[str, np.ndarray] = {}
    for name, array in _tensors(tree):
        if name in out:
            raise ValueError(f"{str(path)!r} has two tensors of the name {name!r}.")
        out[name] = array
    return out


def _tensors(node: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of a tree and its dotted path."""
    if isinstance(node, np.ndarray):
        yield name, node
    elif isinstance(node, dict | list | tuple):
        if depth > DEPTH:
            raise ValueError(f"{name[:60]!r}... of the file nests more than {DEPTH} deep.")
        items: Any = dict.items(node) if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from _tensors(value, f"{name}.{key}" if name else str(key), depth + 1)


class _Archive:
    """An open zip archive, and the bytes of its file, which are mapped and not read yet."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.entries = {name.partition("/")[2]: name for name in archive.namelist()}
        if "data.pkl" not in self.entries:
            raise ValueError(
                f"{str(path)!r} is a zip archive but none of PyTorch's: it has no data.pkl. Unpack it "
                "if the weights are inside."
            )
        if "constants.pkl" in self.entries or self._read("byteorder") == b"big":
            raise ValueError(
                f"{str(path)!r} is TorchScript, or was written on a big-endian machine: load it with "
                "PyTorch and save its parameters as safetensors (scripts/pt_to_safetensors.py)."
            )
        self.bytes = np.memmap(path, np.uint8, "r").view(np.ndarray)

    def tree(self) -> Any:
        """The object that was saved: containers of arrays and plain values."""
        data = self._read("data.pkl")
        try:
            return _Unpickler(data, self._storage).load()
        except _RefusedError as error:
            raise ValueError(
                f"{str(self.path)!r} names {error}, which no file of weights needs: refused, and "
                "nothing of it was run. Take the weights from another source, or save them as "
                "safetensors if you trust them."
            ) from error
        except Exception as error:  # A damaged pickle may raise whatever its opcodes meet.
            raise ValueError(
                f"{str(self.path)!r} cannot be read ({type(error).__name__}: {error}): the file is "
                "damaged or truncated. Get it again."
            ) from error

    def _read(self, name: str) -> bytes:
        if name not in self.entries:
            return b""
        size = self.archive.getinfo(self.entries[name]).file_size
        if size > PICKLE_LIMIT:
            raise ValueError(
                f"{str(self.path)!r} has {size} bytes in {name!r}, of which {PICKLE_LIMIT} are read at "
                "most: no file of weights has so many."
            )
        try:
            return self.archive.read(self.entries[name])
        except _DAMAGE as error:
            raise ValueError(f"{str(self.path)!r} is damaged at {name!r} ({error}).") from error

    def _storage(self, key: str, size: int) -> np.ndarray:
        """The bytes of a storage."""
        entry = self.archive.getinfo(self.entries[f"data/{key}"])
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < size:
            raise ValueError(
                f"storage {key} is compressed, or has {entry.file_size} bytes of {size}"
            )
        header = self.bytes[entry.header_offset :][:LOCAL_HEADER].tobytes()
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"storage {key} is not where the archive says")
        # Name and extra field, whose lengths may differ from those in the archive's directory.
        begin = entry.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[26:]))
        data = self.bytes[begin : begin + size]
        if data.size < size:
            raise ValueError(f"storage {key} ends before its {size} bytes")
        return data


class _RefusedError(pickle.UnpicklingError):
    """The pickle names something outside the table; nothing of it was run."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Stand:
    """What stands for a function, class or dtype in the pickle; a pickle cannot change it."""

    call: Callable[..., Any] | None = None
    dtype: np.dtype | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.call is None:
            raise pickle.UnpicklingError("a pickle calls what is no function")
        return self.call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle sets the state of a function")


class _Inert:
    """An object whose class is not here; its state is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        del state


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    """A flat run of elements, not read yet."""

    key: str
    dtype: np.dtype
    count: int
    fetch: Callable[[str, int], np.ndarray]

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle sets the state of a storage")


def _tensor(
    storage: _Storage, offset: int, shape: Any, strides: Any, dtype: np.dtype | None = None
) -> np.ndarray:
    """An array over a storage, whose bounds are checked; nothing is copied."""
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor's shape, strides and offset are no whole numbers")
    data = storage.fetch(storage.key, storage.count * storage.dtype.itemsize)
    dtype = dtype or storage.dtype
    # Not `view`: a storage may begin at any byte of the file.
    flat = np.ndarray((data.size // dtype.itemsize,), dtype, data)
    if not math.prod(shape):
        return np.empty(shape, dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= flat.size:
        raise ValueError(f"a tensor reaches element {last} of the {flat.size} of its storage")
    steps = [stride * dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> np.ndarray:
    # The dtype stands beside an untyped storage.
    return _tensor(storage, offset, shape, strides, dtype.dtype)


_GLOBALS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.dict": None,
    "builtins.list": None,
    "torch.Size": lambda items=(): tuple(items),
    "torch.device": lambda *names: ":".join(map(str, names)),
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    # A tensor with attributes, which are left out.
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: function(
        *arguments
    ),
}
"""Every function and class that a pickle may name, and what stands for it."""


class _Unpickler(pickle._Unpickler):
    """The standard machine with the table's names.

    The one in Python: the one in C makes room for the largest place that a pickle notes something at,
    64 GB for ten bytes.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes, fetch: Callable[[str, int], np.ndarray]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._fetch = fetch

    def find_class(self, module: str, name: str) -> _Stand:
        whole = f"{module}.{name}"
        if whole in _GLOBALS:
            return _Stand(_GLOBALS[whole])
        if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
            return _Stand(dtype=DTYPES[STORAGES[name]])
        if module == "torch" and name in DTYPES:
            return _Stand(dtype=DTYPES[name])
        if whole in INERT:
            return _Stand(lambda *_: _Inert())
        raise _RefusedError(whole)

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count = pid[:5]
        if type(count) is not int or count < 0 or len(pid) > 5 and pid[5] is not None:
            raise ValueError("a storage without a count of elements, or a view of one")
        return _Storage(str(key), kind.dtype, count, self._fetch)

    def load_newobj(self: Any) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.stack[-1](*arguments)  # The stand-ins are no types.

    dispatch[pickle.NEWOBJ[0]] = load_newobj
