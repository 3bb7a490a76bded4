"""Lists of prompts, as benchmarks publish them and as people type them."""

from __future__ import annotations

import os
from pathlib import Path

from dit_jax.files import SURROGATES, InputError
from dit_jax.prepare.tables import SEPARATED, find_column, read_lines, read_rows, read_values

COLUMNS = ("prompt", "prompts", "prompt_en", "caption", "text")
"""Names of the column or key that holds the prompts, in the order in which they are looked for."""


def read_prompts(path: str | os.PathLike, column: str | None = None) -> list[str]:
    """The prompts of a file in its order, repeated ones repeated, white space around them removed.

    ``.csv`` and ``.tsv`` have a header, ``.json`` is a list, ``.jsonl`` has a value on each line: of
    strings, or of objects. Any other file has a prompt on each line that is not blank; nothing is
    special there (a prompt may begin with ``#``). ``column`` names the column or key; where it is not
    given it is the first of ``COLUMNS`` that there is.

    Raises:
        ValueError: where the file is missing, is not UTF-8 (nor marked UTF-16), holds no prompt, or a
            row has none; it names the line.
    """
    extension = Path(path).suffix.lower()
    if extension in SEPARATED:
        prompts = [_of_row(path, row, where, column) for where, row in read_rows(path)]
    elif extension in (".json", ".jsonl", ".ndjson"):
        prompts = [_of_value(path, item, where, column) for where, item in read_values(path)]
    else:
        prompts = [line for _, line in read_lines(path)]
    if not prompts:
        raise ValueError(
            f"prompt file {str(path)!r} holds no prompt: write one a line, or give a table with a "
            f"column {COLUMNS[0]!r}"
        )
    return prompts


def _of_value(path: str | os.PathLike, value: object, where: str, column: str | None) -> str:
    if isinstance(value, dict):
        return _of_row(path, value, where, column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"prompt file {str(path)!r}, {where} is {value!r}: give a string, or an object with one"
        )
    return check_text(value.strip(), f"prompt file {str(path)!r}, {where}")


def _of_row(path: str | os.PathLike, row: object, where: str, column: str | None) -> str:
    assert isinstance(row, dict)
    name = column if column is not None else find_column(list(row), COLUMNS)
    if name is None or name not in row:
        raise ValueError(
            f"prompt file {str(path)!r}, {where} has no {column or COLUMNS[0]!r}, only "
            f"{', '.join(map(str, row)) or 'nothing'}: name the column of the prompts "
            f"{COLUMNS[0]!r}"
        )
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(
            f"prompt file {str(path)!r}, {where} has the {name} {row[name]!r}: give a text, or leave "
            "the row out"
        )
    return check_text(row[name].strip(), f"prompt file {str(path)!r}, {where}")


def check_text(text: str, where: str) -> str:
    """The text; raises ``ValueError`` where it holds what UTF-8 cannot, naming its place.

    Half an emoji (a lone surrogate) comes from JSON that was cut, bytes that are not UTF-8 from a
    command line.
    """
    if found := SURROGATES.search(text):
        shown = text[max(found.start() - 20, 0) : found.end() + 20]
        raise InputError(
            f"{where} holds {found[0]!r}, which is no character, in {shown!r}: write the text anew, as "
            "UTF-8."
        )
    return text
