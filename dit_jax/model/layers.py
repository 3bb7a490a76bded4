"""Layers that the transformer and the text encoder are made of.

Parameters are float32; matrix products run in the runtime's dtype. The float32 islands are: norms,
modulation, rotary angles, noise levels and the softmax (in the attention function). Parameters and
activations carry names of logical axes only; ``parallel`` knows the mesh.
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

from dit_jax.model.patches import rotate
from dit_jax.types import QKV, DotGeneral, Runtime

Dtype = Any
Initializer = Callable[..., jax.Array]
Tokens = Float[Array, "b l d"]
Ids = Int[Array, "b l"]
ByGroup = Float[Array, "b k d"]

ZERO = nn.initializers.zeros_init()
NORM_EPS = 1e-6


def dense(
    features: int,
    axes: tuple[str, str],
    dtype: Dtype,
    name: str,
    init: Initializer | None = None,
    dot_general: DotGeneral = jax.lax.dot_general,
    precision: Literal["highest"] | None = None,
) -> nn.Dense:
    """A linear layer whose kernel ``[in, out]`` carries logical axes.

    It is Xavier's without ``init``. On TPUs a product of float32 is one only if ``precision`` is
    "highest".
    """
    init = init or nn.initializers.xavier_uniform()
    # A bias along "embed" is whole on every device: to gather it in every layer costs more than room.
    bias_axis = "embed_vector" if axes[1] == "embed" else axes[1]
    return nn.Dense(
        features,
        dtype=dtype,
        dot_general=dot_general,
        precision=precision,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(ZERO, (bias_axis,)),
        name=name,
    )


@jax.custom_vjp
def layer_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Layer norm without parameters, in float32; the result is float32."""
    # The backward pass is written out (here and in `gelu`) so that it keeps the input alone.
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
"""Up to so many, groups are chosen by comparisons, which XLA fuses into what uses the values: nothing
of the row's length is stored."""


def gather_groups(per_group: ByGroup, group_ids: Ids) -> Float[Array, "b #l d"]:
    """The values of each token's modulation group; one for all tokens if there is one group."""
    if per_group.shape[1] <= FEW_GROUPS:
        out = per_group[:, :1]
        for i in range(1, per_group.shape[1]):
            out = jnp.where((group_ids == i)[..., None], per_group[:, i : i + 1], out)
        return out
    # A product with a one-hot matrix: exact, and its gradient is a product too, not a scatter.
    chosen = jax.nn.one_hot(group_ids, per_group.shape[1], dtype=per_group.dtype)
    return jnp.einsum("blk,bkd->bld", chosen, per_group, precision="highest")


def gather_parts(per_group: ByGroup, group_ids: Ids, parts: int) -> list[jax.Array]:
    """``gather_groups`` of each of so many equal parts: ``[b, l or 1, d / parts]``."""
    if per_group.shape[1] <= FEW_GROUPS:
        return [gather_groups(part, group_ids) for part in jnp.split(per_group, parts, -1)]
    return jnp.split(gather_groups(per_group, group_ids), parts, -1)


FLOAT32_LAYERS = {"time", "pooled", "modulation", "final_modulation"}
"""Linear layers that compute in float32 whatever the dtype of activations."""


def as_computed(path: Sequence[str], leaf: jax.Array, dtype: Dtype) -> jax.Array:
    """A parameter in the dtype that its layer computes with (see ``dense``); the others, and those of
    conditioners, which compute in what they please, as they are."""
    linear = path[-1] in ("kernel", "bias") and not FLOAT32_LAYERS.intersection(path)
    linear = linear and not any(part.startswith("conditioners_") for part in path)
    return leaf.astype(dtype) if linear else leaf


class Modulation(nn.Module):
    """Shift, scale and gate of ``branches`` residual branches for every group; zero at init.

    On TPUs the product is made of bfloat16 factors and summed in float32: its kernel is a large part of
    the parameters, which every layer would gather twice as wide.
    """

    width: int
    branches: int
    gated: bool = True

    @nn.compact
    def __call__(self, condition: ByGroup) -> Float[Array, "b k m"]:
        each = 3 if self.gated else 2
        features, axes = self.branches * each * self.width, ("embed", "modulation")
        return dense(features, axes, jnp.float32, "linear", ZERO)(nn.silu(condition))


class Attention(nn.Module):
    """Attention of tokens to those of their own segment, within ``window`` if there is one.

    With ``text`` it is cross-attention: to the text of the segment, and zero at initialisation.
    """

    heads: int
    runtime: Runtime
    window: int | None = None
    axis: str = "tokens"
    """Logical axis of the tokens; those of text are whole on every device."""
    qk_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        segment_ids: Ids,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        text: tuple[Float[Array, "b s e"], Int[Array, "b s"]] | None = None,
    ) -> Tokens:
        run, (b, l, width) = self.runtime, x.shape
        linear = partial(dense, dtype=run.dtype, dot_general=run.dot_general)
        d, source, keys = (
            width // self.heads,
            self.axis,
            None if self.axis == "tokens" else segment_ids,
        )
        # Queries, keys and values of one head lie side by side, so that splitting the heads over
        # devices splits the kernel in whole heads. Named before the norms, whose backward pass needs
        # what enters them: kept after them alone, the product would be computed again.
        if text is None:
            qkv = checkpoint_name(linear(3 * width, ("embed", "heads"), name="qkv")(x), QKV)
            qkv = qkv.reshape(b, l, self.heads, 3, d)
            q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]  # [b, l, a, d]
        else:
            states, keys = text
            source = "text_tokens"
            q = linear(width, ("embed", "heads"), name="q")(x).reshape(b, l, self.heads, d)
            kv = linear(2 * width, ("embed", "heads"), name="kv")(states)
            kv = kv.reshape(b, states.shape[1], self.heads, 2, d)
            k, v = kv[..., 0, :], kv[..., 1, :]  # [b, s, a, d]
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q = run.constrain(q, "batch", self.axis, "heads", None)
        k, v = (run.constrain(y, "batch", source, "heads", None) for y in (k, v))
        out = run.attention(q, k, v, segment_ids, keys, window=self.window)
        out = run.constrain(out, "batch", self.axis, "heads", None).reshape(b, l, width)
        init = None if text is None else ZERO
        return linear(width, ("heads", "embed"), name="out", init=init)(out)


class MLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    hidden: int
    runtime: Runtime
    axis: str = "tokens"

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        run = self.runtime
        linear = partial(dense, dtype=run.dtype, dot_general=run.dot_general)
        hidden = linear(self.hidden, ("embed", "mlp"), name="up")(x)
        hidden = run.constrain(gelu(hidden), "batch", self.axis, "mlp")
        return linear(x.shape[-1], ("mlp", "embed"), name="down")(hidden)
