"""The text-to-video model: a text encoder and the diffusion transformer it conditions.

With class labels for text, no cross-attention and one frame it is DiT as published.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dit_jax.model.blocks import Dtype
from dit_jax.model.dit import DiT, DiTConfig
from dit_jax.model.patch import PatchConfig
from dit_jax.model.text import (
    ByteEncoder,
    ByteEncoderConfig,
    ClassEmbedding,
    ClassLabelsConfig,
    StatesProjection,
    TextStatesConfig,
    byte_tokens,
    label_tokens,
    with_beginning,
)
from dit_jax.types import Attention, Constrain, DotGeneral


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes of the parameters, and how they are computed with."""

    dit: DiTConfig = DiTConfig()
    patch: PatchConfig = PatchConfig()
    text: ByteEncoderConfig | TextStatesConfig | ClassLabelsConfig = ByteEncoderConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations. Auto is bfloat16 on accelerators and float32 on CPUs."""
    matmul: Literal["full", "int8", "fp8"] = "full"
    """What the linear layers of the transformer's blocks multiply in: the dtype of activations, or 8
    bits (``parallel.quantized`` says what, in both passes; needs ``dit-jax[quant]``)."""
    learned_variance: bool = False
    """Whether the network's output has a second half: the variance of the reverse step, for every
    number of the patch (Nichol & Dhariwal 2021, section 3.1; DiT's "learned sigma")."""

    upscale: int = 1
    """For super-resolution: the model is given the clip that it makes with so many times fewer rows and
    columns, enlarged again, as channels beside the noise (Ho et al. 2021, "Cascaded Diffusion Models").
    1 gives it nothing."""

    def __post_init__(self) -> None:
        if self.upscale < 1:
            raise ValueError(f"model.upscale is {self.upscale}: it is at least 1, which is none.")
        told = self.dit.pooled_text or self.dit.cross_attention
        if isinstance(self.text, ClassLabelsConfig) and not told:
            raise ValueError(
                "model.text are classes, and neither dit.pooled_text nor dit.cross_attention is set: "
                "the model would not learn of them. Set pooled_text, as DiT does."
            )

    @property
    def output_dim(self) -> int:
        """Numbers that the network gives for a token: p, or 2 p with learned variance."""
        return self.patch.dim * (2 if self.learned_variance else 1)

    @property
    def text_width(self) -> int:
        """Numbers of a text state as the transformer sees it."""
        return self.text.width if isinstance(self.text, ByteEncoderConfig) else self.dit.width

    def on(self, platform: str) -> ModelConfig:
        """The same with what is left to the platform (cpu, gpu, tpu) decided for this one."""
        scan = self.dit.scan if self.dit.scan is not None else platform != "cpu"
        dtype: Any = jnp.dtype(self.compute_dtype(platform)).name
        return dataclasses.replace(self, dtype=dtype, dit=dataclasses.replace(self.dit, scan=scan))

    def text_tokens(
        self, caption: str, states: np.ndarray | None = None, label: int | None = None
    ) -> np.ndarray:
        """What the model reads: int32 bytes ``[s]`` of the caption, its states float32 ``[s, e]``, or
        the label as int32 ``[s]``. An empty caption is one that was dropped, whatever its
        states."""
        if isinstance(self.text, ByteEncoderConfig):
            return byte_tokens(caption, self.text.max_bytes)
        if isinstance(self.text, ClassLabelsConfig):
            if label is None and caption:
                raise ValueError(
                    f"the model knows classes, 0 to {self.text.classes - 1}, and no captions, and no "
                    f"class came with {caption[:60]!r}: give records that have one "
                    "(data.source.label_key), or the number of a class."
                )
            return label_tokens(label, self.text.classes)
        if states is not None and not caption:
            states = np.zeros((0, self.text.dim), np.float32)
        if states is None or states.ndim != 2 or states.shape[1] != self.text.dim:
            found = "none" if states is None else f"an array of shape {states.shape}"
            raise ValueError(
                f"the model reads captions as states [s, {self.text.dim}] of the text encoder "
                f"{self.text.encoder!r}, and {found} came with {caption[:60]!r}: give records that "
                "have them (data.source.text_states_key), the encoder itself (text_encoder.path), or a "
                "model with a byte encoder (model.text)."
            )
        return with_beginning(states, self.text.max_tokens)

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
    layer_dot_general: DotGeneral | None = None
    """That of the transformer's blocks, where it is another one (in low precision)."""

    def setup(self) -> None:
        dtype = self.config.compute_dtype()
        given = (self.attention, self.constrain, dtype, self.dot_general)
        text = self.config.text
        width = self.config.dit.width
        if isinstance(text, ByteEncoderConfig):
            self.text = ByteEncoder(text, *given)
        elif isinstance(text, ClassLabelsConfig):
            self.text = ClassEmbedding(text, width, self.constrain)
        else:
            self.text = StatesProjection(width, dtype, self.constrain, self.dot_general)
        self.dit = DiT(
            self.config.dit,
            self.config.output_dim,
            *given,
            self.layer_dot_general,
            # A class has an embedding of the transformer's own width.
            project_pooled=not isinstance(text, ClassLabelsConfig),
        )

    def encode_text(
        self,
        text: Int[Array, "b s"] | Float[Array, "b s x"],
        text_segment_ids: Int[Array, "b s"],
    ) -> Float[Array, "b s e"]:
        """Text states, needed once for all steps of a solver."""
        if isinstance(self.text, StatesProjection):
            return self.text(text)
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
        low: Float[Array, "b l p"] | None = None,
        group_low_t: Float[Array, "b k"] | None = None,
        residual: Float[Array, "b l d"] | None = None,
    ) -> Float[Array, "b l o"]:
        """The transformer alone, on encoded text; with what is given at low resolution, and its noise
        level, where ``config.upscale`` is above 1. See ``DiT`` of a ``residual``."""
        groups = group_ids, group_t
        text = text_states, text_segment_ids
        return self.dit(tokens, positions, segment_ids, *groups, *text, low, group_low_t, residual)

    def __call__(
        self,
        tokens: Float[Array, "b l p"],
        positions: Float[Array, "b l 3"],
        segment_ids: Int[Array, "b l"],
        group_ids: Int[Array, "b l"],
        group_t: Float[Array, "b k"],
        text: Int[Array, "b s"] | Float[Array, "b s x"],
        text_segment_ids: Int[Array, "b s"],
        low: Float[Array, "b l p"] | None = None,
        group_low_t: Float[Array, "b k"] | None = None,
    ) -> Float[Array, "b l o"]:
        read = self.encode_text(text, text_segment_ids), text_segment_ids
        groups = group_ids, group_t
        return self.denoise(tokens, positions, segment_ids, *groups, *read, low, group_low_t)
