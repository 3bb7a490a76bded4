"""Which files are prepared: those of a folder, or of a list, in one order whatever the machine."""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from dit_jax.files import is_remote, refuse_if
from dit_jax.prepare.recorded import find_records, is_record
from dit_jax.prepare.tables import read_lines
from dit_jax.prepare.work import digest

LISTS = (".txt", ".lst")


SIDECARS = (".txt", ".json")  # In any case; captions of text come first.


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), which file systems do not agree on."""
    return unicodedata.normalize("NFC", name)


def stem(path: str) -> str:
    """What a media file and its sidecars have in common: the path without suffix, composed."""
    return composed(os.path.splitext(path)[0])


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A file to be prepared."""

    name: str
    """Its path relative to the folder, or as it stands in the list: what records say of it. Bytes
    that are not UTF-8 are written as ``\\xe9``."""
    path: str
    key: str
    """Of its name, size and time of last change."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """What is prepared, sorted by name, and what is not taken for media."""

    items: tuple[Item, ...]
    sidecars: int = 0
    """Captions beside media."""
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    """What was passed over, counted by what it is."""
    orphans: tuple[str, ...] = ()
    """Names of what would be captions, if there were media of that name."""


def find_media(source: str | os.PathLike, leave_out: Collection[str | os.PathLike] = ()) -> Listed:
    """The files of a folder and of those in it, of a list (a path on each line), or the one file; or
    the records of a TFDS builder, ``tfds:NAME_OR_BUILDER_DIR[:split]``.

    Links to folders are followed, and every folder is read once. Hidden files and folders are passed
    over and counted; what ``leave_out`` names (tables of captions, the output) is passed over.
    Nothing is told by a file's name but that ``cat.txt`` and ``cat.json`` beside ``cat.mp4`` are its
    captions, whatever the case of their suffixes.
    """
    if is_record(source):
        records = find_records(str(source))
        return Listed(tuple(Item(name, path, digest(path, key)) for name, path, key in records))
    root, given = Path(source).expanduser(), f"--input {str(source)!r}"
    remote = f"{given}: media are read as local files. Mount the bucket (gcsfuse BUCKET DIR)."
    absent = f"{given} is not there: give a folder of media, a list (.txt) or tfds:NAME[:split]."
    refuse_if([(is_remote(source), remote), (not root.is_dir() and not root.is_file(), absent)])
    notes: Counter[str] = Counter()
    names, beside = [root.name], set[str]()
    if root.is_dir():
        out = {os.path.realpath(Path(path).expanduser()) for path in leave_out}
        names = sorted(_walk(root, out, notes))
        media = {stem(name) for name in names if not _may_caption(name)}
        beside = {name for name in names if _may_caption(name) and stem(name) in media}
    folder = root if root.is_dir() else root.parent
    if root.is_file() and root.suffix.lower() in LISTS:
        listed = [line for _, line in read_lines(root) if not line.startswith("#")]
        twice = [name for name, times in Counter(listed).items() if times > 1]
        refuse_if([(bool(twice), f"{str(source)!r} lists {twice} twice: remove one of the lines.")])
        raw = {name: name for name in sorted(listed)}
    else:
        raw = _escaped(name for name in names if name not in beside)
    refuse_if([(not raw, f"{given} holds no files: give a folder or list of media.")])
    items = tuple(_item(name, str(folder / one)) for name, one in raw.items())
    orphans = tuple(name for name, one in raw.items() if root.is_dir() and _may_caption(one))
    return Listed(items, len(beside), notes, orphans)


def _item(name: str, path: str) -> Item:
    try:
        stat = os.stat(path)
    except OSError:  # It is refused later.
        return Item(name, path, digest(name, None))
    return Item(name, path, digest(name, stat.st_size, stat.st_mtime_ns))


def _walk(root: Path, out: set[str], notes: Counter[str]) -> Iterator[str]:
    """The files in a folder and below, relative to it."""

    def unreadable(error: OSError) -> None:
        notes["folders that cannot be read"] += 1

    seen: set[tuple[int, int]] = set()
    waiting = deque([str(root)])
    # Linked folders come after all others: what can be reached without a link has that name.
    while waiting:
        for folder, folders, files in os.walk(waiting.popleft(), onerror=unreadable):
            about = os.stat(folder)
            if (about.st_dev, about.st_ino) in seen:
                notes["links to folders that are read already"] += 1
                folders.clear()
                continue
            seen.add((about.st_dev, about.st_ino))
            shown = [one for one in folders if not one.startswith(".")]
            notes["hidden folders"] += len(folders) - len(shown)
            folders.clear()
            for one in sorted(shown):
                path = os.path.join(folder, one)
                if os.path.realpath(path) in out:
                    continue
                if os.path.islink(path):
                    waiting.append(path)
                else:
                    folders.append(one)
            for one in files:
                path = os.path.join(folder, one)
                if one.startswith("."):
                    notes["hidden files"] += 1
                elif os.path.realpath(path) not in out:
                    yield os.path.relpath(path, root).replace(os.sep, "/")


def _may_caption(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SIDECARS


def _escaped(names: Iterable[str]) -> dict[str, str]:
    """Names as text that can be stored, and as the file system has them; no two become one."""
    taken = dict.fromkeys(names)
    escaped = {}
    for raw in taken:
        name = os.fsencode(raw).decode(errors="backslashreplace")
        escaped[name if name == raw or name not in taken else f"{name}~{digest(raw)}"] = raw
    return escaped
