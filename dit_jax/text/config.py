"""The text encoder of a run, as configs name it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from dit_jax.config import StatesConfig


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(StatesConfig):
    """A folder of weights that makes states of captions, for a model that reads those."""

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """The folder, as ``transformers`` stores T5 v1.1 or UMT5 (docs/text.md). Captions that come
    without states are encoded by it as they are read, and so are prompts."""
