"""Prompt lists as they are published and typed: read whole, and mistakes named by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_jax.sampling import read_prompts

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "prompts"
BOM = b"\xef\xbb\xbf"
TEXTS = [
    "a red square",
    "# not a comment",
    "雪の中の狐 🦊",
    "two\u2028parts",
    "long " * 200 + "end",
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_every_ending_and_encoding(tmp_path: Path, encoding: str):
    for newline, end in (("\n", ""), ("\r\n", "\r\n"), ("\r", "\r\r \t\r")):
        text = newline.join([" " + TEXTS[0], "", *TEXTS[1:]]) + end
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
def test_tables_and_json(tmp_path: Path, name: str, text: str):
    for bom in (b"", BOM):
        (tmp_path / name).write_bytes(bom + text.encode())
        assert read_prompts(tmp_path / name) == ["a cat", 'a dog, a "cow"', "a cat"]


def test_cells_of_several_lines_and_quotes_in_tsv(tmp_path: Path):
    (tmp_path / "p.csv").write_text('id,prompt\nno,"a cat\nsits"\nno,a dog\n')
    assert read_prompts(tmp_path / "p.csv") == ["a cat\nsits", "a dog"]
    (tmp_path / "p.tsv").write_text('prompt\n"a ""big"" cat"\n"a" and "b"\n')
    assert read_prompts(tmp_path / "p.tsv") == ['a "big" cat', '"a" and "b"']


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("p.txt", b"", "p.txt"),
        ("p.txt", b"a cat\ncaf\xe9", "0xe9"),
        ("p.txt", None, "p.txt"),
        ("p.json", b"[", "p.json"),
        ("p.json", b'["a", 3]', "number 2"),
        ("p.json", b'[{"a": "b", "c": 1}]', "number 1"),
        ("p.json", b'["a cat", "a dog \\ud83d runs"]', "number 2"),
        ("p.json", b"[" * 100_000, "p.json"),
        ("p.jsonl", b'"a"\n\n{"prompt"}', "p.jsonl"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": " "}', "number 2"),
        ("p.tsv", b"a cat\na dog", "number 1"),
        ("p.csv", b'prompt,b\n"x\ny",1\n,2', "number 2"),
        ("p.csv", b'prompt\n"open', "p.csv"),
        ("p.csv", b"prompt\n", "p.csv"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, raw: bytes | None, value: str):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=value):
        read_prompts(tmp_path / name)


# How many there are, how the first begins and the last ends.
LISTS = {
    "Open-Sora-Plan__sora.txt": (51, "A stylish woman walks", "and heavy machinery."),
    "VBench__VBench2_full_text.txt": (1013, "A wooden toy is placed", "the camera circles around."),
    "VBench__VBench_full_info.json": (946, "In a still frame, a stop", "of skis, front view"),
    "VBench__all_dimension_cn.txt": (946, "在静止的画面中，", "双滑雪板的下面，正视图"),
    "geneval__evaluation_metadata.jsonl": (553, "a photo of a bench", "a yellow baseball glove"),
    "parti__PartiPrompts.tsv": (1632, "bond", "musical notes on a computer screen"),
    "t2v_compbench__consistent_attribute_binding.json": (100, "A blue car", "floating upwards"),
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
    if name == "parti__PartiPrompts.tsv":
        assert sum('"' in prompt for prompt in prompts) == 22
