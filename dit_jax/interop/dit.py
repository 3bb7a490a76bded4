"""Published class-conditional transformers: DiT and SiT, as their authors and as Diffusers store them.

Two key layouts hold the same numbers: the ``.pt`` of facebookresearch's DiT and SiT (one dictionary,
or a training checkpoint with ``ema`` and ``model``), and the folder of Diffusers'
``DiTTransformer2DModel`` (``config.json`` and safetensors), where every block has a copy of the
embeddings of time and class. Both fix the positions: a buffer that is checked and left out, and made
again when written.

SiT's time runs from noise to data, and ours from data to noise: its velocity is ours with the other
sign, which goes into the last layer (and out of it again). Where its files have a second half of
outputs, SiT ignores it; it is kept, for the way back.

Sources: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers"; Ma et al. 2024, "SiT".
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dit_jax.interop.layouts import Layout
from dit_jax.interop.maps import Arrays, Entry, Fixed, Map
from dit_jax.model import PRESETS, ClassLabels, ModelConfig, NoTextConfig, PatchConfig
from dit_jax.model.dit import published

Family = Literal["dit", "sit"]
POSITIONS = "pos_embed"
BLOCK = "blocks."

DIT_KEYS: dict[str, tuple[str, str]] = {
    "dit/patch_embedding/kernel": ("x_embedder.proj.weight", "d c ph pw -> (ph pw c) d"),
    "dit/patch_embedding/bias": ("x_embedder.proj.bias", "d -> d"),
    "dit/time/up/kernel": ("t_embedder.mlp.0.weight", "d f -> f d"),
    "dit/time/up/bias": ("t_embedder.mlp.0.bias", "d -> d"),
    "dit/time/out/kernel": ("t_embedder.mlp.2.weight", "d i -> i d"),
    "dit/time/out/bias": ("t_embedder.mlp.2.bias", "d -> d"),
    "conditioners_label/embedding": ("y_embedder.embedding_table.weight", "y d -> y d"),
    "dit/blocks/self_attention/qkv/kernel": (
        "blocks.{}.attn.qkv.weight",
        "(x n e) i -> i (n x e)",
    ),
    "dit/blocks/self_attention/qkv/bias": ("blocks.{}.attn.qkv.bias", "(x n e) -> (n x e)"),
    "dit/blocks/self_attention/out/kernel": ("blocks.{}.attn.proj.weight", "d i -> i d"),
    "dit/blocks/self_attention/out/bias": ("blocks.{}.attn.proj.bias", "d -> d"),
    "dit/blocks/mlp/up/kernel": ("blocks.{}.mlp.fc1.weight", "m d -> d m"),
    "dit/blocks/mlp/up/bias": ("blocks.{}.mlp.fc1.bias", "m -> m"),
    "dit/blocks/mlp/down/kernel": ("blocks.{}.mlp.fc2.weight", "d m -> m d"),
    "dit/blocks/mlp/down/bias": ("blocks.{}.mlp.fc2.bias", "d -> d"),
    "dit/blocks/modulation/linear/kernel": (
        "blocks.{}.adaLN_modulation.1.weight",
        "(six d) i -> i (six d)",
    ),
    "dit/blocks/modulation/linear/bias": (
        "blocks.{}.adaLN_modulation.1.bias",
        "(six d) -> (six d)",
    ),
    "dit/final/kernel": ("final_layer.linear.weight", "(ph pw o c) d -> d (o ph pw c)"),
    "dit/final/bias": ("final_layer.linear.bias", "(ph pw o c) -> (o ph pw c)"),
    "dit/final_modulation/linear/kernel": (
        "final_layer.adaLN_modulation.1.weight",
        "(two d) i -> i (two d)",
    ),
    "dit/final_modulation/linear/bias": (
        "final_layer.adaLN_modulation.1.bias",
        "(two d) -> (two d)",
    ),
}
"""Our parameter: its key in the authors' files, and how the one becomes the other. Axes: d and i the
width, n heads of e, x query, key and value, m the MLP's, f sinusoids, y classes, o outputs of c
channels, ph and pw the patch."""

OUT = "final_layer.linear."
"""Keys of what gives the velocity."""


@dataclasses.dataclass(frozen=True)
class DiTFile:
    """What the shapes of a published transformer say of it."""

    model: ModelConfig
    size: int
    """Rows, and columns, of the latents that it was made for."""
    family: Family = "dit"


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


CLOCKS: dict[Family, tuple[float, float]] = {"dit": (1000.0, -1.0), "sit": (-1.0, 1.0)}
"""``time_scale`` and ``time_offset`` of what each network is told of a noise level."""


def family_of(model: ModelConfig) -> Family:
    """Whose clock a model has, DiT's or SiT's.

    Raises:
        ValueError: where it has another, which the published layouts do not tell of.
    """
    clock = model.dit.time_scale, model.dit.time_offset
    for family, known in CLOCKS.items():
        if clock == known:
            return family
    raise ValueError(
        f"dit.time_scale and time_offset are {clock}, and published weights are read with DiT's "
        f"{CLOCKS['dit']} or SiT's {CLOCKS['sit']}: keep this model as a run."
    )


def with_clock(model: ModelConfig, family: Family) -> ModelConfig:
    """The model told of noise levels as that family is."""
    scale, offset = CLOCKS[family]
    dit = dataclasses.replace(model.dit, time_scale=scale, time_offset=offset)
    return dataclasses.replace(model, dit=dit)


def axis_sizes(model: ModelConfig) -> dict[str, int]:
    """Sizes of the axes in ``DIT_KEYS``."""
    dit, patch, labels = model.dit, model.patch, model.conditioners.get("label")
    return {
        "d": dit.width,
        "i": dit.width,
        "n": dit.heads,
        "e": dit.width // dit.heads,
        "x": 3,
        "m": dit.hidden,
        "f": 256,
        "y": 1 + (labels.classes if isinstance(labels, ClassLabels) else 0),
        "o": 1 + model.learned_variance,
        "c": patch.channels,
        "ph": patch.h,
        "pw": patch.w,
        "six": 6,
        "two": 2,
    }


def check_published(model: ModelConfig, divisors: Sequence[int] = (128,)) -> None:
    """Raises ``ValueError`` where a model is none that the published layouts can hold.

    ``divisors`` are the rates of time that readers of the layout compute: 128 of the authors' files;
    of Diffusers' folders also 127, which its class has and their weights do not tell.
    """
    dit = model.dit
    wanted = {
        "dit.rotary": (dit.rotary, False),
        "dit.qk_norm": (dit.qk_norm, False),
        "dit.absolute_positions": (dit.absolute_positions, "wh"),
        "dit.rope_theta": (dit.rope_theta, 1e4),
        "dit.cross_attention": (dit.cross_attention, False),
        "dit.pooled_text": (dit.pooled_text, False),
        "dit.modulation": (dit.modulation, "layer"),
        "dit.window": (dit.window, None),
        "patch.t": (model.patch.t, 1),
        "text": (type(model.text).__name__, "NoTextConfig"),
        "conditioners": (
            {name: type(one).__name__ for name, one in model.conditioners.items()},
            {"label": "ClassLabels"},
        ),
    }
    other = [
        f"{name} is {has!r}, not {want!r}" for name, (has, want) in wanted.items() if has != want
    ]
    if model.patch.h != model.patch.w:
        other.append(f"patch.h {model.patch.h} and patch.w {model.patch.w} are not equal")
    if dit.time_divisor not in divisors:
        known = " or ".join(map(str, divisors))
        other.append(f"dit.time_divisor is {dit.time_divisor}, not {known}")
    if other:
        raise ValueError(
            "the model is not DiT as published, and the published layouts hold no other: "
            + "; ".join(other)
            + ". Keep it as a run."
        )


def dit_map(file: DiTFile) -> Map:
    """The layout of the authors' ``.pt`` files."""
    check_published(file.model)
    sizes, depth = axis_sizes(file.model), file.model.dit.depth
    entries = []
    for path, (key, pattern) in DIT_KEYS.items():
        stacked = key.startswith(BLOCK)
        entries.append(
            Entry(
                path=tuple(path.split("/")),
                keys=tuple(key.format(i) for i in range(depth)) if stacked else (key,),
                layout=Layout(pattern, sizes),
                stacked=stacked,
                negative=file.family == "sit" and key.startswith(OUT),
            )
        )
    side = file.size // file.model.patch.h
    fixed = Fixed(POSITIONS, grid_table(file.model.dit.width, side))
    return Map(f"a {file.family.upper()} of {_said(file)}", tuple(entries), (fixed,))


def _said(file: DiTFile) -> str:
    dit = file.model.dit
    return f"width {dit.width}, depth {dit.depth} and patch {file.model.patch.h}"


def pick_weights(arrays: Arrays, part: str | None = None) -> dict[str, np.ndarray]:
    """The weights of a file: all of it, or of a training checkpoint those under ``ema`` (or ``part``).

    Raises:
        ValueError: where there are no such weights.
    """
    if part is None and "x_embedder.proj.weight" in arrays:
        return dict(arrays)
    prefix = f"{part or 'ema'}."
    found = {key[len(prefix) :]: a for key, a in arrays.items() if key.startswith(prefix)}
    if not found:
        heads = sorted({key.split(".")[0] for key in arrays})
        raise ValueError(
            f"the file has neither 'x_embedder.proj.weight', as a DiT's has, nor weights under "
            f"{prefix!r}: its keys begin with {', '.join(heads[:12]) or 'nothing'}."
        )
    return found


def infer_dit(arrays: Arrays, family: Family = "dit", heads: int | None = None) -> DiTFile:
    """The config that the shapes of the authors' layout tell.

    The number of heads is in no shape: it is the preset's of that width and depth, or ``heads``.

    Raises:
        ValueError: where a shape that is needed for it is not there or makes no sense.
    """
    width, channels, patch, _ = _shape(arrays, "x_embedder.proj.weight", 4)
    classes = _shape(arrays, "y_embedder.embedding_table.weight", 2)[0] - 1
    out = _shape(arrays, "final_layer.linear.weight", 2)[0]
    hidden = _shape(arrays, "blocks.0.mlp.fc1.weight", 2)[0]
    tokens = _shape(arrays, POSITIONS, 3)[1]
    depth = 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, arrays) if m)
    return made_file(
        family,
        width=width,
        depth=depth,
        heads=heads or _heads(width, depth),
        hidden=hidden,
        channels=channels,
        patch=patch,
        outputs=out / (channels * patch * patch),
        classes=classes,
        size=math.isqrt(tokens) * patch,
    )


def made_file(
    family: Family,
    *,
    width: int,
    depth: int,
    heads: int,
    hidden: int,
    channels: int,
    patch: int,
    outputs: float,
    classes: int,
    size: int,
) -> DiTFile:
    """What a file holds, from its numbers; raises ``ValueError`` where they fit no published model."""
    if outputs not in (1, 2):
        raise ValueError(
            f"the last layer gives {outputs:g} numbers for each of the {channels} channels of a patch "
            f"of {patch}: 1, or 2 with learned variance, are known."
        )
    like = published("S")
    dit = dataclasses.replace(
        like,
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=None if hidden == 4 * width else hidden,
    )
    model = ModelConfig(
        dit=dit,
        patch=PatchConfig(t=1, h=patch, w=patch, channels=channels),
        text=NoTextConfig(),
        conditioners={"label": ClassLabels(classes)},
        learned_variance=outputs == 2,
    )
    return DiTFile(with_clock(model, family), size, family)


def preset_name(model: ModelConfig) -> str | None:
    """The published name of a model's size, such as ``XL/2``."""
    dit = model.dit
    for name, preset in PRESETS.items():
        if (preset.width, preset.depth, preset.heads) == (dit.width, dit.depth, dit.heads):
            return f"{name}/{model.patch.h}"
    return None


def _heads(width: int, depth: int) -> int:
    for preset in PRESETS.values():
        if (preset.width, preset.depth) == (width, depth):
            return preset.heads
    known = ", ".join(f"{name} {p.width} x {p.depth}" for name, p in PRESETS.items())
    raise ValueError(
        f"the file's model has width {width} and depth {depth}, which is no published size ({known}), "
        "and its heads are in no shape: say their number with --heads."
    )


def _shape(arrays: Arrays, key: str, axes: int) -> tuple[Any, ...]:
    found = arrays.get(key)
    if found is None or found.ndim != axes:
        what = "absent" if found is None else f"of shape {tuple(found.shape)}"
        raise ValueError(f"{key!r} is {what}, and the config is read from its {axes} dimensions.")
    return tuple(found.shape)
