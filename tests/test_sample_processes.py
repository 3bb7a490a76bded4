"""Modes and long clips by two real processes on loopback: what one process makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dit_jax import sample
from dit_jax.sampling.media import read_video, write_video
from tests.runs import CONFIG, Run, Verbs, end, free_port
from tests.test_sample import ACROSS, OTHER, PROMPT

UPSCALE = str(Path(CONFIG).with_name("tiny_upscale_config.py"))

pytestmark = pytest.mark.usefixtures("cached")


@pytest.mark.parametrize("mode", ["extend", "long"])
def test_two_processes_make_what_one_makes(whole: Run, verbs: Verbs, tmp_path: Path, mode: str):
    if mode == "extend":
        file = tmp_path / "given.gif"
        pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 3), np.uint8)
        write_video(file, pixels.repeat(8, 1).repeat(8, 2), 8)
        # Both directions: two clips, a row for each process.
        asked = ["--prompt", PROMPT, "--video", file, "--forward", 2, "--backward", 2]
    else:
        # Longer than a window: what the first made is the history of the second, on both processes.
        asked = ["--prompt", PROMPT, OTHER, "--length", 9]
    given = [mode, "--checkpoint", whole.directory, *asked, "--seed", 5, "--output"]
    alone, shared = tmp_path / "alone.png", tmp_path / "shared.png"
    assert sample.main([str(one) for one in [*given, alone]]) == 0
    port = free_port()
    alike = dataclasses.replace(verbs, cache=verbs.cache / str(port))
    ended = end(*(alike.start("sample", [*given, shared], place=(i, 2, port)) for i in (0, 1)))
    assert [one.status for one in ended] == [0, 0]
    assert "clip(s)" in ended[0].text and "clip(s)" not in ended[1].text
    one, two = read_video(alone)[0], read_video(shared)[0]
    assert one.shape == two.shape and one.std() > 0
    assert np.abs(one.astype(int) - two).max() <= ACROSS


def test_files_are_enlarged_on_every_mesh(verbs: Verbs, tmp_path: Path):
    """A loop of four frames, which do not fill their last token, by a run of super-resolution."""
    run, file = tmp_path / "run", tmp_path / "small.gif"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 3), np.uint8)
    write_video(file, pixels.repeat(4, 1).repeat(4, 2), 8)
    training = ["--config", UPSCALE, "--output", run, "--steps", 2]
    training += ["--evaluators.1.prompts", 0, "--log.draw-every", 50]
    (ended,) = end(verbs.start("train", training))
    assert ended.status == 0, ended.text
    one = tmp_path / "one.png"
    asked = ["upscale", "--checkpoint", run, "--videos", file, "--prompt", PROMPT]
    alone = verbs.start("sample", [*asked, "--output", one])
    many = tmp_path / "many.png"
    mesh = ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.context", 2, "--mesh.tensor", 2]
    assert sample.main([str(x) for x in [*asked, "--output", many, *mesh]]) == 0
    (ended,) = end(alone)
    assert ended.status == 0, ended.text
    made = [read_video(path)[0].astype(int) for path in (one, many)]
    assert made[0].shape == (1, 24, 4 * 24, 3) and made[0].std() > 0
    assert np.abs(made[0] - made[1]).max() <= ACROSS
