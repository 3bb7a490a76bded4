"""Benchmarks that can be tried in seconds still run."""

from __future__ import annotations

import numpy as np
import pytest

from tests.runs import ROOT
from tests.scripts import load_script


def test_our_train_step_learns(monkeypatch: pytest.MonkeyPatch, one_device: None):
    script = load_script("benchmarks", "train_step")
    monkeypatch.setattr(script, "SIZES", {"tiny": (16, 1, 2, 8)})
    step, first = script.jax_step("tiny", False, "float32")
    losses = [step() for _ in range(5)]
    assert first > 0 and np.isfinite(losses).all() and losses[-1] < losses[0]


def test_the_judge_of_characters_knows_them_from_any_frame_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbour
    script = load_script("benchmarks", "sprites")
    rng = np.random.default_rng(0)
    samples = [
        {
            "video": rng.integers(0, 256, (8, 4, 4, 3)).astype(np.uint8),
            "caption": f"body {body}, trousers 0, top 0, hair 0 {action} facing left",
        }
        for body in range(3)
        for action in ("walks", "casts")
    ]
    truth = script.Truth(samples)
    made = [np.roll(sample["video"], i, 0) for i, sample in enumerate(samples)]
    right = dict.fromkeys(("action", "character", "both"), 1.0)
    found = truth.judge(made, range(6))
    assert {name: found[name] for name in right} == right and found["psnr"] > 60
    # Clip 1 is the same character casting, clip 2 another that walks.
    for asked, wrong in ((1, "action"), (2, "character")):
        found = truth.judge([made[0]], [asked])
        assert found[wrong] == found["both"] == 0 and found["psnr"] < 12
    assert truth.another(0) == 2 and truth.another(5) == 1
    # Of some frames only: those of the clip from the frame on that fits best.
    assert truth.judge([made[0]], [0], slice(2, 5))["both"] == 1
