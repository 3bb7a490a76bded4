"""The layers of the diffusion transformer.

One block is self-attention within segments, cross-attention to text and an MLP, each in a
residual branch; self-attention and MLP are modulated by their token's conditioning group
(adaLN-Zero, Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", section 3.2). The
modulation is computed per group and gathered to tokens. Every branch ends in a zero at
initialisation, so a fresh block is the identity.

Parameters are float32; matrix products run in ``dtype``. The float32 islands are: norms,
modulation, rotary angles and the softmax (in the attention function).

Axis letters in ``types``; parameter and activation axes carry logical names only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dit_jax.model.positions import rotate
from dit_jax.types import QKV, RESIDUAL, Attention, Constrain, DotGeneral

Dtype = Any
Initializer = Callable[..., jax.Array]

XAVIER = nn.initializers.xavier_uniform()
ZERO = nn.initializers.zeros_init()
NORM_EPS = 1e-6


def dense(
    features: int,
    axes: tuple[str, str],
    dtype: Dtype,
    name: str,
    init: Initializer = XAVIER,
    dot_general: DotGeneral = jax.lax.dot_general,
    precision: Literal["highest"] | None = None,
) -> nn.Dense:
    """A linear layer whose kernel ``[in, out]`` carries logical axes.

    On TPUs a product of float32 is one only where ``precision`` is "highest". A bias along "embed" is
    whole on every device: gathering it in every layer costs more than its room.
    """
    of_bias = "embed_vector" if axes[1] == "embed" else axes[1]
    return nn.Dense(
        features,
        dtype=dtype,
        dot_general=dot_general,
        precision=precision,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(ZERO, (of_bias,)),
        name=name,
    )


@jax.custom_vjp
def layer_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Layer norm without parameters, in float32; the result is float32.

    The backward pass is written out (here and in ``gelu``) so that it keeps the input alone.
    """
    return _layer_norm_forward(x)[0]


def _layer_norm_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPS)
    return centred * inverse, (x, mean, inverse)


def _layer_norm_backward(kept: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array]:
    x, mean, inverse = kept
    y = (x.astype(jnp.float32) - mean) * inverse
    along = y * (g * y).mean(-1, keepdims=True)
    return ((inverse * (g - g.mean(-1, keepdims=True) - along)).astype(x.dtype),)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)

GELU_SCALE = (2 / jnp.pi) ** 0.5
GELU_CUBIC = 0.044715


@jax.custom_vjp
def gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Gaussian error linear unit, tanh approximation (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + jnp.tanh(GELU_SCALE * x * (1 + GELU_CUBIC * x * x)))


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    square = x * x
    tanh = jnp.tanh(GELU_SCALE * x * (1 + GELU_CUBIC * square))
    slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * square)
    return (g * 0.5 * (1 + tanh + x * (1 - tanh * tanh) * slope),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale (Zhang & Sennrich 2019)."""

    axis_name: str | None = None
    eps: float = NORM_EPS

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis_name,))
        # Flax types the boxed initial value; `param` returns it unboxed.
        scale: Any = self.param("scale", init, (x.shape[-1],))
        y = x.astype(jnp.float32)
        squares = jnp.square(y).mean(-1, keepdims=True)
        return (y * jax.lax.rsqrt(squares + self.eps) * scale).astype(x.dtype)


FEW_GROUPS = 4
"""So many are chosen from by comparisons, which XLA fuses into what uses them: nothing as long as the
row is stored."""


def gather_groups(
    per_group: Float[Array, "b k d"], group_ids: Int[Array, "b l"]
) -> Float[Array, "b #l d"]:
    """What each token's conditioning group has, token by token (one for all if it is the only)."""
    if per_group.shape[1] <= FEW_GROUPS:
        out = per_group[:, :1]
        for i in range(1, per_group.shape[1]):
            out = jnp.where((group_ids == i)[..., None], per_group[:, i : i + 1], out)
        return out
    # A product with a one-hot matrix: exact, and its gradient is a product too, not a scatter.
    chosen = jax.nn.one_hot(group_ids, per_group.shape[1], dtype=per_group.dtype)
    return jnp.einsum("blk,bkd->bld", chosen, per_group, precision="highest")


FLOAT32_LAYERS = {"time", "pooled", "modulation", "final_modulation"}
"""Linear layers that compute in float32 whatever the dtype of activations."""


def as_computed(path: Sequence[str], leaf: jax.Array, dtype: Dtype) -> jax.Array:
    """A parameter in the dtype that its layer computes with (see ``dense``); the others, and those of
    conditioners, which compute in what they please, as they are."""
    linear = path[-1] in ("kernel", "bias") and not FLOAT32_LAYERS.intersection(path)
    linear = linear and not any(part.startswith("conditioners_") for part in path)
    return leaf.astype(dtype) if linear else leaf


def gather_parts(
    per_group: Float[Array, "b k d"], group_ids: Int[Array, "b l"], parts: int
) -> list[Float[Array, "b #l m"]]:
    """``gather_groups`` of each of so many equal parts."""
    if per_group.shape[1] <= FEW_GROUPS:
        return [gather_groups(part, group_ids) for part in jnp.split(per_group, parts, -1)]
    return jnp.split(gather_groups(per_group, group_ids), parts, -1)


class Modulation(nn.Module):
    """Shift, scale and gate of ``branches`` residual branches for every group; zero at init.

    On TPUs the product is made of bfloat16 factors and summed in float32: its kernel is a large part of
    the parameters, which every layer would gather twice as wide.
    """

    width: int
    branches: int
    gated: bool = True

    @nn.compact
    def __call__(self, condition: Float[Array, "b k d"]) -> Float[Array, "b k m"]:
        each = 3 if self.gated else 2
        layer = dense(
            self.branches * each * self.width, ("embed", "modulation"), jnp.float32, "linear", ZERO
        )
        return layer(nn.silu(condition))


class SelfAttention(nn.Module):
    """Attention of a row's tokens to those of their own segment, within ``band`` if given."""

    heads: int
    dtype: Dtype
    attention: Attention
    constrain: Constrain
    dot_general: DotGeneral = jax.lax.dot_general
    band: int | None = None
    axis: str = "tokens"
    """Logical axis of the tokens; those of text are whole on every device."""
    qk_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        segment_ids: Int[Array, "b l"],
        rotary: tuple[jax.Array, jax.Array] | None,
    ) -> Float[Array, "b l d"]:
        b, l, width = x.shape
        linear = partial(dense, dtype=self.dtype, dot_general=self.dot_general)
        # Queries, keys and values of one head lie side by side, so that splitting the heads over
        # devices splits the kernel in whole heads. Named before the norms, whose backward pass needs
        # what enters them: kept after them alone, the product would be computed again.
        qkv = checkpoint_name(linear(3 * width, ("embed", "heads"), name="qkv")(x), QKV)
        qkv = qkv.reshape(b, l, self.heads, 3, width // self.heads)
        q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (self.constrain(y, "batch", self.axis, "heads", None) for y in (q, k, v))
        keys = None if self.axis == "tokens" else segment_ids
        out = self.attention(q, k, v, segment_ids, keys, band=self.band)
        out = self.constrain(out, "batch", self.axis, "heads", None).reshape(b, l, width)
        return linear(width, ("heads", "embed"), name="out")(out)


class CrossAttention(nn.Module):
    """Attention of tokens to the text of their own segment; its output is zero at init."""

    heads: int
    dtype: Dtype
    attention: Attention
    constrain: Constrain
    dot_general: DotGeneral = jax.lax.dot_general
    qk_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        text: Float[Array, "b s e"],
        segment_ids: Int[Array, "b l"],
        text_segment_ids: Int[Array, "b s"],
    ) -> Float[Array, "b l d"]:
        b, l, width = x.shape
        d = width // self.heads
        linear = partial(dense, dtype=self.dtype, dot_general=self.dot_general)
        q = linear(width, ("embed", "heads"), name="q")(x).reshape(b, l, self.heads, d)
        kv = linear(2 * width, ("embed", "heads"), name="kv")(text)
        kv = kv.reshape(b, text.shape[1], self.heads, 2, d)
        k, v = kv[..., 0, :], kv[..., 1, :]
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        q = self.constrain(q, "batch", "tokens", "heads", None)
        k, v = (self.constrain(y, "batch", "text_tokens", "heads", None) for y in (k, v))
        out = self.attention(q, k, v, segment_ids, text_segment_ids)
        out = self.constrain(out, "batch", "tokens", "heads", None).reshape(b, l, width)
        return linear(width, ("heads", "embed"), name="out", init=ZERO)(out)


class MLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    hidden: int
    dtype: Dtype
    constrain: Constrain
    dot_general: DotGeneral = jax.lax.dot_general
    axis: str = "tokens"

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        linear = partial(dense, dtype=self.dtype, dot_general=self.dot_general)
        hidden = linear(self.hidden, ("embed", "mlp"), name="up")(x)
        hidden = self.constrain(gelu(hidden), "batch", self.axis, "mlp")
        return linear(x.shape[-1], ("mlp", "embed"), name="down")(hidden)


class DiTBlock(nn.Module):
    """One block; returns ``(x, None)`` so that ``nn.scan`` can carry ``x`` over the layers.

    With ``shared_modulation`` the condition is the modulation itself, one for all layers, to which a
    block adds a table of its own (adaLN-single, Chen et al. 2023, "PixArt-alpha", section 2.3).
    """

    heads: int
    mlp_dim: int
    dtype: Dtype
    attention: Attention
    constrain: Constrain
    dot_general: DotGeneral = jax.lax.dot_general
    cross_attention: bool = True
    shared_modulation: bool = False
    band: int | None = None
    qk_norm: bool = True

    def modulation(self, condition: Float[Array, "b k x"], width: int) -> Float[Array, "b k m"]:
        """Shift, scale and gate of both modulated branches, for every group."""
        if not self.shared_modulation:
            return Modulation(width, branches=2, name="modulation")(condition)
        init = nn.with_logical_partitioning(ZERO, ("modulation_table",))
        # Flax types the boxed initial value; `param` returns it unboxed.
        table: Any = self.param("modulation_table", init, (6 * width,))
        return condition + table

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        condition: Float[Array, "b k x"],
        group_ids: Int[Array, "b l"],
        segment_ids: Int[Array, "b l"],
        rotary: tuple[jax.Array, jax.Array] | None,
        text: Float[Array, "b s e"] | None,
        text_segment_ids: Int[Array, "b s"] | None,
    ) -> tuple[Float[Array, "b l d"], None]:
        width = x.shape[-1]
        layers = {
            "dtype": self.dtype,
            "constrain": self.constrain,
            "dot_general": self.dot_general,
        }
        attend = {"heads": self.heads, "attention": self.attention, "qk_norm": self.qk_norm}
        attend |= layers

        def lay(y: jax.Array) -> jax.Array:
            # Left free, the compiler spreads widths over `tensor` and gathers them at every product.
            return self.constrain(y, "batch", "tokens", "width")

        x = checkpoint_name(x, RESIDUAL)
        groups = self.constrain(self.modulation(condition, width), "batch", None, None)
        shift1, scale1, gate1, shift2, scale2, gate2 = gather_parts(groups, group_ids, 6)

        h = lay((layer_norm(x) * (1 + scale1) + shift1).astype(self.dtype))
        attention = SelfAttention(name="self_attention", band=self.band, **attend)
        branch = lay(attention(h, segment_ids, rotary))
        x = x + (gate1 * branch.astype(jnp.float32)).astype(x.dtype)
        if self.cross_attention:
            assert text is not None and text_segment_ids is not None
            h = lay(layer_norm(x).astype(self.dtype))
            cross = CrossAttention(name="cross_attention", **attend)
            x = x + lay(cross(h, text, segment_ids, text_segment_ids)).astype(x.dtype)
        h = lay((layer_norm(x) * (1 + scale2) + shift2).astype(self.dtype))
        branch = lay(MLP(self.mlp_dim, name="mlp", **layers)(h))
        x = x + (gate2 * branch.astype(jnp.float32)).astype(x.dtype)
        return lay(x), None


RESIDUALS = "residuals"
"""The collection of what all blocks together added to their input, for steps that run none."""


def through(
    module: nn.Module,
    blocks: Callable[..., tuple[Float[Array, "b l d"], None]],
    x: Float[Array, "b l d"],
    given: tuple[Any, ...],
    residual: Float[Array, "b l d"] | None,
) -> Float[Array, "b l d"]:
    """``x`` after the blocks, which leave in ``RESIDUALS`` what they added where that is mutable; or
    plus ``residual``, in place of running them."""
    if residual is not None:
        return x + residual
    out, _ = blocks(x, *given)
    if module.is_mutable_collection(RESIDUALS) and not module.is_initializing():
        module.put_variable(RESIDUALS, "blocks", out - x)
    return out
