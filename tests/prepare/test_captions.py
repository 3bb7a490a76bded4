"""Captions beside media and in tables: all found, each with its origin, mistakes named by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_jax.prepare.captions import (
    Caption,
    TableConfig,
    TableRow,
    match_table,
    read_sidecars,
    read_table,
    record_texts,
    text_features,
)

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "data" / "clips"


def given(text: str, origin: str = "table", **other) -> Caption:
    return Caption(text, origin, **other)


def test_sidecars_of_text_and_json(tmp_path: Path):
    media = tmp_path / "a.b.mp4"
    assert read_sidecars(media) == ()
    (tmp_path / "a.b.txt").write_bytes("\ufeffA cat.\r\n\r\n  猫。 ".encode())
    side = (given("A cat.", "sidecar"), given("猫。", "sidecar"))
    assert read_sidecars(media) == side
    assert read_sidecars(media, whole_text=True) == (given("A cat. 猫。", "sidecar"),)
    stored = {
        "caption": ["A cat.", "Cat!"],
        "short": "A cat",
        "long": "A grey cat.",
        "license": "CC0",
    }
    (tmp_path / "a.b.json").write_text(json.dumps(stored))
    assert read_sidecars(media) == (
        *side,
        given("A cat.", "sidecar", licence="CC0"),
        given("Cat!", "sidecar", licence="CC0"),
        given("A cat", "sidecar", kind="short", licence="CC0"),
        given("A grey cat.", "sidecar", kind="descriptive", licence="CC0"),
    )
    (tmp_path / "a.b.json").write_text('["One.", "Two."]')
    assert [one.text for one in read_sidecars(media)] == ["A cat.", "猫。", "One.", "Two."]
    # The text file of a text file is not its caption.
    assert read_sidecars(tmp_path / "a.b.json")[0] == side[0]


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.txt", b" \n", "a.txt' holds no caption"),
        ("a.txt", "Straße".encode("latin-1"), "line 1 is not utf-8 text .byte 0xdf"),
        ("a.json", b"{", "is no JSON"),
        ("a.json", b'{"fps": 3, "size": 4}', "a.json' has no 'caption', only fps, size"),
        ("a.json", b'{"caption": 3}', "has the caption 3: give a string"),
        ("a.json", b'{"caption": " "}', "has no text as 'caption'"),
        ("a.json", b"3", "is neither a string nor an object"),
    ],
)
def test_bad_sidecars_are_refused(tmp_path: Path, name: str, raw: bytes, said: str):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=said):
        read_sidecars(tmp_path / "a.mp4")


TABLES = {
    "t.csv": 'file_name,text,licence\na/1.mp4,"A ""big"" cat,\nasleep",CC0\n2.mp4,Dogs,',
    "t.tsv": 'Video\tCaption\tLicense\r\na/1.mp4\tA "big" cat, asleep\tCC0\r\n2.mp4\tDogs\t\r\n',
    "t.jsonl": '{"path": "./a/1.mp4", "caption": "A \\"big\\" cat, asleep", "licence": "CC0"}\n'
    '\n{"path": "2.mp4", "caption": "Dogs"}',
    "t.json": '[{"file": "a\\\\1.mp4", "prompt": "A \\"big\\" cat, asleep", "licence": "CC0"},'
    ' {"file": "2.mp4", "prompt": "Dogs"}]',
}
PLACES = {
    "t.csv": ("line 2", "line 4"),
    "t.tsv": ("line 2", "line 3"),
    "t.jsonl": ("line 1", "line 3"),
    "t.json": ("item 1", "item 2"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_kind(tmp_path: Path, name: str, encoding: str):
    (tmp_path / name).write_bytes(TABLES[name].encode(encoding))
    first, second = PLACES[name]
    cat = given('A "big" cat, asleep', licence="CC0")
    assert read_table(tmp_path / name) == (
        TableRow("a/1.mp4", (cat,), first),
        TableRow("2.mp4", (given("Dogs"),), second),
    )


def test_columns_are_guessed_or_named(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("id,file,text,short caption,Long-Caption,words\n7,1.mp4,t,s,l,w\n")
    (row,) = read_table(path)
    assert row.file == "1.mp4"
    assert [(one.text, one.kind) for one in row.captions] == [
        ("t", "given"),
        ("s", "short"),
        ("l", "descriptive"),
    ]
    (row,) = read_table(path, TableConfig("id", ("words", "short caption"), "text"))
    assert row == TableRow(
        "7",
        (given("w", licence="t"), given("s", kind="short", licence="t")),
        "line 2",
    )


def test_several_captions_of_a_file(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"file": "1", "caption": ["a", "b"]}\n{"file": "./1", "caption": ["b", "c"]}')
    with pytest.raises(
        ValueError, match="has '1' twice, at line 1 and line 2: remove one, or join"
    ):
        read_table(path)
    (row,) = read_table(path, TableConfig(repeated="join"))
    assert [one.text for one in row.captions] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "t.csv",
            "caption\na cat\n",
            "line 2 has no 'file', only caption: name the column",
        ),
        ("t.csv", "file,size\n1.mp4,3\n", "line 2 has no 'caption', only file, size"),
        ("t.csv", "file,caption\n1.mp4,a\n2.mp4, \n", "line 3 has no text as 'caption'"),
        ("t.csv", "file,caption\n,a\n", "line 2 has no media file as 'file'"),
        ("t.csv", "file,caption\n1.mp4,a,b\n", "line 2 has more cells than its 2"),
        ("t.csv", 'file,caption\n1.mp4,"a\n', "line 2 is no CSV"),
        ("t.csv", "file,caption\n", "a header and no rows"),
        (
            "t.jsonl",
            '{"file": "1", "caption": "a"}\n["2", "b"]',
            "line 2 is no JSON object",
        ),
        ("t.json", '{"1.mp4": "a"}', "is no JSON list"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, name: str, text: str, said: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_table(tmp_path / name)


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


def test_captions_as_features_of_a_record():
    captions = [
        *(given(f"g{i}") for i in range(3)),
        given("s", kind="short"),
        given("s of a model", "model:seer", kind="short"),
    ]
    texts = record_texts(captions, given=2)
    assert set(texts) == {"caption", *text_features(2)}
    assert texts == {
        "caption": "g0",
        "caption_2": "g1",
        "caption_short": "s",
        "caption_descriptive": "",
        "caption_origin": "caption: table; caption_2: table; caption_short: table",
    }
    assert set(record_texts([]).values()) == {""}
    assert record_texts(captions[:1], given=2)["caption_2"] == ""
    with pytest.raises(ValueError, match="given is 0"):
        record_texts([], given=0)


def test_the_manifest_of_real_clips():
    if not CLIPS.is_dir():
        pytest.skip(f"{CLIPS} is absent: real clips are not in the repository")
    media = sorted(path.name for path in CLIPS.iterdir() if path.suffix != ".json")
    matched = match_table(read_table(CLIPS / "MANIFEST.json"), media)
    assert len(matched.captions) == len(media) == 19 and not matched.unmatched
    (again,) = matched.captions["again.mkv"]
    assert again.text.endswith('signs the word "again" in American Sign Language.')
    assert again.licence == "CC BY 4.0 (LICENSE of repo)" and again.origin == "table"
