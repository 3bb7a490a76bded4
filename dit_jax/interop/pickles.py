"""Reads the pickles inside PyTorch's files without running anything they name.

A pickle is a program: it may name any function of any module and call it. Here a name is looked up in
a table of what PyTorch's files need (``_GLOBALS``, ``_DTYPES``, ``_STORAGES``) and nothing is ever
imported: a name outside the table is refused, and said. What is handed to the unpickler are frozen
objects without a ``__dict__``, so a pickle cannot change them either. A few classes that training
checkpoints hold beside their weights, and the classes of TorchScript, become ``Record``: inert, its
state kept as data.

The format of tensors is that of ``torch/_utils.py`` (``_rebuild_tensor_v2`` and its kin).
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import reprlib
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

Fetch = Callable[[str, np.dtype, int], np.ndarray]
"""``fetch(key, dtype, count)``: the elements of a storage, flat."""
Persistent = Callable[[Any], Any]
"""What a persistent id stands for."""

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
}
"""NumPy's dtype of each of PyTorch's."""

STORAGES: dict[str, str] = {
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
"""The dtype of each storage class, by name."""

INERT = {
    ("argparse", "Namespace"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("types", "SimpleNamespace"),
}
"""Classes that may stand in a checkpoint and become records."""


class RefusedGlobal(pickle.UnpicklingError):
    """The pickle names something outside the table; nothing of it was run."""


def _sealed(self: Any, state: Any) -> None:
    """The ``__setstate__`` of what a pickle must not change."""
    raise pickle.UnpicklingError(f"a pickle sets the state of {self!r:.80}")


class _Frozen(type):
    """Classes whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"a pickle sets {name!r} of a class")


class Record(metaclass=_Frozen):
    """An object of a class that is not here: what the pickle says of it, and no behaviour."""

    __slots__ = ("arguments", "state")
    of: str = ""
    """Dotted name of the class."""

    def __new__(cls, *arguments: Any) -> Record:
        made = super().__new__(cls)
        object.__setattr__(made, "arguments", arguments)
        object.__setattr__(made, "state", {})
        return made

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "state", state)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"a pickle sets {name!r} of a record")

    def __repr__(self) -> str:
        return f"Record({type(self).of}, {self.state!r})"


def _record(name: str) -> type[Record]:
    return _Frozen("Record", (Record,), {"__slots__": (), "of": name})


@dataclasses.dataclass(frozen=True, slots=True)
class _Global:
    """A function or class of the table, as the unpickler gets it."""

    name: str
    call: Callable[..., Any] | None = None
    __setstate__ = _sealed

    def __call__(self, *arguments: Any) -> Any:
        if self.call is None:
            raise RefusedGlobal(f"calls {self.name}")
        return self.call(*arguments)


@dataclasses.dataclass(frozen=True, slots=True)
class DType:
    """A dtype, or a storage of it, named in a pickle."""

    name: str
    __setstate__ = _sealed

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.name]


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A flat run of elements in the file, not yet read."""

    key: str
    dtype: np.dtype
    count: int
    fetch: Fetch
    start: int = 0
    """Of a view: its first element within the storage of that key, which has ``whole`` elements."""
    whole: int | None = None
    __setstate__ = _sealed

    def elements(self, dtype: np.dtype) -> np.ndarray:
        """The elements; bytes (an untyped storage) are seen as ``dtype``."""
        whole = self.count if self.whole is None else self.whole
        if not 0 <= self.start <= self.start + self.count <= whole:
            raise ValueError(f"a view of storage {self.key} reaches beyond its {whole} elements")
        flat = self.fetch(self.key, self.dtype, whole)[self.start : self.start + self.count]
        return flat if flat.dtype == dtype else flat.view(dtype)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None
) -> np.ndarray:
    """An array over a storage; bounds are checked, nothing is copied."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        said = ", ".join(map(reprlib.repr, (shape, strides, offset)))
        raise ValueError(f"a tensor whose shape, strides and offset are {said}")
    flat = storage.elements(storage.dtype if dtype is None else dtype)
    if not math.prod(shape):
        return np.empty(shape, flat.dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= flat.size:
        raise ValueError(
            f"a tensor of shape {tuple(shape)} reaches element {last} of storage {storage.key}, "
            f"which has {flat.size}"
        )
    steps = [stride * flat.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> np.ndarray:
    """``torch._utils._rebuild_tensor`` and ``_v2``: gradients and hooks are left out."""
    del rest
    return _rebuild_tensor(storage, offset, shape, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> np.ndarray:
    """``torch._utils._rebuild_tensor_v3``: the dtype stands beside an untyped storage."""
    del grad, hooks, rest
    if not isinstance(dtype, DType):
        raise ValueError("a tensor without a dtype")
    return _rebuild_tensor(storage, offset, shape, strides, dtype.dtype)


def _parameter(data: Any, *rest: Any) -> Any:
    """``torch._utils._rebuild_parameter``: its tensor."""
    del rest
    return data


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, which are left out."""
    del kind, state
    if not isinstance(function, _Global):
        raise ValueError("a tensor rebuilt by something that is no function")
    return function(*arguments)


def _listed(items: Any, *rest: Any) -> list:
    """A list of TorchScript's; arrays are refused, which may claim more elements than the file has."""
    del rest
    if not isinstance(items, list | tuple):
        raise ValueError("a list made of something else")
    return list(items)


_GLOBALS: dict[tuple[str, str], Callable[..., Any] | None] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "set"): lambda items=(): set(_listed(items)),
    ("__builtin__", "set"): lambda items=(): set(_listed(items)),
    ("builtins", "dict"): None,
    ("builtins", "list"): None,
    ("torch", "Size"): lambda items=(): tuple(_listed(items)),
    ("torch", "device"): lambda *names: ":".join(map(str, names)),
    ("torch", "Tensor"): None,
    ("torch.nn.parameter", "Parameter"): None,
    ("torch._utils", "_rebuild_tensor"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.jit._pickle", "restore_type_tag"): _parameter,
    ("torch.jit._pickle", "build_intlist"): _listed,
    ("torch.jit._pickle", "build_tensorlist"): _listed,
    ("torch.jit._pickle", "build_doublelist"): _listed,
    ("torch.jit._pickle", "build_boollist"): _listed,
}
"""Every function and class that a pickle may name, and what stands for it here."""


def _lookup(module: str, name: str) -> Any:
    """What stands for a global; raises ``RefusedGlobal`` for all but those of the table."""
    if (module, name) in _GLOBALS:
        return _Global(f"{module}.{name}", _GLOBALS[module, name])
    if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
        return DType(STORAGES[name])
    if module == "torch" and name in DTYPES:
        return DType(name)
    if (module, name) in INERT or module == "__torch__" or module.startswith("__torch__."):
        return _record(f"{module}.{name}")
    raise RefusedGlobal(f"names {module}.{name}")


class _Unpickler(pickle._Unpickler):
    """The standard machine with every name and persistent id given by us.

    The one in Python: the one in C makes room for the largest place that a pickle notes something at,
    64 GB for ten bytes.
    """

    def __init__(self, file: BinaryIO, persistent: Persistent) -> None:
        super().__init__(file, encoding="utf-8")
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        return _lookup(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)


def unpickle(file: BinaryIO | bytes, persistent: Persistent, where: str) -> Any:
    """The object that the next pickle of ``file`` describes; the file stands after it.

    Raises:
        ValueError: for names outside the table, damage, and an end before the pickle's; ``where``
            (the file, as the message names it) is said.
    """
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        return _Unpickler(stream, persistent).load()
    except RefusedGlobal as error:
        raise ValueError(
            f"{where} {error}, which no file of weights needs: refused, and nothing of it was run. "
            "Take the weights from another source, or save them again as safetensors where you trust "
            "them."
        ) from error
    except Exception as error:  # A damaged pickle can raise whatever its opcodes meet.
        raise ValueError(
            f"{where} cannot be read ({type(error).__name__}: {error}): the file is damaged or "
            "truncated. Get it again."
        ) from error


def storage_of(pid: Any, fetch: Fetch) -> Storage:
    """The storage that a persistent id names: ``("storage", class, key, location, count, ...)``."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise ValueError(f"a persistent id that is no storage: {reprlib.repr(pid)}")
    _, kind, key, _, count = pid[:5]
    if not isinstance(kind, DType) or type(count) is not int or count < 0:
        said = ", ".join(map(reprlib.repr, (key, count, kind)))
        raise ValueError(f"a storage whose key, count of elements and class are {said}")
    view = pid[5] if len(pid) > 5 else None
    if view is None:
        return Storage(str(key), kind.dtype, count, fetch)
    _, start, size = view
    return Storage(str(key), kind.dtype, int(size), fetch, start=int(start), whole=count)
