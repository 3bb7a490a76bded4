"""Reads PyTorch's ``.pt``/``.pth``/``.bin`` files without PyTorch and without running their pickles.

Three containers are known: the zip archive (PyTorch 1.6 and later: ``data.pkl`` and one stored entry a
storage), the stream before it (magic number, protocol, system, the object, storage keys, raw
storages), and TorchScript archives, whose modules become inert records and give their parameters by
attribute path. Arrays are read-only views of the mapped file: nothing is read until it is used.

``pickles`` says what a pickle may name. Checksums of the zip archive are not verified.
"""

from __future__ import annotations

import reprlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dit_jax.files import MiB, local_copy
from dit_jax.interop.pickles import Record, storage_of, unpickle

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)
"""What the standard library raises on an archive that is not whole."""
LOCAL_HEADER = 30
"""Bytes of a zip entry's header before its name."""
PICKLE_LIMIT = 64 * MiB
"""Bytes of an archive's pickle: names and shapes, and no weights."""
INFLATED_LIMIT = 64 * MiB
INFLATED_RATIO = 16
"""Compressed storages, which PyTorch does not write, may have ``INFLATED_LIMIT`` bytes in all, or the
file's size times this, if that is more."""
REPEATS = 1_000_000
"""Values that may be met again, in containers that stand in several places of a tree."""


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file by their dotted path, ``{"ema": {"a.b": x}}`` as ``ema.a.b``.

    What is no tensor (numbers, strings, arguments) is left out. The arrays are mapped from the file
    and read-only; their dtypes are those of the file (bfloat16 as ``ml_dtypes.bfloat16``).

    Raises:
        ValueError: where the file is absent, damaged, no file of PyTorch's, or names a function or
            class that no file of weights needs.
    """
    found: dict[str, np.ndarray] = {}
    for name, array in _tensors(read_torch_tree(path)):
        if name in found:
            raise ValueError(f"{str(path)!r} has two tensors of the name {name!r}.")
        found[name] = array
    return found


def read_torch_tree(path: str | Path) -> Any:
    """The object in a file as it was saved: containers of arrays, plain values and ``Record``.

    Raises:
        ValueError: as ``read_torch`` does.
    """
    path = local_copy(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            if head[:4] == b"PK\x03\x04":
                return _Archive(path, file).tree()
            if head[:1] == b"\x80":
                return _Stream(path, file).tree()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror or error}).") from error
    if head[257:262] == b"ustar":
        why = "is a tar archive of PyTorch before 0.1.11: load and save it with a later one"
    else:
        why = f"is no file of PyTorch's (it begins with {head[:12]!r}): give a .pt, .pth or .bin"
    raise ValueError(f"{str(path)!r} {why}.")


def _tensors(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of a tree and its dotted path; an array in several places has several paths."""
    seen: set[int] = set()
    again = 0

    def below(node: Any, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
        """Those of ``node``, which the containers ``above`` hold."""
        nonlocal again
        if isinstance(node, np.ndarray):
            yield name, node
            return
        if isinstance(node, Record):
            node = node.state
        if isinstance(node, dict):
            items: Any = dict.items(node)
        elif isinstance(node, list | tuple):
            items = enumerate(node)
        else:
            return
        if id(node) in above or len(above) > 100:
            raise ValueError(f"{name!r} of the file holds itself, or nests more than 100 deep.")
        # Sixty tuples, each twice in the next, are 2^60 paths of a file of a few hundred bytes.
        again += 1 + len(node) if id(node) in seen else 0
        if again > REPEATS:
            raise ValueError(
                f"the file holds the same containers over and over ({REPEATS} values and more of them "
                "are repeats): no file of weights does. Take the weights from another source."
            )
        seen.add(id(node))
        for key, value in items:
            yield from below(value, f"{name}.{key}" if name else str(key), (*above, id(node)))

    return below(tree, "", ())


def _mapped(path: Path) -> np.ndarray:
    """The bytes of a file, not read yet."""
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


class _Archive:
    """A zip archive of PyTorch's or TorchScript's."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        try:
            self.zip = zipfile.ZipFile(file)
        except DAMAGE as error:
            raise ValueError(
                f"{str(path)!r} is a zip archive that is truncated or damaged ({error}): get it again."
            ) from error
        entries = {name.partition("/")[2]: name for name in self.zip.namelist()}
        if "data.pkl" not in entries:
            raise ValueError(
                f"{str(path)!r} is a zip archive but none of PyTorch's: it has no data.pkl. Unpack it "
                "if the weights are inside."
            )
        self.entries = entries
        self.bytes = _mapped(path)
        self.inflated: dict[str, bytes] = {}
        order = self._read("byteorder") if "byteorder" in entries else b"little"
        if order != b"little":
            raise ValueError(f"{str(path)!r} was written on a big-endian machine: not read here.")

    def tree(self) -> Any:
        """The object saved; of TorchScript, with its constants beside the module's attributes."""
        saved = self._pickle("data.pkl", "data")
        if isinstance(saved, Record) and "constants.pkl" in self.entries:
            constants = self._pickle("constants.pkl", "constants")
            if constants and isinstance(saved.state, dict):
                return {**saved.state, "__constants__": constants}
        return saved

    def _pickle(self, name: str, folder: str) -> Any:
        def fetch(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            return self._storage(f"{folder}/{key}", dtype, count)

        data = self._read(name)
        return unpickle(data, lambda pid: storage_of(pid, fetch), repr(str(self.path)))

    def _read(self, name: str, limit: int = PICKLE_LIMIT) -> bytes:
        size = self.zip.getinfo(self.entries[name]).file_size
        if size > limit:
            raise ValueError(
                f"{str(self.path)!r} has {size} bytes in {name!r}, of which {limit} are read at most: "
                "no file of weights has so many. Take the weights from another source."
            )
        try:
            return self.zip.read(self.entries[name])
        except DAMAGE as error:
            raise ValueError(
                f"{str(self.path)!r} is damaged at {name!r} ({error}): get it again."
            ) from error

    def _storage(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        if name not in self.entries:
            raise ValueError(f"the archive has no {name}")
        entry, size = self.zip.getinfo(self.entries[name]), count * dtype.itemsize
        if entry.file_size < size:
            raise ValueError(f"{name} has {entry.file_size} bytes of {size}")
        if entry.compress_type != zipfile.ZIP_STORED:
            if name not in self.inflated:
                allowed = max(INFLATED_LIMIT, INFLATED_RATIO * self.bytes.size)
                left = allowed - sum(map(len, self.inflated.values()))
                self.inflated[name] = self._read(name, left)
            return np.frombuffer(self.inflated[name], dtype, count)
        begin = entry.header_offset
        header = self.bytes[begin : begin + LOCAL_HEADER].tobytes()
        if len(header) < LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{name} is not where the archive says")
        begin += LOCAL_HEADER + sum(struct.unpack("<HH", header[26:]))
        data = self.bytes[begin : begin + size]
        if data.size < size:
            raise ValueError(f"{name} ends before its {size} bytes")
        return _typed(data, dtype)


class _Stream:
    """A file of PyTorch's before 1.6."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.where = repr(str(path))
        self.places: dict[str, tuple[int, int]] = {}
        self.sizes: dict[str, int] = {}
        self.bytes = _mapped(path)

    def tree(self) -> Any:
        """The object saved.

        Storages come after the object that uses them: it is read twice, for their dtypes and then
        for their contents.
        """
        if self._plain() != MAGIC or self._plain() != PROTOCOL:
            raise ValueError(
                f"{self.where} is a pickle but no file of PyTorch's: its beginning is another. Give a "
                ".pt, .pth or .bin that torch.save has written."
            )
        system = self._plain()
        if not isinstance(system, dict) or not system.get("little_endian", True):
            raise ValueError(f"{self.where} was written on a big-endian machine: not read here.")
        start = self.file.tell()
        unpickle(self.file, self._note, self.where)
        keys = self._plain()
        if not isinstance(keys, list):
            raise ValueError(f"{self.where} is damaged: it has no list of storages. Get it again.")
        self._find(keys)
        self.file.seek(start)
        return unpickle(self.file, self._load, self.where)

    def _plain(self) -> Any:
        def none(pid: Any) -> Any:
            raise ValueError(f"a persistent id out of place: {reprlib.repr(pid)}")

        return unpickle(self.file, none, self.where)

    def _note(self, pid: Any) -> Any:
        """Notes how wide the elements of a storage are; its stand-in is all zeros."""
        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) > 1:
            return pid[1]
        storage = storage_of(pid, _zeros)
        self.sizes[storage.key] = storage.dtype.itemsize
        return storage

    def _load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) > 1:
            return pid[1]
        return storage_of(pid, self._fetch)

    def _find(self, keys: list[Any]) -> None:
        """Where each storage begins: a count of elements and the elements, one after another."""
        place = self.file.tell()
        for key in map(str, keys):
            head = self.bytes[place : place + 8]
            count = int(head.view("<i8")[0]) if head.size == 8 else -1
            size = count * self.sizes.get(key, 0)
            if count < 0 or key not in self.sizes or place + 8 + size > self.bytes.size:
                raise ValueError(
                    f"{self.where} ends or breaks off at storage {key!r}: it is truncated or damaged. "
                    "Get it again."
                )
            self.places[key] = (place + 8, count)
            place += 8 + size

    def _fetch(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if key not in self.places or self.places[key][1] < count:
            raise ValueError(f"storage {key!r} is absent or smaller than {count} elements")
        begin = self.places[key][0]
        return _typed(self.bytes[begin : begin + count * dtype.itemsize], dtype)


def _zeros(key: str, dtype: np.dtype, count: int) -> np.ndarray:
    """Elements that take no memory."""
    del key
    return np.broadcast_to(np.zeros((), dtype), (count,))


def _typed(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Mapped bytes as elements, wherever in the file they begin."""
    return np.ndarray((data.size // dtype.itemsize,), dtype, data)
