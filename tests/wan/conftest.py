"""Small pipelines of Wan, written once for a session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.wan.small_pipeline import write_pipeline


@pytest.fixture(scope="session")
def small_wan(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline of a kind, as Diffusers writes it."""
    for name in ("torch", "diffusers", "transformers", "sentencepiece"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    return cache(lambda kind: write_pipeline(tmp_path_factory.mktemp(kind) / "Wan", kind))
