"""The text-to-video model, top to bottom: text encoder, conditioners and the diffusion transformer.

One block of the transformer, with shift, scale and gate of the token's modulation group (adaLN-Zero,
Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", section 3.2)::

    x = x + gate1 attention((1 + scale1) norm(x) + shift1)     within segments
    x = x + cross_attention(norm(x), text)                     to the segment's own text
    x = x + gate2 mlp((1 + scale2) norm(x) + shift2)

Every branch ends in a zero at initialisation, so a fresh block is the identity. Tokens of any number of
clips and images lie side by side in a row; noise levels, and the modulation made of them, come by
modulation group and are gathered to tokens. The output has the shape of the input patches, or twice
that (with learned variance); what it means is decided in ``diffusion``.

Also from: Dehghani et al. 2023 (packing; QK-norm from "Scaling Vision Transformers to 22 Billion
Parameters"), Su et al. 2021 (rotary positions), Chen et al. 2023, "PixArt-alpha" (adaLN-single).
With class labels and no text, no cross-attention and one frame this is DiT as published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dit_jax.model.conditioners import Conditioner, Conditioning
from dit_jax.model.layers import (
    MLP,
    XAVIER,
    ZERO,
    Dtype,
    Modulation,
    RMSNorm,
    SelfAttention,
    dense,
    gather_parts,
    layer_norm,
)
from dit_jax.model.patches import (
    PatchConfig,
    axis_dims,
    grid_features,
    grid_time_features,
    rotary_angles,
    sincos_features,
)
from dit_jax.model.text import (
    BEGIN,
    ByteEncoder,
    ByteEncoderConfig,
    NoTextConfig,
    StatesProjection,
    TextStatesConfig,
    byte_tokens,
    with_beginning,
)
from dit_jax.types import ATTENTION, QKV, RESIDUAL, DenoiserInputs, Params, Runtime

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
    """Ratio of rotary wavelengths (see ``model.patches``)."""
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
    window: int | None = None
    """Tokens on either side, in the row's order, that the windowed layers attend to: n tokens are
    n / (h w) latent frames of h w patches. Unset, every layer attends to the whole segment."""
    global_every: int = 2
    """With a window: every n-th layer attends to the whole segment, the others within the window (the
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
        if self.window is not None and (
            self.window < 1 or self.global_every < 1 or self.depth % self.global_every
        ):
            raise ValueError(
                f"dit.window {self.window} and global_every {self.global_every} are at least 1, and "
                f"global_every divides the depth, {self.depth}."
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


# ---------------------------------------------------------------------------------------------------
# The blocks
# ---------------------------------------------------------------------------------------------------


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
    runtime: Runtime

    @nn.compact
    def __call__(self, t: Float[Array, "b k"]) -> Float[Array, "b k d"]:
        config, constrain = self.config, self.runtime.constrain
        features = time_features(t, config.time_scale, config.time_offset, config.time_divisor)
        init = XAVIER if config.time_std is None else nn.initializers.normal(config.time_std)
        linear = partial(dense, config.width, dtype=jnp.float32, init=init, precision="highest")
        hidden = linear(("time", "embed"), name="up")(features)
        hidden = constrain(nn.silu(hidden), "batch", None, "width")
        out = linear(("embed", "embed_out"), name="out")(hidden)
        return constrain(out, "batch", None, "width")


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


class CrossAttention(nn.Module):
    """Attention of tokens to the text of their own segment; its output is zero at init."""

    heads: int
    runtime: Runtime
    qk_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        text: Float[Array, "b s e"],
        segment_ids: Int[Array, "b l"],
        text_segment_ids: Int[Array, "b s"],
    ) -> Float[Array, "b l d"]:
        run, (b, l, width) = self.runtime, x.shape
        d = width // self.heads
        linear = partial(dense, dtype=run.dtype, dot_general=run.dot_general)
        q = linear(width, ("embed", "heads"), name="q")(x).reshape(b, l, self.heads, d)
        kv = linear(2 * width, ("embed", "heads"), name="kv")(text)
        kv = kv.reshape(b, text.shape[1], self.heads, 2, d)
        k, v = kv[..., 0, :], kv[..., 1, :]
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        q = run.constrain(q, "batch", "tokens", "heads", None)
        k, v = (run.constrain(y, "batch", "text_tokens", "heads", None) for y in (k, v))
        out = run.attention(q, k, v, segment_ids, text_segment_ids)
        out = run.constrain(out, "batch", "tokens", "heads", None).reshape(b, l, width)
        return linear(width, ("heads", "embed"), name="out", init=ZERO)(out)


class DiTBlock(nn.Module):
    """One block; returns ``(x, None)`` so that ``nn.scan`` can carry ``x`` over the layers."""

    config: DiTConfig
    runtime: Runtime
    window: int | None = None

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
        config, run, width = self.config, self.runtime, x.shape[-1]
        attend: dict[str, Any] = {
            "heads": config.heads,
            "runtime": run,
            "qk_norm": config.qk_norm,
        }

        def whole(y: jax.Array) -> jax.Array:
            # Unconstrained, the compiler splits widths over `tensor` and gathers them at every product.
            return run.constrain(y, "batch", "tokens", "width")

        x = checkpoint_name(x, RESIDUAL)
        if config.modulation == "layer":
            groups = Modulation(width, branches=2, name="modulation")(condition)  # [b, k, 6 d]
        else:  # The condition is the modulation of all layers, to which a block adds its own table.
            init = nn.with_logical_partitioning(ZERO, ("modulation_table",))
            # Flax types the boxed initial value; `param` returns it unboxed.
            table: Any = self.param("modulation_table", init, (6 * width,))
            groups = condition + table
        groups = run.constrain(groups, "batch", None, None)
        shift1, scale1, gate1, shift2, scale2, gate2 = gather_parts(groups, group_ids, 6)

        h = whole((layer_norm(x) * (1 + scale1) + shift1).astype(run.dtype))
        attention = SelfAttention(window=self.window, name="self_attention", **attend)
        branch = whole(attention(h, segment_ids, rotary))
        x = x + (gate1 * branch.astype(jnp.float32)).astype(x.dtype)
        if config.cross_attention:
            assert text is not None and text_segment_ids is not None
            h = whole(layer_norm(x).astype(run.dtype))
            cross = CrossAttention(name="cross_attention", **attend)
            x = x + whole(cross(h, text, segment_ids, text_segment_ids)).astype(x.dtype)
        h = whole((layer_norm(x) * (1 + scale2) + shift2).astype(run.dtype))
        branch = whole(MLP(config.hidden, run, name="mlp")(h))
        x = x + (gate2 * branch.astype(jnp.float32)).astype(x.dtype)
        return whole(x), None


class LayerGroup(nn.Module):
    """Layers with a window and one without after them: the unit that repeats if there is a window."""

    block: type[DiTBlock]
    config: DiTConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], *others: Any
    ) -> tuple[Float[Array, "b l d"], None]:
        for i in range(self.config.global_every):
            window = self.config.window if i < self.config.global_every - 1 else None
            x, _ = self.block(self.config, self.runtime, window, name=f"layer_{i}")(x, *others)
        return x, None


# ---------------------------------------------------------------------------------------------------
# The transformer
# ---------------------------------------------------------------------------------------------------


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


RESIDUALS = "residuals"
"""The collection of what all blocks together added to their input, for steps that run none (feature
caching, see ``sampling.sampler``)."""


class DiT(nn.Module):
    """The transformer: noised tokens, their noise levels and text in, a patch a token out."""

    config: DiTConfig
    output_dim: int
    runtime: Runtime

    @nn.compact
    def __call__(
        self,
        inputs: DenoiserInputs,
        added: Sequence[Conditioning] = (),
        residual: Float[Array, "b l d"] | None = None,
    ) -> Float[Array, "b l o"]:
        """Returns float32 ``[b, l, output_dim]``; finite and otherwise unspecified at padding.

        ``inputs.text`` are text states, or None if the config uses none; ``added`` is what conditioners
        add. A ``residual`` is added in place of running the blocks.
        """
        config, run, positions = self.config, self.runtime, inputs.positions
        segment_ids, group_ids = inputs.segment_ids, inputs.group_ids
        text, text_segment_ids = inputs.text, inputs.text_segment_ids
        linear = partial(dense, dtype=run.dtype, dot_general=run.dot_general)

        # Tokens, and the fixed features of their place.
        embed = linear(config.width, ("patch", "embed"), name="patch_embedding")
        x = embed(inputs.tokens.astype(run.dtype))
        for one in added:
            x = x if one.tokens is None else x + one.tokens.astype(run.dtype)
        if config.absolute_positions != "none":
            features = ABSOLUTE[config.absolute_positions]
            x = x + features(positions, config.width, config.rope_theta).astype(run.dtype)
        x = run.constrain(x, "batch", "tokens", "width")

        # The condition [b, k, d] of every modulation group, float32.
        condition = TimeEmbedding(config, run, name="time")(inputs.group_t)
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
            text = text.astype(run.dtype)
        of_layers = condition = run.constrain(condition, "batch", None, "width")
        if config.modulation == "shared":
            of_layers = Modulation(config.width, 2, name="modulation")(condition)
            of_layers = run.constrain(of_layers, "batch", None, None)

        if residual is None:
            others = (of_layers, group_ids, segment_ids, rotary, text, text_segment_ids)
            start, (x, _) = x, self.blocks()(x, *others)
            if self.is_mutable_collection(RESIDUALS) and not self.is_initializing():
                self.put_variable(RESIDUALS, "blocks", x - start)
        else:
            x = x + residual

        groups = Modulation(config.width, 1, gated=False, name="final_modulation")(condition)
        groups = run.constrain(groups, "batch", None, None)
        shift, scale = gather_parts(groups, group_ids, 2)
        x = (layer_norm(x) * (1 + scale) + shift).astype(run.dtype)
        x = linear(self.output_dim, ("embed", "patch"), name="final", init=ZERO)(x)
        return x.astype(jnp.float32)

    def blocks(self) -> nn.Module:
        """All blocks one after another, their parameters stacked, as one module that carries ``x``."""
        config = self.config
        scan = config.scan if config.scan is not None else jax.default_backend() != "cpu"
        run = dataclasses.replace(self.runtime, dot_general=self.runtime.block_dot_general)
        block: Any = DiTBlock
        if config.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        unit, count = partial(block, config, run), config.depth
        if config.window is not None:
            unit, count = (
                partial(LayerGroup, block, config, run),
                config.depth // config.global_every,
            )
        scanned: Any = nn.scan(
            unit.func,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # Flax infers int from 0
            length=count,
            unroll=1 if scan else count,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(*unit.args, name="blocks")


# ---------------------------------------------------------------------------------------------------
# The model with its text encoder
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes of the parameters, and how they are computed with."""

    dit: DiTConfig = DiTConfig()
    patch: PatchConfig = PatchConfig()
    text: ByteEncoderConfig | TextStatesConfig | NoTextConfig = ByteEncoderConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations. Auto is bfloat16 on accelerators and float32 on CPUs."""
    matmul: Literal["full", "int8", "fp8"] = "full"
    """What the linear layers of the transformer's blocks multiply in: the dtype of activations, or 8
    bits (``parallel.matmul`` says what, in both passes; needs ``dit-jax[quant]``)."""
    learned_variance: bool = False
    """Whether the network's output has a second half: the variance of the reverse step, for every
    number of the patch (Nichol & Dhariwal 2021, section 3.1; DiT's "learned sigma")."""
    conditioners: dict[str, Conditioner] = dataclasses.field(default_factory=dict, hash=False)
    """What else the model is conditioned on: a conditioner for each field, under the field's name."""

    def __post_init__(self) -> None:
        reads = self.dit.pooled_text or self.dit.cross_attention
        if isinstance(self.text, NoTextConfig) and reads:
            raise ValueError(
                "model.text is NoTextConfig, and dit.pooled_text or dit.cross_attention is set: there "
                "is nothing to read. Unset both."
            )

    @property
    def output_dim(self) -> int:
        """Numbers that the network gives for a token: p, or 2 p with learned variance."""
        return self.patch.dim * (2 if self.learned_variance else 1)

    @property
    def text_width(self) -> int:
        """Numbers of a text state as the transformer sees it."""
        return self.text.width if isinstance(self.text, ByteEncoderConfig) else self.dit.width

    def on(self, platform: str) -> ModelConfig:
        """The same with what is left to the platform (cpu, gpu, tpu) decided for this one."""
        scan = self.dit.scan if self.dit.scan is not None else platform != "cpu"
        dtype: Any = jnp.dtype(self.compute_dtype(platform)).name
        return dataclasses.replace(self, dtype=dtype, dit=dataclasses.replace(self.dit, scan=scan))

    def text_tokens(self, caption: str, states: np.ndarray | None = None) -> np.ndarray:
        """What the model reads: int32 bytes ``[s]`` of the caption, or its states float32 ``[s, e]``.
        An empty caption is one that was dropped, whatever its states."""
        if isinstance(self.text, ByteEncoderConfig):
            return byte_tokens(caption, self.text.max_bytes)
        if isinstance(self.text, NoTextConfig):
            return np.array([BEGIN], np.int32)
        if states is not None and not caption:
            states = np.zeros((0, self.text.dim), np.float32)
        if states is None or states.ndim != 2 or states.shape[1] != self.text.dim:
            found = "none" if states is None else f"an array of shape {states.shape}"
            raise ValueError(
                f"the model reads captions as states [s, {self.text.dim}] of the text encoder "
                f"{self.text.encoder!r}, and {found} came with {caption[:60]!r}: give records that "
                "have them (data.source.text_states_key), the encoder itself (text_encoder.path), or a "
                "model with a byte encoder (model.text)."
            )
        return with_beginning(states, self.text.max_tokens)

    def compute_dtype(self, backend: str | None = None) -> Dtype:
        """The dtype of activations on ``backend`` (this process's, if not given)."""
        if self.dtype == "auto":
            cpu = (backend or jax.default_backend()) == "cpu"
            return jnp.float32 if cpu else jnp.bfloat16
        return jnp.dtype(self.dtype)


class TextToVideo(nn.Module):
    """Text tokens, fields and noised patches in, predicted patches out."""

    config: ModelConfig
    runtime: Runtime

    def setup(self) -> None:
        config = self.config
        run = dataclasses.replace(self.runtime, dtype=config.compute_dtype())
        if isinstance(config.text, ByteEncoderConfig):
            self.text = ByteEncoder(config.text, run)
        elif isinstance(config.text, TextStatesConfig):
            self.text = StatesProjection(config.dit.width, run)
        self.conditioners = {
            name: one.build(name, config, run) for name, one in config.conditioners.items()
        }
        self.dit = DiT(config.dit, config.output_dim, run)

    def encode_text(
        self,
        text: Int[Array, "b s"] | Float[Array, "b s x"],
        text_segment_ids: Int[Array, "b s"] | None,
    ) -> Float[Array, "b s e"] | Int[Array, "b s"]:
        """Text states, needed once for all steps of a solver; without text, the tokens as they are."""
        if isinstance(self.config.text, NoTextConfig):
            return text
        encoder: Any = self.text
        if isinstance(self.config.text, TextStatesConfig):
            return encoder(text)
        return encoder(text, text_segment_ids)

    def denoise(
        self, inputs: DenoiserInputs, residual: Float[Array, "b l d"] | None = None
    ) -> Float[Array, "b l o"]:
        """Conditioners and the transformer, on encoded text. See ``DiT`` for ``residual``."""
        if isinstance(self.config.text, NoTextConfig):
            inputs = inputs.replace(text=None)  # pyright: ignore[reportAttributeAccessIssue]
        added = [conditioner(inputs) for conditioner in self.conditioners.values()]
        return self.dit(inputs, added, residual)

    def __call__(self, inputs: DenoiserInputs) -> Float[Array, "b l o"]:
        text = self.encode_text(inputs.text, inputs.text_segment_ids)
        return self.denoise(inputs.replace(text=text))  # pyright: ignore[reportAttributeAccessIssue]


def no_attention(q: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """Stands in for attention, which has no parameters, where only parameters matter."""
    return q


def denoise_and_keep(
    model: TextToVideo, params: Params, inputs: DenoiserInputs
) -> tuple[Float[Array, "b l o"], Float[Array, "b l d"]]:
    """``TextToVideo.denoise``, and what the blocks added, in the dtype of activations."""
    out: Any = model.apply(params, inputs, method="denoise", mutable=[RESIDUALS])
    output, collections = out
    return output, collections[RESIDUALS]["dit"]["blocks"]


def first_modulation(
    config: DiTConfig, params: Params, t: Float[Array, "k"]
) -> Float[Array, "k m"]:
    """Shift and scale (1 added) of what enters the first block, ``m = 2 d``, at noise levels ``t`` and
    with no text: the part of that input which the level alone decides.

    ``params`` are those of ``DiT``, without boxes.
    """
    condition: Any = TimeEmbedding(config, Runtime(no_attention)).apply(
        {"params": params["time"]}, t[None]
    )
    blocks = params["blocks"]
    first = blocks["layer_0"] if config.window is not None else blocks
    modulation = Modulation(config.width, 2)
    if config.modulation == "shared":
        made: Any = modulation.apply({"params": params["modulation"]}, condition)
        made = made + first["modulation_table"][0]
    else:
        own = jax.tree.map(lambda leaf: leaf[0], first["modulation"])
        made = modulation.apply({"params": own}, condition)
    shift, scale, *_ = jnp.split(made[0], 6, -1)
    return jnp.concatenate([shift, 1 + scale], -1)
