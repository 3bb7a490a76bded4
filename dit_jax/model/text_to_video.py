"""The text-to-video model: a text encoder, conditioners, and the diffusion transformer.

With class labels and no text, no cross-attention and one frame it is DiT as published.
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
from dit_jax.model.conditioners import Conditioner
from dit_jax.model.dit import DiT, DiTConfig
from dit_jax.model.patch import PatchConfig
from dit_jax.model.text import (
    BEGIN,
    ByteEncoder,
    ByteEncoderConfig,
    NoTextConfig,
    StatesProjection,
    TextStatesConfig,
    byte_tokens,
    with_beginning,
)
from dit_jax.types import Attention, Constrain, DenoiserInputs, DotGeneral, Runtime


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes of the parameters, and how they are computed with."""

    dit: DiTConfig = DiTConfig()
    patch: PatchConfig = PatchConfig()
    text: ByteEncoderConfig | TextStatesConfig | NoTextConfig = ByteEncoderConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations. Auto is bfloat16 on accelerators and float32 on CPUs."""
    matmul: Literal["full", "int8", "fp8"] = "full"
    """What the linear layers of the transformer's blocks multiply in: the dtype of activations, or 8
    bits (``parallel.matmul`` says what, in both passes; needs ``dit-jax[quant]``)."""
    learned_variance: bool = False
    """Whether the network's output has a second half: the variance of the reverse step, for every
    number of the patch (Nichol & Dhariwal 2021, section 3.1; DiT's "learned sigma")."""
    conditioners: dict[str, Conditioner] = dataclasses.field(default_factory=dict)
    """What else the model is conditioned on: a conditioner for each field, under the field's name."""

    def __post_init__(self) -> None:
        reads = self.dit.pooled_text or self.dit.cross_attention
        if isinstance(self.text, NoTextConfig) and reads:
            raise ValueError(
                "model.text is NoTextConfig, and dit.pooled_text or dit.cross_attention is set: there "
                "is nothing to read. Unset both."
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

    def text_tokens(self, caption: str, states: np.ndarray | None = None) -> np.ndarray:
        """What the model reads: int32 bytes ``[s]`` of the caption, or its states float32 ``[s, e]``.
        An empty caption is one that was dropped, whatever its states."""
        if isinstance(self.text, ByteEncoderConfig):
            return byte_tokens(caption, self.text.max_bytes)
        if isinstance(self.text, NoTextConfig):
            return np.array([BEGIN], np.int32)
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
        config, dtype = self.config, self.config.compute_dtype()
        given = (self.attention, self.constrain, dtype, self.dot_general)
        blocks = self.layer_dot_general or self.dot_general
        runtime = Runtime(*given[:2], dtype, self.dot_general, blocks)
        if isinstance(config.text, ByteEncoderConfig):
            self.text = ByteEncoder(config.text, *given)
        elif isinstance(config.text, TextStatesConfig):
            self.text = StatesProjection(config.dit.width, dtype, self.constrain, self.dot_general)
        self.conditioners = {
            name: one.build(name, config, runtime) for name, one in config.conditioners.items()
        }
        self.dit = DiT(config.dit, config.output_dim, *given, self.layer_dot_general)

    def encode_text(
        self,
        text: Int[Array, "b s"] | Float[Array, "b s x"],
        text_segment_ids: Int[Array, "b s"],
    ) -> Float[Array, "b s e"] | Int[Array, "b s"]:
        """Text states, needed once for all steps of a solver; without text, the tokens as they are."""
        if isinstance(self.config.text, NoTextConfig):
            return text
        encoder: Any = self.text
        if isinstance(self.config.text, TextStatesConfig):
            return encoder(text)
        return encoder(text, text_segment_ids)

    def denoise(
        self, inputs: DenoiserInputs, residual: Float[Array, "b l d"] | None = None
    ) -> Float[Array, "b l o"]:
        """Conditioners and the transformer, on encoded text. See ``DiT`` of a ``residual``."""
        if isinstance(self.config.text, NoTextConfig):
            inputs = inputs.replace(text=None)  # pyright: ignore[reportAttributeAccessIssue]
        added = [conditioner(inputs) for conditioner in self.conditioners.values()]
        return self.dit(inputs, added, residual)

    def __call__(self, inputs: DenoiserInputs) -> Float[Array, "b l o"]:
        text = self.encode_text(inputs.text, inputs.text_segment_ids)
        return self.denoise(inputs.replace(text=text))  # pyright: ignore[reportAttributeAccessIssue]
