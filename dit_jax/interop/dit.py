"""Published class-conditional transformers: DiT and SiT, as their authors and as Diffusers store them.

Two key layouts hold the same numbers: the ``.pt`` of facebookresearch's DiT and SiT (one dictionary,
or a training checkpoint with ``ema`` and ``model``), and the folder of Diffusers'
``DiTTransformer2DModel`` (``config.json`` and safetensors), in which queries, keys and values have
weights of their own and every block has a copy of the embeddings of time and class. Both store the
positions: a buffer that is checked and left out, and made again when written.

SiT's time runs from noise to data, and ours from data to noise: its velocity is ours with the other
sign, which goes into the last layer (and out of it again). If its files have a second half of outputs,
SiT ignores it; it is kept, for the way back.

Diffusers' own class departs from the published transformer in two places that the weights do not
tell, and we do not follow: the rates of its sinusoids of time are ``1e4 ** (-i / 127)`` where DiT's
are ``1e4 ** (-i / 128)``, and its second norm adds 1e-5 to the variance (``norm_eps``) for 1e-6.

Sources: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers"; Ma et al. 2024, "SiT".
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from dit_jax.config import CodecConfig, DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.diffusion import DiffusionConfig, MaskConfig, PathConfig, TimeConfig
from dit_jax.files import checking_input, refuse_if
from dit_jax.interop.folders import read_settings
from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Arrays, Entry, Fixed, Map, shape_of
from dit_jax.model import PRESETS, ClassLabels, ModelConfig, NoTextConfig, PatchConfig
from dit_jax.model.dit import published
from dit_jax.sampling import SamplingConfig
from dit_jax.types import PositiveInt, require

Family = Literal["dit", "sit"]
BLOCK, EMBEDDERS = "transformer_blocks.{}.", "transformer_blocks.{}.norm1.emb."
"""How Diffusers' keys of every block begin, and those of what every block has a copy of."""

LAYERS: dict[str, tuple[str, Any, str, str]] = {
    "dit/patch_embedding": (
        "x_embedder.proj",
        "pos_embed.proj",
        "d c ph pw -> (ph pw c) d",
        "d -> d",
    ),
    "dit/time/up": (
        "t_embedder.mlp.0",
        f"{EMBEDDERS}timestep_embedder.linear_1",
        "d f -> f d",
        "d -> d",
    ),
    "dit/time/out": (
        "t_embedder.mlp.2",
        f"{EMBEDDERS}timestep_embedder.linear_2",
        "d i -> i d",
        "d -> d",
    ),
    "dit/blocks/self_attention/qkv": (
        "blocks.{}.attn.qkv",
        tuple(f"{BLOCK}attn1.to_{x}" for x in "qkv"),
        "(x n e) i -> i (n x e)",
        "(x n e) -> (n x e)",
    ),
    "dit/blocks/self_attention/out": (
        "blocks.{}.attn.proj",
        f"{BLOCK}attn1.to_out.0",
        "d i -> i d",
        "d -> d",
    ),
    "dit/blocks/mlp/up": ("blocks.{}.mlp.fc1", f"{BLOCK}ff.net.0.proj", "m d -> d m", "m -> m"),
    "dit/blocks/mlp/down": ("blocks.{}.mlp.fc2", f"{BLOCK}ff.net.2", "d m -> m d", "d -> d"),
    "dit/blocks/modulation/linear": (
        "blocks.{}.adaLN_modulation.1",
        f"{BLOCK}norm1.linear",
        "(six d) i -> i (six d)",
        "(six d) -> (six d)",
    ),
    "dit/final": (
        "final_layer.linear",
        "proj_out_2",
        "(ph pw o c) d -> d (o ph pw c)",
        "(ph pw o c) -> (o ph pw c)",
    ),
    "dit/final_modulation/linear": (
        "final_layer.adaLN_modulation.1",
        "proj_out_1",
        "(two d) i -> i (two d)",
        "(two d) -> (two d)",
    ),
}
"""Our layer: its name in the authors' files and in Diffusers' (several if they are joined to ours), and
what their weight and bias become. Axes: d and i the width, n heads of e, x query, key and value, m the
MLP's, f sinusoids, y classes, o outputs of c channels, ph and pw the patch."""
LABELS = (
    "conditioners_label/embedding",
    "y_embedder.embedding_table.weight",
    f"{EMBEDDERS}class_embedder.embedding_table.weight",
)
"""The only parameter that is of no linear layer."""
CLOCKS: dict[Family, tuple[float, float]] = {"dit": (1000.0, -1.0), "sit": (-1.0, 1.0)}
"""``time_scale`` and ``time_offset`` of what each network is told of a noise level."""
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""The second is what Diffusers called it before 0.28, and published folders do; its ``norm_type`` says
which of several models it is."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a ``config.json`` that matter, and what leaving one out means."""

    num_attention_heads: PositiveInt = 16
    attention_head_dim: PositiveInt = 72
    in_channels: PositiveInt = 4
    out_channels: PositiveInt | None = None
    num_layers: PositiveInt = 28
    sample_size: PositiveInt = 32
    patch_size: PositiveInt = 2
    num_embeds_ada_norm: PositiveInt = 1000
    # Set otherwise, these are of another model.
    norm_eps: float = 1e-5
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    attention_bias: Literal[True] = True
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_elementwise_affine: Literal[False] = False
    dropout: float = 0.0
    norm_num_groups: int = 32
    upcast_attention: bool = False


@dataclasses.dataclass(frozen=True)
class DiTFile:
    """A published transformer: what its shapes say of it."""

    model: ModelConfig
    size: int
    """Rows, and columns, of the latents that it was made for."""
    family: Family = "dit"

    def __str__(self) -> str:
        dit, patch = self.model.dit, self.model.patch.h
        sizes = (dit.width, dit.depth, dit.heads)
        name = f"of width {dit.width}, depth {dit.depth}, patch {patch}"
        for preset, known in PRESETS.items():
            if (known.width, known.depth, known.heads) == sizes:
                name = f"{preset}/{patch}"
        words = "SiT" if self.family == "sit" else "DiT"
        return f"{words} {name}, {self.size} x {self.size} latents"

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the latents that it was trained on, if no codec is named: frames, rows and columns."""
        side = 1 if self.model.patch.channels == 3 else 8
        return 1, side, side

    def table(self, kind: str) -> Map:
        """The keys of a file of the authors' ("safetensors"), or of Diffusers' folder ("diffusers")."""
        return diffusers_map(self) if kind == "diffusers" else dit_map(self)

    def config_json(self) -> dict[str, Any]:
        """What Diffusers' folder says of it."""
        return to_diffusers(self)

    def run(self, output: str, codec: CodecConfig, divisor: int = 128) -> VideoRun:
        """The config of a run with it; ``divisor``: its ``dit.time_divisor``."""
        dit = dataclasses.replace(self.model.dit, time_divisor=divisor)
        model = dataclasses.replace(self.model, dit=dit)
        return run_config(dataclasses.replace(self, model=model), output, codec)


def with_clock(model: ModelConfig, family: Family) -> ModelConfig:
    """The model told of noise levels as that family is."""
    scale, offset = CLOCKS[family]
    dit = dataclasses.replace(model.dit, time_scale=scale, time_offset=offset)
    return dataclasses.replace(model, dit=dit)


# ---------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------


def grid_table(width: int, side: int) -> np.ndarray:
    """The fixed positions of a square of ``side`` tokens, float32 ``[1, side * side, width]``.

    As published files have them: angles in float64, the column's features before the row's (He et al.
    2022, section A.1).
    """
    rates = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    rows, columns = np.divmod(np.arange(side * side, dtype=np.float64), side)
    angles = [columns[:, None] * rates, rows[:, None] * rates]
    features = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(features, 1, dtype=np.float32)[None]


def _table(file: DiTFile, name: str, diffusers: bool, fixed: Fixed) -> Map:
    """The table of one of the two layouts."""
    model, dit, patch = file.model, file.model.dit, file.model.patch
    labels: Any = model.conditioners["label"]
    sizes = dict(d=dit.width, i=dit.width, n=dit.heads, e=dit.width // dit.heads, x=3, six=6, two=2)
    sizes |= dict(m=dit.hidden, f=256, y=1 + labels.classes, o=1 + model.learned_variance)
    sizes |= dict(c=patch.channels, ph=patch.h, pw=patch.w)

    def entry(path: str, keys: tuple[str, ...], pattern: str) -> Entry:
        of_blocks, tied = "{}" in keys[0], keys[0].startswith(EMBEDDERS)
        return Entry(
            path=tuple(path.split("/")),
            keys=tuple(key.format(i) for i in range(dit.depth if of_blocks else 1) for key in keys),
            layout=Layout(pattern, sizes, joined="x" if len(keys) > 1 else None),
            stacked=of_blocks and not tied,
            tied=tied,
            negative=file.family == "sit" and path.startswith("dit/final/"),
        )

    path, *keys = LABELS
    entries = [entry(path, (keys[diffusers],), "y d -> y d")]
    for path, (authors, theirs, kernel, bias) in LAYERS.items():
        names = theirs if diffusers else authors
        names = (names,) if isinstance(names, str) else names
        entries.append(entry(f"{path}/kernel", tuple(f"{x}.weight" for x in names), kernel))
        entries.append(entry(f"{path}/bias", tuple(f"{x}.bias" for x in names), bias))
    return Map(name, tuple(entries), (fixed,))


def dit_map(file: DiTFile) -> Map:
    """The keys of the authors' ``.pt`` files."""
    check_published(file.model)
    dit, patch = file.model.dit, file.model.patch.h
    name = f"a {file.family.upper()} of width {dit.width}, depth {dit.depth} and patch {patch}"
    return _table(file, name, False, Fixed("pos_embed", grid_table(dit.width, file.size // patch)))


def diffusers_map(file: DiTFile) -> Map:
    """The keys of the safetensors in Diffusers' folder."""
    check_published(file.model, (128, 127))
    positions = grid_table(file.model.dit.width, file.size // file.model.patch.h)
    fixed = Fixed("pos_embed.pos_embed", positions, optional=True)
    return _table(file, f"Diffusers' {CLASSES[0]} of its config.json", True, fixed)


def check_published(model: ModelConfig, divisors: Sequence[int] = (128,)) -> None:
    """Refuses a model that the published layouts cannot hold.

    ``divisors`` are the rates of time that readers of the layout compute: 128 of the authors' files;
    of Diffusers' folders also 127, which its class has and their weights do not tell.
    """
    kinds = {name: type(one).__name__ for name, one in model.conditioners.items()}
    wanted = published("S")
    fields = "rotary qk_norm absolute_positions rope_theta cross_attention pooled_text modulation"
    rules = {
        f"dit.{name}": (getattr(model.dit, name), getattr(wanted, name))
        for name in (*fields.split(), "window")
    }
    rules |= {
        "patch.t": (model.patch.t, 1),
        "patch.w": (model.patch.w, model.patch.h),
        "text": (type(model.text).__name__, "NoTextConfig"),
        "conditioners": (kinds, {"label": "ClassLabels"}),
    }
    other = [
        f"{name} is {has!r}, not {want!r}" for name, (has, want) in rules.items() if has != want
    ]
    if model.dit.time_divisor not in divisors:
        known = " or ".join(map(str, divisors))
        other.append(f"dit.time_divisor is {model.dit.time_divisor}, not {known}")
    message = "the model is not DiT as published, and the published layouts hold no other: "
    refuse_if([(bool(other), f"{message}{'; '.join(other)}. Keep it as a run.")])


# ---------------------------------------------------------------------------------------------------
# From files, folders and runs
# ---------------------------------------------------------------------------------------------------


def from_arrays(
    arrays: Arrays, family: Family = "dit", heads: int | None = None, part: str | None = None
) -> tuple[DiTFile, dict[str, np.ndarray]]:
    """A file of the authors', and its weights: of a training checkpoint those under ``part``."""
    picked = pick_weights(arrays, part)
    return infer_dit(picked, family, heads), picked


def from_folder(
    values: Mapping[str, Any], where: str, family: Family, arrays: Arrays
) -> tuple[DiTFile, str]:
    """The model of a ``config.json`` of Diffusers', and the layout of the keys that are beside it."""
    file = from_diffusers(values, where)
    model = with_clock(file.model, family)
    return dataclasses.replace(file, family=family, model=model), "diffusers"


def from_run(config: VideoRun, kind: str) -> DiTFile:
    """The model of a run, for a layout; refused if it is none by its network or by what it is trained
    to predict: a reader of a published file could not know."""
    check_published(config.model, (128, 127) if kind == "diffusers" else (128,))
    family = family_of(config.model)
    has, path, drawn = config.diffusion, config.diffusion.path, config.sampling
    linear = PathConfig(kind="ddpm", betas="linear")
    if family == "dit":
        wanted = "'eps' on a path of kind 'ddpm' with 1000 linear betas"
        same = has.prediction == "eps" and path == linear
    else:
        wanted = "'velocity' on a path of kind 'rectified_flow'"
        same = has.prediction == "velocity" and path.kind == "rectified_flow"
    other = (
        f"the run has the clock of {family.upper()} (dit.time_scale and time_offset), whose files are "
        f"of models that predict {wanted}; it predicts {has.prediction!r}, on {path}: keep this model "
        "as a run."
    )
    _, size, width = config.codec.latent_size(1, drawn.height, drawn.width)
    shape = (
        f"the run samples {drawn.height} x {drawn.width}, and published files are of squares: set "
        "sampling.height and width in its config."
    )
    refuse_if([(not same, other), (size != width, shape)])
    return DiTFile(config.model, size, family)


def family_of(model: ModelConfig) -> Family:
    """Whose clock a model has, DiT's or SiT's."""
    clock = model.dit.time_scale, model.dit.time_offset
    found: list[Family] = [name for name, known in CLOCKS.items() if clock == known]
    message = (
        f"dit.time_scale and time_offset are {clock}, and published weights are read with DiT's "
        f"{CLOCKS['dit']} or SiT's {CLOCKS['sit']}: keep this model as a run."
    )
    refuse_if([(not found, message)])
    return found[0]


def pick_weights(arrays: Arrays, part: str | None = None) -> dict[str, np.ndarray]:
    """The weights of a file: all, or of a training checkpoint those under ``ema`` (or ``part``)."""
    key = "x_embedder.proj.weight"
    if part is None and key in arrays:
        return dict(arrays)
    prefix = f"{part or 'ema'}."
    found = {key[len(prefix) :]: a for key, a in arrays.items() if key.startswith(prefix)}
    heads = ", ".join(sorted({name.split(".")[0] for name in arrays})[:12]) or "nothing"
    message = f"the file has neither {key!r}, as a DiT's has, nor weights under {prefix!r}: "
    refuse_if([(not found, f"{message}its keys begin with {heads}.")])
    return found


def infer_dit(arrays: Arrays, family: Family = "dit", heads: int | None = None) -> DiTFile:
    """The config that the shapes of the authors' layout tell.

    The number of heads is in no shape: it is the preset's of that width and depth, or ``heads``.
    """

    shape = partial(shape_of, arrays)

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    outputs = shape("final_layer.linear.weight", 2)[0] / (channels * patch * patch)
    depth = 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, arrays) if m)
    known = {(one.width, one.depth): one.heads for one in PRESETS.values()}
    message = (
        f"the file's model has width {width} and depth {depth}, which is no published size "
        f"({', '.join(f'{name} {p.width} x {p.depth}' for name, p in PRESETS.items())}), and its heads "
        "are in no shape: say their number with --heads."
    )
    refuse_if([(not heads and (width, depth) not in known, message)])
    return _file(
        family,
        dict(width=width, depth=depth, heads=heads or known[width, depth]),
        hidden=shape("blocks.0.mlp.fc1.weight", 2)[0],
        patch=PatchConfig(t=1, h=patch, w=patch, channels=channels),
        outputs=outputs,
        classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        size=math.isqrt(shape("pos_embed", 3)[1]) * patch,
    )


def from_diffusers(values: Mapping[str, Any], where: str) -> DiTFile:
    """The model of a ``config.json``; refused if it is set to what the published transformer is not."""
    name = values.get("_class_name")
    refuse_if([(name not in CLASSES, f"{where} is of {name!r}, not {CLASSES[0]!r}.")])
    with checking_input(f"{where} is not the published transformer", "take the authors' folder"):
        given = read_settings(Settings, values)
        require("", given, ("norm_eps", given.norm_eps in (1e-5, 1e-6), "1e-5 or 1e-6"))
    channels, patch = given.in_channels, given.patch_size
    heads, width = given.num_attention_heads, given.num_attention_heads * given.attention_head_dim
    return _file(
        "dit",
        dict(width=width, depth=given.num_layers, heads=heads),
        hidden=4 * width,
        patch=PatchConfig(t=1, h=patch, w=patch, channels=channels),
        outputs=(given.out_channels or channels) / channels,
        classes=given.num_embeds_ada_norm,
        size=given.sample_size,
    )


def to_diffusers(file: DiTFile) -> dict[str, Any]:
    """The ``config.json`` of a model; refused if the class cannot hold it."""
    check_published(file.model, (128, 127))
    dit, patch = file.model.dit, file.model.patch
    labels: Any = file.model.conditioners["label"]
    message = (
        f"Diffusers' {CLASSES[0]} has an MLP of 4 x {dit.width}, and this model's is {dit.hidden}: "
        "write the authors' layout instead."
    )
    refuse_if([(dit.hidden != 4 * dit.width, message)])
    settings = Settings(
        num_attention_heads=dit.heads,
        attention_head_dim=dit.width // dit.heads,
        in_channels=patch.channels,
        out_channels=patch.channels * (1 + file.model.learned_variance),
        num_layers=dit.depth,
        sample_size=file.size,
        patch_size=patch.h,
        num_embeds_ada_norm=labels.classes,
    )
    about = {"_class_name": CLASSES[0], "_diffusers_version": "0.12.0"}
    return about | dataclasses.asdict(settings)


def _file(
    family: Family,
    sizes: dict[str, int],
    *,
    hidden: int,
    patch: PatchConfig,
    outputs: float,
    classes: int,
    size: int,
) -> DiTFile:
    """What a file holds, from its numbers."""
    message = (
        f"the last layer gives {outputs:g} numbers for each of the {patch.channels} channels of a "
        f"patch of {patch.h}: 1, or 2 with learned variance, are known."
    )
    refuse_if([(outputs not in (1, 2), message)])
    mlp_dim = None if hidden == 4 * sizes["width"] else hidden
    dit = dataclasses.replace(published("S"), mlp_dim=mlp_dim, **sizes)
    labels: Any = {"label": ClassLabels(classes)}
    text, learned = NoTextConfig(), outputs == 2
    model = ModelConfig(dit, patch, text, learned_variance=learned, conditioners=labels)
    return DiTFile(with_clock(model, family), size, family)


# ---------------------------------------------------------------------------------------------------
# As a run
# ---------------------------------------------------------------------------------------------------


def run_config(file: DiTFile, output: str, codec: CodecConfig) -> VideoRun:
    """The config of a run with the published model: how it was trained, and how it is sampled.

    DiT: 1000 linear betas, predicted noise, learned variance; 250 steps of ancestral sampling (Peebles
    & Xie 2022, section 5 and their code's defaults). SiT: velocities on straight paths; 250 steps of
    its SDE, the last from 0.04 (Ma et al. 2024, section 3.4). Guidance is of 4 on three of four
    channels, as the code of both has it. The data are to be named for training.
    """
    common: Any = dict(time=TimeConfig(distribution="uniform"), masks=MaskConfig.only(none=1))
    height, width = file.size * codec.h, file.size * codec.w
    guided = 3 if file.model.patch.channels > 3 else None
    sampling = SamplingConfig(
        frames=1, height=height, width=width, steps=250, shift=1.0, cfg_channels=guided
    )
    if file.family == "dit":
        common |= dict(path=PathConfig(kind="ddpm", betas="linear"), prediction="eps")
        common |= dict(loss="prediction")
        learned = file.model.learned_variance
        common |= dict(variance="learned_range" if learned else "fixed_small")
        sampling = dataclasses.replace(sampling, solver="ddpm", spacing="linspace")
    else:
        sampling = dataclasses.replace(sampling, solver="sde", last_step=0.04)
    tokens = file.model.patch.num_tokens(1, file.size, file.size)
    source = RecordsConfig(path="latents", video_key="image", label_key="label")
    packing = PackingConfig(rows=8, row_tokens=tokens, row_text=1, row_segments=1)
    return VideoRun(
        output=output,
        data=DataConfig(source, packing),
        model=file.model,
        diffusion=DiffusionConfig(**common),
        codec=codec,
        log=LogConfig(draw_every=0),
        sampling=sampling,
    )
