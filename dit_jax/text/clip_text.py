"""The text transformer of CLIP: tokens of a caption to states, and one vector of the whole.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (section
2.4): learned places, pre-norm layers with causal attention, and the state at the token that ends the
caption as its summary, which a projection takes to the space it shares with images. Configuration and
computation are those of ``transformers``' ``CLIPTextModel`` and ``CLIPTextModelWithProjection``.

Attention looks back alone, so that padding behind a caption changes none of its states and needs no
mask. Products run in ``dtype``; the residual stream, norms and softmax are float32. The images' half
is not here.

Axis letters: b captions, s tokens, e width, j width of the projection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dit_jax.model.blocks import Dtype
from dit_jax.text.t5 import MASKED, exact_dense, masked_attention
from dit_jax.types import Constrain, unconstrained

HIGHEST_TOKEN = 2
"""The ``end`` of configs that name no real one: the token with the highest number ends a caption."""
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the text transformer; the defaults are those of CLIP-L."""

    vocabulary: int = 49408
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    max_tokens: int = 77
    """Places there are, the beginning and the end of a caption included."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: float = 1e-5
    end: int = 49407
    """The token that ends a caption; ``HIGHEST_TOKEN`` in configs of before it was right."""
    projection: int | None = None
    """Width of the projection of the summary; None where there is none."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "depth", "heads", "hidden", "projection"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"CLIP text {name} is {size}: it is at least 1.")
        if self.max_tokens < 2:
            raise ValueError(
                f"CLIP text max_tokens is {self.max_tokens}: a beginning and an end are two."
            )
        if self.width % self.heads:
            raise ValueError(
                f"CLIP text width {self.width} does not divide into {self.heads} heads; make it a "
                "multiple."
            )


CLIP_PRESETS = {
    "clip-l": CLIPTextConfig(),
    "openclip-h": CLIPTextConfig(
        width=1024, depth=24, heads=16, hidden=4096, activation="gelu", projection=1024
    ),
    "openclip-bigg": CLIPTextConfig(
        width=1280, depth=32, heads=20, hidden=5120, activation="gelu", projection=1280
    ),
}
"""OpenAI's ViT-L/14 as Stable Diffusion has it, and OpenCLIP's ViT-H/14 and ViT-bigG/14."""


class CLIPTextStates(NamedTuple):
    """What the text transformer says of captions, float32."""

    last: Float[Array, "b s e"]
    """After the last layer and the norm behind it."""
    penultimate: Float[Array, "b s e"]
    """Before the last layer, without a norm: what Stable Diffusion XL reads."""
    pooled: Float[Array, "b j"]
    """``last`` at the end of the caption, projected where there is a projection."""


def _norm(eps: float, name: str) -> nn.LayerNorm:
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    return nn.LayerNorm(
        epsilon=eps,
        dtype=jnp.float32,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(ones, ("embed_vector",)),
        bias_init=nn.with_logical_partitioning(zeros, ("embed_vector",)),
        name=name,
    )


def _table(count: int, width: int, axis: str, name: str) -> nn.Embed:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "embed"))
    return nn.Embed(count, width, embedding_init=init, name=name)


class CLIPBlock(nn.Module):
    """One layer; returns what comes out and what went in, for ``nn.scan``."""

    config: CLIPTextConfig
    dtype: Dtype
    constrain: Constrain

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s e"], mask: Float[Array, "1 1 s s"]
    ) -> tuple[Float[Array, "b s e"], Float[Array, "b s e"]]:
        config, entered = self.config, x

        def linear(features: int, axes: tuple[str, str], name: str) -> nn.Dense:
            axis = "embed_vector" if axes[1] == "embed" else axes[1]
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (axis,))
            return exact_dense(features, axes, self.dtype, name, bias_init=zeros)

        def lay(y: jax.Array) -> jax.Array:
            return self.constrain(y, "batch", "text_tokens", "width")

        b, s, width = x.shape
        h = lay(_norm(config.norm_eps, "attention_norm")(x).astype(self.dtype))
        q, k, v = (
            self.constrain(
                linear(width, ("embed", "heads"), name)(h).reshape(b, s, config.heads, -1),
                "batch",
                "text_tokens",
                "heads",
                None,
            )
            for name in ("q", "k", "v")
        )
        out = masked_attention(q, k, v, mask, (width // config.heads) ** -0.5)
        out = linear(width, ("heads", "embed"), "out")(out.reshape(b, s, width))
        x = lay(x + out.astype(jnp.float32))
        h = lay(_norm(config.norm_eps, "mlp_norm")(x).astype(self.dtype))
        h = ACTIVATIONS[config.activation](linear(config.hidden, ("embed", "mlp"), "up")(h))
        h = self.constrain(h, "batch", "text_tokens", "mlp")
        down = linear(width, ("mlp", "embed"), "down")(h)
        return lay(x + down.astype(jnp.float32)), entered


class CLIPTextEncoder(nn.Module):
    """Tokens ``[b, s]`` to states and summaries."""

    config: CLIPTextConfig
    dtype: Dtype = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"]) -> CLIPTextStates:
        """States of tokens up to the end of each caption; behind it they mean nothing."""
        config, (b, s) = self.config, tokens.shape
        x = _table(config.vocabulary, config.width, "vocab", "tokens")(tokens)
        places = _table(config.max_tokens, config.width, "text_place", "places")(jnp.arange(s))
        x = x.astype(jnp.float32) + places.astype(jnp.float32)
        x = self.constrain(x, "batch", "text_tokens", "width")
        mask = jnp.where(jnp.tril(jnp.ones((s, s), bool)), 0.0, MASKED)[None, None]
        stacked: Any = nn.scan(
            CLIPBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # Flax infers int from 0
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, entered = stacked(config, self.dtype, self.constrain, name="blocks")(x, mask)
        last = _norm(config.norm_eps, "norm")(x)
        ends = tokens if config.end == HIGHEST_TOKEN else tokens == config.end
        pooled = last[jnp.arange(b), jnp.argmax(ends, axis=-1)]
        if config.projection is not None:
            project = exact_dense(
                config.projection, ("embed", "embed_out"), jnp.float32, "project", use_bias=False
            )
            pooled = project(pooled)
        return CLIPTextStates(last, entered[-1], pooled)
