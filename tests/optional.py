"""Modules that not everybody has."""

import importlib
import warnings
from typing import Any


def optional(name: str) -> Any:
    """A module, or None where it is not installed; its warnings at import are not ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None
