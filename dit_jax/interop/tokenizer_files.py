"""Tokenizers from the files that come with a text encoder, by the libraries that those are of.

``tokenizer.json`` is read by ``tokenizers``, T5's ``spiece.model`` by ``sentencepiece``, and CLIP's
``vocab.json`` and ``merges.txt`` by ``tokenizers`` again, which is told what CLIP does to a text first
(Unicode composition, white space to single blanks, lower case, then words, single digits and
punctuation apart). Both libraries come with ``pip install -e '.[text]'`` and are imported when a folder
needs them.

Captions are taken as they are: what some pipelines do to prompts beforehand (unescaping of HTML,
``ftfy``, Wan's and CLIP's cleaning of white space) is not done here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_jax.files import InputError, MiB, local_copy, read_bytes, read_json

END = "</s>"
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
"""What OpenAI's tokenizer splits a caption into before it looks for pairs."""
T5_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
CLIP_FILES = ("tokenizer.json", "vocab.json")

TOKENIZER_LIMIT = 256 * MiB

Tokenize = Callable[[str], list[int]]
"""A caption to tokens; what begins and ends it is included."""


def _library(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{str(file)!r} is read by the library {name!r}, which is not installed ({error}): pip "
            "install -e '.[text]'."
        ) from error


def find_tokenizer(folder: Path, files: tuple[str, ...]) -> Path:
    """The first of ``files`` in a folder of weights, or in the folder beside it that has the same name
    but for ``tokenizer`` in place of ``text_encoder``, as pipelines have them.

    Raises:
        ValueError: where there is none.
    """
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    places = [folder, *([beside] if beside != folder else [])]
    for place in places:
        for name in files:
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
        f"{', '.join(files)}. Put the files that were published with the encoder there, or give their "
        "folder (tokenizer)."
    )


def t5_tokenizer(file: Path, vocabulary: int, max_tokens: int) -> Tokenize:
    """T5's and UMT5's: pieces, and the end; longer captions are cut before it.

    Raises:
        ValueError: where the file cannot be read, or is of another encoder.
    """
    end: Any
    if file.suffix == ".json":
        pieces = _fast(file)
        plain, size, end = _plain(pieces), pieces.get_vocab_size(), pieces.token_to_id(END)
    else:
        library = _library("sentencepiece", file)
        try:
            model = library.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise _unreadable(file, error) from error
        plain, size = model.encode, model.get_piece_size()
        end = model.piece_to_id(END) if model.id_to_piece(model.piece_to_id(END)) == END else None
    _check(file, size, vocabulary, {END: end})
    return lambda caption: [*plain(caption)[: max_tokens - 1], end]


def clip_tokenizer(file: Path, vocabulary: int, max_tokens: int) -> Tokenize:
    """CLIP's: the beginning, pairs of bytes joined to words, and the end; longer captions are cut
    before it.

    Raises:
        ValueError: where the file cannot be read, or is of another encoder.
    """
    pieces = _fast(file) if file.name == "tokenizer.json" else _of_pairs(file)
    begin, end = pieces.token_to_id(CLIP_BEGIN), pieces.token_to_id(CLIP_END)
    _check(file, pieces.get_vocab_size(), vocabulary, {CLIP_BEGIN: begin, CLIP_END: end})
    plain = _plain(pieces)
    return lambda caption: [begin, *plain(caption)[: max_tokens - 2], end]


def _fast(file: Path) -> Any:
    """The tokenizer of a ``tokenizer.json``, which neither cuts nor pads."""
    library = _library("tokenizers", file)
    try:
        found = library.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises no class of its own.
        raise _unreadable(file, error) from error
    found.no_truncation()
    found.no_padding()
    return found


def _of_pairs(file: Path) -> Any:
    """CLIP's tokenizer of ``vocab.json`` and the ``merges.txt`` beside it."""
    library = _library("tokenizers", file)
    merges = file.with_name("merges.txt")
    try:
        numbers = read_json(file)
        lines = read_bytes(merges, TOKENIZER_LIMIT).decode().splitlines()
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        pieces = library.models.BPE(
            vocab=numbers, merges=pairs, unk_token=CLIP_END, end_of_word_suffix="</w>"
        )
    except Exception as error:  # The library raises no class of its own.
        raise _unreadable(file, error) from error
    found = library.Tokenizer(pieces)
    steps, words = library.normalizers, library.pre_tokenizers
    blank = steps.Replace(library.Regex(r"\s+"), " ")
    found.normalizer = steps.Sequence([steps.NFC(), blank, steps.Lowercase()])
    split = words.Split(library.Regex(CLIP_WORDS), behavior="removed", invert=True)
    found.pre_tokenizer = words.Sequence([split, words.ByteLevel(add_prefix_space=False)])
    marks = [library.AddedToken(mark, special=True) for mark in (CLIP_BEGIN, CLIP_END)]
    found.add_special_tokens([mark for mark in marks if mark.content in numbers])
    return found


def _plain(pieces: Any) -> Tokenize:
    return lambda caption: pieces.encode(caption, add_special_tokens=False).ids


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{str(file)!r} cannot be read as a tokenizer ({error}): get it again.")


def _check(file: Path, size: int, vocabulary: int, marks: dict[str, int | None]) -> None:
    """Raises ``ValueError`` where a tokenizer is not the encoder's."""
    absent = [mark for mark, number in marks.items() if number is None]
    if absent:
        raise ValueError(
            f"{str(file)!r} has no {' and no '.join(map(repr, absent))}, which begin or end captions: "
            "give the tokenizer that was published with the encoder."
        )
    if size > vocabulary:
        raise ValueError(
            f"{str(file)!r} has {size} tokens, and the encoder knows {vocabulary}: give the tokenizer "
            "that was published with the encoder."
        )
