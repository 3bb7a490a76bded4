"""Wan's transformers, 2.1 and 2.2, as their authors and as Diffusers store them.

Two key layouts hold the same arrays under other names: the authors' safetensors or ``.pth`` (alone, or
in a folder whose ``config.json`` is of class ``WanModel``), and the folder of Diffusers'
``WanTransformer3DModel``. Five models differ by sizes alone: 2.1 from text, 2.1 from images, 2.2 from
text or an image (48 channels, its first frame kept by per-token noise levels, which noise caps are),
and the two of 2.2 that are pairs of experts.

Pairs of numbers that rotary positions turn lie side by side there, and here are halves of a head: the
numbers of queries, keys and values of self-attention are permuted within each head, and so are the
inputs of what follows. Values need not be, but products do not see it and the three stay alike. Names
of axes: d and i the width, n heads of e pairs (of e numbers in cross-attention), x query, key, value.

Sources: Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models", and the code of
Wan-Video/Wan2.1 and Wan2.2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_jax.config import (
    CodecConfig,
    DataConfig,
    ExpertConfig,
    LogConfig,
    VideoRun,
    differences,
)
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.diffusion import DiffusionConfig, MaskConfig, TimeConfig
from dit_jax.files import absolute, checking_input, read_json, refuse_if
from dit_jax.interop import Pipeline, text_tools
from dit_jax.interop.folders import read_config, read_settings
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Arrays, Entry, Map, rest_of, shape_of
from dit_jax.model import DiTConfig, ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.model.dit import TIME_FREQUENCIES
from dit_jax.sampling import SamplingConfig
from dit_jax.types import PositiveInt, require
from dit_jax.wan.conditioners import CLIP_TOKENS, LATENTS, STATES, ImageLatents, ImageStates

CLASS, AUTHORS = "WanTransformer3DModel", "WanModel"
PATCHES, EMB_POS = "patch_embedding.weight", "img_emb.emb_pos"
STRIDE = 4
"""Frames of a latent frame, but for the first."""
EMBED, IMAGE = "condition_embedder.", "condition_embedder.image_embedder."
BLOCK, STATE = "dit/blocks/", f"conditioners_{STATES}/"
"""How the paths of what every block has begin ("blocks.{}." in both layouts), and those of what embeds
states of images."""
SELF, CROSS = f"{BLOCK}self_attention/", f"{BLOCK}cross_attention/"
PAIRS = "(n e two) -> (n two e)"
Rows = dict[str, tuple[str, str, str]]

LINEAR: Rows = {
    "dit/patch_embedding": ("patch_embedding", "patch_embedding", "d c pt ph pw -> (pt ph pw c) d"),
    "text/up": ("text_embedding.0", f"{EMBED}text_embedder.linear_1", "d s -> s d"),
    "text/out": ("text_embedding.2", f"{EMBED}text_embedder.linear_2", "d i -> i d"),
    "dit/time/up": ("time_embedding.0", f"{EMBED}time_embedder.linear_1", "d f -> f d"),
    "dit/time/out": ("time_embedding.2", f"{EMBED}time_embedder.linear_2", "d i -> i d"),
    "dit/modulation/linear": ("time_projection.1", f"{EMBED}time_proj", "(six d) i -> i (six d)"),
    f"{SELF}qkv": ("self_attn.{q k v}", "attn1.{to_q to_k to_v}", "(x n e two) i -> i (n x two e)"),
    f"{SELF}out": ("self_attn.o", "attn1.to_out.0", "d (n e two) -> (n two e) d"),
    f"{CROSS}q": ("cross_attn.q", "attn2.to_q", "d i -> i d"),
    f"{CROSS}kv": ("cross_attn.{k v}", "attn2.{to_k to_v}", "(x n h) i -> i (n x h)"),
    f"{CROSS}out": ("cross_attn.o", "attn2.to_out.0", "d i -> i d"),
    f"{BLOCK}mlp/up": ("ffn.0", "ffn.net.0.proj", "m d -> d m"),
    f"{BLOCK}mlp/down": ("ffn.2", "ffn.net.2", "d m -> m d"),
    "dit/final": ("head.head", "proj_out", "(pt ph pw c) d -> d (pt ph pw c)"),
}
"""Our layer, its name in the authors' files and in Diffusers' (in braces several that are joined to
ours), and what its weight becomes; its bias becomes the like."""
VECTORS: Rows = {
    f"{SELF}q_norm/scale": ("self_attn.norm_q.weight", "attn1.norm_q.weight", PAIRS),
    f"{SELF}k_norm/scale": ("self_attn.norm_k.weight", "attn1.norm_k.weight", PAIRS),
    f"{CROSS}q_norm/scale": ("cross_attn.norm_q.weight", "attn2.norm_q.weight", "d -> d"),
    f"{CROSS}k_norm/scale": ("cross_attn.norm_k.weight", "attn2.norm_k.weight", "d -> d"),
    f"{BLOCK}cross_attention_norm/scale": ("norm3.weight", "norm2.weight", "d -> d"),
    f"{BLOCK}cross_attention_norm/bias": ("norm3.bias", "norm2.bias", "d -> d"),
    f"{BLOCK}modulation_table": ("modulation", "scale_shift_table", "one six d -> (one six d)"),
    "dit/final_modulation_table": (
        "head.modulation",
        "scale_shift_table",
        "one two d -> (one two d)",
    ),
}
"""The same of parameters that are of no linear layer, with their whole names."""
# Of models that attend to states of images.
IMAGE_LINEAR: Rows = {
    f"{CROSS}image_kv": (
        "cross_attn.{k_img v_img}",
        "attn2.{add_k_proj add_v_proj}",
        "(x n h) i -> i (n x h)",
    ),
    f"{STATE}up": ("img_emb.proj.1", f"{IMAGE}ff.net.0.proj", "j g -> g j"),
    f"{STATE}out": ("img_emb.proj.3", f"{IMAGE}ff.net.2", "d g -> g d"),
}
IMAGE_VECTORS: Rows = {
    f"{CROSS}image_k_norm/scale": (
        "cross_attn.norm_k_img.weight",
        "attn2.norm_added_k.weight",
        "d -> d",
    ),
    f"{STATE}norm_in/scale": ("img_emb.proj.0.weight", f"{IMAGE}norm1.weight", "g -> g"),
    f"{STATE}norm_in/bias": ("img_emb.proj.0.bias", f"{IMAGE}norm1.bias", "g -> g"),
    f"{STATE}norm_out/scale": ("img_emb.proj.4.weight", f"{IMAGE}norm2.weight", "d -> d"),
    f"{STATE}norm_out/bias": ("img_emb.proj.4.bias", f"{IMAGE}norm2.bias", "d -> d"),
}
# Of the one that is given two images.
POSITIONS: Rows = {
    f"{STATE}positions": (EMB_POS, f"{IMAGE}pos_embed", "one t g -> (one t) g"),
}

FREE = "dtype matmul dit.scan dit.remat dit.time_std dit.mlp_dim text.encoder".split()
FREE += [f"conditioners.{STATES}.encoder", f"conditioners.{STATES}.tokens"]
"""Fields of a model that its files say nothing of: how it is computed, what makes its states."""

# ---------------------------------------------------------------------------------------------------
# Models and their settings
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a ``config.json`` of Diffusers' that matter, and what leaving one out means."""

    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    num_attention_heads: PositiveInt = 40
    attention_head_dim: PositiveInt = 128
    in_channels: PositiveInt = 16
    out_channels: PositiveInt = 16
    text_dim: PositiveInt = 4096
    ffn_dim: PositiveInt = 13824
    num_layers: PositiveInt = 40
    image_dim: PositiveInt | None = None
    added_kv_proj_dim: PositiveInt | None = None
    pos_embed_seq_len: PositiveInt | None = None
    # Set otherwise, these are of another model.
    freq_dim: Literal[256] = 256
    cross_attn_norm: Literal[True] = True
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    eps: float = 1e-6
    rope_max_seq_len: PositiveInt = 1024

    def __post_init__(self) -> None:
        width, dim = self.num_attention_heads * self.attention_head_dim, self.attention_head_dim
        states, ends = width if self.image_dim else None, self.pos_embed_seq_len is not None
        require(
            "",
            self,
            ("eps", self.eps == 1e-6, "1e-6"),
            ("attention_head_dim", dim % 2 == 0 and dim >= 6, "even, 6 or more"),
            ("in_channels", self.in_channels >= self.out_channels, f"{self.out_channels} or more"),
            ("added_kv_proj_dim", self.added_kv_proj_dim == states, f"{states}, as image_dim is"),
            ("pos_embed_seq_len", bool(states) or not ends, "None without image_dim"),
        )


def model_of(settings: Settings) -> ModelConfig:
    """The model that settings describe."""
    (t, h, w), channels = settings.patch_size, settings.out_channels
    conditioners: dict[str, Any] = {}
    if extra := settings.in_channels - channels:
        conditioners[LATENTS] = ImageLatents(extra)
    if settings.image_dim:
        tokens = settings.pos_embed_seq_len
        states = ImageStates(tokens or CLIP_TOKENS, settings.image_dim, positions=bool(tokens))
        conditioners[STATES] = states
    dit = DiTConfig(
        width=settings.num_attention_heads * settings.attention_head_dim,
        depth=settings.num_layers,
        heads=settings.num_attention_heads,
        mlp_dim=settings.ffn_dim,
        qk_norm="width",
        cross_norm=True,
        image_attention=bool(settings.image_dim),
        modulation="table",
    )
    # Published positions count latent frames, at whatever rate: four frames each, and clips of 16 or
    # 24 frames a second.
    patch = PatchConfig(t, h, w, channels, reference_fps=fps_of(channels) / STRIDE)
    text = TextStatesConfig("umt5-xxl", settings.text_dim, 512, padded=True)
    return ModelConfig(dit, patch, text, conditioners=conditioners)


def fps_of(channels: int) -> float:
    """Frames a second of the clips of a model of so many channels: the 48 of TI2V-5B are of 24."""
    return 24.0 if channels == 48 else 16.0


def settings_of(model: ModelConfig) -> Settings:
    """The settings of a model; refused if the published class cannot hold it."""
    dit, patch, text = model.dit, model.patch, model.text
    latents, states = (model.conditioners.get(name) for name in (LATENTS, STATES))
    extra = latents.channels if isinstance(latents, ImageLatents) else 0
    image = states if isinstance(states, ImageStates) else None
    settings = Settings(
        patch_size=(patch.t, patch.h, patch.w),
        num_attention_heads=dit.heads,
        attention_head_dim=dit.width // dit.heads,
        in_channels=patch.channels + extra,
        out_channels=patch.channels,
        text_dim=text.dim if isinstance(text, TextStatesConfig) else 1,
        ffn_dim=dit.hidden,
        num_layers=dit.depth,
        image_dim=image and image.dim,
        added_kv_proj_dim=image and dit.width,
        pos_embed_seq_len=image.tokens if image and image.positions else None,
    )
    other = [
        f"{name} is {has!r}, not {want!r}"
        for name, has, want in differences(model, model_of(settings), "model")
        if name.removeprefix("model.") not in FREE
    ]
    message = "the model is not Wan's as published, and the published layouts hold no other: "
    refuse_if([(bool(other), f"{message}{'; '.join(other)}. Keep it as a run.")])
    return settings


# ---------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------


def wan_map(model: ModelConfig, diffusers: bool) -> Map:
    """The keys of one of the two layouts."""
    dit, patch, states = model.dit, model.patch, model.conditioners.get(STATES)
    sizes = dict(d=dit.width, i=dit.width, n=dit.heads, m=dit.hidden, f=TIME_FREQUENCIES)
    sizes |= dict(h=dit.width // dit.heads, e=dit.width // dit.heads // 2, one=1, two=2, six=6)
    sizes |= dict(c=patch.channels, pt=patch.t, ph=patch.h, pw=patch.w)
    linear, vectors, text = dict(LINEAR), dict(VECTORS), model.text
    if isinstance(text, TextStatesConfig):
        sizes |= dict(s=text.dim)
    if isinstance(states, ImageStates):
        linear, vectors = linear | IMAGE_LINEAR, vectors | IMAGE_VECTORS
        vectors |= POSITIONS if states.positions else {}
        sizes |= dict(g=states.dim, j=states.dim, t=states.tokens)

    def entry(path: str, name: str, pattern: str, **other: int) -> Entry:
        blocks = range(dit.depth) if path.startswith(BLOCK) else None
        first, _, rest = name.partition("{")
        joined, _, last = rest.partition("}")
        names = [f"{first}{part}{last}" for part in joined.split()] or [name]
        keys = names if blocks is None else [f"blocks.{b}.{key}" for b in blocks for key in names]
        axis = "x" if joined else None
        layout = Layout(pattern, sizes | other | dict(x=len(names)), axis)
        return Entry(tuple(path.split("/")), tuple(keys), layout, stacked=blocks is not None)

    entries = [entry(path, row[diffusers], row[2]) for path, row in vectors.items()]
    for path, row in linear.items():
        name, (theirs, ours) = row[diffusers], row[2].split("->")
        entries.append(entry(f"{path}/kernel", f"{name}.weight", row[2]))
        # Of a bias the outputs are left: the first axis of theirs and the last of ours.
        theirs, ours = (re.findall(r"\([^)]*\)|\w+", side) for side in (theirs, ours))
        entries.append(entry(f"{path}/bias", f"{name}.bias", f"{theirs[0]} -> {ours[-1]}"))
    parts, latents = {}, model.conditioners.get(LATENTS)
    if isinstance(latents, ImageLatents):
        parts = {PATCHES: patch.channels}
        path, pattern = f"conditioners_{LATENTS}/embedding/kernel", LINEAR["dit/patch_embedding"][2]
        entries.append(entry(path, rest_of(PATCHES, patch.channels), pattern, c=latents.channels))
    # Some published files have a norm of queries that nothing computes with.
    ignored = tuple(f"blocks.{i}.attn2.norm_added_q." for i in range(dit.depth))
    name = f"a transformer of Wan's of width {dit.width} and depth {dit.depth}"
    return Map(name, tuple(entries), parts=parts, ignored=ignored)


# ---------------------------------------------------------------------------------------------------
# From files, folders and runs
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WanFile:
    """A published transformer: what its shapes or its folder say of it."""

    model: ModelConfig

    def __str__(self) -> str:
        dit, fields = self.model.dit, " and ".join(["text", *self.model.conditioners])
        sizes = f"width {dit.width}, depth {dit.depth} and {self.model.patch.channels} channels"
        return f"Wan of {sizes}, of {fields}"

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the codec that it was trained with: frames, rows and columns of a latent."""
        side = 16 if self.model.patch.channels == 48 else 8
        return STRIDE, side, side

    def table(self, kind: str) -> Map:
        """The keys of a file of the authors' ("safetensors"), or of Diffusers' folder ("diffusers")."""
        return wan_map(self.model, kind == "diffusers")

    def config_json(self) -> dict[str, Any]:
        """What Diffusers' folder says of it."""
        about = {"_class_name": CLASS, "_diffusers_version": "0.33.0"}
        return about | dataclasses.asdict(settings_of(self.model))

    def run(self, output: str, codec: CodecConfig, divisor: int = 128) -> VideoRun:
        """The config of a run with it; ``divisor``: its ``dit.time_divisor``."""
        dit = dataclasses.replace(self.model.dit, time_divisor=divisor)
        return run_config(dataclasses.replace(self.model, dit=dit), output, codec)


def from_arrays(
    arrays: Arrays, family: str = "", heads: int | None = None, part: str | None = None
) -> tuple[WanFile, dict[str, np.ndarray]]:
    """A file of the authors', and its weights: those under ``part``, or under whatever precedes their
    names, as in files of one part among others."""
    begins = (
        f"{part}."
        if part
        else next((key.removesuffix(PATCHES) for key in arrays if key.endswith(PATCHES)), "")
    )
    own = {key.removeprefix(begins): a for key, a in arrays.items() if key.startswith(begins)}
    return WanFile(model_of(infer_wan(own, heads))), own


def infer_wan(arrays: Arrays, heads: int | None = None) -> Settings:
    """The settings that the shapes of the authors' layout tell; heads, which are in no shape, have 128
    dimensions as in all published sizes, or are ``heads``."""

    shape = functools.partial(shape_of, arrays)

    width, channels, *patch = shape(PATCHES, 5)
    outputs, odd = divmod(shape("head.head.weight", 2)[0], math.prod(patch))
    count = heads or width // 128
    blocks = [int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, arrays) if m]
    image = "img_emb.proj.0.weight" in arrays
    whole = count > 0 and width % count == 0 and not odd
    message = (
        f"the file's model has width {width}, of which {count} heads of 128 (or --heads) do not make "
        "up the whole, or no whole patches: say the number of heads with --heads."
    )
    refuse_if([(not whole or not blocks, message)])
    return Settings(
        patch_size=(patch[0], patch[1], patch[2]),
        num_attention_heads=count,
        attention_head_dim=width // count,
        in_channels=channels,
        out_channels=outputs,
        text_dim=shape("text_embedding.0.weight", 2)[1],
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
        num_layers=1 + max(blocks),
        image_dim=shape("img_emb.proj.0.weight", 1)[0] if image else None,
        added_kv_proj_dim=width if image else None,
        pos_embed_seq_len=shape(EMB_POS, 3)[1] if EMB_POS in arrays else None,
    )


def from_folder(
    values: Mapping[str, Any], where: str, family: str, arrays: Arrays
) -> tuple[WanFile, str]:
    """The model of a ``config.json``, and the layout of the keys that are beside it."""
    if values.get("_class_name") == AUTHORS:
        heads = values.get("num_heads")
        return from_arrays(arrays, heads=heads if type(heads) is int else None)[0], "safetensors"
    with checking_input(f"{where} is not the published transformer", "take the authors' folder"):
        return WanFile(model_of(read_settings(Settings, values))), "diffusers"


def from_run(config: VideoRun, kind: str) -> WanFile:
    """The model of a run, for a layout; refused if it is none by its network or by what it is trained
    to predict."""
    settings_of(config.model)
    has = config.diffusion.prediction, config.diffusion.path.kind
    message = (
        f"the run predicts {has[0]!r} on a path of kind {has[1]!r}, and Wan 'velocity' on one of kind "
        "'rectified_flow': keep this model as a run."
    )
    refuse_if([(has != ("velocity", "rectified_flow"), message)])
    return WanFile(config.model)


# ---------------------------------------------------------------------------------------------------
# As a run
# ---------------------------------------------------------------------------------------------------

# wan/configs/shared_config.py of the authors' code (sample_neg_prompt).
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def sampling_of(model: ModelConfig) -> SamplingConfig:
    """How the authors' code samples a model (generate.py of 2.1, wan/configs of 2.2), at 480p where
    it has both sizes: with a shift of 3 there (5 at 720p; docs of Diffusers' pipelines)."""
    states = model.conditioners.get(STATES)
    changes: dict[str, Any] = {}
    if fps_of(model.patch.channels) == 24:  # TI2V-5B
        changes = dict(frames=121, height=704, width=1280, shift=5.0)
    elif isinstance(states, ImageStates):  # 2.1 I2V, and its model of first and last frames
        ends = dict(height=720, width=1280, shift=16.0)
        changes = ends if states.positions else dict(steps=40)
    elif LATENTS in model.conditioners:  # 2.2 I2V
        changes = dict(steps=40, shift=5.0, cfg_scale=3.5)
    plain: dict[str, Any] = dict(
        frames=81, height=480, width=832, steps=50, shift=3.0, cfg_scale=5.0
    )
    plain |= dict(
        solver="unipc",
        spacing="flow",
        batch=1,
        negative_prompt=NEGATIVE,
        fps=fps_of(model.patch.channels),
    )
    return SamplingConfig(**plain | changes)


def run_config(model: ModelConfig, output: str, codec: CodecConfig) -> VideoRun:
    """The config of a run with the published model: velocities on straight paths at logit-normal times
    (Wan Team 2025, section 4.2), a clip a row. The empty caption has states of its own, so that none
    is dropped. The data are to be named for training."""
    sampling = sampling_of(model)
    assert sampling.shift is not None
    # TI2V-5B makes clips of a text alone and of a first frame; others have conditioners for images.
    masks = dict(none=1.0, first=float(fps_of(model.patch.channels) == 24), noisy=0.0)
    latents = codec.latent_size(sampling.frames, sampling.height, sampling.width)
    tokens = model.patch.num_tokens(*latents)
    packing = PackingConfig(
        rows=1, row_tokens=tokens, row_text=model.text.max_tokens, row_segments=1
    )
    return VideoRun(
        output=output,
        data=DataConfig(RecordsConfig("latents", text_states_key="text_states"), packing),
        model=model,
        diffusion=DiffusionConfig(
            time=TimeConfig(shift=sampling.shift),
            masks=MaskConfig.only(**masks),
            caption_dropout=0.0,
        ),
        codec=codec,
        text_encoder=text_tools().TextEncoderConfig(),
        log=LogConfig(draw_every=0),
        sampling=sampling,
    )


# ---------------------------------------------------------------------------------------------------
# Whole pipelines
# ---------------------------------------------------------------------------------------------------

EXPERTS = ("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")
"""Folders of the transformer, or of the two, of Diffusers' pipelines and of the authors' folders."""
LOW_NOISE = "low_noise"
"""The folder of the second in the run of the first."""
SOLVERS: dict[Any, Any] = {
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
"""Ours for schedulers other than Wan's own, which is UniPC."""
SCHEDULER = "scheduler/scheduler_config.json"


def from_pipeline(folder: Path, place: str) -> Pipeline:
    """What is in the folder of a whole pipeline: Diffusers' (``model_index.json``), or the authors'
    with two experts. ``place`` is where it lies, as configs name it.

    Of two experts the boundary is the pipeline's, steps and guidance are the authors' (wan/configs of
    2.2). The shift is the scheduler's, whatever the size, or the model's.
    """
    index, scheduler = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("model_index.json", SCHEDULER)
    )
    absent = [
        name
        for name in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
        if (index.get(name) or [None])[0] and not (folder / name / "config.json").exists()
    ]
    message = (
        f"{place!r} has a model_index.json that names {', '.join(absent)}, and no such folder with a "
        "config.json: fetch the whole pipeline."
    )
    refuse_if([(bool(absent), message)])

    def part(name: str) -> str | None:
        return f"{place}/{name}" if (folder / name / "config.json").exists() else None

    first, second = next(pair for pair in EXPERTS if part(pair[0]))
    two = part(second) is not None
    transformers = {"": folder / first} | ({LOW_NOISE: folder / second} if two else {})
    text, image = part("text_encoder"), part("image_encoder")

    @functools.cache
    def encoder() -> tuple[Any, str]:
        """The text encoder as configs name it, and its name; all of its bytes are read for its hash."""
        config = text_tools().TextEncoderConfig(text)
        name, digest = config.identity()
        return dataclasses.replace(config, hash=digest), name

    def configure(name: str, config: VideoRun) -> VideoRun:
        model, sampling, parts = config.model, config.sampling, {}
        shift = scheduler.get("flow_shift", scheduler.get("shift", sampling.shift))
        solver = SOLVERS.get(scheduler.get("_class_name"), "unipc")
        if two:
            of_text = LATENTS not in model.conditioners
            guidance = (4.0, 3.0) if of_text else (3.5, 3.5)
            sampling = dataclasses.replace(sampling, steps=40, cfg_scale=guidance[name != ""])
            shift = 12.0 if of_text and not scheduler else shift
            below = index.get("boundary_ratio") or (0.875 if of_text else 0.9)
            low = absolute(f"{config.output}/{LOW_NOISE}")
            parts |= dict(expert=ExpertConfig(low, below, guidance[1])) if not name else {}
        if text is not None and isinstance(model.text, TextStatesConfig):
            dim = read_config(folder / "text_encoder").get("d_model")
            message = (
                f"{text!r} makes states of {dim} numbers, and the transformer reads {model.text.dim}: "
                "give the pipeline as it is published."
            )
            refuse_if([(dim != model.text.dim, message)])
            parts["text_encoder"], encoder_name = encoder()
            reads = dataclasses.replace(model.text, encoder=encoder_name)
            model = dataclasses.replace(model, text=reads)
        if image is not None and STATES in model.conditioners:
            states: Any = model.conditioners[STATES]
            vision = read_config(folder / "image_encoder")
            side = vision.get("image_size", 224) // vision.get("patch_size", 14)
            tokens = states.tokens if states.positions else side**2 + 1  # With the class token.
            states = {STATES: dataclasses.replace(states, encoder=image, tokens=tokens)}
            model = dataclasses.replace(model, conditioners=model.conditioners | states)
        spacing: Any = "flow" if solver == "unipc" else "linear"
        settings: Any = dict(shift=float(shift), solver=solver, spacing=spacing)
        sampling = dataclasses.replace(sampling, **settings)
        time = dataclasses.replace(config.diffusion.time, shift=float(shift))
        diffusion = dataclasses.replace(config.diffusion, time=time)
        parts |= dict(model=model, sampling=sampling, diffusion=diffusion)
        return dataclasses.replace(config, **parts)

    return Pipeline(transformers, part("vae"), configure)
