"""The diffusion transformer over packed spacetime tokens.

Tokens of any number of clips and images lie side by side in a row; noise levels come per
conditioning group; text comes packed the same way. The output has the shape of the input
patches, or twice that (with learned variance); what it means is decided in ``diffusion``.

Sources: Peebles & Xie 2022 (adaLN-Zero blocks), Dehghani et al. 2023 (packing; QK-norm from
"Scaling Vision Transformers to 22 Billion Parameters"), Su et al. 2021 (rotary positions).
``published`` gives DiT as Peebles & Xie trained it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dit_jax.model.blocks import (
    XAVIER,
    ZERO,
    DiTBlock,
    Dtype,
    Modulation,
    dense,
    gather_parts,
    layer_norm,
    through,
)
from dit_jax.model.conditioners import Conditioning
from dit_jax.model.positions import (
    axis_dims,
    grid_features,
    grid_time_features,
    rotary_angles,
    sincos_features,
)
from dit_jax.types import (
    ATTENTION,
    QKV,
    RESIDUAL,
    Attention,
    Constrain,
    DenoiserInputs,
    DotGeneral,
)

policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "full": None,
    "attention": policies.save_only_these_names(ATTENTION),
    "projections": policies.save_only_these_names(ATTENTION, QKV),
    "dots": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
    ),
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[ATTENTION],
        names_which_can_be_offloaded=[RESIDUAL, QKV],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What a block keeps for its backward pass (``DiTConfig.remat`` says it in words)."""

ABSOLUTE = {"thw": sincos_features, "wh": grid_features, "wht": grid_time_features}
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
    """Ratio of rotary wavelengths (see ``model.positions``)."""
    rotary: bool = True
    """Turn queries and keys by their token's coordinates."""
    qk_norm: bool = True
    """Normalise queries and keys (root mean square, a learned scale for each dimension of a head)."""
    absolute_positions: Literal["none", "thw", "wh", "wht"] = "none"
    """Also add sines and cosines of the coordinates to the patches: of all three, or of columns and
    rows alone as DiT and MAE do, or (wht) of these and time, the first frame placed as in wh. A small
    model learns where things are much sooner; sizes never trained on are then a little harder."""
    time_scale: float = 1000.0
    time_offset: float = 0.0
    """The network is told ``time_scale * t + time_offset`` of a noise level t in [0, 1]. 1000 and -1
    count the levels of a thousand-step schedule from 0 as DiT does; -1 and 1 are SiT's clock."""
    time_divisor: int = TIME_FREQUENCIES // 2
    """The i-th sinusoid's rate is 10,000 to the power of ``-i / time_divisor``: 128 in DiT and SiT; 127
    is what Diffusers' class computes from the same weights."""
    time_std: float | None = None
    """Standard deviation of the fresh kernels that embed noise levels (DiT: 0.02); unset: Xavier's."""
    cross_attention: bool = True
    """Attend to the text in every block; without it only ``pooled_text`` reads the text."""
    pooled_text: bool = False
    """Also condition the modulation on the mean of the text states, and not by attention alone."""
    modulation: Literal["layer", "shared"] = "layer"
    """Whether every layer makes its modulation from the condition by a matrix of its own
    (adaLN-Zero), or one matrix serves all and a layer adds a table (PixArt-alpha's adaLN-single: a
    quarter to a third fewer parameters)."""
    band: int | None = None
    """Tokens on either side, in the row's order, that the banded layers attend to: n tokens are
    n / (h w) latent frames of h w patches. Unset, every layer attends to the whole segment."""
    dense_every: int = 2
    """With a band: every so-many-th layer attends to the whole segment, the others are banded (the
    alternating pattern of Child et al. 2019, "Sparse Transformers", as in GPT-3)."""
    scan: bool | None = None
    """Compile one block and loop over the layers (quick to compile), or unroll them (quick to run
    on a CPU); the parameters are the same. Unset: loop on accelerators, unroll on CPUs."""
    remat: Literal["none", "dots", "projections", "attention", "full", "offload"] = "none"
    """What the backward pass has from the forward pass, and does not compute again. none: all that it
    needs. dots: the results of linear layers and of attention. projections: attention's results and the
    product its inputs are made from. attention: its results. full: only what enters the block. offload:
    attention's results on the device, that product and the block's input in the host's memory (TPUs and
    GPUs)."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"dit.{name} is {getattr(self, name)}: it must be at least 1. Take a preset "
                    "(dit_jax.model.PRESETS) if unsure."
                )
        if self.width % self.heads:
            raise ValueError(
                f"dit.width {self.width} does not divide into {self.heads} heads; "
                f"make it a multiple, such as {self.width // self.heads * self.heads or self.heads}."
            )
        if self.rotary:
            axis_dims(self.width // self.heads)
        if self.band is not None and (
            self.band < 1 or self.dense_every < 1 or self.depth % self.dense_every
        ):
            raise ValueError(
                f"dit.band {self.band} and dense_every {self.dense_every} are at least 1, and "
                f"dense_every divides the depth, {self.depth}."
            )
        if self.absolute_positions in ("wh", "wht") and self.width % 4:
            raise ValueError(
                f"dit.width {self.width} is not a multiple of 4, as sines and cosines of columns and "
                f"rows (absolute_positions {self.absolute_positions!r}) need: change the width, or "
                "take 'thw'."
            )
        if self.time_divisor < 1:
            raise ValueError(f"dit.time_divisor is {self.time_divisor}: it is at least 1 (128).")
        if self.time_scale == 0 or not (self.time_std is None or self.time_std > 0):
            raise ValueError(
                f"dit.time_scale {self.time_scale} must not be 0, nor time_std {self.time_std} below "
                "or equal to 0 (1000 and unset are usual)."
            )
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


def published(preset: str) -> DiTConfig:
    """A preset as in Peebles & Xie 2022: fixed positions, no QK-norm, no text.

    To be used with ``NoTextConfig``, the conditioner ``ClassLabels`` and patches of one frame;
    ``ModelConfig.learned_variance`` is theirs too.
    """
    return dataclasses.replace(
        PRESETS[preset],
        rotary=False,
        qk_norm=False,
        absolute_positions="wh",
        cross_attention=False,
        time_offset=-1.0,
        time_std=0.02,
    )


def time_features(
    t: Float[Array, "b k"],
    scale: float = 1000.0,
    offset: float = 0.0,
    divisor: int = TIME_FREQUENCIES // 2,
) -> Float[Array, "b k f"]:
    """Sinusoids of noise levels in [0, 1], counted in thousandths as DDPM's steps are."""
    half = TIME_FREQUENCIES // 2
    rates = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / divisor)
    angles = (scale * t + offset)[..., None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class TimeEmbedding(nn.Module):
    """Noise levels of groups to conditioning vectors, in float32."""

    config: DiTConfig
    constrain: Constrain

    @nn.compact
    def __call__(self, t: Float[Array, "b k"]) -> Float[Array, "b k d"]:
        config = self.config
        features = time_features(t, config.time_scale, config.time_offset, config.time_divisor)
        init = XAVIER if config.time_std is None else nn.initializers.normal(config.time_std)
        linear = partial(dense, config.width, dtype=jnp.float32, init=init, precision="highest")
        hidden = linear(("time", "embed"), name="up")(features)
        hidden = self.constrain(nn.silu(hidden), "batch", None, "width")
        out = linear(("embed", "embed_out"), name="out")(hidden)
        return self.constrain(out, "batch", None, "width")


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


class LayerGroup(nn.Module):
    """Banded layers and a dense one after them: the unit that repeats where there is a band."""

    block: Callable[..., DiTBlock]
    count: int
    band: int

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], *given: Any) -> tuple[Float[Array, "b l d"], None]:
        for i in range(self.count):
            band = self.band if i < self.count - 1 else None
            x, _ = self.block(band=band, name=f"layer_{i}")(x, *given)
        return x, None


def layers(
    config: DiTConfig, name: str, **given: Any
) -> Callable[..., tuple[Float[Array, "b l d"], None]]:
    """All layers one after another, their parameters stacked, as one module that carries ``x``."""
    block: Any = DiTBlock
    if config.remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    scan = config.scan if config.scan is not None else jax.default_backend() != "cpu"
    each = config.dense_every if config.band is not None else 1
    given |= {"cross_attention": config.cross_attention}
    given |= {"shared_modulation": config.modulation == "shared", "qk_norm": config.qk_norm}
    if config.band is not None:
        given = {"block": partial(block, **given), "count": each, "band": config.band}
    stacked = nn.scan(
        block if config.band is None else LayerGroup,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # Flax infers int from 0
        length=config.depth // each,
        unroll=1 if scan else config.depth // each,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stacked(name=name, **given)


def with_text(
    text: Float[Array, "b s e"] | None,
    text_segment_ids: Int[Array, "b s"] | None,
    added: Sequence[Conditioning],
) -> tuple[Float[Array, "b t e"] | None, Int[Array, "b t"] | None]:
    """Text states and their segments, with those of conditioners behind them."""
    more = [one.text for one in added if one.text is not None]
    if not more:
        return text, text_segment_ids
    if text is not None and text_segment_ids is not None:
        more = [(text, text_segment_ids), *more]
    states, ids = zip(*more, strict=True)
    return jnp.concatenate(states, 1), jnp.concatenate(ids, 1)


class DiT(nn.Module):
    """The transformer: noised tokens, their noise levels and text in, a patch a token out."""

    config: DiTConfig
    output_dim: int
    attention: Attention
    constrain: Constrain
    dtype: Dtype = jnp.float32
    dot_general: DotGeneral = jax.lax.dot_general
    layer_dot_general: DotGeneral | None = None
    """That of the blocks, where it is another one (in low precision)."""

    @nn.compact
    def __call__(
        self,
        inputs: DenoiserInputs,
        added: Sequence[Conditioning] = (),
        residual: Float[Array, "b l d"] | None = None,
    ) -> Float[Array, "b l o"]:
        """Returns float32 ``[b, l, output_dim]``; finite and otherwise unspecified at padding.

        ``inputs.text`` are text states, or None if the config uses none; ``added`` is what conditioners
        add. A ``residual`` takes the place of the blocks (see ``model.reuse``).
        """
        config, positions = self.config, inputs.positions
        segment_ids, group_ids = inputs.segment_ids, inputs.group_ids
        text, text_segment_ids = inputs.text, inputs.text_segment_ids
        linear = partial(dense, dtype=self.dtype, dot_general=self.dot_general)
        embed = linear(config.width, ("patch", "embed"), name="patch_embedding")
        x = embed(inputs.tokens.astype(self.dtype))
        for one in added:
            x = x if one.tokens is None else x + one.tokens.astype(self.dtype)
        if config.absolute_positions != "none":
            features = ABSOLUTE[config.absolute_positions]
            x = x + features(positions, config.width, config.rope_theta).astype(self.dtype)
        x = self.constrain(x, "batch", "tokens", "width")
        condition = TimeEmbedding(config, self.constrain, name="time")(inputs.group_t)
        for one in added:
            condition = condition if one.modulation is None else condition + one.modulation
        rotary = None
        if config.rotary:
            rotary = rotary_angles(positions, config.width // config.heads, config.rope_theta)
        if config.pooled_text:
            assert text is not None and text_segment_ids is not None
            groups = inputs.group_t.shape[1]
            pooled = pool_text(text, text_segment_ids, segment_ids, group_ids, groups)
            exact = partial(dense, dtype=jnp.float32, precision="highest")
            condition += exact(config.width, ("embed", "embed_out"), name="pooled")(pooled)
        text, text_segment_ids = with_text(text, text_segment_ids, added)
        if text is not None:
            text = text.astype(self.dtype)

        of_layers = condition = self.constrain(condition, "batch", None, "width")
        if config.modulation == "shared":
            of_layers = Modulation(config.width, 2, name="modulation")(condition)
            of_layers = self.constrain(of_layers, "batch", None, None)
        given = (of_layers, group_ids, segment_ids, rotary, text, text_segment_ids)
        x = through(self, _layers_of(self), x, given, residual)

        groups = Modulation(config.width, 1, gated=False, name="final_modulation")(condition)
        groups = self.constrain(groups, "batch", None, None)
        shift, scale = gather_parts(groups, group_ids, 2)
        x = (layer_norm(x) * (1 + scale) + shift).astype(self.dtype)
        x = linear(self.output_dim, ("embed", "patch"), name="final", init=ZERO)(x)
        return x.astype(jnp.float32)


def _layers_of(dit: DiT) -> Callable[..., tuple[Float[Array, "b l d"], None]]:
    config = dit.config
    return layers(
        config,
        "blocks",
        heads=config.heads,
        mlp_dim=config.hidden,
        dtype=dit.dtype,
        attention=dit.attention,
        constrain=dit.constrain,
        dot_general=dit.layer_dot_general or dit.dot_general,
    )
