"""The encoders of T5 v1.1 and UMT5: tokens of a caption to states.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(section 2.1), in version 1.1: gated GELU (Shazeer 2020, "GLU Variants Improve Transformer") and no
weights shared with the output. Pre-norm layers without biases; attention is not scaled, and where a
token stands is told by a bias that depends on the distance alone, in buckets. T5 has one table of
biases for all layers, UMT5 (Chung et al. 2023, "UniMax") one for each.

Products run in ``dtype``; the residual stream, norms and softmax are float32. Decoders, dropout and
the first version's ReLU are not here. The layers are stacked and looped over.

Axis letters: b captions, s tokens, e width, a heads, d head dimension.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dit_jax.model.layers import Dtype, RMSNorm, gelu
from dit_jax.types import Constrain, unconstrained

MASKED = -1e9
"""Added to the logits of padding: nothing is left of them after the softmax."""
NORMAL = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig:
    """Sizes of an encoder; the defaults are those of T5 v1.1 XXL."""

    vocabulary: int = 32128
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240
    """Of each of the two branches of the gated layer."""
    buckets: int = 32
    """Of distances: half for each direction, half of those for single steps."""
    max_distance: int = 128
    """From where on all distances share the last bucket."""
    bias: Literal["shared", "layers"] = "shared"
    """Whether all layers share one table of biases (T5) or each has its own (UMT5)."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "depth", "heads", "head_dim", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"T5 encoder {name} is {getattr(self, name)}: it is at least 1.")
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"T5 encoder buckets {self.buckets} are a multiple of 4, and max_distance "
                f"{self.max_distance} is above a quarter of them: 32 and 128 are usual."
            )

    @property
    def parameters(self) -> int:
        """How many numbers the encoder has."""
        attention = 4 * self.width * self.heads * self.head_dim
        layer = attention + 3 * self.width * self.hidden + 2 * self.width
        tables = self.depth if self.bias == "layers" else 1
        biases = tables * self.buckets * self.heads
        return (self.vocabulary + 1) * self.width + self.depth * layer + biases


def _presets(name: str, **given: Any) -> dict[str, T5EncoderConfig]:
    sizes = {
        "small": (512, 8, 6, 1024),
        "base": (768, 12, 12, 2048),
        "large": (1024, 24, 16, 2816),
        "xl": (2048, 24, 32, 5120),
        "xxl": (4096, 24, 64, 10240),
    }
    return {
        f"{name}-{size}": T5EncoderConfig(
            width=width, depth=depth, heads=heads, hidden=hidden, **given
        )
        for size, (width, depth, heads, hidden) in sizes.items()
    }


T5_PRESETS = {
    **_presets("t5-v1.1"),
    **_presets("umt5", vocabulary=256384, bias="layers"),
}
"""Both families from small to xxl, as published (nobody published a large UMT5)."""


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "s s"]:
    """The bucket of the way from each query (first axis) to each key, as T5 counts them.

    Keys after the query have the second half of the buckets. Small distances have one each, larger
    ones share them along a logarithm. It is computed in float32, as the published models' code does:
    distances at the edge of a bucket depend on it.
    """
    places = np.arange(length)
    way = places[None, :] - places[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(way)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    large = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return np.where(distance < exact, distance, large) + np.where(way > 0, half, 0)


def exact_dense(features: int, axes: tuple[str, str], dtype: Dtype, name: str, **given: Any) -> Any:
    """A linear layer ``[in, out]`` whose products of float32 are such on every accelerator."""
    return nn.Dense(
        features,
        dtype=dtype,
        precision="highest" if dtype == jnp.float32 else None,
        kernel_init=nn.with_logical_partitioning(NORMAL, axes),
        name=name,
        **given,
    )


def masked_attention(
    q: Float[Array, "b s a d"],
    k: Float[Array, "b s a d"],
    v: Float[Array, "b s a d"],
    bias: Float[Array, "#b #a s s"],
    scale: float = 1.0,
) -> Float[Array, "b s a d"]:
    """Attention with a bias on its logits, which are float32 as the softmax is."""
    exact = "highest" if q.dtype == jnp.float32 else None
    given: dict[str, Any] = {"precision": exact, "preferred_element_type": jnp.float32}
    logits = jnp.einsum("bsad,btad->bast", q, k, **given) * scale + bias
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bast,btad->bsad", weights, v, **given).astype(v.dtype)


class RelativeBias(nn.Module):
    """The biases of attention, from a table of buckets; float32."""

    config: T5EncoderConfig

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "1 a s s"]:
        config = self.config
        init = nn.with_logical_partitioning(NORMAL, (None, "heads"))
        # Flax types the boxed initial value; `param` returns it unboxed.
        table: Any = self.param("table", init, (config.buckets, config.heads))
        chosen = relative_buckets(length, config.buckets, config.max_distance)
        return jnp.moveaxis(table[chosen], -1, 0)[None]


class T5Block(nn.Module):
    """Attention and the gated layer; returns ``(x, None)``, so that ``nn.scan`` can carry ``x``."""

    config: T5EncoderConfig
    dtype: Dtype
    constrain: Constrain

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s e"],
        mask: Float[Array, "b 1 1 s"],
        shared: Float[Array, "1 a s s"] | None,
    ) -> tuple[Float[Array, "b s e"], None]:
        config = self.config
        linear = partial(exact_dense, dtype=self.dtype, use_bias=False)

        def lay(y: jax.Array) -> jax.Array:
            return self.constrain(y, "batch", "text_tokens", "width")

        b, s, width = x.shape
        inner = config.heads * config.head_dim
        bias = RelativeBias(config, name="relative_bias")(s) if shared is None else shared
        h = lay(RMSNorm(name="attention_norm")(x).astype(self.dtype))
        q, k, v = (
            self.constrain(
                linear(inner, ("embed", "heads"), name=name)(h).reshape(b, s, config.heads, -1),
                "batch",
                "text_tokens",
                "heads",
                None,
            )
            for name in ("q", "k", "v")
        )
        out = masked_attention(q, k, v, bias + mask).reshape(b, s, inner)
        x = lay(x + linear(width, ("heads", "embed"), name="out")(out).astype(jnp.float32))
        h = lay(RMSNorm(name="mlp_norm")(x).astype(self.dtype))
        gate = gelu(linear(config.hidden, ("embed", "mlp"), name="gate")(h))
        h = gate * linear(config.hidden, ("embed", "mlp"), name="up")(h)
        h = self.constrain(h, "batch", "text_tokens", "mlp")
        down = linear(width, ("mlp", "embed"), name="down")(h)
        return lay(x + down.astype(jnp.float32)), None


class T5Encoder(nn.Module):
    """Tokens ``[b, s]`` to states ``[b, s, e]``."""

    config: T5EncoderConfig
    dtype: Dtype = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b s"], mask: Bool[Array, "b s"]
    ) -> Float[Array, "b s e"]:
        """Float32 states; ``mask`` is True at tokens, and states elsewhere say nothing."""
        config = self.config
        table = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        x = nn.Embed(config.vocabulary, config.width, embedding_init=table, name="tokens")(tokens)
        x = self.constrain(x.astype(jnp.float32), "batch", "text_tokens", "width")
        shared = None
        if config.bias == "shared":
            shared = RelativeBias(config, name="relative_bias")(tokens.shape[1])
        hidden = jnp.where(mask, 0.0, MASKED)[:, None, None, :]
        stacked: Any = nn.scan(
            T5Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # Flax infers int from 0
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stacked(config, self.dtype, self.constrain, name="blocks")(x, hidden, shared)
        return RMSNorm(name="norm")(x)
