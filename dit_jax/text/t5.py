"""The encoders of T5 v1.1 and UMT5: tokens of a caption to states.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(section 2.1), in version 1.1: gated GELU (Shazeer 2020, "GLU Variants Improve Transformer"). Pre-norm
layers without biases::

    x <- x + O softmax(q k^T + B[bucket(j - i)]) v,    q, k, v = (Q, K, V) norm(x)             (1)
    x <- x + D (gelu(G norm(x)) * U norm(x))                                                   (2)

Attention is not scaled, and the place of a token is known by the bias B alone, of which T5 has one
table for all layers and UMT5 (Chung et al. 2023, "UniMax") one for each. Products run in ``dtype``; the
residual stream, norms and softmax are float32.

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

MASKED = -1e9  # added to the logits of padding: nothing is left of them after the softmax
NORMAL = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig:
    """Sizes of an encoder; the defaults are those of T5 v1.1 XXL."""

    vocabulary: int = 32128
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240  # of each of the two branches of (2)
    buckets: int = 32  # half for each direction, half of those for single steps
    max_distance: int = 128  # from where on all distances share the last bucket
    bias: Literal["shared", "layers"] = "shared"  # one table of biases (T5) or one a layer (UMT5)

    def __post_init__(self) -> None:
        numbers = [value for value in dataclasses.astuple(self) if isinstance(value, int)]
        if min(numbers) < 1 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"{self}: sizes are at least 1, buckets a multiple of 4 and max_distance above a "
                "quarter of them (32 and 128 are usual)."
            )


SIZES = {  # width, depth, heads, hidden
    "small": (512, 8, 6, 1024),
    "base": (768, 12, 12, 2048),
    "large": (1024, 24, 16, 2816),
    "xl": (2048, 24, 32, 5120),
    "xxl": (4096, 24, 64, 10240),
}
# Both families as published (nobody published a large UMT5): vocabulary and biases.
FAMILIES: dict[str, tuple[int, Literal["shared", "layers"]]] = {
    "t5-v1.1": (32128, "shared"),
    "umt5": (256384, "layers"),
}
T5_PRESETS = {
    f"{family}-{size}": T5EncoderConfig(words, width, depth, heads, hidden=hidden, bias=bias)
    for family, (words, bias) in FAMILIES.items()
    for size, (width, depth, heads, hidden) in SIZES.items()
}


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "s s"]:
    """The bucket of the way from each query (first axis) to each key: keys after the query have the
    second half; small distances have one each, larger ones share them along a logarithm."""
    places = np.arange(length)
    way = places[None, :] - places[:, None]
    half = buckets // 2
    exact, distance = half // 2, np.abs(way)
    # In float32, as the published code: distances at the edge of a bucket depend on it.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    large = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return np.where(distance < exact, distance, large) + np.where(way > 0, half, 0)


def masked_attention(
    q: Float[Array, "b s a d"],
    k: Float[Array, "b s a d"],
    v: Float[Array, "b s a d"],
    bias: Float[Array, "#b #a s s"],
) -> Float[Array, "b s a d"]:
    """Attention with a bias on its logits, which are float32 as the softmax is (1)."""
    exact: Any = "highest" if q.dtype == jnp.float32 else None
    product = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(product("bsad,btad->bast", q, k) + bias).astype(v.dtype)
    return product("bast,btad->bsad", weights, v).astype(v.dtype)


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
    """A layer; returns ``(x, None)``, so that ``nn.scan`` can carry ``x``."""

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
        config, (b, s, width) = self.config, x.shape
        inner = config.heads * config.head_dim

        def linear(y: jax.Array, features: int, axes: tuple[str, str], name: str) -> jax.Array:
            return nn.Dense(
                features,
                use_bias=False,
                dtype=self.dtype,
                # On TPUs a product of float32 is one only so.
                precision="highest" if self.dtype == jnp.float32 else None,
                kernel_init=nn.with_logical_partitioning(NORMAL, axes),
                name=name,
            )(y)

        def by_tokens(y: jax.Array, *axes: str | None) -> jax.Array:
            return self.constrain(y, "batch", "text_tokens", *axes)

        bias = RelativeBias(config, name="relative_bias")(s) if shared is None else shared
        h = by_tokens(RMSNorm(name="attention_norm")(x).astype(self.dtype), "width")
        heads = [linear(h, inner, ("embed", "heads"), name) for name in ("q", "k", "v")]
        q, k, v = (by_tokens(y.reshape(b, s, config.heads, -1), "heads", None) for y in heads)
        out = masked_attention(q, k, v, bias + mask).reshape(b, s, inner)
        x = x + linear(out, width, ("heads", "embed"), "out").astype(jnp.float32)  # (1)
        x = by_tokens(x, "width")
        h = by_tokens(RMSNorm(name="mlp_norm")(x).astype(self.dtype), "width")
        gate = gelu(linear(h, config.hidden, ("embed", "mlp"), "gate"))
        h = by_tokens(gate * linear(h, config.hidden, ("embed", "mlp"), "up"), "mlp")
        x = x + linear(h, width, ("mlp", "embed"), "down").astype(jnp.float32)  # (2)
        return by_tokens(x, "width"), None


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
