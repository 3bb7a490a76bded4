"""Configs that are built from others beside them."""

import sys
import types
import unittest.mock
from pathlib import Path

from dit_jax.config import load_config


def test_a_config_finds_its_own_neighbours_only(tmp_path: Path):
    for folder, steps in (("a", 11), ("b", 22)):
        (tmp_path / folder).mkdir()
        base = f"from dit_jax.config import VideoRun\ndef base(): return VideoRun(steps={steps})\n"
        (tmp_path / folder / "neighbour.py").write_text(base)
        (tmp_path / folder / "mine.py").write_text("from neighbour import base as get_config\n")
    found = [load_config(str(tmp_path / folder / "mine.py")).steps for folder in "ab"]
    assert found == [11, 22]


def test_a_config_takes_no_name_from_a_module_that_is_in_use(tmp_path: Path):
    theirs = types.ModuleType("neighbour")
    (tmp_path / "neighbour.py").write_text("STEPS = 5\n")
    text = "from neighbour import STEPS\nfrom dit_jax.config import VideoRun\n"
    (tmp_path / "mine.py").write_text(f"{text}def get_config(): return VideoRun(steps=STEPS)\n")
    with unittest.mock.patch.dict(sys.modules, neighbour=theirs):
        assert load_config(str(tmp_path / "mine.py")).steps == 5
        assert sys.modules["neighbour"] is theirs
