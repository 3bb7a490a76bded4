"""Layers of the transformer and the text encoder::

    layer_norm(x) = (x - mean x) / sqrt(mean (x - mean x)^2 + eps)                            (1)
    rms_norm(x)   = scale x / sqrt(mean x^2 + eps)               Zhang & Sennrich 2019        (2)
    gelu(x)       = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2                         (3)

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
# Of text or images, and the segment that each is of.
States = tuple[Float[Array, "b _ _"], Int[Array, "b _"]]

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
    """A linear layer whose kernel ``[in, out]``, Xavier's without ``init``, carries logical axes. On
    TPUs a product of float32 is one only if ``precision`` is "highest"."""
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


# The backward passes of (1) and (3) are written out so that they keep the input alone.
@jax.custom_vjp
def layer_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Layer norm (1) without parameters, in float32; the result is float32."""
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
    """Gaussian error linear unit, tanh approximation (3) (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + jnp.tanh(GELU_SCALE * x * (1 + GELU_CUBIC * x * x)))


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    square = x * x
    tanh = jnp.tanh(GELU_SCALE * x * (1 + GELU_CUBIC * square))
    slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * square)
    return (g * 0.5 * (1 + tanh + x * (1 - tanh * tanh) * slope),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class RMSNorm(nn.Module):
    """Root-mean-square norm (2) over the last axis with a learned scale."""

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


def gather_groups(per_group: ByGroup, group_ids: Ids, parts: int = 1) -> list[jax.Array]:
    """The values of each token's modulation group in equal parts ``[b, l, d / parts]``; of a single
    group, ``[b, 1, d / parts]`` for all tokens."""
    k = per_group.shape[1]
    # Few groups are chosen by comparisons, which XLA fuses into what uses the values: nothing of the
    # row's length is stored.
    if k > FEW_GROUPS:
        # A product with a one-hot matrix: exact, and its gradient is a product too, not a scatter.
        chosen = jax.nn.one_hot(group_ids, k, dtype=per_group.dtype)
        gathered = jnp.einsum("blk,bkd->bld", chosen, per_group, precision="highest")
        return jnp.split(gathered, parts, -1)
    out = []
    for part in jnp.split(per_group, parts, -1):
        value = part[:, :1]
        for i in range(1, k):
            value = jnp.where((group_ids == i)[..., None], part[:, i : i + 1], value)
        out.append(value)
    return out


def as_computed(path: Sequence[str], leaf: jax.Array, dtype: Dtype) -> jax.Array:
    """A parameter in the dtype that its layer computes with (see ``dense``)."""
    # These are float32 whatever the dtype of activations, and conditioners compute in what they please.
    wide = {"time", "pooled", "modulation", "final_modulation", "cross_attention_norm"}
    own = any(part in wide or part.startswith("conditioners_") for part in path)
    return leaf if own or path[-1] not in ("kernel", "bias") else leaf.astype(dtype)


class Modulation(nn.Module):
    """All shifts, scales and gates of every group, ``features`` numbers; zero when fresh."""

    features: int

    @nn.compact
    def __call__(self, condition: ByGroup) -> Float[Array, "b k m"]:
        # Not of the highest precision: on TPUs its factors are bfloat16 (the sum is float32), for its
        # kernel is a large part of the parameters, and every layer would gather it twice as wide.
        linear = dense(self.features, ("embed", "modulation"), jnp.float32, "linear", ZERO)
        return linear(nn.silu(condition))


class LayerNorm(nn.Module):
    """Layer norm (1) with a learned scale and bias, in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        def vector(name: str, init: Initializer) -> Any:
            boxed = nn.with_logical_partitioning(init, (None,))
            return self.param(name, boxed, (x.shape[-1],))

        return layer_norm(x) * vector("scale", nn.initializers.ones_init()) + vector("bias", ZERO)


class Attention(nn.Module):
    """Attention of tokens to those of their own segment, within ``window`` if there is one; with
    ``text``, cross-attention to the segment's text, zero at initialisation. With ``image`` too, its
    states have keys and values of their own, and both results are added (Ye et al. 2023,
    "IP-Adapter", section 3.2.2)."""

    heads: int
    runtime: Runtime
    window: int | None = None
    axis: str = "tokens"  # Logical axis of the tokens; those of text are whole on every device.
    qk_norm: bool | Literal["width"] = True

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        segment_ids: Ids,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        text: States | None = None,
        image: States | None = None,
    ) -> Tokens:
        run, (b, l, width) = self.runtime, x.shape
        linear = partial(dense, dtype=run.dtype, dot_general=run.dot_general)

        def norm(y: jax.Array, name: str) -> jax.Array:
            if self.qk_norm == "width":  # of all heads together
                return RMSNorm(name=name)(y.reshape(b, -1, width)).reshape(y.shape)
            return RMSNorm(name=name)(y) if self.qk_norm else y

        def keys_and_values(states: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
            kv = linear(2 * width, ("embed", "heads"), name=name)(states)
            kv = kv.reshape(b, states.shape[1], self.heads, 2, -1)
            return kv[..., 0, :], kv[..., 1, :]  # [b, s, a, d]

        # Queries, keys and values of one head lie side by side, so that splitting the heads over
        # devices splits the kernel in whole heads. Named before the norms, whose backward pass needs
        # what enters them: kept after them alone, the product would be computed again.
        if text is None:
            # Keys laid out as the queries are have no segment ids of their own; those of text have.
            keys_axis, keys = self.axis, None if self.axis == "tokens" else segment_ids
            qkv = checkpoint_name(linear(3 * width, ("embed", "heads"), name="qkv")(x), QKV)
            qkv = qkv.reshape(b, l, self.heads, 3, -1)
            q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]  # [b, l, a, d]
        else:
            keys_axis, (states, keys) = "text_tokens", text
            q = linear(width, ("embed", "heads"), name="q")(x).reshape(b, l, self.heads, -1)
            k, v = keys_and_values(states, "kv")
        q, k = norm(q, "q_norm"), norm(k, "k_norm")
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q = run.constrain(q, "batch", self.axis, "heads", None)
        k, v = (run.constrain(y, "batch", keys_axis, "heads", None) for y in (k, v))
        out = run.attention(q, k, v, segment_ids, keys, window=self.window)
        if image is not None:
            states, ids = image
            k, v = keys_and_values(states, "image_kv")
            k = norm(k, "image_k_norm")
            k, v = (run.constrain(y, "batch", keys_axis, "heads", None) for y in (k, v))
            out = out + run.attention(q, k, v, segment_ids, ids, window=None)
        out = run.constrain(out, "batch", self.axis, "heads", None).reshape(b, l, width)
        init = None if text is None else ZERO
        return linear(width, ("heads", "embed"), name="out", init=init)(out)


class MLP(nn.Module):
    """Two linear layers with a GELU (3) between."""

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
