"""Tokenizers from the files that come with a text encoder, by the libraries that wrote them.

``tokenizer.json`` is read by ``tokenizers`` and T5's ``spiece.model`` by ``sentencepiece``. Both come
with ``pip install -e '.[text]'`` and are imported when a folder needs them.

Captions are taken as they are: what some pipelines do to prompts beforehand (unescaping of HTML,
``ftfy``, Wan's cleaning of white space) is not done here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_jax.files import InputError, MiB, local_copy

END = "</s>"
FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
TOKENIZER_LIMIT = 256 * MiB

Tokenize = Callable[[str], list[int]]
"""A caption to tokens; the one that ends it is included."""


def _library(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{str(file)!r} is read by the library {name!r}, which is not installed ({error}): pip "
            "install -e '.[text]'."
        ) from error


def find_tokenizer(folder: Path) -> Path:
    """The first of ``FILES`` in a folder of weights, or in the folder beside it that has the same name
    but for ``tokenizer`` in place of ``text_encoder``, as pipelines have them.

    Raises:
        ValueError: if there is none.
    """
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    places = [folder, *([beside] if beside != folder else [])]
    for place in places:
        for name in FILES:
            if (place / name).is_file():
                file = local_copy(place) / name
                if file.stat().st_size > TOKENIZER_LIMIT:
                    raise InputError(
                        f"{str(place / name)!r} has more than {TOKENIZER_LIMIT:,} bytes: no tokenizer "
                        "has so many. Get it again."
                    )
                return file
    raise ValueError(
        f"no tokenizer in {' or '.join(repr(str(place)) for place in places)}: none of "
        f"{', '.join(FILES)}. Put the files that were published with the encoder there, or give their "
        "folder (tokenizer)."
    )


def t5_tokenizer(file: Path, vocabulary: int, max_tokens: int) -> Tokenize:
    """T5's and UMT5's: pieces, and the end; longer captions are cut before it.

    Raises:
        ValueError: if the file cannot be read, or is another encoder's.
    """
    library = _library("tokenizers" if file.suffix == ".json" else "sentencepiece", file)
    try:
        if file.suffix == ".json":
            pieces = library.Tokenizer.from_file(str(file))
            pieces.no_truncation()
            pieces.no_padding()

            def plain(caption: str) -> list[int]:
                return pieces.encode(caption, add_special_tokens=False).ids

            size, end = pieces.get_vocab_size(), pieces.token_to_id(END)
        else:
            model = library.SentencePieceProcessor(model_file=str(file))
            plain, size = model.encode, model.get_piece_size()
            # An unknown piece gets the number of the piece for unknown ones.
            number = model.piece_to_id(END)
            end = number if model.id_to_piece(number) == END else None
    except Exception as error:  # `tokenizers` raises no class of its own.
        raise ValueError(
            f"{str(file)!r} cannot be read as a tokenizer ({error}): get it again."
        ) from error
    if end is None or size > vocabulary:
        missing = f"has no {END!r}" if end is None else f"has {size} tokens of at most {vocabulary}"
        raise ValueError(
            f"{str(file)!r} {missing}: give the tokenizer that was published with the encoder."
        )
    return lambda caption: [*plain(caption)[: max_tokens - 1], end]
