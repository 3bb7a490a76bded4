"""Sets of images or clips on disk, read a batch at a time: .npz files and folders.

All items of a set have one size. An .npz holds them as ``arr_0``, uint8 ``[n, h, w, 3]`` (as OpenAI's
evaluation suite writes and reads) or, for clips, ``[n, t, h, w, 3]``; it is read in pieces and never
whole. A folder holds a file for each (PNG, JPEG, WebP or BMP; mp4, GIF, WebM, MOV, MKV or AVI), read
with PyAV in the order of their names. Nothing is resized here: how images were brought to one size is
part of a measurement (Parmar et al. 2022, "On aliased resizing and surprising subtleties in GAN
evaluation"), and the networks do their own.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from dit_jax.files import InputError, atomic_path, check_exists, local_copy
from dit_jax.sampling.media import read_video

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
ITEMS = "arr_0"
DAMAGE = (
    OSError,
    ValueError,
    MemoryError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What the standard library and NumPy raise on an .npz whose bytes are not those that were written."""
ITEM_LIMIT = 2**30
"""Bytes of one item of an .npz."""
PIECE = 2**28
"""Bytes read at once from an .npz whose beginning is passed over."""


class ImageSet(Protocol):
    """Images or clips that can be read from anywhere in order."""

    count: int
    shape: tuple[int, ...]
    """Of one: ``(h, w, 3)`` for images, ``(t, h, w, 3)`` for clips."""

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """uint8 ``[<= size, *shape]`` of items start to stop."""
        ...


def is_clips(items: ImageSet) -> bool:
    """Whether a set holds clips, not images."""
    return len(items.shape) == 4


def open_images(path: str) -> ImageSet:
    """The set in a folder or an .npz; raises ``ValueError`` where there is none."""
    place = check_exists(path, "the set of samples")
    if place.is_dir():
        return FolderImages(local_copy(place))
    if place.suffix == ".npz":
        return NpzImages(place)
    raise ValueError(
        f"{path!r} is neither a folder nor an .npz file: give a folder of images or clips, or an .npz "
        f"that holds uint8 images [n, h, w, 3] as {ITEMS!r}."
    )


class NpzImages:
    """``arr_0`` of an .npz, streamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _member(path, ITEMS) as file:
            whole, fortran, dtype = _header(file, path)
        shaped = len(whole) in (4, 5) and whole[-1] == 3 and min(whole) > 0
        if fortran or dtype != np.uint8 or not shaped or math.prod(whole[1:]) > ITEM_LIMIT:
            raise ValueError(
                f"{ITEMS!r} in {str(path)!r} is {dtype} {list(whole)}: it must hold uint8 images "
                "[n, h, w, 3] or clips [n, t, h, w, 3], in C order, of at most a GiB each."
            )
        self.count, self.shape = whole[0], whole[1:]

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """uint8 ``[<= size, *shape]`` of items start to stop."""
        each = int(np.prod(self.shape))
        with _member(self.path, ITEMS) as file:
            _header(file, self.path)
            left = start * each
            while left:
                left -= len(_exactly(file, min(left, PIECE), self.path))
            for first in range(start, stop, size):
                number = min(size, stop - first)
                data = _exactly(file, number * each, self.path)
                yield np.frombuffer(data, np.uint8).reshape(number, *self.shape)


class FolderImages:
    """The files of a folder, subfolders included, which are all images or all clips."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(file for file in path.rglob("*") if file.is_file())
        images = [file for file in files if file.suffix.lower() in IMAGES]
        clips = [file for file in files if file.suffix.lower() in CLIPS]
        if bool(images) == bool(clips):
            found = (
                f"both images and clips ({images[0].name}, {clips[0].name})" if images else "none"
            )
            raise ValueError(
                f"the folder {str(path)!r} must hold images ({', '.join(IMAGES)}) or clips "
                f"({', '.join(CLIPS)}), but holds {found}: give another, or part them."
            )
        self.files: Sequence[Path] = images or clips
        self._clips = bool(clips)
        self.count = len(self.files)
        self.shape = self._read(self.files[0]).shape

    def _read(self, file: Path) -> np.ndarray:
        frames = read_video(file)[0]
        return frames if self._clips else frames[0]

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """uint8 ``[<= size, *shape]`` of items start to stop."""
        for first in range(start, stop, size):
            items = [self._read(file) for file in self.files[first : min(first + size, stop)]]
            for file, item in zip(self.files[first:], items, strict=False):
                if item.shape != self.shape:
                    raise ValueError(
                        f"{str(file)!r} is {list(item.shape)}, but {str(self.files[0])!r} is "
                        f"{list(self.shape)}: bring all of a folder to one size first (for ImageNet: "
                        "the short side resized, the centre cut out)."
                    )
            yield np.stack(items)


def npz_keys(path: Path) -> set[str]:
    """The names of the arrays in an .npz."""
    with _archive(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def write_npz(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    batches: Iterable[np.ndarray] = (),
    count: int = 0,
) -> None:
    """Writes an .npz: ``count`` uint8 items, batch by batch, as ``arr_0`` if any, and other arrays.

    The same items give the same bytes. The file appears whole or not at all.
    """
    with (
        atomic_path(path) as scratch,
        zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        if count:
            with archive.open(zipfile.ZipInfo(f"{ITEMS}.npy"), "w", force_zip64=True) as file:
                _write_items(file, batches, count)
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array))


def _write_items(file: IO[bytes], batches: Iterable[np.ndarray], count: int) -> None:
    written = 0
    for batch in batches:
        if not written:
            shape = (count, *batch.shape[1:])
            description = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, description)
        file.write(np.ascontiguousarray(batch).tobytes())
        written += len(batch)
    assert written == count, (written, count)


def read_arrays(path: Path, names: Collection[str], limit: int) -> dict[str, np.ndarray]:
    """Arrays of an .npz; raises ``ValueError`` where they have more than ``limit`` bytes in all."""
    with undamaged(path), _archive(path) as archive:
        size = sum(archive.getinfo(f"{name}.npy").file_size for name in names)
        if size > limit:
            raise InputError(
                f"{str(path)!r} has {size:,} bytes in {', '.join(sorted(names)[:5])}, and no such file "
                f"has more than {limit:,}: fetch or make it again."
            )
        found = {}
        for name in names:
            with archive.open(f"{name}.npy") as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
        return found


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(local_copy(path))
    except DAMAGE as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as .npz ({error}): check the path, or fetch it again."
        ) from error


def _member(path: Path, name: str) -> IO[bytes]:
    with _archive(path) as archive:
        try:
            with undamaged(path):
                return archive.open(f"{name}.npy")
        except KeyError:
            held = ", ".join(sorted(npz_keys(path))) or "nothing"
            raise ValueError(
                f"{str(path)!r} has no {name!r}, only {held}: images are stored under {ITEMS!r}."
            ) from None


def _header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    with undamaged(path):
        # Later versions are for headers of up to 4 GB, which images do not have.
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"a header of version {version}")
        return np.lib.format.read_array_header_1_0(file)


def _exactly(file: IO[bytes], number: int, path: Path) -> bytes:
    with undamaged(path):
        data = file.read(number)
    if len(data) != number:
        raise ValueError(f"{str(path)!r} ends in the middle of {ITEMS!r}: fetch or make it again.")
    return data


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Raises ``ValueError`` for whatever an .npz meets that is damaged while it is read."""
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as .npz ({error}): it is damaged. Fetch or make it again."
        ) from error
