"""What the documentation says of one's own sources and objectives: its code is what is run here."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dit_jax import train
from dit_jax.config import Run, VideoRun, parse_config, read_config
from dit_jax.parallel import global_batch, local_rows, make_mesh
from dit_jax.training import (
    Checkpointer,
    Progress,
    abstract_params,
    abstract_state,
    init_frozen,
    make_optimizer,
    make_step,
    open_run,
)
from dit_jax.training.video_task import init_params, make_model

pytestmark = pytest.mark.usefixtures("cached", "one_device")
ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    *("--model.dit.width", "48", "--model.dit.heads", "4", "--model.text.width", "32"),
    *("--model.text.depth", "1", "--data.packing.rows", "2", "--checkpoint.every", "2"),
    *("--log.every", "1", "--log.draw-every", "0"),
)
NO_CLIPS = ("--evaluators.1.prompts", 0)
CONSTANT = re.compile(r"\w+\[([\d,]*)\][^=\n]*constant\(")
"""The sizes of constants in optimized HLO."""


def write_page(page: str, folder: Path) -> None:
    """The files of a page of documentation, each named before its code, and the quickstart."""
    text = (ROOT / "docs" / page).read_text()
    for name, code in re.findall(r"`(\w+\.py)`[^\n]*\n\n```python\n(.*?)```", text, re.S):
        (folder / name).write_text(code)
    shutil.copy(ROOT / "configs" / "quickstart.py", folder)


def run(config: Path, output: Path, *more: object, steps: int = 5) -> Any:
    arguments = ["--config", config, "--output", output, "--steps", steps, *SMALL, *more]
    return parse_config([str(one) for one in arguments], "train", "Trains.", Run)


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
    assert stored.data.source == {"type": "my_source:GrowingBars", "external": True}


def test_a_student_learns_from_a_teacher_that_is_no_part_of_it(tmp_path: Path, monkeypatch: Any):
    write_page("objectives.md", tmp_path)
    deep = ("--model.dit.depth", 2, *NO_CLIPS)
    teacher = run(tmp_path / "quickstart.py", tmp_path / "teacher", *deep, steps=1)
    train.train(teacher)
    more = ("--model.dit.depth", 1, "--teacher", tmp_path / "teacher", *NO_CLIPS)
    student = run(tmp_path / "student.py", tmp_path / "student", *more)
    killed(student, monkeypatch)
    train.train(student)
    # Of the student's shapes: a teacher beside it would be refused.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(averages(student)))
    stored = read_config(tmp_path / "student" / "config.json")
    assert type(stored) is VideoRun and stored.model.dit.depth == 1

    mesh = make_mesh(student.mesh)
    task = student.build(mesh)
    optimizer = make_optimizer(student.optimizer, 5)
    shapes, shardings = abstract_state(task.init, optimizer, mesh, task.trainable)
    assert set(shapes.params) == {"params"}
    frozen = init_frozen(task.init, mesh, jax.random.key(0), task.trainable, task.load_frozen)
    kept = Checkpointer(tmp_path / "teacher", student.checkpoint)
    of_teacher = frozen["teacher"]
    same = kept.restore_ema(1, of_teacher, jax.tree.map(lambda leaf: leaf.sharding, of_teacher))
    kept.close()
    jax.tree.map(np.testing.assert_array_equal, same, frozen["teacher"])
    rows = local_rows(mesh, task.rows)
    loader = task.loader(rows)
    batch = global_batch(mesh, next(loader), rows, task.rows)
    loader.close()
    step = make_step(task.loss, optimizer, student.optimizer, student.seed, shardings)
    program = step.lower(shapes, batch, frozen).compile()
    sizes = CONSTANT.findall(program.as_text())
    constant = max(math.prod(int(n) for n in one.split(",") if n) for one in sizes)
    assert constant < max(leaf.size for leaf in jax.tree.leaves(frozen)) / 4
    # An argument that the program does not read has no sharding: of the teacher it reads every weight.
    weights = program.input_shardings[0][2]
    assert len(jax.tree.leaves(weights)) == len(jax.tree.leaves(frozen))
