"""The text encoder of a run, as configs name it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import StatesConfig
from dit_jax.parallel import batch_sharding, batch_shards, make_constrain, parameter_shardings
from dit_jax.text.folders import load_text_encoder, text_encoder_identity, text_length
from dit_jax.text.text_encoder import Placement
from dit_jax.types import TextEncoder


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(StatesConfig):
    """A folder of weights that makes states of captions, for a model that reads those."""

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """The folder, as ``transformers`` stores T5 v1.1 or UMT5 (docs/text.md). Captions that come
    without states are encoded by it as they are read, and so are prompts."""

    def open(self, mesh: Mesh | None = None, check: Any = None) -> TextEncoder | None:
        """The encoder in the folder: spread over a mesh, for all processes together, or on a device of
        this process. ``check(name, hash, width)`` may refuse it."""
        if self.path is None:
            return None
        placement = None if mesh is None else on_mesh(mesh)
        return load_text_encoder(self.path, placement=placement, check=check)

    def identity(self) -> tuple[str, str] | None:
        """Name and hash of the encoder in the folder."""
        return None if self.path is None else text_encoder_identity(self.path)

    def length(self) -> tuple[Callable[[str], int], int] | None:
        """How many tokens a text is, and how many are read; a folder has its tokenizer."""
        return None if self.path is None else text_length(self.path)


def on_mesh(mesh: Mesh) -> Placement:
    """An encoder spread over a mesh: its parameters over fsdp, context and tensor, captions over data
    and fsdp. All processes encode the same captions together."""

    def place(batch: np.ndarray) -> jax.Array:
        sharding = batch_sharding(mesh, batch.ndim, tokens=False)
        return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])

    return Placement(
        shardings=partial(parameter_shardings, mesh),
        place=place,
        whole=NamedSharding(mesh, PartitionSpec()),
        rows=batch_shards(mesh),
        constrain=make_constrain(mesh),
    )
