"""The diffusion transformer over packed spacetime tokens.

Tokens of any number of clips and images lie side by side in a row; noise levels come per
conditioning group; text comes packed the same way. The output has the shape of the input
patches; what it means (velocity, clean patches) is decided in ``diffusion``.

Sources: Peebles & Xie 2022 (adaLN-Zero blocks), Dehghani et al. 2023 (packing; QK-norm from
"Scaling Vision Transformers to 22 Billion Parameters"), Su et al. 2021 (rotary positions). Class
labels and learned sigma are not here.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dit_jax.models.blocks import (
    ZERO,
    DiTBlock,
    Dtype,
    Modulation,
    dense,
    gather_groups,
    layer_norm,
)
from dit_jax.models.positions import axis_dims, rotary_angles, sincos_features
from dit_jax.types import Attention, Constrain, DotGeneral

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a block keeps for its backward pass: nothing, or the results of its linear layers."""

TIME_FREQUENCIES = 256
"""Sinusoids that a noise level is embedded in, as in DiT."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Size and execution of the transformer. Presets are in ``PRESETS``."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_dim: int | None = None
    """Hidden width of the MLP; four times the width if not given."""
    rope_theta: float = 1e4
    """Ratio of rotary wavelengths (see ``models.positions``)."""
    absolute_positions: bool = False
    """Also add sines and cosines of the coordinates to the patches. A small model learns where
    things are much sooner; sizes never trained on are then a little harder."""
    cross_attention: bool = True
    """Attend to the text in every block; without it only ``pooled_text`` tells of the text."""
    pooled_text: bool = False
    """Also condition the modulation on the mean of the text states, and not by attention alone."""
    scan: bool | None = None
    """Compile one block and loop over the layers (quick to compile), or unroll them (quick to run
    on a CPU); the parameters are the same. Unset: loop on accelerators, unroll on CPUs."""
    remat: Literal["none", "dots", "full"] = "none"
    """What is computed again in the backward pass instead of being kept: nothing, all but the
    linear layers' results, or the whole block."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"dit.{name} is {getattr(self, name)}: it must be at least 1. Take a preset "
                    "(dit_jax.models.PRESETS) if unsure."
                )
        if self.width % self.heads:
            raise ValueError(
                f"dit.width {self.width} does not divide into {self.heads} heads; "
                f"make it a multiple, such as {self.width // self.heads * self.heads or self.heads}."
            )
        axis_dims(self.width // self.heads)
        if self.mlp_dim is not None and self.mlp_dim < 1:
            raise ValueError(
                f"dit.mlp_dim is {self.mlp_dim}: it must be at least 1, or unset for 4 x width."
            )

    @property
    def hidden(self) -> int:
        return self.mlp_dim or 4 * self.width


PRESETS = {
    "Ti": DiTConfig(width=192, depth=6, heads=4),
    "S": DiTConfig(width=384, depth=12, heads=6),
    "B": DiTConfig(width=768, depth=12, heads=12),
    "L": DiTConfig(width=1024, depth=24, heads=16),
    "XL": DiTConfig(width=1152, depth=28, heads=16),
}
"""The field's sizes (Peebles & Xie 2022, table 1), and a tiny one; patch sizes are set apart."""


def time_features(t: Float[Array, "b k"]) -> Float[Array, "b k f"]:
    """Sinusoids of noise levels in [0, 1], counted in thousandths as DDPM's steps are."""
    half = TIME_FREQUENCIES // 2
    rates = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = 1000.0 * t[..., None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class TimeEmbedding(nn.Module):
    """Noise levels of groups to conditioning vectors, in float32."""

    width: int

    @nn.compact
    def __call__(self, t: Float[Array, "b k"]) -> Float[Array, "b k d"]:
        hidden = dense(self.width, ("time", "embed"), jnp.float32, "up")(time_features(t))
        return dense(self.width, ("embed", "embed_out"), jnp.float32, "out")(nn.silu(hidden))


def pool_text(
    text: Float[Array, "b s e"],
    text_segment_ids: Int[Array, "b s"],
    segment_ids: Int[Array, "b l"],
    group_ids: Int[Array, "b l"],
    groups: int,
) -> Float[Array, "b k e"]:
    """The mean text state, float32, of the segment that each of ``groups`` groups belongs to."""
    member = group_ids[:, None, :] == jnp.arange(groups)[None, :, None]
    segment = jnp.where(member, segment_ids[:, None, :], 0).max(-1)
    mine = (segment[:, :, None] == text_segment_ids[:, None, :]).astype(jnp.float32)
    weights = mine / jnp.maximum(mine.sum(-1, keepdims=True), 1.0)
    return jnp.einsum("bks,bse->bke", weights, text.astype(jnp.float32), precision="highest")


def layers(config: DiTConfig) -> type[DiTBlock]:
    """A block that stands for all layers, one after another, their parameters stacked."""
    block = DiTBlock
    if config.remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    scan = config.scan if config.scan is not None else jax.default_backend() != "cpu"
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # Flax infers int from 0
        length=config.depth,
        unroll=1 if scan else config.depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class DiT(nn.Module):
    """The transformer: noised tokens, their noise levels and text in, a patch a token out."""

    config: DiTConfig
    patch_dim: int
    attention: Attention
    constrain: Constrain
    dtype: Dtype = jnp.float32
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b l p"],
        positions: Float[Array, "b l 3"],
        segment_ids: Int[Array, "b l"],
        group_ids: Int[Array, "b l"],
        group_t: Float[Array, "b k"],
        text: Float[Array, "b s e"] | None,
        text_segment_ids: Int[Array, "b s"] | None,
    ) -> Float[Array, "b l p"]:
        """Returns float32 patches; at padding they are finite and otherwise unspecified.

        Text may be None where the config uses none.
        """
        config = self.config
        linear = partial(dense, dtype=self.dtype, dot_general=self.dot_general)
        x = linear(config.width, ("patch", "embed"), name="patch_embedding")(
            tokens.astype(self.dtype)
        )
        if config.absolute_positions:
            features = sincos_features(positions, config.width, config.rope_theta)
            x = x + features.astype(self.dtype)
        x = self.constrain(x, "batch", "tokens", "width")
        condition = TimeEmbedding(config.width, name="time")(group_t)
        rotary = rotary_angles(positions, config.width // config.heads, config.rope_theta)
        if text is not None:
            text = text.astype(self.dtype)
        if config.pooled_text:
            assert text is not None and text_segment_ids is not None
            pooled = pool_text(text, text_segment_ids, segment_ids, group_ids, group_t.shape[1])
            condition += dense(config.width, ("embed", "embed_out"), jnp.float32, "pooled")(pooled)

        x, _ = layers(config)(
            config.heads,
            config.hidden,
            self.dtype,
            self.attention,
            self.constrain,
            self.dot_general,
            config.cross_attention,
            name="blocks",
        )(x, condition, group_ids, segment_ids, rotary, text, text_segment_ids)

        groups = Modulation(config.width, 1, gated=False, name="final_modulation")(condition)
        shift, scale = jnp.split(gather_groups(groups, group_ids), 2, axis=-1)
        x = (layer_norm(x) * (1 + scale) + shift).astype(self.dtype)
        x = linear(self.patch_dim, ("embed", "patch"), name="final", init=ZERO)(x)
        return x.astype(jnp.float32)
