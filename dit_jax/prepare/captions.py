"""Captions that came with media, in files beside them and in tables, and what records say of a clip.

A *sidecar* of ``clips/cat.mp4`` is ``clips/cat.txt`` or ``clips/cat.json``. A *table* is a CSV, TSV,
JSONL or JSON file with a row for each media file. Captions of models come from ``recaption``. Every
caption carries its origin, and the words that a user gave are never replaced, only joined by others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import eq
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from dit_jax.files import SURROGATES, MiB, refuse_if
from dit_jax.prepare import tables
from dit_jax.prepare.listing import SIDECARS, composed, stem
from dit_jax.prepare.tables import encodable, find_column
from dit_jax.types import PositiveInt

# As it came; of the main subject; of everything that is seen.
Kind = Literal["given", "short", "descriptive"]

# Names of columns that are known; the first that is there counts.
CAPTIONS: dict[Kind, str] = {
    "given": "caption captions text prompt description",
    "short": "short caption_short short_caption",
    "descriptive": "descriptive long caption_descriptive caption_long long_caption detailed_caption",
}
KINDS = {name: kind for kind, names in CAPTIONS.items() for name in names.split()}
FILES = "file file_name filename media clip video image video_path image_path path name video_id "
FILES += "videoid id key"
LICENCES = "licence license"
LARGEST = MiB  # Bytes of a sidecar.


@dataclasses.dataclass(frozen=True, slots=True)
class Caption:
    """A caption of a media file, and where it is from."""

    text: str
    origin: str  # "sidecar", "table", "record" or "model:NAME".
    kind: Kind = "given"
    licence: str | None = None  # That of the media file, if a table or sidecar says it.
    repaired: bool = False  # Half a surrogate pair in its text was replaced by U+FFFD.


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """The columns of a table; those that are not named are guessed from their names."""

    # The media file: its path relative to the media's folder, its base name, or its stem.
    file_column: str | None = None
    caption_columns: tuple[str, ...] = ()  # Each gives a caption.
    licence_column: str | None = None
    # What several rows of one file are: a mistake, or its several captions.
    repeated: Literal["refuse", "join"] = "refuse"


@dataclasses.dataclass(frozen=True)
class CaptionsConfig:
    """Which captions that came with media are kept."""

    # A CSV, TSV, JSONL or JSON file with a row for each media file (docs/captions.md).
    table: str | None = None
    columns: TableConfig = TableConfig()  # Of the table; those that are not named are guessed.
    whole_text: bool = False  # A sidecar cat.txt is one caption, and not one on each line.
    given: PositiveInt = 1  # Captions that came with a file are kept, at most so many.
    licence: str = ""  # Of files of which neither table nor sidecar says one.
    # Put before every caption, such as a trigger word, "sks style, "; a clip without captions has it
    # alone.
    prefix: str = ""


def _captions(
    row: Mapping[str, Any], config: TableConfig, origin: str, where: str
) -> tuple[Caption, ...]:
    """The captions in a row; ``InputError`` if it has no column for them, or no text in any."""
    guessed = filter(None, (find_column(row, names) for names in CAPTIONS.values()))
    columns = config.caption_columns or [*guessed] or ["caption"]
    licence = row.get(config.licence_column or find_column(row, LICENCES) or "")
    licence = encodable(str(licence)) if licence else None
    captions: list[Caption] = []
    for column in columns:
        value: Any = _cell(row, column, where)
        kind: Any = KINDS.get(tables.plain(column), "given")
        texts = [x for x in (value if isinstance(value, list) else [value]) if x is not None]
        message = f"{where} has the {column} {value!r}: give a string or several"
        refuse_if((not isinstance(text, str), message) for text in texts)
        for text in filter(str.strip, texts):
            repaired = SURROGATES.search(text) is not None
            text = encodable(" ".join(text.split()))
            captions.append(Caption(text, origin, kind, licence, repaired))
    message = f"{where} has no text as {columns[0]!r}: write one, or leave it out"
    refuse_if([(not captions, message)])
    return tuple(captions)


def _cell(row: Mapping[str, Any], column: str, where: str) -> Any:
    message = f"{where} has no {column!r}, only {', '.join(row) or 'nothing'}: name the column"
    refuse_if([(column not in row, message)])
    return row[column]


# Sidecars


def list_sidecars(folder: str) -> dict[str, list[Path]]:
    """The sidecars in a folder by their stems, text before JSON."""
    beside: dict[str, list[Path]] = defaultdict(list)
    with contextlib.suppress(OSError):
        found = [path for path in Path(folder).iterdir() if path.suffix.lower() in SIDECARS]
        for path in sorted(found, key=lambda x: (SIDECARS.index(x.suffix.lower()), x.name)):
            if path.is_file():
                beside[stem(path.name)].append(path)
    return beside


def read_sidecars(
    media: str | os.PathLike,
    whole_text: bool = False,
    listing: Callable[[str], Mapping[str, list[Path]]] = list_sidecars,
) -> tuple[Caption, ...]:
    """The captions beside a media file, in the order ``NAME.txt``, ``NAME.json``; equal ones once.

    A text file has a caption on each line that is not blank, or, with ``whole_text``, is one caption.
    A JSON file is a string, a list of strings, or an object as a row of a table. ``InputError`` if one
    cannot be read, or holds no caption.
    """
    path = Path(media)
    captions: list[Caption] = []
    for file in listing(str(path.parent)).get(stem(path.name), ()):
        if file == path:
            continue
        where = repr(str(file))
        if file.suffix.lower() == ".json":
            value = tables.read_json(file, LARGEST)
        elif whole_text:
            value = tables.read_text(file, LARGEST)
        else:
            value = [line for _, line in tables.read_lines(file, LARGEST)]
        value = {"caption": value} if isinstance(value, str | list) else value
        message = f"{where} is neither a string nor an object: see docs/captions.md"
        refuse_if([(not isinstance(value, dict), message)])
        captions += _captions(value, TableConfig(), "sidecar", where)
    return tuple(dict.fromkeys(captions))


# Tables


class TableRow(NamedTuple):
    """What a table says of one media file, and its place: ``line 12``, or ``item 12`` of JSON."""

    file: str
    captions: tuple[Caption, ...]
    where: str


class Matched(NamedTuple):
    """Captions by media file, rows whose file is not there (or not the only one of that name), and
    media files without a row."""

    captions: dict[str, tuple[Caption, ...]]
    unmatched: tuple[TableRow, ...]
    uncaptioned: tuple[str, ...]


def read_table(
    path: str | os.PathLike, config: TableConfig = TableConfig()
) -> tuple[TableRow, ...]:
    """The rows of a table of captions, in its order.

    ``InputError`` if it cannot be read, its columns are not there or not known, a row has no file or no
    caption, or (unless ``config.repeated`` joins them) two have the same file.
    """
    rows: dict[str, TableRow] = {}
    for place, row in tables.read_rows(path):
        where = f"{str(path)!r}, {place}"
        column = config.file_column or find_column(row, FILES) or "file"
        name = str(_cell(row, column, where) or "").strip()
        refuse_if([(not name, f"{where} has no media file as {column!r}: fill it in")])
        file, captions = _normal(name), _captions(row, config, "table", where)
        if before := rows.get(file):
            message = f"{str(path)!r} has {file!r} twice, at {before.where} and {place}: remove one"
            refuse_if([(config.repeated == "refuse", f"{message}, or join them (repeated='join')")])
            captions, place = tuple(dict.fromkeys(before.captions + captions)), before.where
        rows[file] = TableRow(file, captions, place)
    refuse_if([(not rows, f"{str(path)!r} has a header and no rows: give one for each file")])
    return tuple(rows.values())


def _normal(name: str) -> str:
    # Bytes that are not UTF-8 as ``listing`` writes them.
    if SURROGATES.search(name):
        name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return str(PurePosixPath(name.replace("\\", "/")))


def match_table(rows: Iterable[TableRow], media: Iterable[str | os.PathLike]) -> Matched:
    """Which row is of which media file.

    A row's file is sought as a path, then as the end of one (or the other way about: tables are moved,
    and folders too), then so again without the media's extension. Accents are compared as composed
    (NFC). What could mean several files means none, and so does a file that an earlier way has found.
    """
    files = {_normal(str(path)): str(path) for path in media}
    found: dict[str, TableRow] = {}
    left = list(rows)
    for form, first in ((str, None), (composed, None), (composed, -1), (stem, -1)):
        # By what two of one name have in common at least, lest every row is held against every file.
        named: dict[tuple[str, ...], list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
        for file in files if left else ():
            parts = PurePosixPath(form(file)).parts
            named[parts[first:]].append((file, parts))
        claims: dict[str, list[TableRow]] = defaultdict(list)
        for row in left:
            parts = PurePosixPath(row.file if form is str else composed(row.file)).parts
            alike = named.get(parts[first:], ())
            ends = [file for file, other in alike if all(map(eq, parts[::-1], other[::-1]))]
            if len(ends) == 1 and ends[0] not in found:
                claims[ends[0]].append(row)
        found |= {file: of[0] for file, of in claims.items() if len(of) == 1}
        taken = {id(row) for row in found.values()}
        left = [row for row in left if id(row) not in taken]
    return Matched(
        {name: found[file].captions for file, name in files.items() if file in found},
        tuple(left),
        tuple(name for file, name in files.items() if file not in found),
    )


# Both, and what a record says


@dataclasses.dataclass
class Given:
    """The captions that came with files, and what was wrong with them, by the files' names; counts of
    what did not meet; and the table's rows that match no file."""

    captions: dict[str, tuple[Caption, ...]] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    unmatched: tuple[str, ...] = ()

    def of(self, name: str, recorded: str = "") -> tuple[Caption, ...]:
        """The captions of a file, and the one that is ``recorded`` with it."""
        captions = (Caption(recorded, "record"),) if recorded else ()
        return self.captions.get(name, ()) + captions


def find_captions(paths: Mapping[str, str], config: CaptionsConfig) -> Given:
    """Captions of the table and, behind them, of sidecars, of files by name; a bad sidecar is a note, a
    bad table an ``InputError``."""
    given = Given()
    if config.table is not None:
        rows = read_table(config.table, config.columns)
        given.captions, unmatched, uncaptioned = match_table(rows, paths)
        print(f"{config.table}: {len(given.captions)} of {len(paths)} files have a row")
        given.unmatched = tuple(f"{row.file} ({row.where})" for row in unmatched)
        given.notes["table rows that match no file"] = len(unmatched)
        given.notes["files without a row in the table"] = len(uncaptioned)
    listing = functools.lru_cache(64)(list_sidecars)  # Files of a folder follow one another.
    for name, path in paths.items():
        captions = given.captions.get(name, ())
        try:
            captions += read_sidecars(path, config.whole_text, listing)
        except (ValueError, OSError) as error:
            given.problems[name] = encodable(f"sidecar: {error}")
            given.notes["sidecars that cannot be read"] += 1
        if captions:
            given.captions[name] = tuple(dict.fromkeys(captions))
        if any(caption.repaired for caption in captions):
            given.problems.setdefault(name, "caption: half a surrogate pair became U+FFFD")
            given.notes["files whose captions were repaired"] += 1
    return given


def clip_features(config: CaptionsConfig = CaptionsConfig()) -> tuple[str, ...]:
    """The names of what ``clip_texts`` gives beside ``caption``: for ``write_records(texts=...)``."""
    further = (f"caption_{i}" for i in range(2, config.given + 1))
    return (*further, "caption_short", "caption_descriptive", "caption_origin", "licence")


def clip_texts(
    captions: Sequence[Caption], config: CaptionsConfig = CaptionsConfig()
) -> dict[str, str]:
    """A clip's captions and licence as features of its record; what there is none of is empty.

    ``caption`` is the first that was given, or else the descriptive or the short one of a model;
    ``caption_2``, ... are others, up to ``config.given`` in all; ``caption_short`` and
    ``caption_descriptive`` are the first of their kind. ``caption_origin`` says where each is from:
    "caption: sidecar; caption_short: model:NAME".
    """
    of = {kind: [one for one in captions if one.kind == kind] for kind in CAPTIONS}
    first = (of["given"] or of["descriptive"] or of["short"])[:1]
    features = ("caption", *clip_features(config))
    found = dict(zip(features[: config.given], first + of["given"][1:], strict=False))
    found |= {f"caption_{kind}": of[kind][0] for kind in ("short", "descriptive") if of[kind]}
    licences = (one.licence for one in captions if one.licence)
    texts = dict.fromkeys(features, "") | {name: one.text for name, one in found.items()}
    texts["caption_origin"] = "; ".join(f"{name}: {one.origin}" for name, one in found.items())
    texts |= {name: prefixed(config.prefix, texts[name]) for name in ("caption", *found)}
    return {**texts, "licence": next(licences, encodable(config.licence))}


def prefixed(prefix: str, caption: str) -> str:
    """The caption behind a prefix; of an empty one the prefix alone, without what would join them."""
    return encodable(prefix) + caption if caption else encodable(prefix).strip(" ,.:;")
