"""Where captions come from: files beside the media, and tables that name the media.

A *sidecar* of ``clips/cat.mp4`` is ``clips/cat.txt`` or ``clips/cat.json``. A *table* is a CSV, TSV,
JSONL or JSON file with a row for each media file. Captions of models come from ``recaption``. Every
caption carries its origin, and the words that a user gave are never replaced, only joined by others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dit_jax.files import SURROGATES, MiB, refuse_if
from dit_jax.prepare.recorded import is_record
from dit_jax.prepare.tables import (
    encodable,
    find_column,
    read_json,
    read_lines,
    read_rows,
    read_text,
)

Kind = Literal["given", "short", "descriptive"]
"""``given``: as it came; ``short``: the main subject; ``descriptive``: everything that is seen."""

CAPTION_KEYS: dict[Kind, tuple[str, ...]] = {
    "given": ("caption", "captions", "text", "prompt", "description"),
    "short": ("short", "caption_short", "short_caption"),
    "descriptive": tuple(
        "descriptive long caption_descriptive caption_long long_caption detailed_caption".split()
    ),
}
FILE_KEYS = tuple(
    "file file_name filename media clip video image video_path image_path path name video_id videoid "
    "id key".split()
)
LICENCE_KEYS = ("licence", "license")
SIDECARS = (".txt", ".json")
"""The suffixes of sidecars, in any case."""
LARGEST = MiB
"""Bytes of a sidecar."""


@dataclasses.dataclass(frozen=True, slots=True)
class Caption:
    """A caption of a media file, and where it is from."""

    text: str
    origin: str
    """``sidecar``, ``table``, ``record`` or ``model:NAME``."""
    kind: Kind = "given"
    licence: str | None = None
    """That of the media file, where a table or sidecar says it."""
    repaired: bool = False
    """Half a surrogate pair in its text was replaced by U+FFFD."""


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """The columns of a table; what is not given is guessed from their names."""

    file_column: str | None = None
    """The media file: its path relative to the media's folder, its base name, or its stem. Unset: the
    first there is of ``FILE_KEYS``."""
    caption_columns: tuple[str, ...] = ()
    """Each gives a caption. Unset: all there are of ``CAPTION_KEYS``."""
    licence_column: str | None = None
    repeated: Literal["refuse", "join"] = "refuse"
    """What several rows of one file are: a mistake, or its several captions."""


@dataclasses.dataclass(frozen=True)
class TableRow:
    """What a table says of one media file."""

    file: str
    captions: tuple[Caption, ...]
    where: str
    """``line 12`` (CSV, TSV, JSONL) or ``item 12`` (JSON)."""


@dataclasses.dataclass(frozen=True)
class Matched:
    """What a table said of the media that there are."""

    captions: dict[str, tuple[Caption, ...]]
    """By media file, as it was given."""
    unmatched: tuple[TableRow, ...]
    """Rows whose file is not there, or is not the only one of that name."""
    uncaptioned: tuple[str, ...]
    """Media files without a row."""


def stem(path: str) -> str:
    """What a media file and its sidecars have in common: the path without suffix, composed (NFC)."""
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])


@functools.lru_cache(64)
def _sidecars_in(folder: str) -> dict[str, list[Path]]:
    """The sidecars in a folder by their stems, text before JSON."""
    names: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
        names = sorted(entry.name for entry in entries if entry.is_file())
    beside: dict[str, list[Path]] = {}
    for suffix in SIDECARS:
        for name in names:
            if os.path.splitext(name)[1].lower() == suffix:
                beside.setdefault(stem(name), []).append(Path(folder, name))
    return beside


def read_sidecars(media: str | os.PathLike, whole_text: bool = False) -> tuple[Caption, ...]:
    """The captions beside a media file, in the order ``NAME.txt``, ``NAME.json``; equal ones once.

    A text file has a caption on each line that is not blank, or, with ``whole_text``, is one caption.
    A JSON file is a string, a list of strings, or an object with any of ``CAPTION_KEYS`` (and a
    licence); their values are strings or lists of strings. ``InputError`` if one cannot be read, or
    holds no caption.
    """
    _sidecars_in.cache_clear()
    return _listed_sidecars(media, whole_text)


def _listed_sidecars(media: str | os.PathLike, whole_text: bool) -> tuple[Caption, ...]:
    """``read_sidecars`` of file after file: a folder is listed once, as it was at the first of them."""
    path = Path(media)
    files = _sidecars_in(os.path.dirname(path)).get(stem(path.name), ())
    captions = [one for file in files if file != path for one in _read_sidecar(file, whole_text)]
    return tuple(dict.fromkeys(captions))


def _read_sidecar(path: Path, whole_text: bool) -> tuple[Caption, ...]:
    large = os.stat(path).st_size > LARGEST
    refuse_if([(large, f"{str(path)!r} has more than {LARGEST:,} bytes: captions are shorter")])
    if path.suffix.lower() == ".txt":
        text = read_text(path)
        value: Any = [text] if whole_text else [line for _, line in read_lines(path)]
        refuse_if([(not text.strip(), f"{str(path)!r} holds no caption: write one, or remove it")])
    else:
        value = read_json(path)
    if isinstance(value, str | list):
        value = {"caption": value}
    message = f"{str(path)!r} is neither a string nor an object: see docs/captions"
    refuse_if([(not isinstance(value, dict), message)])
    return _captions(value, TableConfig(), "sidecar", f"{str(path)!r}")


def _caption(text: str, origin: str, kind: Kind = "given", licence: str | None = None) -> Caption:
    repaired = SURROGATES.search(text) is not None
    return Caption(encodable(" ".join(text.split())), origin, kind, licence, repaired)


def _captions(
    row: Mapping[str, Any], config: TableConfig, origin: str, where: str
) -> tuple[Caption, ...]:
    """The captions in a row; ``InputError`` if it has no column for them, or no text in any."""
    columns = list(row)
    named: list[tuple[str, Kind]] = [(column, _kind(column)) for column in config.caption_columns]
    if not named:
        for kind, keys in CAPTION_KEYS.items():
            if column := find_column(columns, keys):
                named.append((column, kind))
    absent = [column for column, _ in named if column not in row] or [CAPTION_KEYS["given"][0]]
    message = (
        f"{where} has no {absent[0]!r}, only {', '.join(columns) or 'nothing'}: name the column"
    )
    refuse_if([(not named or absent[0] in dict(named) and absent[0] not in row, message)])
    licence = row.get(config.licence_column or find_column(columns, LICENCE_KEYS) or "")
    licence = encodable(str(licence)) if licence else None
    captions: list[Caption] = []
    for column, kind in named:
        value = row[column]
        texts = [
            text for text in (value if isinstance(value, list) else [value]) if text is not None
        ]
        strings = all(isinstance(text, str) for text in texts)
        refuse_if([(not strings, f"{where} has the {column} {value!r}: give a string or several")])
        captions += [_caption(text, origin, kind, licence) for text in texts if text.strip()]
    refuse_if(
        [(not captions, f"{where} has no text as {named[0][0]!r}: write one, or leave it out")]
    )
    return tuple(captions)


def _kind(column: str) -> Kind:
    for kind, keys in CAPTION_KEYS.items():
        if find_column([column], keys):
            return kind
    return "given"


def read_table(path: str | os.PathLike, config: TableConfig | None = None) -> tuple[TableRow, ...]:
    """The rows of a table of captions, in its order.

    ``InputError`` if it cannot be read, its columns are not there or not known, a row has no file or no
    caption, or (unless ``config.repeated`` joins them) two have the same file.
    """
    config = config or TableConfig()
    rows: dict[str, TableRow] = {}
    for place, row in read_rows(path):
        where = f"{str(path)!r}, {place}"
        column = config.file_column or find_column(list(row), FILE_KEYS) or FILE_KEYS[0]
        name = str(row.get(column) or "").strip()
        message = f"{where} has no {column!r}, only {', '.join(row) or 'nothing'}: name the column"
        blank = f"{where} has no media file as {column!r}: fill it in"
        refuse_if([(column not in row, message), (not name, blank)])
        file = _normal(name)
        captions = _captions(row, config, "table", where)
        if before := rows.get(file):
            message = f"{str(path)!r} has {file!r} twice, at {before.where} and {place}: remove one"
            refuse_if([(config.repeated == "refuse", f"{message}, or join them (repeated='join')")])
            captions = tuple(dict.fromkeys(before.captions + captions))
        rows[file] = TableRow(file, captions, before.where if before else place)
    refuse_if([(not rows, f"{str(path)!r} has a header and no rows: give one for each file")])
    return tuple(rows.values())


def _normal(name: str) -> str:
    # Bytes that are not UTF-8 as ``listing`` writes them.
    if SURROGATES.search(name):
        name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return str(PurePosixPath(name.replace("\\", "/")))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def match_table(rows: Sequence[TableRow], media: Sequence[str | os.PathLike]) -> Matched:
    """Which row is of which media file.

    A row's file is sought as a path, then as the end of one (or the other way about: tables are moved,
    and folders too), then so again without the media's extension. Accents are compared as composed
    (NFC). What could mean several files means none, and so does a file that an earlier way, or an
    earlier row, has found.
    """
    exact = {_normal(str(path)): str(path) for path in media}
    times = Counter(map(_composed, exact))
    given = {(_composed(f) if times[_composed(f)] == 1 else f): name for f, name in exact.items()}
    found: dict[str, TableRow] = {}
    left = []
    for row in rows:
        file = row.file if row.file in given else _composed(row.file)
        if file in given and file not in found:
            found[file] = row
        else:
            left.append(row)
    for extension in (True, False):
        named: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for file in given if left else ():
            path = PurePosixPath(file)
            parts = (path if extension else path.with_suffix("")).parts
            named.setdefault(parts[-1], []).append((file, parts))
        claims: dict[str, list[TableRow]] = {}
        for row in left:
            parts = PurePosixPath(_composed(row.file)).parts
            alike = named.get(parts[-1], ()) if parts else ()
            ends = [f for f, other in alike if _share_end(parts, other)]
            if len(ends) == 1 and ends[0] not in found:
                claims.setdefault(ends[0], []).append(row)
        found |= {file: of[0] for file, of in claims.items() if len(of) == 1}
        taken = {id(row) for row in found.values()}
        left = [row for row in left if id(row) not in taken]
    return Matched(
        {name: found[file].captions for file, name in given.items() if file in found},
        tuple(left),
        tuple(name for file, name in given.items() if file not in found),
    )


def _share_end(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    shared = min(len(one), len(other))
    return one[-shared:] == other[-shared:]


def text_features(given: int = 1) -> tuple[str, ...]:
    """The names of what ``record_texts`` gives beside ``caption``: for ``write_records(texts=...)``."""
    further = (f"caption_{i}" for i in range(2, given + 1))
    return (*further, "caption_short", "caption_descriptive", "caption_origin")


def record_texts(captions: Sequence[Caption], given: int = 1) -> dict[str, str]:
    """A clip's captions as features of its record; what there is none of is empty.

    ``caption`` is the first that was given, ``caption_2``, ... are others, up to ``given`` in all;
    ``caption_short`` and ``caption_descriptive`` are the first of their kind. ``caption_origin`` says
    where each is from: "caption: sidecar; caption_short: model:NAME".
    """
    refuse_if([(given < 1, f"given is {given}: at least 1 caption of a clip is kept.")])
    of_kind = {kind: [one for one in captions if one.kind == kind] for kind in CAPTION_KEYS}
    places = ["caption", *(f"caption_{i}" for i in range(2, given + 1))]
    found = dict(zip(places, of_kind["given"], strict=False))
    found |= {
        f"caption_{kind}": of_kind[kind][0] for kind in ("short", "descriptive") if of_kind[kind]
    }
    texts = {
        name: found[name].text if name in found else ""
        for name in ("caption", *text_features(given))
    }
    texts["caption_origin"] = "; ".join(f"{name}: {one.origin}" for name, one in found.items())
    return texts


@dataclasses.dataclass(frozen=True)
class CaptionsConfig:
    """Where given captions are from."""

    table: str | None = None
    """A CSV, TSV, JSONL or JSON file with a row for each media file (docs/captions.md)."""
    columns: TableConfig = TableConfig()
    whole_text: bool = False
    """A sidecar ``cat.txt`` is one caption, and not one on each line."""
    given: int = 1
    """Captions that came with a file are kept, at most so many."""
    licence: str = ""
    """Of files of which neither table nor sidecar says one."""

    def __post_init__(self) -> None:
        refuse_if([(self.given < 1, f"captions.given is {self.given}: it is at least 1.")])


@dataclasses.dataclass
class Given:
    """The captions that came with files, by their names."""

    captions: dict[str, tuple[Caption, ...]]
    problems: dict[str, str]
    """Sidecars that could not be read."""
    table: str = ""
    """What became of the table, in a line."""
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    """What did not meet, or was repaired, counted by what it is."""
    unmatched: tuple[str, ...] = ()
    """Rows of the table that match no file, and where they stand."""


def given_captions(paths: Mapping[str, str], config: CaptionsConfig) -> Given:
    """Captions of the table and, behind them, of sidecars, of files by name; a bad sidecar is a note, a
    bad table an ``InputError``."""
    given = Given({}, {})
    if config.table is not None:
        matched = match_table(read_table(config.table, config.columns), list(paths))
        given.captions |= matched.captions
        given.table = (
            f"{config.table}: {len(matched.captions)} of {len(paths)} files have a row, and "
            f"{len(matched.unmatched)} rows match no file"
        )
        given.unmatched = tuple(f"{row.file} ({row.where})" for row in matched.unmatched)
        given.notes["table rows that match no file"] = len(matched.unmatched)
        given.notes["files without a row in the table"] = len(matched.uncaptioned)
    for name, path in paths.items():
        if is_record(path):
            continue
        try:
            beside = _listed_sidecars(path, config.whole_text)
        except (ValueError, OSError) as error:
            given.problems[name] = encodable(f"sidecar: {error}")
            given.notes["sidecars that cannot be read"] += 1
            beside = ()
        if both := tuple(dict.fromkeys(given.captions.get(name, ()) + beside)):
            given.captions[name] = both
            if any(caption.repaired for caption in both):
                given.problems.setdefault(name, "caption: half a surrogate pair became U+FFFD")
                given.notes["files whose captions were repaired"] += 1
    return given


def clip_texts(captions: Sequence[Caption], config: CaptionsConfig) -> dict[str, str]:
    """A clip's captions and licence as features of its record.

    Where none was given, ``caption`` is the descriptive or else the short one of the model, and its
    origin says so; a clip without any has an empty one, and trains as if it had been dropped.
    """
    texts = record_texts(captions, config.given)
    made = next((k for k in ("caption_descriptive", "caption_short") if texts[k]), None)
    if not texts["caption"] and made is not None:
        texts["caption"] = texts[made]
        origins = dict(one.split(": ", 1) for one in texts["caption_origin"].split("; "))
        texts["caption_origin"] = f"caption: {origins[made]}; {texts['caption_origin']}"
    licences = [one.licence for one in captions if one.licence]
    return {**texts, "licence": licences[0] if licences else encodable(config.licence)}


def clip_features(config: CaptionsConfig) -> tuple[str, ...]:
    """The names of what ``clip_texts`` gives beside ``caption``."""
    return (*text_features(config.given), "licence")
