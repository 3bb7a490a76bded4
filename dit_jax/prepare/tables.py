"""Text files that people write by hand or export: their encodings, lines, tables and JSON.

What is read keeps its place (``line 12``), so that a mistake can be named. Encodings are UTF-8, with or
without a byte order mark, and UTF-16 with one; others cannot be told apart.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_jax.files import SURROGATES, InputError, MiB, checking_input, read_bytes, refuse_if

LIMIT = 256 * MiB  # Bytes of a file: some millions of prompts or captions.
UTF16 = (b"\xff\xfe", b"\xfe\xff")
Row = tuple[str, dict[str, Any]]
"""Its place in the file, and its cells by the names of their columns."""


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which no encoding of Unicode can hold."""
    return SURROGATES.sub("\ufffd", text)


def read_text(path: str | os.PathLike, limit: int = LIMIT) -> str:
    """The text of a file without its byte order mark; ``InputError`` if it is not UTF-8 or UTF-16, or
    has more than ``limit`` bytes."""
    raw = read_bytes(path, limit)
    try:
        text = raw.decode("utf-16" if raw.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        where = f"{str(path)!r}, line {line} is not utf-8 text (byte 0x{raw[error.start]:02x})"
        raise InputError(f"{where}: save the file as UTF-8") from error
    refuse_if([("\0" in text, f"{str(path)!r} holds zero bytes: save it as UTF-8 text")])
    return text


def read_lines(path: str | os.PathLike, limit: int = LIMIT) -> list[tuple[int, str]]:
    """The lines that are not blank, without the white space around them, and their numbers from 1."""
    # Not ``splitlines``: a caption may hold U+2028 and its like.
    lines = re.split(r"\r\n|\n|\r", read_text(path, limit))
    return [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]


def read_json(path: str | os.PathLike, limit: int = LIMIT) -> Any:
    """The value of a JSON file."""
    text = read_text(path, limit)
    with checking_input(f"{str(path)!r} is no JSON", "correct it"):
        return json.loads(text)


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a table: CSV and TSV with a header, or the objects of JSON Lines or a JSON list."""
    suffix, name = Path(path).suffix.lower(), repr(str(path))
    if suffix in (".csv", ".tsv"):
        return _read_separated(read_text(path), name, suffix == ".tsv")
    rows: list[tuple[str, Any]] = []
    if suffix in (".jsonl", ".ndjson"):
        for i, line in read_lines(path):
            with checking_input(f"{name}, line {i} is no JSON", "one value on each line"):
                rows.append((f"line {i}", json.loads(line)))
    else:
        value = read_json(path)
        if isinstance(value, dict):  # Of one list, {"clips": [...]}, perhaps.
            lists = [inner for inner in value.values() if isinstance(inner, list)]
            value = lists[0] if len(lists) == 1 else value
        refuse_if([(not isinstance(value, list), f"{name} is no JSON list: give one")])
        rows = [(f"item {i}", item) for i, item in enumerate(value, 1)]
    message = f"is no JSON object: every row of {name} is one"
    refuse_if((not isinstance(row, dict), f"{name}, {place} {message}") for place, row in rows)
    return rows


def _read_separated(text: str, name: str, tsv: bool) -> list[Row]:
    header = next((line for line in text.splitlines() if line.strip()), "")
    # Quotes in TSV have no meaning but around a whole cell, where spreadsheets put them.
    how: Any = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
    if not tsv:
        how = dict(delimiter=max(",;\t", key=header.count))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **how)
    rows: list[tuple[str, list[str]]] = []
    start = 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                rows.append((f"line {start}", [_unquoted(x) for x in cells] if tsv else cells))
            start = reader.line_num + 1  # A quoted cell may have several lines.
    except csv.Error as error:
        raise InputError(f"{name}, line {start} is no CSV ({error}): close every quote") from error
    refuse_if([(not rows, f"{name} is empty: begin it with a line of column names")])
    columns = [column.strip() for column in rows[0][1]]
    twice = {column for column in columns if column and columns.count(column) > 1}
    refuse_if([(bool(twice), f"{name} has two columns {[*twice]}: rename one of them")])
    message = f"has more cells than its {len(columns)} columns: quote cells that hold the separator"
    refuse_if((len(row) > len(columns), f"{name}, {place} {message}") for place, row in rows)
    blank = dict.fromkeys(columns, "")
    return [(place, blank | dict(zip(columns, row, strict=False))) for place, row in rows[1:]]


def _unquoted(cell: str) -> str:
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return whole[1].replace('""', '"') if whole else cell


def plain(column: str) -> str:
    """A column's name as those that are known are written: in lower case, without ``-`` and blanks."""
    return re.sub(r"[\s-]+", "_", column.strip().lower())


def find_column(columns: Iterable[str], known: str) -> str | None:
    """The column with the first of the ``known`` names, between blanks, as ``plain`` reads them."""
    names = {plain(column): column for column in reversed(list(columns))}
    return next((names[name] for name in known.split() if name in names), None)
