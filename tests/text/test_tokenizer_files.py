"""Tokenizers of the files that encoders come with, beside ``transformers``', id by id."""

import sys

import pytest

from dit_jax.text.tokenizers import find_tokenizer, t5_tokenizer
from tests.text.text_folders import CAPTIONS, needs_transformers, transformers
from tests.text_files import needs_tokenizers, write_sentencepiece

pytestmark = needs_tokenizers


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return write_sentencepiece(tmp_path_factory.mktemp("t5"))


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


def test_long_captions_are_cut_before_the_end(pieces):
    whole, cut = t5_tokenizer(pieces, 200, 512), t5_tokenizer(pieces, 200, 6)
    assert cut(CAPTIONS[1]) == [*whole(CAPTIONS[1])[:5], 1]


def test_settings_in_a_file_that_cut_or_pad_are_not_obeyed(pieces, tmp_path):
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
    with pytest.raises(ValueError, match=r"no tokenizer in .*_encoder_2' or .*tokenizer_2'"):
        find_tokenizer(folder)
    beside.mkdir()
    (beside / "spiece.model").write_bytes(pieces.read_bytes())
    assert find_tokenizer(folder) == beside / "spiece.model"
    (folder / "tokenizer.json").write_text("{}")
    assert find_tokenizer(folder) == folder / "tokenizer.json"


def test_files_that_are_none_are_said_to_be(pieces, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json' cannot be read as a tokenizer"):
        t5_tokenizer(tmp_path / "tokenizer.json", 9, 9)
    (tmp_path / "spiece.model").write_bytes(b"none")
    with pytest.raises(ValueError, match="spiece.model' cannot be read as a tokenizer"):
        t5_tokenizer(tmp_path / "spiece.model", 9, 9)
    with pytest.raises(ValueError, match=r"has \d\d tokens of at most 9"):
        t5_tokenizer(pieces, 9, 9)


@pytest.mark.parametrize(
    "name, file", [("sentencepiece", "spiece.model"), ("tokenizers", "tokenizer.json")]
)
def test_a_library_that_is_not_there_is_named(name, file, pieces, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"by '{name}' .*pip install -e '.\[text\]'"):
        t5_tokenizer(pieces.with_name(file), 200, 9)
