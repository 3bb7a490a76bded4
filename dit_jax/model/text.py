"""How text enters: a small encoder over bytes learned with the model, or an encoder's stored states.

UTF-8 bytes, in any language and with nothing downloaded, pass through a few bidirectional transformer
layers within their own segment. A first token (of states, a zero one) stands for the beginning: an
empty caption is that alone, and so is a dropped one, the "unconditional" of guidance.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dit_jax.model.layers import MLP, Attention, dense, gelu, layer_norm
from dit_jax.types import NonNegativeInt, PositiveInt, Range, Runtime, require

BEGIN = 1
FIRST_BYTE = 2
VOCABULARY = FIRST_BYTE + 256


@dataclasses.dataclass(frozen=True)
class NoTextConfig:
    """No text, for a model of classes or of other fields alone."""

    max_tokens: ClassVar[int] = 1

    def length(self, caption: str, states: np.ndarray | None = None) -> int:
        """Tokens that a caption is, or states, before they are cut to ``max_tokens``."""
        return 1

    def tokens(self, caption: str, states: np.ndarray | None = None) -> np.ndarray:
        """What the model reads of a caption: tokens int32 ``[s]``, or states float32 ``[s, e]``."""
        return np.array([BEGIN], np.int32)


@dataclasses.dataclass(frozen=True)
class ByteEncoderConfig:
    """Size of the byte encoder."""

    width: PositiveInt = 128
    depth: NonNegativeInt = 2
    heads: PositiveInt = 4
    # Longer captions are cut there; one more token stands for the beginning.
    max_bytes: PositiveInt = 63

    def __post_init__(self) -> None:
        heads = max(self.heads, 1)  # The type refuses 0 later.
        require("text.", self, ("width", self.width % heads == 0, f"a multiple of heads {heads}"))

    @property
    def max_tokens(self) -> int:
        return self.max_bytes + 1

    def length(self, caption: str, states: np.ndarray | None = None) -> int:
        return 1 + len(caption.encode())

    def tokens(self, caption: str, states: np.ndarray | None = None) -> np.ndarray:
        """The beginning, then UTF-8 bytes, cut to ``max_bytes``, but no character in two."""
        cut = caption.encode()[: self.max_bytes].decode(errors="ignore").encode()
        body = np.frombuffer(cut, np.uint8).astype(np.int32) + FIRST_BYTE
        return np.concatenate([np.array([BEGIN], np.int32), body])


@dataclasses.dataclass(frozen=True)
class TextStatesConfig:
    """Captions that come as the states of a text encoder, computed when the data was prepared."""

    # The encoder's name: its states cannot stand in for another's, which are refused (by the hash
    # of its weights, ``text_encoder.hash``, if that is known, and else by this).
    encoder: str = "umt5-xxl"
    dim: PositiveInt = 4096  # Numbers of a state.
    # The beginning and the states of a caption; longer captions are cut there.
    max_tokens: Annotated[int, Range(2)] = 512
    # Every caption is ``max_tokens`` states, zeros behind its own, which are attended to as well, and
    # there is no beginning: as Wan reads UMT5. The empty caption then has states, too.
    padded: bool = False

    @property
    def begins(self) -> int:
        """How many of the tokens stand for the beginning."""
        return 0 if self.padded else 1

    def length(self, caption: str, states: np.ndarray | None = None) -> int:
        return self.begins + (0 if states is None else len(states))

    def tokens(self, caption: str, states: np.ndarray | None = None) -> np.ndarray:
        if not caption and not (self.padded and states is not None):
            # None, or a dropped one: nothing is to be read.
            states = np.zeros((0, self.dim), np.float32)
        if states is None or states.ndim != 2 or states.shape[1] != self.dim:
            actual = "none" if states is None else f"an array of shape {states.shape}"
            raise ValueError(
                f"the model reads captions as states [s, {self.dim}] of the text encoder "
                f"{self.encoder!r}, and {actual} came with {caption[:60]!r}: give records that "
                "have them (data.source.text_states_key), the encoder itself (text_encoder.path), or a "
                "model with a byte encoder (model.text)."
            )
        cut = states[: self.max_tokens - self.begins].astype(np.float32)
        after = self.max_tokens - len(cut) if self.padded else 0
        return np.pad(cut, ((self.begins, after), (0, 0)))


TextConfig = ByteEncoderConfig | TextStatesConfig | NoTextConfig


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

        attention = Attention(config.heads, run, axis="text_tokens", name="self_attention")
        x = whole(x + whole(attention(whole(layer_norm(x).astype(run.dtype)), segment_ids)))
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

        def embed(count: int, axis: str, name: str) -> nn.Embed:
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (axis, "embed_out"))
            return nn.Embed(count, width, embedding_init=init, name=name)

        x = embed(VOCABULARY, "vocab", "bytes")(tokens)
        # A learned place for every byte of its own caption: words are told apart by order.
        starts = jnp.argmax(segment_ids[:, :, None] == segment_ids[:, None, :], axis=-1)
        place = jnp.minimum(jnp.arange(tokens.shape[1]) - starts, config.max_bytes)
        places = embed(config.max_tokens, "text_place", "places")(place)
        # Or the compiler may split the states by their width, as the tables are.
        x = run.constrain((x + places).astype(run.dtype), "batch", "text_tokens", "width")
        for i in range(config.depth):
            x = TextBlock(config, run, name=f"block_{i}")(x, segment_ids)
        x = run.constrain(layer_norm(x).astype(run.dtype), "batch", "text_tokens", "width")
        x = dense(width, ("embed", "text_out"), run.dtype, "out")(x)
        return run.constrain(x, "batch", "text_tokens", "width")


class StatesProjection(nn.Module):
    """An encoder's states ``[b, s, e]`` to text states of the model's width, token by token (that of
    the beginning to what the biases say, a learned "no caption")."""

    width: int
    runtime: Runtime

    @nn.compact
    def __call__(
        self, states: Float[Array, "b s e"], segment_ids: Int[Array, "b s"] | None
    ) -> Float[Array, "b s d"]:
        run = self.runtime
        linear = partial(dense, self.width, dtype=run.dtype, dot_general=run.dot_general)
        hidden = linear(("text_states", "embed"), name="up")(states)
        x = linear(("embed", "text_out"), name="out")(gelu(hidden))
        return run.constrain(x, "batch", "text_tokens", "width")


def make_encoder(config: TextConfig, width: int, runtime: Runtime) -> nn.Module | None:
    """The module that computes text states for a model of this width; None without text."""
    if isinstance(config, ByteEncoderConfig):
        return ByteEncoder(config, runtime)
    return StatesProjection(width, runtime) if isinstance(config, TextStatesConfig) else None
