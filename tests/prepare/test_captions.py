"""Captions beside media and in tables: all found, each with its origin, mistakes named by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_jax.config import check_types
from dit_jax.prepare.captions import (
    Caption,
    CaptionsConfig,
    TableConfig,
    TableRow,
    clip_features,
    clip_texts,
    match_table,
    read_sidecars,
    read_table,
)


def given(text: str, origin: str = "table", **other) -> Caption:
    return Caption(text, origin, **other)


def test_sidecars_of_text_and_json(tmp_path: Path):
    media = tmp_path / "a.b.mp4"
    assert read_sidecars(media) == ()
    (tmp_path / "a.b.txt").write_bytes("\ufeffA cat.\r\n\r\n  猫。 ".encode())
    side = (given("A cat.", "sidecar"), given("猫。", "sidecar"))
    assert read_sidecars(media) == side
    assert read_sidecars(media, whole_text=True) == (given("A cat. 猫。", "sidecar"),)
    stored = {"caption": ["A cat.", "Cat!"], "short": "A cat", "long": "A grey cat."}
    (tmp_path / "a.b.json").write_text(json.dumps({**stored, "license": "CC0"}))
    texts = [("A cat.", "given"), ("Cat!", "given"), ("A cat", "short")]
    more = (
        Caption(text, "sidecar", kind, "CC0")
        for text, kind in [*texts, ("A grey cat.", "descriptive")]
    )
    assert read_sidecars(media) == (*side, *more)
    (tmp_path / "a.b.json").write_text('["One.", "Two."]')
    assert [one.text for one in read_sidecars(media)] == ["A cat.", "猫。", "One.", "Two."]
    # The text file of a text file is not its caption.
    assert read_sidecars(tmp_path / "a.b.json")[0] == side[0]


TABLES = {  # Each with the places of its two rows.
    "t.csv": (
        'file_name,text,licence\na/1.mp4,"A ""big"" cat,\nasleep",CC0\n2.mp4,Dogs,',
        ("line 2", "line 4"),
    ),
    "t.tsv": (
        'Video\tCaption\tLicense\r\na/1.mp4\tA "big" cat, asleep\tCC0\r\n2.mp4\t"Dogs"\t\r\n',
        ("line 2", "line 3"),
    ),
    "t.jsonl": (
        '{"path": "./a/1.mp4", "caption": "A \\"big\\" cat, asleep", "licence": "CC0"}\n'
        '\n{"path": "2.mp4", "caption": "Dogs"}',
        ("line 1", "line 3"),
    ),
    "t.json": (
        '[{"file": "a\\\\1.mp4", "prompt": "A \\"big\\" cat, asleep", "licence": "CC0"},'
        ' {"file": "2.mp4", "prompt": "Dogs"}]',
        ("item 1", "item 2"),
    ),
}


@pytest.mark.parametrize(
    ("name", "encoding"),
    [*((name, "utf-8") for name in TABLES), ("t.csv", "utf-8-sig"), ("t.jsonl", "utf-16")],
)
def test_tables_of_every_kind(tmp_path: Path, name: str, encoding: str):
    text, (first, second) = TABLES[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    cat = given('A "big" cat, asleep', licence="CC0")
    assert read_table(tmp_path / name) == (
        TableRow("a/1.mp4", (cat,), first),
        TableRow("2.mp4", (given("Dogs"),), second),
    )


def test_columns_are_guessed_or_named_and_rows_joined(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("id,file,text,short caption,Long-Caption,words\n7,1.mp4,t,s,l,w\n")
    (row,) = read_table(path)
    kinds = [("t", "given"), ("s", "short"), ("l", "descriptive")]
    assert row.file == "1.mp4" and [(one.text, one.kind) for one in row.captions] == kinds
    (row,) = read_table(path, TableConfig("id", ("words", "short caption"), "text"))
    captions = given("w", licence="t"), given("s", kind="short", licence="t")
    assert row == TableRow("7", captions, "line 2")
    path = tmp_path / "t.jsonl"
    path.write_text('{"file": "1", "caption": ["a", "b"]}\n{"file": "./1", "caption": ["b", "c"]}')
    with pytest.raises(ValueError, match="'1' twice, at line 1 and line 2"):
        read_table(path)
    (row,) = read_table(path, TableConfig(repeated="join"))
    assert [one.text for one in row.captions] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "caption\na cat\n", "line 2 .*'file', only caption"),
        ("t.csv", "file,size\n1.mp4,3\n", "line 2 .*'caption', only file, size"),
        ("t.csv", "file,caption\n1.mp4,a\n2.mp4, \n", "line 3 .*'caption'"),
        ("t.csv", "file,caption\n,a\n", "line 2 .*'file'"),
        ("t.csv", "file,caption\n1.mp4,a,b\n", "line 2 has more cells"),
        ("t.csv", 'file,caption\n1.mp4,"a\n', "line 2"),
        ("t.csv", "file,caption\n", "no rows"),
        ("t.csv", "file,caption,file\n1.mp4,a,b\n", "two columns ..file"),
        ("t.jsonl", '{"file": "1", "caption": "a"}\n["2", "b"]', "line 2"),
        ("t.jsonl", '{"file": "1", "caption": "a"}\n{', "line 2"),
        ("t.json", '{"1.mp4": "a"}', "JSON list"),
        # Beside a medium.
        ("a.txt", " \n", "a.txt"),
        ("a.txt", "Stra\udcdfe", "line 1 .*0xdf"),
        ("a.json", "{", "JSON"),
        ("a.json", '{"fps": 3, "size": 4}', "'caption', only fps, size"),
        ("a.json", '{"caption": 3}', "caption 3"),
        ("a.json", '{"caption": " "}', "'caption'"),
        ("a.json", "3", "a.json"),
    ],
)
def test_bad_tables_and_sidecars_are_refused(tmp_path: Path, name: str, text: str, said: str):
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=said):
        read_table(path) if name[0] == "t" else read_sidecars(path.with_suffix(".mp4"))


def test_rows_find_their_media():
    def row(file: str) -> TableRow:
        return TableRow(file, (given(f"of {file}"),), f"line {len(file)}")

    files = ["a/1.mp4", "b/1.mp4", "a/2.mp4", "3.v2.mp4", "c/4.mp4", "c/5.mp4", Path("6.png")]
    rows = [
        *map(row, ("a/1.mp4", "2.mp4", "3.v2", "/data/raw/c/4.mp4", "d/5.mp4", "1.mp4")),
        *map(row, ("6", "6.png", "7.mp4")),
    ]
    matched = match_table(rows, files)
    assert {file: captions[0].text for file, captions in matched.captions.items()} == {
        "a/1.mp4": "of a/1.mp4",
        "a/2.mp4": "of 2.mp4",
        "3.v2.mp4": "of 3.v2",
        "c/4.mp4": "of /data/raw/c/4.mp4",
        "6.png": "of 6.png",
    }
    # Two files are called 1.mp4; d/5.mp4 is not c/5.mp4; 6 was named better already.
    assert [one.file for one in matched.unmatched] == ["d/5.mp4", "1.mp4", "6", "7.mp4"]
    assert matched.uncaptioned == ("b/1.mp4", "c/5.mp4")
    # Of both forms of a name a row is of its own.
    for name in (both := ["caf\u00e9.mp4", "cafe\u0301.mp4"]):
        assert list(match_table([row(name)], both).captions) == [name]


def test_captions_as_features_of_a_record():
    model = [Caption("s", "model:seer", "short"), Caption("d", "model:seer", "descriptive")]
    captions = [*(given(f"g{i}", licence="CC0") for i in range(3)), given("s", kind="short")]
    two = CaptionsConfig(given=2, licence="mine")
    texts = clip_texts([*captions, model[0]], two)
    assert set(texts) == {"caption", *clip_features(two)}
    assert texts == {
        "caption": "g0",
        "caption_2": "g1",
        "caption_short": "s",
        "caption_descriptive": "",
        "caption_origin": "caption: table; caption_2: table; caption_short: table",
        "licence": "CC0",
    }
    assert set(clip_texts([]).values()) == {""} and clip_texts([], two)["licence"] == "mine"
    # Without a caption that was given, that of a model stands in its place.
    texts = clip_texts(model)
    assert texts["caption"] == texts["caption_descriptive"] == "d"
    assert texts["caption_origin"].startswith("caption: model:seer; caption_short: model:seer; ")
    assert clip_texts(model[:1])["caption"] == "s"
    word = CaptionsConfig(prefix="sks style, ")
    assert clip_texts(model[:1], word)["caption"] == "sks style, s"
    alone = clip_texts([], word)
    assert alone["caption"] == "sks style" and alone["caption_short"] == ""
    with pytest.raises(ValueError, match="given is 0"):
        check_types(CaptionsConfig(given=0))
