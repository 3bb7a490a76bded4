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
from typing import Annotated, Any, ClassVar

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


class BaseTextConfig:
    """What a model asks of the config of its text; here, of a model that reads none."""

    def tokens(self, caption: str, states: np.ndarray | None = None) -> np.ndarray:
        """What the model reads of a caption: tokens int32 ``[s]``, or states float32 ``[s, e]``."""
        return np.array([BEGIN], np.int32)

    def state_width(self, width: int) -> int:
        """Numbers of a state that a transformer of this width attends to."""
        return width

    def build(self, width: int, runtime: Runtime) -> nn.Module | None:
        """The text encoder of a transformer of this width, if there is one."""
        return None

    def flops(self, letters: Any, width: int) -> Any:
        """Of encoding captions of so many tokens."""
        return 0 * letters


@dataclasses.dataclass(frozen=True)
class ByteEncoderConfig(BaseTextConfig):
    """Size of the byte encoder."""

    width: PositiveInt = 128
    depth: NonNegativeInt = 2
    heads: PositiveInt = 4
    max_bytes: PositiveInt = 63
    """Longer captions are cut there; one more token stands for the beginning."""

    def __post_init__(self) -> None:
        heads = max(self.heads, 1)
        require("text.", self, ("width", self.width % heads == 0, f"a multiple of heads {heads}"))

    @property
    def max_tokens(self) -> int:
        return self.max_bytes + 1

    def length(self, caption: str) -> int:
        """Tokens that a caption is before it is cut to ``max_tokens``."""
        return 1 + len(caption.encode())

    def tokens(self, caption: str, states: np.ndarray | None = None) -> np.ndarray:
        return byte_tokens(caption, self.max_bytes)

    def state_width(self, width: int) -> int:
        return self.width

    def build(self, width: int, runtime: Runtime) -> nn.Module | None:
        return ByteEncoder(self, runtime)

    def flops(self, letters: Any, width: int) -> Any:
        e = self.width
        layer = 24 * e * e * letters + 4 * e * letters * letters
        return self.depth * layer + 2 * e * e * letters


@dataclasses.dataclass(frozen=True)
class TextStatesConfig(BaseTextConfig):
    """Captions that come as the states of a text encoder, made when the data was prepared."""

    encoder: str = "umt5-xxl"
    """The encoder's name: its states cannot stand in for another's, which are refused (by the hash of
    its weights, ``text_encoder.hash``, if that is known, and else by this)."""
    dim: PositiveInt = 4096
    """Numbers of a state."""
    max_tokens: Annotated[int, Range(2)] = 512
    """The beginning and the states of a caption; longer captions are cut there."""

    def tokens(self, caption: str, states: np.ndarray | None = None) -> np.ndarray:
        """Float32 states ``[s, e]`` behind a zero one; an empty caption is a dropped one."""
        if states is not None and not caption:
            states = np.zeros((0, self.dim), np.float32)
        if states is None or states.ndim != 2 or states.shape[1] != self.dim:
            actual = "none" if states is None else f"an array of shape {states.shape}"
            raise ValueError(
                f"the model reads captions as states [s, {self.dim}] of the text encoder "
                f"{self.encoder!r}, and {actual} came with {caption[:60]!r}: give records that "
                "have them (data.source.text_states_key), the encoder itself (text_encoder.path), or a "
                "model with a byte encoder (model.text)."
            )
        cut = states[: self.max_tokens - 1].astype(np.float32)
        return np.concatenate([np.zeros((1, self.dim), np.float32), cut])

    def build(self, width: int, runtime: Runtime) -> nn.Module | None:
        return StatesProjection(width, runtime)

    def flops(self, letters: Any, width: int) -> Any:
        return 2 * (self.dim + width) * width * letters


@dataclasses.dataclass(frozen=True)
class NoTextConfig(BaseTextConfig):
    """No text: a model of classes, or of other fields, alone (``ModelConfig.conditioners``)."""

    max_tokens: ClassVar[int] = 1
    """The beginning, which nothing reads."""


TextConfig = ByteEncoderConfig | TextStatesConfig | NoTextConfig


def byte_tokens(caption: str, max_bytes: int) -> np.ndarray:
    """A caption as int32 tokens ``[s]``: the beginning, then its UTF-8 bytes, cut to ``max_bytes``, but
    no character in two."""
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

        attention = Attention(config.heads, run, axis="text_tokens", name="self_attention")
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
    """An encoder's states ``[b, s, e]`` to text states of the model's width, token by token.

    The zero state of the beginning becomes what the biases say: a learned "no caption".
    """

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
