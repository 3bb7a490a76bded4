"""Sets of images or clips on disk, read a batch at a time, and what samples are compared with.

All items of a set have one size. An .npz holds them as ``arr_0``, uint8 ``[n, h, w, 3]`` (as OpenAI's
evaluation suite writes and reads) or, for clips, ``[n, t, h, w, 3]``, and is never read whole; a folder
holds a file for each. Nothing is resized here: how images were brought to one size is part of a
measurement (Parmar et al. 2022, "On aliased resizing and surprising subtleties in GAN evaluation").

A reference is such a set, or an .npz of statistics::

    mu, sigma                        pytorch-fid and others: Inception's pooled features
    mu, sigma, mu_s, sigma_s, arr_0  OpenAI's evaluation suite (``VIRTUAL_imagenet256_labeled.npz``):
                                     also the spatial features, and 10,000 images for precision
    mu_v, sigma_v                    I3D's logits, as ``save_statistics`` writes them

Statistics that a file has are taken as they are, never recomputed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from dit_jax.evaluate.distances import Statistics
from dit_jax.files import atomic_path, check_exists, checking_input, local_copy, refuse_if
from dit_jax.sampling.media import read_video

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
ITEMS, COUNT = "arr_0", "count"
ITEM_LIMIT = 2**30  # Bytes of one item of an .npz.
# Kinds of features: their names in an .npz of statistics, and how many there are.
KINDS = {
    "pool": ("mu", "sigma", 2048),
    "spatial": ("mu_s", "sigma_s", 2023),
    "video": ("mu_v", "sigma_v", 400),
}
# Bytes of all statistics of a file: two covariances of 2,048 numbers in float64 are half of it.
STATISTICS_LIMIT = 2**27


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images or clips that can be read in order from anywhere."""

    count: int
    shape: tuple[int, ...]  # Of one: (h, w, 3) of images, (t, h, w, 3) of clips.
    batches: Callable[[int, int, int], Iterator[np.ndarray]]
    """``batches(start, stop, size)``: uint8 ``[<= size, *shape]`` of items start to stop."""

    @property
    def kind(self) -> str:
        return "clips" if len(self.shape) == 4 else "images"


class Reference(NamedTuple):
    """What samples are compared with: statistics by kind of features, and images if there are some."""

    path: str
    statistics: Mapping[str, Statistics]
    items: ImageSet | None


def open_images(path: str) -> ImageSet:
    """The set in a folder or an .npz."""
    place = check_exists(path, "the set of samples")
    if place.is_dir():
        return _open_folder(local_copy(place))
    other = f"{path!r} is neither a folder of images or clips nor an .npz with {ITEMS!r}: give one."
    refuse_if([(place.suffix != ".npz", other)])
    return _open_npz(place)


def _open_npz(path: Path) -> ImageSet:
    with _open_items(path) as (_, header):
        (count, *shape), fortran, dtype = header[0] or (0,), *header[1:]
    fits = dtype == np.uint8 and len(shape) in (3, 4) and shape[-1] == 3 and not fortran
    fits = fits and min(count, *shape) > 0 and math.prod(shape) <= ITEM_LIMIT
    message = (
        f"{ITEMS!r} in {str(path)!r} is {dtype} {[count, *shape]}: it must hold uint8 images "
        "[n, h, w, 3] or clips [n, t, h, w, 3], in C order, of at most a GiB each."
    )
    refuse_if([(not fits, message)])

    def batches(start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        each = math.prod(shape)
        with _open_items(path) as (file, _):
            file.seek(start * each, 1)
            for first in range(start, stop, size):
                number = min(size, stop - first)
                data = np.frombuffer(file.read(number * each), np.uint8)
                yield data.reshape(number, *shape)  # Fails if the file has ended.

    return ImageSet(count, tuple(shape), batches)


@contextlib.contextmanager
def _open_npz_file(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; any error that damaged bytes raise is an InputError."""
    remedy = "it is damaged or another file. Fetch or make it again"
    with checking_input(f"{str(path)!r} cannot be read as .npz", remedy):
        with zipfile.ZipFile(local_copy(path)) as archive:
            yield archive


@contextlib.contextmanager
def _open_items(path: Path) -> Iterator[tuple[IO[bytes], tuple[tuple[int, ...], bool, np.dtype]]]:
    """The items of an .npz, opened behind their header, and the header."""
    with _open_npz_file(path) as archive, archive.open(f"{ITEMS}.npy") as file:
        # Later versions are for headers of up to 4 GB, which images do not have.
        version = np.lib.format.read_magic(file)
        refuse_if([(version != (1, 0), f"a header of version {version}")])
        yield file, np.lib.format.read_array_header_1_0(file)


def _open_folder(path: Path) -> ImageSet:
    """The files of a folder, subfolders included, in the order of their names."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    images = [file for file in files if file.suffix.lower() in IMAGES]
    clips = [file for file in files if file.suffix.lower() in CLIPS]
    held = f"both ({images[0].name}, {clips[0].name})" if images and clips else "none"
    message = f"{str(path)!r} must hold images {IMAGES} or clips {CLIPS}, and holds {held}."
    refuse_if([(bool(images) == bool(clips), message)])

    def read(file: Path) -> np.ndarray:
        frames = read_video(file)[0]
        return frames if clips else frames[0]

    files = images or clips
    shape = read(files[0]).shape

    def batches(start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for first in range(start, stop, size):
            chosen = files[first : min(first + size, stop)]
            items = [read(file) for file in chosen]
            message = "{!r} is {}, and {!r} {}: bring all to one size first, by one method."
            refuse_if(
                (item.shape != shape, message.format(str(file), item.shape, str(files[0]), shape))
                for file, item in zip(chosen, items, strict=True)
            )
            yield np.stack(items)

    return ImageSet(len(files), shape, batches)


def npz_keys(path: Path) -> set[str]:
    """The names of the arrays in an .npz."""
    with _open_npz_file(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_arrays(path: Path, names: Collection[str], limit: int) -> dict[str, np.ndarray]:
    """Arrays of an .npz, of ``limit`` bytes at most in all."""
    arrays = {}
    with _open_npz_file(path) as archive:
        size = sum(archive.getinfo(f"{name}.npy").file_size for name in names)
        listed = ", ".join(sorted(names)[:5])
        refuse_if([(size > limit, f"{size:,} bytes in {listed}: no such file has over {limit:,}")])
        for name in names:
            with archive.open(f"{name}.npy") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def write_npz(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    batches: Iterable[np.ndarray] = (),
    count: int = 0,
) -> None:
    """Writes an .npz, whole or not at all: ``count`` uint8 items as ``arr_0`` if any, batch by batch,
    and other arrays. The same items give the same bytes."""
    with atomic_path(path) as fresh, zipfile.ZipFile(fresh, "w") as archive:
        if count:
            with archive.open(f"{ITEMS}.npy", "w", force_zip64=True) as file:
                rest = iter(batches)
                first = next(rest)
                header = {"descr": "|u1", "fortran_order": False}
                header["shape"] = (count, *first.shape[1:])
                np.lib.format.write_array_header_1_0(file, header)
                for batch in itertools.chain([first], rest):
                    file.write(batch.tobytes())
                    count -= len(batch)
                assert count == 0, count
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array))


def open_reference(path: str) -> Reference:
    """Reads the statistics of an .npz, and opens the images of it or of a folder."""
    if not path.endswith(".npz"):
        return Reference(path, {}, open_images(path))
    place = check_exists(path, "--reference")
    names = npz_keys(place)
    items = _open_npz(place) if ITEMS in names else None
    keys = {key for *pair, _ in KINDS.values() for key in pair}
    arrays = read_arrays(place, ({COUNT} | keys) & names, STATISTICS_LIMIT)
    count = arrays.get(COUNT, np.array(1))
    odd = count.size != 1 or not np.issubdtype(count.dtype, np.integer) or count.item() < 1
    message = f"{COUNT!r} in {path!r} is {count.tolist()!r:.60}: give a whole number, at least 1."
    refuse_if([(odd, message)])
    size = int(count.item()) if COUNT in arrays else None
    statistics: dict[str, Statistics] = {}
    for kind, (mean, covariance, width) in KINDS.items():
        if {mean, covariance} <= arrays.keys():
            with checking_input(f"{mean!r} and {covariance!r} in {path!r}", "make the file again"):
                pair = arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64)
                one = Statistics(*pair, size)
                other = f"{one.mean.size} numbers, but there are {width} such features"
                refuse_if([(one.mean.size != width, other)])
            statistics[kind] = one
    empty = not statistics and items is None
    held = ", ".join(sorted(names)) or "nothing"
    message = f"{path!r} holds {held}: give a reference with {ITEMS} or statistics (mu and sigma)."
    refuse_if([(empty, message)])
    return Reference(path, statistics, items)


def save_statistics(
    path: Path, statistics: Mapping[str, Statistics], items: ImageSet | None = None
) -> None:
    """Writes statistics as ``open_reference`` reads them, with the images for precision and recall."""
    arrays: dict[str, np.ndarray] = {}
    for kind, one in statistics.items():
        mean, covariance, _ = KINDS[kind]
        arrays |= {mean: one.mean, covariance: one.covariance}
        if one.count is not None:
            arrays[COUNT] = np.array(one.count)
    batches = items.batches(0, items.count, 256) if items else ()
    write_npz(path, arrays, batches, items.count if items else 0)
