"""What the documentation says of one's own sources and objectives: its code is what is run here."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dit_jax import train, training
from dit_jax.config import Run, VideoRun, parse_config, read_config, to_dict
from dit_jax.parallel import make_mesh
from dit_jax.training import CheckpointConfig, Checkpointer, abstract_params
from dit_jax.training.video_task import init_params, make_model
from tests.runs import ROOT, arrays, assert_same_run, steps

COUNT, LAST = 50, 3
SMALL = (
    *("--model.dit.width", "48", "--model.dit.heads", "4", "--model.text.width", "32"),
    *("--model.text.depth", "1", "--data.packing.rows", "1", "--checkpoint.every", "2"),
    *("--log.every", "1", "--log.draw-every", "0", "--steps", LAST),
)
BOTH = """
import dataclasses
from my_config import get_config as bars
from student import get_config as student

def get_config():
    return dataclasses.replace(student(), data=bars().data, evaluators=bars().evaluators)
"""
CONSTANT = re.compile(r"\w+\[([\d,]*)\][^=\n]*constant\(")
"""The sizes of constants in optimized HLO."""


def parse(config: Path, output: Path, *more: object) -> Any:
    arguments = ["--config", config, "--output", output, *SMALL, *more]
    return parse_config([str(one) for one in arguments], "train", "Trains.", Run)


def save_teacher(config: VideoRun) -> None:
    """A run with random weights."""
    mesh = make_mesh(config.mesh)
    model = make_model(config.model, mesh)
    shapes, shardings = abstract_params(lambda key: init_params(model, key), mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(x.dtype), shapes)
    with Checkpointer(Path(config.output), CheckpointConfig()) as checkpointer:
        checkpointer.save_weights(jax.device_put(params, shardings), to_dict(config))


@dataclasses.dataclass
class Student:
    """A student that learns from growing bars, trained to its end and again from its second step."""

    folder: Path
    config: Any
    program: Any
    frozen: Any


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Student]:
    folder, programs, frozen = tmp_path_factory.mktemp("seams"), [], []
    for page in ("sources.md", "objectives.md"):
        text = (ROOT / "docs" / page).read_text()
        for name, code in re.findall(r"`(\w+\.py)`[^\n]*\n\n```python\n(.*?)```", text, re.S):
            (folder / name).write_text(code)
    shutil.copy(ROOT / "configs" / "quickstart.py", folder)
    (folder / "both.py").write_text(BOTH)
    make_step, init_frozen, one = training.make_step, training.init_frozen, jax.devices()[:1]

    def compiled_step(*parts: Any) -> Any:
        step = make_step(*parts)

        def run(*given: Any) -> Any:
            if not programs:
                programs.append(step.lower(*given).compile())
            return programs[-1](*given)

        return run

    def keep_frozen(*given: Any) -> Any:
        frozen.append(init_frozen(*given))
        return frozen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: one)
        patch.setattr(jax, "local_devices", lambda: one)
        patch.setattr(training, "make_step", compiled_step)
        patch.setattr(training, "init_frozen", keep_frozen)
        save_teacher(parse(folder / "quickstart.py", folder / "teacher", "--model.dit.depth", 2))
        more = ("--model.dit.depth", 1, "--teacher", folder / "teacher")
        more += ("--data.source.count", COUNT)
        whole = parse(folder / "both.py", folder / "whole", *more)
        train.train(whole)
        # As a kill between the last two saves leaves it.
        shutil.copytree(folder / "whole", folder / "again")
        shutil.rmtree(folder / "again" / "checkpoints" / str(LAST))
        again = parse(folder / "both.py", folder / "again", *more)
        assert len(again.data.source) == len(whole.data.source) == COUNT
        train.train(dataclasses.replace(again, evaluators=()))
        yield Student(folder, whole, programs[0], frozen)


def test_a_source_of_ones_own_is_resumed_bit_by_bit(student: Student):
    assert len((student.folder / "my_source.py").read_text().splitlines()) < 40
    whole, again = student.folder / "whole", student.folder / "again"
    assert steps(whole) == steps(again) == [2, LAST]
    assert_same_run(whole, again, [LAST])
    stored = read_config(again / "config.json")
    assert stored.data.source == {"type": "my_source:GrowingBars", "external": True}


def test_a_student_learns_from_a_teacher_that_is_no_part_of_it(student: Student):
    stored = read_config(student.folder / "whole" / "config.json")
    assert type(stored) is VideoRun and stored.model.dit.depth == 1
    # Parameters, averages, moments: of the student alone.
    assert not [name for name in arrays(student.folder / "whole", LAST) if "teacher" in name]
    with Checkpointer(student.folder / "teacher", CheckpointConfig()) as checkpointer:
        weights = student.frozen[0]["teacher"]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, weights)
        expected = checkpointer.restore_ema(checkpointer.latest(), weights, shardings)
    for frozen in student.frozen:
        jax.tree.map(np.testing.assert_array_equal, expected, frozen["teacher"])
    sizes = CONSTANT.findall(student.program.as_text())
    constant = max(math.prod(int(n) for n in one.split(",") if n) for one in sizes)
    leaves = jax.tree.leaves(student.frozen[0])
    assert constant < max(leaf.size for leaf in leaves) / 4
    # An argument that the program does not read has no sharding: of the teacher it reads every weight.
    assert len(jax.tree.leaves(student.program.input_shardings[0][2])) == len(leaves)
