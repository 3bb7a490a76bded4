"""The text encoder of a run, as configs name it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from jax.sharding import Mesh

from dit_jax.config import StatesConfig
from dit_jax.files import refuse_if
from dit_jax.text.folders import load_text_encoder, text_encoder_identity, text_length
from dit_jax.types import TextEncoder


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(StatesConfig):
    """A folder of weights that makes states of captions, for a model that reads those."""

    paths: ClassVar[tuple[str, ...]] = ("path",)

    # As ``transformers`` stores T5 v1.1 or UMT5 (docs/text.md). Captions that come without states are
    # encoded by it as they are read, and so are prompts.
    path: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def open(self, text: Any, mesh: Mesh | None = None) -> TextEncoder | None:
        """The encoder in the folder: spread over a mesh, for all processes together, or on a device of
        this process. Raises ``InputError`` if its states are not those that the model reads."""
        if self.path is None:
            return None
        encoder, where = load_text_encoder(self.path, mesh=mesh), f"text_encoder.path {self.path!r}"
        message = f"{where} makes states of {encoder.dim} numbers, and the model reads {text.dim}"
        refuse_if([(encoder.dim != text.dim, f"{message}: change model.text.dim.")])
        self.known_as(text, encoder.name, encoder.hash, f"{where} is")
        return encoder

    def identity(self) -> tuple[str, str] | None:
        """Name and hash of the encoder in the folder."""
        return None if self.path is None else text_encoder_identity(self.path)

    def length(self) -> tuple[Callable[[str], int], int] | None:
        """How many tokens a text is, and how many are read; a folder has its tokenizer."""
        return None if self.path is None else text_length(self.path)
