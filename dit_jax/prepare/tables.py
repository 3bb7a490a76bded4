"""Text files that people write by hand or export: their encodings, lines, tables and JSON.

Everything that is read here keeps the place it came from (``line 12``), so that what is wrong with it
can be named. Encodings: UTF-8 with or without a byte order mark, and UTF-16 with one. Others cannot be
told apart reliably and are refused.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_jax.files import SURROGATES, MiB, read_bytes

LIMIT = 256 * MiB
"""Bytes of a file: some millions of prompts or captions."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")
SEPARATED = {".csv": ",", ".tsv": "\t"}
Row = tuple[str, Mapping[str, Any]]
"""Where it stands ("line 3"), and its cells by the names of their columns."""


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which no encoding of Unicode can hold."""
    return SURROGATES.sub("\ufffd", text)


def read_text(path: str | os.PathLike) -> str:
    """The text of a file of at most ``LIMIT`` bytes, local or on Cloud Storage, without its byte order
    mark, its line ends as they are.

    Raises:
        ValueError: where the file cannot be read, is larger, is not UTF-8 (nor marked UTF-16), or
            holds zero bytes.
    """
    raw = read_bytes(path, LIMIT, "the file")
    try:
        text = raw.decode("utf-16" if raw.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"cannot read {str(path)!r}: line {line} is not utf-8 text (byte 0x{raw[error.start]:02x}; "
            "Latin-1 or a Windows code page?); save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"cannot read {str(path)!r}: it holds zero bytes; save it as UTF-8 text")
    return text


def read_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    """The lines that are not blank, without the white space around them, and their numbers from 1.

    Lines end in LF, CRLF or CR, the last one perhaps in nothing, and nowhere else: a prompt may hold
    U+2028 and its like.
    """
    lines = re.split(r"\r\n|\n|\r", read_text(path))
    return [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]


def read_json(path: str | os.PathLike) -> Any:
    """The value of a JSON file; raises ``ValueError`` that names line and column of a mistake."""
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError(f"{str(path)!r} is JSON that nests too deep: correct it") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is no JSON ({error.msg}, line {error.lineno} column {error.colno}): "
            "correct it; a file with a value on each line is called .jsonl"
        ) from error


def read_values(path: str | os.PathLike) -> list[tuple[str, Any]]:
    """The values of a ``.jsonl`` file, one a line, or of a JSON list, each with its place.

    A JSON object that has one list (``{"prompts": [...]}``) stands for that list.
    """
    if Path(path).suffix.lower() in (".jsonl", ".ndjson"):
        return [(f"line {i}", _json_line(path, i, line)) for i, line in read_lines(path)]
    value = read_json(path)
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise ValueError(f"{str(path)!r} holds {_kind(value)}: give a JSON list, or JSON lines")
    return [(f"item {i}", item) for i, item in enumerate(value, 1)]


def _json_line(path: str | os.PathLike, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError(f"{str(path)!r}, line {number} is JSON that nests too deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r}, line {number} is no JSON ({error.msg}, column {error.colno}): every line "
            "is one JSON value"
        ) from error


def _kind(value: Any) -> str:
    kinds = {dict: "one JSON object", str: "one string", list: "a list", type(None): "null"}
    return kinds.get(type(value), f"one {type(value).__name__}")


def read_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of a table by extension: ``.csv`` and ``.tsv`` with a header, ``.jsonl`` and ``.json``
    of objects; a column keeps the name that it has there.

    CSV may be separated by ``,``, ``;`` or tabs (the header tells) and quoted, also over several
    lines. TSV has a row a line; a cell that is quoted as spreadsheets quote it loses those quotes.

    Raises:
        ValueError: where the file cannot be read, or a row does not fit its header.
    """
    extension = Path(path).suffix.lower()
    if extension not in SEPARATED:
        rows = read_values(path)
        for where, value in rows:
            if not isinstance(value, dict):
                raise ValueError(
                    f"{str(path)!r}, {where} is {_kind(value)}: every row is a JSON object"
                )
        return rows
    cells = _tsv(path) if extension == ".tsv" else _csv(path)
    lines = [(i, row) for i, row in cells if any(cell.strip() for cell in row)]
    if not lines:
        raise ValueError(f"{str(path)!r} is empty: it begins with a line of column names")
    header = [name.strip() for name in lines[0][1]]
    if twice := {name for name in header if header.count(name) > 1 and name}:
        raise ValueError(f"{str(path)!r} has two columns {min(twice)!r}: rename one of them")
    rows = []
    for i, row in lines[1:]:
        if len(row) > len(header):
            raise ValueError(
                f"{str(path)!r}, line {i} has {len(row)} cells, and its header {len(header)}: quote "
                "cells that hold the separator"
            )
        padded = row + [""] * (len(header) - len(row))
        rows.append((f"line {i}", dict(zip(header, padded, strict=True))))
    return rows


def _csv(path: str | os.PathLike) -> Iterator[tuple[int, list[str]]]:
    text = read_text(path)
    header = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    start = 1
    try:
        for row in reader:
            yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r}, line {start} is no CSV ({error}): close every quote, and write a quote "
            "inside quotes twice"
        ) from error


def _tsv(path: str | os.PathLike) -> Iterator[tuple[int, list[str]]]:
    for i, line in enumerate(re.split(r"\r\n|\n|\r", read_text(path)), 1):
        yield i, [_unquoted(cell) for cell in line.split("\t")]


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    whole = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else cell


def find_column(columns: list[str], known: tuple[str, ...]) -> str | None:
    """The first of the ``known`` names that a column has, whatever its case, ``-`` and blanks."""
    plain = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(columns)}
    return next((plain[name] for name in known if name in plain), None)
