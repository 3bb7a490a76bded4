"""Loads what is started by its path, and is no module of the package."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.runs import ROOT


def load_script(folder: str, name: str) -> ModuleType:
    """A script of ``scripts/`` or ``benchmarks/``, anew in every call."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
