"""The page about Wan: every command of it is run, on small pipelines with random weights."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_jax import interop
from dit_jax.config import read_config
from dit_jax.sampling.media import read_video, write_png
from dit_jax.sampling.pipeline import load_run
from tests.prepare.made_media import moving, run_here, write_video
from tests.runs import ROOT

PAGE = (ROOT / "docs" / "wan.md").read_text()
FOLDERS = {
    "Wan2.1-T2V-1.3B-Diffusers": "2.1-t2v",
    "Wan2.2-TI2V-5B-Diffusers": "2.2-ti2v",
    "Wan2.2-T2V-A14B-Diffusers": "2.2-t2v-a14b",
}
SMALL = {
    "train": {
        "--steps": "2",
        "--data.packing.row-tokens": "512",
        "--data.packing.row-text": "1024",
        "--data.packing.row-segments": "2",
        "--data.packing.threads": "0",
        "--checkpoint.every": "2",
        "--log.every": "1",
    },
    "sample": {"--frames": "5", "--height": "64", "--width": "96", "--steps": "2", "--num": "2"},
    "prepare": {"--workers.count": "1"},
}
"""What every command of a verb gets, in place of its own: the small Wan is one in its weights alone."""


def commands() -> list[list[str]]:
    """The words of every command of the page, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [one for one in words if one and one[0] == "python" and one[2] != "dit_jax.plan"]


def words_of(line: str) -> list[str]:
    return ["python", "-m", *shlex.split(line)]


def run(words: list[str]) -> None:
    """``python -m dit_jax.VERB ...`` in this process."""
    assert words[:2] == ["python", "-m"]
    verb, rest = words[2], words[3:]
    small = SMALL.get(verb.removeprefix("dit_jax."), {})
    for option in small.keys() & {"--frames"} & set(rest):
        small = {key: value for key, value in small.items() if key != option}
    for option, value in small.items():
        if option in rest:
            rest[rest.index(option) + 1] = value
        elif option != "--num":
            rest += [option, value]
    name = verb if verb.split(".")[-1] not in ("prepare", "lora") else f"{verb}.__main__"
    status = importlib.import_module(name).main(rest)
    assert not status, shlex.join(words)


@pytest.fixture
def folder(
    small_wan: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where the commands are given: with pipelines, videos and pictures, as the page has them."""
    for name, kind in FOLDERS.items():
        (tmp_path / name).symlink_to(small_wan(kind))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("videos", "pictures", "prior"):
        (tmp_path / name).mkdir()
    write_video(tmp_path / "videos" / "a.mp4", moving(26, 96, 160, 0), 24)
    (tmp_path / "videos" / "a.txt").write_text("a red circle moves left\n")
    write_video(tmp_path / "videos" / "b.mp4", moving(20, 96, 128, 1), 16)
    for i in range(3):
        write_png(tmp_path / "pictures" / f"{i}.png", moving(1, 96, 128, i + 2)[0])
        # What random weights make may be too even to be kept.
        write_png(tmp_path / "prior" / f"more-{i}.png", moving(1, 96, 128, i + 5)[0])
    write_png(tmp_path / "cat.png", moving(1, 96, 128, 9)[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dit_jax.prepare.stages.run", run_here)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Twenty commands, each of which compiles.
def test_every_command_of_the_page_runs(folder: Path, one_device: None):
    for words in commands():
        run(words)
    config = read_config(folder / "runs" / "wan_lora" / "config.json")
    assert config.steps == 2 and config.text_encoder.hash and config.codec.hash
    for name in re.findall(r"--output (\S+\.mp4)", PAGE):
        clip, _ = read_video(folder / name)
        assert clip.shape == (5, 64, 96, 3) and np.ptp(clip) > 0
    assert exported_is_merged(folder) < 1e-3
    assert experts_changed("runs/wan_lora_low") == (False, True)
    assert experts_changed("runs/wan_lora_high") == (True, False)


def experts_changed(*lora: str) -> tuple[bool, ...]:
    """Whether adapters change the expert of high noise levels, and that of low ones."""
    plain, adapted = load_run("runs/wan_a14b").params, load_run("runs/wan_a14b", lora=lora).params
    return tuple(
        any(bool((x != y).any()) for x, y in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in ((plain.high, adapted.high), (plain.low, adapted.low))
    )


def exported_is_merged(folder: Path) -> float:
    """How far the products of the file for Diffusers are from what merging changes, relatively."""
    run(words_of("dit_jax.lora merge --base runs/wan_lora --output runs/merged"))
    run(words_of("dit_jax.convert --input runs/merged --output merged --to diffusers"))
    of_base = interop.read_weights(folder / next(iter(FOLDERS)) / "transformer")[0]
    of_merged = interop.read_weights(folder / "merged")[0]
    lora = interop.read_safetensors(folder / "style-diffusers.safetensors")
    worst = 0.0
    for key, weight in of_base.items():
        change, name = of_merged[key] - weight, f"transformer.{key.removesuffix('.weight')}"
        if f"{name}.lora_A.weight" in lora:
            product = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
            worst = max(worst, np.abs(product - change).max() / np.abs(change).max())
        else:
            np.testing.assert_array_equal(change, 0)
    assert len(lora) == 2 * 2 * 10  # A and B of ten matrices in two blocks.
    return worst


def test_the_page_names_what_it_has():
    """Commands name configs, folders and files that earlier ones make."""
    made = {*FOLDERS, "videos", "pictures", "cat.png"}
    for words in commands():
        for option, value in zip(words, words[1:], strict=False):
            if option in ("--input", "--for-run", "--checkpoint", "--lora", "--image", "--base"):
                assert value.partition(":")[0] in made, shlex.join(words)
            if option == "--config":
                assert (ROOT / value).exists()
            if option == "--output":
                made |= {value, f"{value}/low_noise"}
        if "--config" in words and "--output" not in words:
            text = (ROOT / words[words.index("--config") + 1]).read_text()
            made |= set(re.findall(r'output="([^"]+)"', text))
        if "--name" in words:
            made.add("data")
