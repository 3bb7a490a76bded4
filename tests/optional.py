"""Modules that not everybody has, and that take seconds to import."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any


class Module:
    """A module that is imported where it is first used; its warnings at import are not ours."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # what pytest asks of everything in a file of tests
            raise AttributeError(attribute)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(self._name)
            return getattr(module, attribute)  # which imports what a package loads late


def optional(name: str) -> Any:
    """A module, or None where it is not installed."""
    return Module(name) if importlib.util.find_spec(name) else None
