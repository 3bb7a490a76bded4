"""Tokenizers from the files that come with a text encoder, by the libraries that wrote them.

Captions are taken as they are: what some pipelines do to prompts beforehand (unescaping of HTML,
``ftfy``, Wan's cleaning of white space) is not done here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_jax.files import InputError, local_copy

END = "</s>"
FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")


def find_tokenizer(folder: Path) -> Path:
    """The first of ``FILES`` in a folder of weights, or in the folder beside it that has the same name
    but for ``tokenizer`` in place of ``text_encoder``, as pipelines have them."""
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for place in (folder, beside):
        for name in FILES:
            if (place / name).is_file():
                return local_copy(place) / name
    raise InputError(
        f"no tokenizer in {str(folder)!r} or {str(beside)!r}: put one of {', '.join(FILES)} there, as "
        "published with the encoder."
    )


def t5_tokenizer(file: Path, vocabulary: int, max_tokens: int) -> Callable[[str], list[int]]:
    """T5's and UMT5's: a caption to its pieces and the end; longer captions are cut before it.

    ``tokenizer.json`` is read by ``tokenizers``, ``spiece.model`` by ``sentencepiece``.
    """
    library = "tokenizers" if file.suffix == ".json" else "sentencepiece"
    try:
        read: Any = importlib.import_module(library)
        if library == "tokenizers":
            pieces = read.Tokenizer.from_file(str(file))
            # Settings in the file that cut or pad are not for captions.
            pieces.no_truncation()
            pieces.no_padding()

            def plain(caption: str) -> list[int]:
                return pieces.encode(caption, add_special_tokens=False).ids

            size, end = pieces.get_vocab_size(), pieces.token_to_id(END)
        else:
            model = read.SentencePieceProcessor(model_file=str(file))
            plain, size = model.encode, model.get_piece_size()
            # An unknown piece gets the number of the piece for unknown ones.
            number = model.piece_to_id(END)
            end = number if model.id_to_piece(number) == END else None
    except Exception as error:  # `tokenizers` raises no class of its own.
        remedy = "pip install -e '.[text]'" if isinstance(error, ImportError) else "get it again"
        raise InputError(
            f"{str(file)!r} cannot be read as a tokenizer by {library!r} ({error}): {remedy}."
        ) from error
    if end is None or size > vocabulary:
        fault = f"no {END!r}" if end is None else f"{size} tokens of at most {vocabulary}"
        raise InputError(f"{str(file)!r} has {fault}: give the one published with the encoder.")
    return lambda caption: [*plain(caption)[: max_tokens - 1], end]
