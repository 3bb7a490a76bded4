"""Tokenizers of the files that encoders come with, beside ``transformers``', id by id."""

import json

import pytest

from dit_jax.interop.tokenizer_files import (
    CLIP_FILES,
    T5_FILES,
    clip_tokenizer,
    find_tokenizer,
    t5_tokenizer,
)
from tests.interop.text_folders import (
    CAPTIONS,
    needs_transformers,
    transformers,
)
from tests.text_files import needs_tokenizers, write_pairs, write_sentencepiece

pytestmark = needs_tokenizers


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return write_sentencepiece(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder / "vocab.json", len(write_pairs(folder))


@needs_transformers
def test_pieces_are_transformers(pieces, tmp_path):
    theirs = transformers.T5Tokenizer.from_pretrained(pieces.parent)
    ours = t5_tokenizer(pieces, 200, 512)
    theirs.save_pretrained(tmp_path)
    fast = t5_tokenizer(tmp_path / "tokenizer.json", 200, 512)
    for caption in CAPTIONS:
        wanted = theirs(caption).input_ids
        assert ours(caption) == fast(caption) == wanted and wanted[-1] == 1
    assert ours("") == [1]


@needs_transformers
def test_pairs_are_transformers(pairs, tmp_path):
    theirs = transformers.CLIPTokenizer.from_pretrained(pairs[0].parent)
    ours = clip_tokenizer(pairs[0], pairs[1], 77)
    theirs.save_pretrained(tmp_path)
    fast = clip_tokenizer(tmp_path / "tokenizer.json", pairs[1], 77)
    for caption in [*CAPTIONS, "said <|endoftext|> there"]:
        wanted = theirs(caption, truncation=True, max_length=77).input_ids
        assert ours(caption) == fast(caption) == wanted
    assert ours("") == [pairs[1] - 2, pairs[1] - 1]


def test_long_captions_are_cut_before_the_end(pieces, pairs):
    whole, cut = t5_tokenizer(pieces, 200, 512), t5_tokenizer(pieces, 200, 6)
    assert cut(CAPTIONS[1]) == [*whole(CAPTIONS[1])[:5], 1]
    begin, end = pairs[1] - 2, pairs[1] - 1
    found = clip_tokenizer(*pairs, 77)("circle " * 100)
    assert len(found) == 77 and (found[0], found[-1]) == (begin, end)
    assert found.count(end) == 1


def test_settings_in_a_file_that_cut_or_pad_are_not_obeyed(pieces, pairs, tmp_path):
    import tokenizers

    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    theirs.enable_truncation(2)
    theirs.enable_padding(length=9)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert t5_tokenizer(tmp_path / "tokenizer.json", 2, 512)("a a a a") == [0, 0, 0, 0, 1]


def test_tokenizers_are_found_in_the_folder_or_beside_it(pieces, tmp_path):
    folder, beside = tmp_path / "text_encoder_2", tmp_path / "tokenizer_2"
    folder.mkdir()
    with pytest.raises(
        ValueError, match=r"no tokenizer in .*_encoder_2' or .*tokenizer_2': none of"
    ):
        find_tokenizer(folder, T5_FILES)
    beside.mkdir()
    (beside / "spiece.model").write_bytes(pieces.read_bytes())
    assert find_tokenizer(folder, T5_FILES) == beside / "spiece.model"
    with pytest.raises(ValueError, match="none of tokenizer.json, vocab.json"):
        find_tokenizer(beside, CLIP_FILES)
    (folder / "tokenizer.json").write_text("{}")
    assert find_tokenizer(folder, T5_FILES) == folder / "tokenizer.json"


def test_files_that_are_none_are_said_to_be(pieces, pairs, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json' cannot be read as a tokenizer"):
        t5_tokenizer(tmp_path / "tokenizer.json", 9, 9)
    (tmp_path / "spiece.model").write_bytes(b"none")
    with pytest.raises(ValueError, match="spiece.model' cannot be read as a tokenizer"):
        t5_tokenizer(tmp_path / "spiece.model", 9, 9)
    (tmp_path / "vocab.json").write_bytes(pairs[0].read_bytes())
    with pytest.raises(ValueError, match="vocab.json' cannot be read .*merges.txt"):
        clip_tokenizer(tmp_path / "vocab.json", 9999, 9)
    with pytest.raises(ValueError, match=r"has \d\d tokens, and the encoder knows 9:"):
        t5_tokenizer(pieces, 9, 9)
    numbers = json.loads(pairs[0].read_text())
    del numbers["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(numbers))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"has no '<\|endoftext\|>', which begin or end"):
        clip_tokenizer(tmp_path / "vocab.json", 9999, 9)


@pytest.mark.parametrize("name", ["sentencepiece", "tokenizers"])
def test_a_library_that_is_not_there_is_named(name, pieces, pairs, monkeypatch):
    import importlib

    real = importlib.import_module

    def absent(wanted, *given):
        if wanted == name:
            raise ImportError(f"No module named {wanted!r}")
        return real(wanted, *given)

    monkeypatch.setattr(importlib, "import_module", absent)
    message = rf"read by the library '{name}', which is not installed .*pip install -e '.\[text\]'"
    with pytest.raises(ValueError, match=message):
        if name == "sentencepiece":
            t5_tokenizer(pieces, 200, 9)
        else:
            clip_tokenizer(*pairs, 9)
