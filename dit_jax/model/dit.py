"""The text-to-video model, top to bottom: configuration, blocks, transformer, text and conditioners.

One block, with shift, scale and gate of the token's modulation group (adaLN-Zero, Peebles & Xie 2022,
"Scalable Diffusion Models with Transformers", section 3.2)::

    x = x + gate1 attention((1 + scale1) norm(x) + shift1)     within segments             (1)
    x = x + cross_attention(norm(x), text)                     to the segment's own text   (2)
    x = x + gate2 mlp((1 + scale2) norm(x) + shift2)                                       (3)

Every branch is zero at initialisation, so a fresh block is the identity. Clips and images lie side by
side in a row of tokens; noise levels, and the modulation computed from them, come by modulation group
and are gathered to tokens. What the output means is decided in ``diffusion``.

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
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from dit_jax.model.conditioners import Conditioner, Conditioning, group_segments, prepare_fields
from dit_jax.model.layers import (
    MLP,
    ZERO,
    Attention,
    LayerNorm,
    Modulation,
    States,
    dense,
    gather_groups,
    layer_norm,
)
from dit_jax.model.patches import PatchConfig, absolute_features, rotary_angles
from dit_jax.model.text import ByteEncoderConfig, NoTextConfig, TextConfig, make_encoder
from dit_jax.types import (
    ATTENTION,
    QKV,
    RESIDUAL,
    DenoiserInputs,
    Params,
    PositiveFloat,
    PositiveInt,
    Runtime,
    require,
)

Tokens = Float[Array, "b l d"]
Output = Float[Array, "b l o"]

TIME_FREQUENCIES = 256  # as in DiT
policies, save = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names
# What a block keeps for its backward pass (`DiTConfig.remat` says it in words).
REMAT_POLICIES = {
    "full": None,
    "attention": save(ATTENTION),
    "projections": save(ATTENTION, QKV),
    "dots": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, save(ATTENTION)
    ),
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[ATTENTION],
        names_which_can_be_offloaded=[RESIDUAL, QKV],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Size and execution of the transformer. Presets are in ``PRESETS``."""

    width: PositiveInt = 384
    depth: PositiveInt = 12
    heads: PositiveInt = 6
    mlp_dim: PositiveInt | None = None  # Hidden width of the MLP; unset: four times the width.
    rope_theta: float = 1e4  # Ratio of rotary wavelengths (see ``model.patches``).
    rotary: bool = True  # Turn queries and keys by their token's coordinates.
    # Normalise queries and keys (root mean square, a learned scale for each dimension): each head, or
    # all heads together, as Wan does.
    qk_norm: bool | Literal["width"] = True
    # Also add sines and cosines of the coordinates to the patches: of all, or of columns and rows
    # as DiT and MAE do, or (wht) of these and time, the first frame placed as in wh. A small model
    # learns where things are much sooner; sizes never trained on are then a little harder.
    absolute_positions: Literal["none", "thw", "wh", "wht"] = "none"
    # The network reads ``time_scale * t + time_offset`` for a noise level t in [0, 1]. 1000 and -1
    # count the levels of a thousand-step schedule from 0 as DiT does; -1 and 1 are SiT's.
    time_scale: float = 1000.0
    time_offset: float = 0.0
    # The i-th sinusoid's rate is 10,000^(-i / time_divisor): 128 in DiT and SiT, 127 in Diffusers.
    time_divisor: PositiveInt = TIME_FREQUENCIES // 2
    # Standard deviation of the fresh kernels that embed noise levels (DiT: 0.02); unset: Xavier's.
    time_std: PositiveFloat | None = None
    # Attend to the text in every block; without it only ``pooled_text`` reads the text.
    cross_attention: bool = True
    # A learned scale and bias of what enters cross-attention.
    cross_norm: bool = False
    # Cross-attention also to the image states of a conditioner, with keys and values of their own.
    image_attention: bool = False
    pooled_text: bool = False  # Also condition the modulation on the mean of the text states.
    # A matrix for every layer (adaLN-Zero), or one for all, to whose product a layer adds a table
    # (PixArt-alpha's adaLN-single: a quarter to a third fewer parameters). table: shared, and the last
    # layer adds a table to the condition itself, with no matrix (as PixArt-alpha's and Wan's do).
    modulation: Literal["layer", "shared", "table"] = "layer"
    # Local attention window: tokens on either side, in the row's order, that local layers attend to
    # (n tokens are n / (h w) latent frames of h w patches). Unset: every layer is global.
    window: PositiveInt | None = None
    # With a window, every n-th layer attends to the whole segment (Child et al. 2019, as in GPT-3).
    global_every: PositiveInt = 2
    # Compile one block and loop over the layers (quick to compile), or unroll them (quick to run on
    # a CPU); the parameters are the same. Unset: loop on accelerators, unroll on CPUs.
    scan: bool | None = None
    # What is kept for the backward pass, which computes the rest again. none: all of it. dots:
    # results of linear layers and attention. projections: attention's results and the product its
    # inputs come from. attention: its results. full: only what enters the block. offload:
    # attention's results on the device, that product and the block's input in the host's memory.
    remat: Literal["none", "dots", "projections", "attention", "full", "offload"] = "none"

    def __post_init__(self) -> None:
        heads, every = max(self.heads, 1), max(self.global_every, 1)  # The types refuse 0 later.
        dim, fit = self.width // heads, max(self.width // heads, 1) * heads
        even, grid = dim % 2 == 0 and dim >= 6, self.absolute_positions in ("wh", "wht")
        whole = not self.window or self.depth % every == 0
        require(
            "dit.",
            self,
            ("width", self.width % heads == 0, f"a multiple of heads {heads}, as {fit}"),
            ("width", even or not self.rotary, "of an even number of dimensions a head, 6 or more"),
            ("width", not grid or self.width % 4 == 0, "a multiple of 4 for positions of rows"),
            ("depth", whole, f"a multiple of global_every {every}"),
            (
                "image_attention",
                self.cross_attention or not self.image_attention,
                "with cross_attention",
            ),
            ("time_scale", self.time_scale != 0, "1000 (DiT), -1 (SiT) or another but 0"),
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
    """A preset as in Peebles & Xie 2022, for ``NoTextConfig``, the conditioner ``ClassLabels``, patches
    of one frame and ``ModelConfig.learned_variance``."""
    plain: Any = {"rotary": False, "qk_norm": False, "cross_attention": False}
    changes: Any = {"absolute_positions": "wh", "time_offset": -1.0, "time_std": 0.02}
    return dataclasses.replace(PRESETS[preset], **plain, **changes)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes of the parameters, and how they are computed with."""

    dit: DiTConfig = DiTConfig()
    patch: PatchConfig = PatchConfig()
    text: TextConfig = ByteEncoderConfig()
    # Of activations. Auto is bfloat16 on accelerators and float32 on CPUs.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # What the linear layers of the transformer's blocks multiply in: the dtype of activations, or 8
    # bits (``parallel.matmul`` says what, in both passes; needs ``dit-jax[quant]``).
    matmul: Literal["full", "int8", "fp8"] = "full"
    # The network's output has a second half: the variance of the reverse step, for every number of
    # the patch (Nichol & Dhariwal 2021, section 3.1; DiT's "learned sigma").
    learned_variance: bool = False
    # What else the model is conditioned on: a conditioner for each field, under the field's name.
    conditioners: dict[str, Conditioner] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        reads = self.dit.pooled_text or self.dit.cross_attention
        rule = "of a kind, or unset dit.pooled_text and cross_attention, which have nothing to read"
        require("model.", self, ("text", not (reads and isinstance(self.text, NoTextConfig)), rule))

    @property
    def text_width(self) -> int:
        """Numbers of a text state as the transformer sees it."""
        return self.text.width if isinstance(self.text, ByteEncoderConfig) else self.dit.width

    def on(self, platform: str) -> ModelConfig:
        """The same with what is left to the platform (cpu, gpu, tpu) decided for this one."""
        cpu = platform == "cpu"
        scan = not cpu if self.dit.scan is None else self.dit.scan
        dtype: Any = ("float32" if cpu else "bfloat16") if self.dtype == "auto" else self.dtype
        return dataclasses.replace(self, dtype=dtype, dit=dataclasses.replace(self.dit, scan=scan))

    def compute_dtype(self) -> Any:
        """The dtype of activations on this process's platform."""
        return jnp.dtype(self.on(jax.default_backend()).dtype)


# --- The blocks ---


def time_features(
    t: Float[Array, "b k"], scale: float = 1e3, offset: float = 0.0, divisor: int = 128
) -> Float[Array, "b k f"]:
    """Sinusoids of noise levels in [0, 1], counted in thousandths as DDPM's steps are."""
    index = jnp.arange(TIME_FREQUENCIES // 2, dtype=jnp.float32)
    angles = (scale * t + offset)[..., None] * jnp.exp(-jnp.log(1e4) * index / divisor)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class TimeEmbedding(nn.Module):
    """Noise levels of groups to conditioning vectors, in float32."""

    config: DiTConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, t: Float[Array, "b k"]) -> Float[Array, "b k d"]:
        config, constrain = self.config, self.runtime.constrain
        x = time_features(t, config.time_scale, config.time_offset, config.time_divisor)
        init = nn.initializers.normal(config.time_std) if config.time_std else None
        linear = partial(dense, config.width, dtype=jnp.float32, init=init, precision="highest")
        x = constrain(nn.silu(linear(("time", "embed"), name="up")(x)), "batch", None, "width")
        return constrain(linear(("embed", "embed_out"), name="out")(x), "batch", None, "width")


class DiTBlock(nn.Module):
    """One block; returns ``(x, None)`` so that ``nn.scan`` can carry ``x`` over the layers."""

    config: DiTConfig
    runtime: Runtime
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        condition: Float[Array, "b k x"],
        group_ids: Int[Array, "b l"],
        segment_ids: Int[Array, "b l"],
        rotary: tuple[jax.Array, jax.Array] | None,
        text: Float[Array, "b s e"] | None,
        text_segment_ids: Int[Array, "b s"] | None,
        image: States | None = None,
    ) -> tuple[Tokens, None]:
        config, run, width = self.config, self.runtime, x.shape[-1]
        attention = partial(Attention, config.heads, run, qk_norm=config.qk_norm)

        def whole(y: jax.Array) -> jax.Array:
            # Unconstrained, the compiler splits widths over `tensor` and gathers them at every product.
            return run.constrain(y, "batch", "tokens", "width")

        x = checkpoint_name(x, RESIDUAL)
        if config.modulation == "layer":
            groups = Modulation(6 * width, name="modulation")(condition)  # [b, k, 6 d]
        else:  # The condition is the modulation of all layers, to which a block adds its own table.
            init = nn.with_logical_partitioning(ZERO, ("modulation_table",))
            # Flax types the boxed initial value; `param` returns it unboxed.
            table: Any = self.param("modulation_table", init, (6 * width,))
            groups = condition + table
        groups = run.constrain(groups, "batch", None, None)
        shift1, scale1, gate1, shift2, scale2, gate2 = gather_groups(groups, group_ids, 6)

        # The residual stream has the dtype of activations; norms, shifts and gates are float32.
        h = whole((layer_norm(x) * (1 + scale1) + shift1).astype(run.dtype))  # (1)
        branch = whole(attention(self.window, name="self_attention")(h, segment_ids, rotary))
        x = x + (gate1 * branch.astype(jnp.float32)).astype(x.dtype)
        if config.cross_attention:
            assert text is not None and text_segment_ids is not None
            norm = LayerNorm(name="cross_attention_norm") if config.cross_norm else layer_norm
            h = whole(norm(x).astype(run.dtype))  # (2)
            cross = attention(name="cross_attention")
            branch = cross(h, segment_ids, None, (text, text_segment_ids), image)
            x = x + whole(branch).astype(x.dtype)
        h = whole((layer_norm(x) * (1 + scale2) + shift2).astype(run.dtype))  # (3)
        branch = whole(MLP(config.hidden, run, name="mlp")(h))
        x = x + (gate2 * branch.astype(jnp.float32)).astype(x.dtype)
        return whole(x), None


class LayerGroup(nn.Module):
    """Layers with a window and one without after them: the unit that repeats if there is a window."""

    block: type[DiTBlock]
    config: DiTConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x: Tokens, *others: Any) -> tuple[Tokens, None]:
        for i in range(self.config.global_every):
            window = self.config.window if i < self.config.global_every - 1 else None
            x, _ = self.block(self.config, self.runtime, window, name=f"layer_{i}")(x, *others)
        return x, None


# --- The transformer ---


class DiT(nn.Module):
    """The transformer: noised tokens, their noise levels and text states (if it uses any) in, a patch a
    token out, float32; finite and otherwise unspecified at padding."""

    config: DiTConfig
    output_dim: int
    runtime: Runtime

    @nn.compact
    def __call__(
        self,
        inputs: DenoiserInputs,
        added: Sequence[Conditioning] = (),  # by conditioners
        residual: Tokens | None = None,  # in place of running the blocks
    ) -> Output:
        config, run, positions = self.config, self.runtime, inputs.positions
        width, theta, group_ids = config.width, config.rope_theta, inputs.group_ids
        text, text_segment_ids = inputs.text, inputs.text_segment_ids
        linear = partial(dense, dtype=run.dtype, dot_general=run.dot_general)

        # Tokens [b, l, d], and the fixed features of their place.
        embed = linear(width, ("patch", "embed"), name="patch_embedding")
        x = embed(inputs.tokens.astype(run.dtype))
        for one in added:
            x = x if one.tokens is None else x + one.tokens.astype(run.dtype)
        if config.absolute_positions != "none":
            features = absolute_features(config.absolute_positions, positions, width, theta)
            x = x + features.astype(run.dtype)
        x = run.constrain(x, "batch", "tokens", "width")

        # The condition [b, k, d] of every modulation group, float32.
        condition = TimeEmbedding(config, run, name="time")(inputs.group_t)
        for one in added:
            condition = condition if one.modulation is None else condition + one.modulation
        if config.pooled_text:  # The mean text state of each group's segment.
            assert text is not None and text_segment_ids is not None
            mine = group_segments(inputs)[:, :, None] == text_segment_ids[:, None]  # [b, k, s]
            mine = mine.astype(jnp.float32)
            weights = mine / jnp.maximum(mine.sum(-1, keepdims=True), 1.0)
            exact = partial(dense, dtype=jnp.float32, precision="highest")
            states = text.astype(jnp.float32)
            pooled = jnp.einsum("bks,bse->bke", weights, states, precision="highest")
            condition += exact(width, ("embed", "embed_out"), name="pooled")(pooled)
        of_layers = condition = run.constrain(condition, "batch", None, "width")
        if config.modulation != "layer":
            of_layers = Modulation(6 * width, name="modulation")(condition)
            of_layers = run.constrain(of_layers, "batch", None, None)

        # Text states [b, s, e], those of conditioners behind the caption's.
        texts = [] if text is None or text_segment_ids is None else [(text, text_segment_ids)]
        texts += [one.text for one in added if one.text is not None]
        if texts:
            states, ids = zip(*texts, strict=True)
            text, text_segment_ids = jnp.concatenate(states, 1), jnp.concatenate(ids, 1)
            text = text.astype(run.dtype)
        image = next((one.image for one in added if one.image is not None), None)

        # The blocks, one after another: their parameters are stacked along a first axis.
        if residual is None:
            head_dim = width // config.heads
            rotary = rotary_angles(positions, head_dim, theta) if config.rotary else None
            block: Any = DiTBlock
            if config.remat != "none":
                block = nn.remat(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
            of_blocks = dataclasses.replace(run, dot_general=run.block_dot_general)
            unit, arguments, count = block, (config, of_blocks), config.depth
            if config.window is not None:
                unit, arguments = LayerGroup, (block, *arguments)
                count //= config.global_every
            stacked: Any = nn.scan(
                unit,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  # Flax infers int from 0
                length=count,
                unroll=1 if config.scan else count,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            others = (of_layers, group_ids, inputs.segment_ids, rotary, text, text_segment_ids)
            others = (*others, image) if config.image_attention else others
            start, (x, _) = x, stacked(*arguments, name="blocks")(x, *others)
            self.sow("intermediates", "residual", x - start)
        else:
            x = x + residual

        if config.modulation == "table":
            init = nn.with_logical_partitioning(ZERO, ("modulation_table",))
            table: Any = self.param("final_modulation_table", init, (2 * width,))
            groups = jnp.tile(condition, 2) + table
        else:
            groups = Modulation(2 * width, name="final_modulation")(condition)
        groups = run.constrain(groups, "batch", None, None)
        shift, scale = gather_groups(groups, group_ids, 2)
        x = (layer_norm(x) * (1 + scale) + shift).astype(run.dtype)
        x = linear(self.output_dim, ("embed", "patch"), name="final", init=ZERO)(x)
        return x.astype(jnp.float32)


# --- The model with its text encoder and conditioners ---


class TextToVideo(nn.Module):
    """Text tokens, fields and noised patches in, predicted patches out."""

    config: ModelConfig
    runtime: Runtime

    def setup(self) -> None:
        config = self.config.on(jax.default_backend())
        run = dataclasses.replace(self.runtime, dtype=jnp.dtype(config.dtype))
        self.text: Any = make_encoder(config.text, config.dit.width, run)
        self.conditioners = {
            name: one.build(name, config, run) for name, one in config.conditioners.items()
        }
        outputs = 2 if config.learned_variance else 1
        self.dit = DiT(config.dit, outputs * config.patch.dim, run)

    def encode_text(
        self, text: Shaped[Array, "b s *x"], text_segment_ids: Int[Array, "b s"] | None
    ) -> Float[Array, "b s e"] | Int[Array, "b s"]:
        """Text states, needed once for all steps of a solver; without text, the tokens as they are."""
        return text if self.text is None else self.text(text, text_segment_ids)

    def __call__(
        self, inputs: DenoiserInputs, residual: Tokens | None = None, encoded: bool = False
    ) -> Output:
        """The output, of text that is ``encoded`` already or not; see ``DiT`` for ``residual``."""
        text = inputs.text if encoded else self.encode_text(inputs.text, inputs.text_segment_ids)
        inputs = dataclasses.replace(inputs, text=None if self.text is None else text)
        added = [conditioner(inputs) for conditioner in self.conditioners.values()]
        return self.dit(inputs, added, residual)


def blank_inputs(config: ModelConfig, l: int = 1, s: int = 1) -> DenoiserInputs:
    """A row of zeros of ``l`` tokens and ``s`` text tokens, to trace what depends on shapes alone."""
    token_fields, segment_fields = {}, {"fps": jnp.ones((1, 1))}
    for name, conditioner in config.conditioners.items():
        of, shape, dtype, _ = conditioner.field(config)
        fields, count = (token_fields, l) if of == "token" else (segment_fields, 1)
        fields[name] = jnp.zeros((1, count, *shape), dtype)
    ids, text_ids = jnp.zeros((1, l), jnp.int32), jnp.zeros((1, s), jnp.int32)
    empty = config.text.tokens("")  # [1], or a state [1, e]
    inputs = DenoiserInputs(
        tokens=jnp.zeros((1, l, config.patch.dim)),
        positions=jnp.zeros((1, l, 3)),
        segment_ids=ids,
        token_ids=ids,
        group_ids=ids,
        group_t=jnp.zeros((1, 1)),
        text=jnp.zeros((1, s, *empty.shape[1:]), empty.dtype),
        text_segment_ids=text_ids,
        dropped=jnp.zeros((1, 1)),
        token_fields=token_fields,
        segment_fields=segment_fields,
    )
    keys = jax.random.split(jax.random.key(0), (1, 1))
    return prepare_fields(config.conditioners, keys, inputs, train=False)


def no_attention(q: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """Stands in for attention, which has no parameters, if only parameters matter."""
    return q


def denoise_and_keep(
    model: TextToVideo, params: Params, inputs: DenoiserInputs
) -> tuple[Output, Tokens]:
    """The output for encoded text, and what the blocks added, for steps that run none (feature
    caching)."""
    out: Any = model.apply(params, inputs, encoded=True, mutable=["intermediates"])
    return out[0], out[1]["intermediates"]["dit"]["residual"][0]


def first_modulation(
    config: DiTConfig, params: Params, t: Float[Array, "k"]
) -> Float[Array, "k m"]:
    """Shift and 1 + scale of what enters the first block, ``m = 2 d``, at noise levels ``t`` and with
    no text: the part of that input which the level alone decides. ``params`` are ``DiT``'s, unboxed."""
    time: Any = TimeEmbedding(config, Runtime(no_attention))
    modulation: Any = Modulation(6 * config.width)
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    first = first if config.window is None else first["layer_0"]
    own = first["modulation"] if config.modulation == "layer" else params["modulation"]
    out = modulation.apply({"params": own}, time.apply({"params": params["time"]}, t[None]))
    shift, scale, *_ = jnp.split((out + first.get("modulation_table", 0))[0], 6, -1)
    return jnp.concatenate([shift, 1 + scale], -1)
