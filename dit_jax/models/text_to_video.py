"""The text-to-video model: a text encoder and the diffusion transformer it conditions."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dit_jax.models.blocks import Dtype
from dit_jax.models.dit import DiT, DiTConfig
from dit_jax.models.patch import PatchConfig
from dit_jax.models.text import ByteEncoder, ByteEncoderConfig
from dit_jax.types import Attention, Constrain, DotGeneral


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes of the parameters, and how they are computed with."""

    dit: DiTConfig = DiTConfig()
    patch: PatchConfig = PatchConfig()
    text: ByteEncoderConfig = ByteEncoderConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations. Auto is bfloat16 on accelerators and float32 on CPUs."""

    def compute_dtype(self, backend: str | None = None) -> Dtype:
        """The dtype of activations on ``backend`` (this process's, if not given)."""
        if self.dtype == "auto":
            cpu = (backend or jax.default_backend()) == "cpu"
            return jnp.float32 if cpu else jnp.bfloat16
        return jnp.dtype(self.dtype)


class TextToVideo(nn.Module):
    """Text tokens and noised patches in, predicted patches out."""

    config: ModelConfig
    attention: Attention
    constrain: Constrain
    dot_general: DotGeneral = jax.lax.dot_general

    def setup(self) -> None:
        dtype = self.config.compute_dtype()
        given = (self.attention, self.constrain, dtype, self.dot_general)
        self.text = ByteEncoder(self.config.text, *given)
        self.dit = DiT(self.config.dit, self.config.patch.dim, *given)

    def encode_text(
        self, text: Int[Array, "b s"], text_segment_ids: Int[Array, "b s"]
    ) -> Float[Array, "b s e"]:
        """Text states, needed once for all steps of a solver."""
        return self.text(text, text_segment_ids)

    def denoise(
        self,
        tokens: Float[Array, "b l p"],
        positions: Float[Array, "b l 3"],
        segment_ids: Int[Array, "b l"],
        group_ids: Int[Array, "b l"],
        group_t: Float[Array, "b k"],
        text_states: Float[Array, "b s e"],
        text_segment_ids: Int[Array, "b s"],
    ) -> Float[Array, "b l p"]:
        """The transformer alone, on encoded text."""
        return self.dit(
            tokens, positions, segment_ids, group_ids, group_t, text_states, text_segment_ids
        )

    def __call__(
        self,
        tokens: Float[Array, "b l p"],
        positions: Float[Array, "b l 3"],
        segment_ids: Int[Array, "b l"],
        group_ids: Int[Array, "b l"],
        group_t: Float[Array, "b k"],
        text: Int[Array, "b s"],
        text_segment_ids: Int[Array, "b s"],
    ) -> Float[Array, "b l p"]:
        states = self.encode_text(text, text_segment_ids)
        return self.denoise(
            tokens, positions, segment_ids, group_ids, group_t, states, text_segment_ids
        )
