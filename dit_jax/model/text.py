"""How text enters: a small encoder over bytes learned with the model, or an encoder's stored states.

Prompts in any language work with nothing downloaded. UTF-8 bytes (after a first token that
stands for the beginning) are embedded and pass through a few bidirectional transformer layers
within their own segment. An empty caption is the beginning token alone; that is also what a
dropped caption becomes, so classifier-free guidance's "unconditional" is the empty prompt.

States that a large encoder made beforehand come with the data. A zero state is put before them and
stands for the beginning in the same way.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dit_jax.model.layers import MLP, SelfAttention, dense, gelu, layer_norm
from dit_jax.types import Runtime

BEGIN = 1
FIRST_BYTE = 2
VOCABULARY = FIRST_BYTE + 256


@dataclasses.dataclass(frozen=True)
class ByteEncoderConfig:
    """Size of the byte encoder."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    max_bytes: int = 63
    """Longer captions are cut there; one more token stands for the beginning."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 0 or self.heads < 1 or self.max_bytes < 1:
            raise ValueError(
                f"text encoder width {self.width}, depth {self.depth}, heads {self.heads}, max_bytes "
                f"{self.max_bytes}: depth is at least 0 and the others at least 1."
            )
        if self.width % self.heads:
            raise ValueError(
                f"text.width {self.width} does not divide into {self.heads} heads; make it a multiple."
            )

    @property
    def max_tokens(self) -> int:
        return self.max_bytes + 1

    def length(self, caption: str) -> int:
        """Tokens that a caption is before it is cut to ``max_tokens``."""
        return 1 + len(caption.encode())


@dataclasses.dataclass(frozen=True)
class TextStatesConfig:
    """Captions that come as the states of a text encoder, made when the data was prepared."""

    encoder: str = "umt5-xxl"
    """The encoder's name: its states cannot stand in for another's, which are refused (by the hash of
    its weights, ``text_encoder.hash``, where that is known, and else by this)."""
    dim: int = 4096
    """Numbers of a state."""
    max_tokens: int = 512
    """The beginning and the states of a caption; longer captions are cut there."""

    def __post_init__(self) -> None:
        if self.dim < 1 or self.max_tokens < 2:
            raise ValueError(
                f"text.dim {self.dim} is at least 1 and max_tokens {self.max_tokens} at least 2."
            )


@dataclasses.dataclass(frozen=True)
class NoTextConfig:
    """No text: a model of classes, or of other fields, alone (``ModelConfig.conditioners``)."""

    max_tokens: ClassVar[int] = 1
    """The beginning, which nothing reads."""


TextConfig = ByteEncoderConfig | TextStatesConfig | NoTextConfig


def with_beginning(states: np.ndarray, max_tokens: int) -> np.ndarray:
    """Text states ``[s, e]`` after a zero state, cut to ``max_tokens``; float32."""
    cut = states[: max_tokens - 1].astype(np.float32)
    return np.concatenate([np.zeros((1, states.shape[1]), np.float32), cut])


def byte_tokens(caption: str, max_bytes: int) -> np.ndarray:
    """A caption as int32 tokens ``[s]``: the beginning, then its UTF-8 bytes, cut to ``max_bytes``.

    A character is never cut in two.
    """
    encoded = caption.encode("utf-8")[:max_bytes].decode("utf-8", errors="ignore").encode("utf-8")
    body = np.frombuffer(encoded, np.uint8).astype(np.int32) + FIRST_BYTE
    return np.concatenate([np.array([BEGIN], np.int32), body])


class TextBlock(nn.Module):
    """A pre-norm transformer layer over text tokens."""

    config: ByteEncoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s e"], segment_ids: Int[Array, "b s"]
    ) -> Float[Array, "b s e"]:
        config, run = self.config, self.runtime

        def whole(y: jax.Array) -> jax.Array:
            # Unconstrained, the compiler splits the states by their width, as their kernels are.
            return run.constrain(y, "batch", "text_tokens", "width")

        attention = SelfAttention(config.heads, run, axis="text_tokens", name="self_attention")
        x = whole(x + whole(attention(whole(layer_norm(x).astype(run.dtype)), segment_ids, None)))
        mlp = MLP(4 * config.width, run, axis="text_tokens", name="mlp")
        return whole(x + whole(mlp(whole(layer_norm(x).astype(run.dtype)))))


class ByteEncoder(nn.Module):
    """Byte tokens ``[b, s]`` to text states ``[b, s, e]``."""

    config: ByteEncoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b s"], segment_ids: Int[Array, "b s"]
    ) -> Float[Array, "b s e"]:
        config, run, width = self.config, self.runtime, self.config.width
        normal = nn.initializers.normal(1.0)
        table = nn.with_logical_partitioning(normal, ("vocab", "embed_out"))
        x = nn.Embed(VOCABULARY, width, embedding_init=table, name="bytes")(tokens)
        # A learned place for every byte of its own caption: words are told apart by order.
        starts = jnp.argmax(segment_ids[:, :, None] == segment_ids[:, None, :], axis=-1)
        place = jnp.minimum(jnp.arange(tokens.shape[1]) - starts, config.max_bytes)
        places = nn.Embed(
            config.max_tokens,
            width,
            embedding_init=nn.with_logical_partitioning(normal, ("text_place", "embed_out")),
            name="places",
        )(place)
        # Or the compiler may split the states by their width, as the tables are.
        x = run.constrain((x + places).astype(run.dtype), "batch", "text_tokens", "width")
        for i in range(config.depth):
            x = TextBlock(config, run, name=f"block_{i}")(x, segment_ids)
        x = run.constrain(layer_norm(x).astype(run.dtype), "batch", "text_tokens", "width")
        x = dense(width, ("embed", "text_out"), run.dtype, "out")(x)
        return run.constrain(x, "batch", "text_tokens", "width")


class StatesProjection(nn.Module):
    """An encoder's states ``[b, s, e]`` to text states of the model's width, token by token.

    The zero state of the beginning becomes what the biases say: a learned "no caption".
    """

    width: int
    runtime: Runtime

    @nn.compact
    def __call__(self, states: Float[Array, "b s e"]) -> Float[Array, "b s d"]:
        run = self.runtime
        linear = partial(dense, self.width, dtype=run.dtype, dot_general=run.dot_general)
        hidden = linear(("text_states", "embed"), name="up")(states)
        x = linear(("embed", "text_out"), name="out")(gelu(hidden))
        return run.constrain(x, "batch", "text_tokens", "width")
