"""Modes and long clips by two real processes on loopback: what one process makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dit_jax import sample
from dit_jax.sampling.media import read_video, write_video
from tests.optional import optional
from tests.runs import Run, Verbs, end, free_port
from tests.test_sample import ACROSS, OTHER, PROMPT

pytestmark = pytest.mark.usefixtures("cached")


@pytest.mark.parametrize("mode", ["extend", "long"])
def test_two_processes_make_what_one_makes(whole: Run, verbs: Verbs, tmp_path: Path, mode: str):
    if mode == "extend":
        optional("av")
        file = tmp_path / "given.gif"
        pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 3), np.uint8)
        write_video(file, pixels.repeat(8, 1).repeat(8, 2), 8)
        # Both directions: two clips, a row for each process.
        asked = ["--prompt", PROMPT, "--extend", file, "--forward", 2, "--backward", 2]
    else:
        # Longer than a window: what the first made is the history of the second, on both processes.
        asked = ["--prompt", PROMPT, OTHER, "--long", 9]
    given = ["--checkpoint", whole.directory, *asked, "--seed", 5, "--output"]
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
