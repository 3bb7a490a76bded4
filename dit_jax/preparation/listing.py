"""Which files are prepared: those of a folder, or of a list, in one order whatever the machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from dit_jax.preparation.recorded import find_records, is_record
from dit_jax.preparation.tables import read_lines
from dit_jax.preparation.work import digest

LISTS = (".txt", ".lst")
SIDECARS = (".txt", ".json")


@dataclasses.dataclass(frozen=True)
class Item:
    """A file to be prepared."""

    name: str
    """Its path relative to the folder, or as it stands in the list: what records say of it."""
    path: str
    key: str
    """Of its name, size and time of last change."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """What is prepared, sorted by name, and what is not taken for media."""

    items: tuple[Item, ...]
    sidecars: tuple[str, ...] = ()
    """Names of captions beside media."""


def find_media(source: str | os.PathLike, leave_out: Collection[str | os.PathLike] = ()) -> Listed:
    """The files of a folder and of those in it, of a list (a path on each line), or the one file; or
    the records of a TFDS builder, ``tfds:NAME_OR_BUILDER_DIR[:split]``.

    Hidden files and folders are passed over, and so is what ``leave_out`` names (tables of captions,
    the output). Nothing is told by a file's name but that ``cat.txt`` and ``cat.json`` beside
    ``cat.mp4`` are its captions.

    Raises:
        ValueError: where there is nothing, or what is listed is there twice.
    """
    if is_record(source):
        found = find_records(str(source))
        return Listed(tuple(Item(name, path, digest(path, key)) for name, path, key in found))
    root = Path(source)
    out = {os.path.realpath(path) for path in leave_out}
    if root.is_dir():
        names = sorted(_walk(root, out))
        sidecars = _sidecars(names)
        paths = {name: str(root / name) for name in names if name not in sidecars}
    elif root.is_file() and root.suffix.lower() in LISTS:
        lines = [line.strip() for _, line in read_lines(root)]
        given = [line for line in lines if line and not line.startswith("#")]
        if len(set(given)) < len(given):
            twice = next(name for name in given if given.count(name) > 1)
            raise ValueError(f"{str(source)!r} lists {twice!r} twice: remove one of the lines.")
        paths, sidecars = {name: str(root.parent / name) for name in sorted(given)}, set()
    elif root.is_file():
        paths, sidecars = {root.name: str(root)}, set()
    else:
        raise ValueError(
            f"--input {str(source)!r} is not there: give a folder of media, a list of them "
            "(.txt), or tfds:NAME_OR_BUILDER_DIR[:split]."
        )
    if not paths:
        raise ValueError(f"--input {str(source)!r} holds no files: give a folder or list of media.")
    items = tuple(Item(name, path, _key(name, path)) for name, path in paths.items())
    return Listed(items, tuple(sorted(sidecars)))


def _walk(root: Path, out: set[str]) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        kept = [one for one in folders if not one.startswith(".")]
        folders[:] = [one for one in kept if os.path.realpath(os.path.join(folder, one)) not in out]
        for one in files:
            path = os.path.join(folder, one)
            if not one.startswith(".") and os.path.realpath(path) not in out:
                yield Path(path).relative_to(root).as_posix()


def _sidecars(names: list[str]) -> set[str]:
    """Of these names, the captions of another."""
    media = {os.path.splitext(n)[0] for n in names if os.path.splitext(n)[1] not in SIDECARS}
    split = {name: os.path.splitext(name) for name in names}
    return {name for name, (stem, end) in split.items() if end in SIDECARS and stem in media}


def _key(name: str, path: str) -> str:
    """A file that is not there, or cannot be read, has a key as well: it is refused later."""
    try:
        stat = os.stat(path)
    except OSError:
        return digest(name, None)
    return digest(name, stat.st_size, stat.st_mtime_ns)
