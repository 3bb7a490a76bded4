"""What the documentation says of a source of one's own: its code is what is run here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dit_jax import train
from dit_jax.config import External, Run, parse_config, read_config
from dit_jax.parallel import make_mesh
from dit_jax.training import (
    Progress,
    abstract_params,
    open_run,
)
from dit_jax.training.video_task import init_params, make_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    *("--model.dit.width", "48", "--model.dit.heads", "4", "--model.text.width", "32"),
    *("--model.text.depth", "1", "--data.packing.rows", "8", "--checkpoint.every", "2"),
    *("--log.every", "1", "--log.draw-every", "0", "--evaluation.prompts", "0"),
)


def write_page(page: str, folder: Path) -> None:
    """The files of a page of documentation, each named before its code, and the quickstart."""
    text = (ROOT / "docs" / page).read_text()
    for name, code in re.findall(r"`(\w+\.py)`[^\n]*\n\n```python\n(.*?)```", text, re.S):
        (folder / name).write_text(code)
    shutil.copy(ROOT / "configs" / "quickstart.py", folder)


def run(config: Path, output: Path, *more: object) -> Any:
    given = ["--config", config, "--output", output, "--steps", 5, *SMALL, *more]
    return parse_config([str(one) for one in given], "train", "Trains.", Run)


def killed(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until the fourth step, between two checkpoints."""
    report = Progress.report

    def fail(self: Progress, step: int, metrics: dict[str, Any]) -> None:
        if step == 4:
            raise MemoryError("killed")
        report(self, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Progress, "report", fail)
        train.train(config)


def averages(config: Any) -> Any:
    """The averaged parameters of a finished run, of the shapes that sampling expects."""
    checkpointer, step = open_run(config.output)
    assert step == 5
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    model = make_model(config.model, mesh)
    shapes = abstract_params(lambda key: init_params(model, key), mesh)
    params = checkpointer.restore_ema(step, *shapes)
    checkpointer.close()
    return jax.device_get(params)


def test_a_source_of_ones_own_is_resumed_bit_by_bit(tmp_path: Path, monkeypatch: Any):
    write_page("sources.md", tmp_path)
    assert len((tmp_path / "my_source.py").read_text().splitlines()) < 40
    file = tmp_path / "my_config.py"
    whole = run(file, tmp_path / "whole", "--data.source.count", 50, "--model.dit.depth", 1)
    assert whole.data.source.count == 50 and len(whole.data.source) == 50
    train.train(whole)
    again = run(file, tmp_path / "again", "--data.source.count", 50, "--model.dit.depth", 1)
    killed(again, monkeypatch)
    train.train(again)
    jax.tree.map(np.testing.assert_array_equal, averages(whole), averages(again))
    stored = read_config(tmp_path / "again" / "config.json")
    assert stored.data.source == External("my_source:GrowingBars")
