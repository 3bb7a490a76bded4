"""A small text encoder over bytes, learned together with the model it conditions.

Prompts in any language work with nothing downloaded. UTF-8 bytes (after a first token that
stands for the beginning) are embedded and pass through a few bidirectional transformer layers
within their own segment. An empty caption is the beginning token alone; that is also what a
dropped caption becomes, so classifier-free guidance's "unconditional" is the empty prompt.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dit_jax.models.blocks import MLP, Dtype, SelfAttention, dense, layer_norm
from dit_jax.types import Attention, Constrain, DotGeneral

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
    dtype: Dtype
    attention: Attention
    constrain: Constrain
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s e"], segment_ids: Int[Array, "b s"]
    ) -> Float[Array, "b s e"]:
        h = layer_norm(x).astype(self.dtype)
        x = x + SelfAttention(
            self.config.heads,
            self.dtype,
            self.attention,
            self.constrain,
            self.dot_general,
            name="self_attention",
        )(h, segment_ids, None)
        h = layer_norm(x).astype(self.dtype)
        return x + MLP(
            4 * self.config.width, self.dtype, self.constrain, self.dot_general, name="mlp"
        )(h)


class ByteEncoder(nn.Module):
    """Byte tokens ``[b, s]`` to text states ``[b, s, e]``."""

    config: ByteEncoderConfig
    attention: Attention
    constrain: Constrain
    dtype: Dtype = jnp.float32
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b s"], segment_ids: Int[Array, "b s"]
    ) -> Float[Array, "b s e"]:
        width = self.config.width
        normal = nn.initializers.normal(1.0)
        table = nn.with_logical_partitioning(normal, ("vocab", "embed"))
        x = nn.Embed(VOCABULARY, width, embedding_init=table, name="bytes")(tokens)
        # A learned place for every byte of its own caption: words are told apart by order.
        starts = jnp.argmax(segment_ids[:, :, None] == segment_ids[:, None, :], axis=-1)
        place = jnp.minimum(jnp.arange(tokens.shape[1]) - starts, self.config.max_bytes)
        places = nn.Embed(
            self.config.max_tokens,
            width,
            embedding_init=nn.with_logical_partitioning(normal, ("text_place", "embed")),
            name="places",
        )(place)
        x = (x + places).astype(self.dtype)
        for i in range(self.config.depth):
            block = TextBlock(
                self.config,
                self.dtype,
                self.attention,
                self.constrain,
                self.dot_general,
                name=f"block_{i}",
            )
            x = block(x, segment_ids)
        x = layer_norm(x).astype(self.dtype)
        return dense(width, ("embed", "text_out"), self.dtype, "out")(x)
