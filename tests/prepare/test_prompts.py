"""Prompt lists as they are published and typed: read whole, and mistakes named by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_jax.files import write_whole
from dit_jax.prepare import tables
from dit_jax.prepare.prompts import read_prompts

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "prompts"
BOM = b"\xef\xbb\xbf"
TEXTS = [
    "a red square",
    "# not a comment",
    "雪の中の狐 🦊",
    "two\u2028parts",
    "long " * 200 + "end",
]


@pytest.mark.parametrize("end", ["", "\n", "\n\n \t\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_every_ending_and_encoding(tmp_path: Path, encoding, newline, end):
    text = newline.join([" " + TEXTS[0], "", *TEXTS[1:]]) + end.replace("\n", newline)
    (tmp_path / "p.txt").write_bytes(text.encode(encoding))
    assert read_prompts(tmp_path / "p.txt") == TEXTS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.tsv", 'Prompt\tNote\r\na cat\tx\r\n\r\na dog, a "cow"\t\r\na cat'),
        ("p.csv", 'id,Prompt\n1,a cat\n2,"a dog, a ""cow"""\n3,a cat'),
        ("p.csv", 'id;prompt_en\r\n1;a cat\r\n2;"a dog, a ""cow"""\r\n3;a cat\r\n'),
        ("p.json", json.dumps(["a cat", ' a dog, a "cow"', "a cat"])),
        ("p.json", json.dumps({"prompts": ["a cat", 'a dog, a "cow"', "a cat"], "n": 3})),
        (
            "p.jsonl",
            '{"prompt": "a cat", "text": "no"}\n\n{"caption": "a dog, a \\"cow\\""}\n"a cat"',
        ),
    ],
)
@pytest.mark.parametrize("bom", [b"", BOM])
def test_tables_and_json(tmp_path: Path, bom: bytes, name: str, text: str):
    (tmp_path / name).write_bytes(bom + text.encode())
    assert read_prompts(tmp_path / name) == ["a cat", 'a dog, a "cow"', "a cat"]


def test_a_column_of_another_name_and_cells_of_several_lines(tmp_path: Path):
    (tmp_path / "p.csv").write_text('prompt,words\nno,"a cat\nsits"\nno,a dog\n')
    assert read_prompts(tmp_path / "p.csv", "words") == ["a cat\nsits", "a dog"]
    (tmp_path / "p.tsv").write_text('prompt\n"a ""big"" cat"\n"a" and "b"\n')
    assert read_prompts(tmp_path / "p.tsv") == ['a "big" cat', '"a" and "b"']


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", BOM + b" \r\n", "holds no prompt"),
        ("p.txt", b"a cat\ncaf\xe9", "line 2 is not utf-8 text .byte 0xe9; Latin-1"),
        ("p.txt", b"\xff\xfea", "is not utf-8"),
        ("p.txt", b"a\0b", "zero bytes"),
        ("p.txt", b"\x89PNG", "line 1 is not utf-8"),
        ("p.txt", None, "No such file"),
        ("p.json", b"[", "is no JSON .*line 1 column 2"),
        ("p.json", b"{}", "holds one JSON object: give a JSON list"),
        ("p.json", b'["a", 3]', "item 2 is 3: give a string"),
        ("p.json", b'[{"a": "b", "c": 1}]', "item 1 has no 'prompt', only a, c"),
        ("p.jsonl", b'"a"\n\n{"prompt"}', "line 3 is no JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": " "}', "line 2 has the prompt ' ': give a text"),
        ("p.tsv", b"a cat\na dog", "line 2 has no 'prompt', only a cat"),
        ("p.tsv", b"prompt\na\tb", "line 2 has 2 cells, and its header 1"),
        ("p.csv", b'prompt,b\n"x\ny",1\n,2', "line 4 has the prompt ''"),
        ("p.csv", b'prompt\n"open', "line 2 is no CSV .*close every quote"),
        ("p.csv", b"", "is empty: it begins with a line of column names"),
        ("p.csv", b"prompt,prompt\n", "two columns 'prompt'"),
        ("p.csv", b"prompt\n", "holds no prompt"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, raw: bytes | None, said: str):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name)


SORA, TILT = "A stylish woman walks down a Tokyo street", "equipment, and heavy machinery."
LISTS = {
    "Open-Sora-Plan__sora.txt": (51, SORA, TILT),
    "VBench__VBench2_full_text.txt": (1013, "A wooden toy is placed", "the camera circles around."),
    "VBench__VBench_full_info.json": (
        946,
        "In a still frame, a stop sign",
        "on the bottom of skis, front view",
    ),
    "VBench__all_dimension_cn.txt": (946, "在静止的画面中，", "双滑雪板的下面，正视图"),
    "VBench__vbench2_i2v_full_info.json": (
        1118,
        "a close up of a blue and orange liquid",
        "chopsticks over a bowl of food",
    ),
    "geneval__evaluation_metadata.jsonl": (553, "a photo of a bench", "a yellow baseball glove"),
    "parti__PartiPrompts.tsv": (1632, "bond", "musical notes on a computer screen"),
    "t2v_compbench__3_spatial_relationship.txt": (100, "A dog running", "playing under a desk"),
    "t2v_compbench__6_interaction.txt": (100, "Two cars collide", "watching them grow"),
    "t2v_compbench__consistent_attribute_binding.json": (100, "A blue car", "floating upwards"),
    "t2v_compbench__motion_binding.json": (100, "A cat slinking", "up a tall christmas tree"),
}


@pytest.mark.parametrize("name", LISTS)
def test_published_lists_are_read_whole(name: str):
    if not (PUBLISHED / name).exists():
        pytest.skip(f"{PUBLISHED / name} is absent: published lists are not in the repository")
    count, first, last = LISTS[name]
    prompts = read_prompts(PUBLISHED / name)
    assert len(prompts) == count
    assert prompts[0].startswith(first) and prompts[-1].endswith(last)
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


def test_every_published_list_is_tested_and_the_long_lines_are_whole():
    if not PUBLISHED.is_dir():
        pytest.skip(f"{PUBLISHED} is absent: published lists are not in the repository")
    assert {path.name for path in PUBLISHED.iterdir()} == set(LISTS)
    long = read_prompts(PUBLISHED / "VBench__VBench2_full_text.txt")
    assert max(map(len, long)) == 1120
    quoted = read_prompts(PUBLISHED / "parti__PartiPrompts.tsv")
    assert sum('"' in prompt for prompt in quoted) == 22


FAULTS = PUBLISHED.parent / "faults"


def test_half_an_emoji_is_told_with_its_place(tmp_path: Path):
    (tmp_path / "p.json").write_text('["a cat", "a dog \\ud83d runs", "\\ud83d\\udc15"]')
    with pytest.raises(ValueError, match=r"p.json', item 2 holds '\\ud83d'.*a dog"):
        read_prompts(tmp_path / "p.json")
    (tmp_path / "p.jsonl").write_text('{"text": "a cat"}\n{"text": "\\udc15"}\n')
    with pytest.raises(ValueError, match=r"p.jsonl', line 2 holds '\\udc15'"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.json").write_text('["\\ud83d\\udc15"]')
    assert read_prompts(tmp_path / "p.json") == ["🐕"]
    if (shared := FAULTS / "lone_surrogate_prompts.json").exists():
        with pytest.raises(ValueError, match="item"):
            read_prompts(shared)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_a_file_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(tables, "LIMIT", 2**20)
    with pytest.raises(ValueError, match="'/dev/zero' has more than 1,048,576 bytes"):
        read_prompts("/dev/zero")


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_json_that_nests_without_end_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{name}'.* nests too deep"):
        read_prompts(tmp_path / name)


def test_prompts_lie_on_cloud_storage(bucket: str):
    write_whole(f"{bucket}/prompts/p.csv", "prompt\na cat\na dog\n")
    assert read_prompts(f"{bucket}/prompts/p.csv") == ["a cat", "a dog"]
