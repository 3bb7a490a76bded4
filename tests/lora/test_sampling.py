"""Clips of a run of adapters, of runs and files beside any checkpoint, and of the verb's own runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_jax import sample
from dit_jax.config import ExpertConfig, VideoRun, read_config
from dit_jax.files import InputError
from dit_jax.lora import __main__ as verb
from dit_jax.lora import files
from dit_jax.lora.pipeline import open_adapted, split_weight
from dit_jax.sampling.modes import plain
from dit_jax.sampling.pipeline import load_run
from tests.lora.adapted import adapters_of, base_config, random_adapter, save_adapter, save_base

SMALL: Any = {"steps": 2, "batch": 1}


def run_verb(*arguments: object) -> int:
    return verb.main([str(one) for one in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two runs of adapters, and the second as a file."""
    folder = tmp_path_factory.mktemp("sampling")
    base = save_base(base_config(folder / "base"))
    for name, seed in (("one", 1), ("two", 2)):
        config = adapters_of(base, folder / name)
        adapter = random_adapter(config, seed)
        save_adapter(config, adapter)
    files.write_adapter(folder / "two.safetensors", adapter, base, "own")
    return folder


def clip(folder: Path, run: str, *lora: str, **options: Any) -> np.ndarray:
    """The latents of one clip."""
    pipeline = load_run(folder / run, lora=lora, **SMALL, **options)
    (video,) = pipeline.sample([plain(pipeline.request("a red circle", 3))])
    return video.astype(np.float32)


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether clips are the same, but for rounding to 8 bits."""
    return bool(np.abs(one - other).max() <= 1)


def test_adapters_add_up_merged_and_unmerged(folder: Path, one_device: None):
    plain_clip, own = clip(folder, "base"), clip(folder, "one")
    assert not close(plain_clip, own)
    assert close(own, clip(folder, "base", str(folder / "one")))
    assert close(own, clip(folder, "one", unmerged=True))
    assert close(plain_clip, clip(folder, "base", f"{folder / 'one'}:0"))
    both = clip(folder, "one", f"{folder / 'two.safetensors'}:0.5")
    assert not close(both, own)
    assert close(
        both, clip(folder, "base", str(folder / "one"), f"{folder / 'two'}:0.5", unmerged=True)
    )
    assert split_weight("gs://bucket/x") == ("gs://bucket/x", 1.0)


def test_verb_exports_imports_and_merges(folder: Path, one_device: None, tmp_path: Path):
    file, again, merged = tmp_path / "a.safetensors", tmp_path / "again", tmp_path / "merged"
    assert run_verb("export", "--lora", folder / "one", "--output", file, "--layout", "own") == 0
    assert run_verb("import", "--lora", file, "--base", folder / "base", "--output", again) == 0
    assert read_config(again / "config.json").lora.rank == 3  # pyright: ignore
    assert run_verb("merge", "--base", folder / "one", "--output", merged) == 0
    assert type(read_config(merged / "config.json")) is VideoRun
    own = clip(folder, "one")
    assert close(own, clip(tmp_path, "again")) and close(own, clip(tmp_path, "merged"))
    # A layout that no published model holds; an output that is there.
    assert run_verb("export", "--lora", folder / "one", "--output", tmp_path / "b.safetensors") == 2
    assert run_verb("export", "--lora", folder / "one", "--output", file, "--layout", "own") == 2


def test_command_takes_adapters(folder: Path, one_device: None, tmp_path: Path):
    common = ["--checkpoint", str(folder / "base"), "--prompt", "a red circle", "--steps", "2"]
    common += ["--output", str(tmp_path / "a.png"), "--frames", "1"]
    assert (
        sample.main([*common, "--lora", f"{folder / 'two.safetensors'}:0.8", str(folder / "one")])
        == 0
    )
    assert sample.main([*common, "--lora", str(folder / "nothing")]) == 2
    assert sample.main([*common, "--lora", str(folder / "base")]) == 2


def test_expert_has_adapters_of_its_own(folder: Path, one_device: None):
    expert = save_base(base_config(folder / "expert"), seed=5)
    config = adapters_of(expert, folder / "of_expert")
    save_adapter(config, random_adapter(config, 6))

    def opened(*lora: str) -> Any:
        one = load_run(folder / "base", **SMALL)
        config = dataclasses.replace(one.config, expert=ExpertConfig(expert.output, below=0.5))
        parts = config, one.mesh, one.codec, one.checkpointer, one.step, False
        return open_adapted(*parts, lora, False).params

    def kernel(params: Any) -> np.ndarray:
        return np.asarray(params["params"]["dit"]["blocks"]["mlp"]["up"]["kernel"])

    experts = opened(str(folder / "one"), str(folder / "of_expert"))
    of_base = load_run(folder / "base", lora=[str(folder / "one")], **SMALL).params
    np.testing.assert_array_equal(kernel(experts.high), kernel(of_base))
    of_expert = load_run(folder / "of_expert", **SMALL).params
    np.testing.assert_allclose(kernel(experts.low), kernel(of_expert), rtol=1e-6)
    # Of a file nobody knows which of the two it adapts.
    with pytest.raises(InputError, match="two experts"):
        opened(str(folder / "two.safetensors"))
