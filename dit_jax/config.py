"""The configuration of a run: frozen dataclasses that validate themselves.

A file of ``configs/`` builds a ``Config`` in its function ``get_config``; the command line overrides
any field by its dotted name (``--optimizer.learning-rate 3e-4``), with ``tyro`` refusing unknown names
and wrong types. A config is stored with every checkpoint as JSON and read back from there.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from dit_jax.data import PackingConfig, RecordsConfig, ShapesConfig, TransformConfig
from dit_jax.diffusion import DiffusionConfig
from dit_jax.models import (
    ByteEncoderConfig,
    ClassLabelsConfig,
    ModelConfig,
    PatchConfig,
    TextStatesConfig,
)
from dit_jax.parallel import AttentionConfig, MeshConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig

CHOICES = (ShapesConfig, RecordsConfig, ByteEncoderConfig, TextStatesConfig, ClassLabelsConfig)
"""Dataclasses that stand where another may stand: stored with their name."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is packed."""

    source: ShapesConfig | RecordsConfig = ShapesConfig()
    packing: PackingConfig = PackingConfig()
    transform: TransformConfig = TransformConfig()


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """What turns pixels into the latents that the model makes, and back; none for models of pixels."""

    path: str | None = None
    """The folder of an autoencoder (``python -m dit_jax.convert`` says which). Pixels of the data are
    encoded by it as they are read, and what the model makes is decoded by it."""
    t: int = 1
    h: int = 1
    w: int = 1
    """Frames, rows and columns of pixels to one latent: 1 x 8 x 8 for Stable Diffusion's. The first
    frame has a latent of its own. Sizes in ``sampling`` count pixels."""

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w) < 1:
            raise ValueError(
                f"codec.t, h, w = {self.t}, {self.h}, {self.w}: strides are at least 1."
            )

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of so many frames of so many pixels.

        Raises:
            ValueError: where the strides do not divide them.
        """
        if (frames - 1) % self.t or height % self.h or width % self.w:
            raise ValueError(
                f"{frames} frames of {height} x {width} pixels have no whole latents of {self.t} x "
                f"{self.h} x {self.w}: give 1 + {self.t}n frames and multiples of the others."
            )
        return 1 + (frames - 1) // self.t, height // self.h, width // self.w


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """What makes states of captions, for a model that reads those (``model.text``)."""

    path: str | None = None
    """Its folder, as ``transformers`` stores T5 v1.1, UMT5 or CLIP (docs/text.md). Captions that come
    without states are encoded by it as they are read, and so are prompts."""
    layer: Literal["last", "penultimate"] = "last"
    """Of CLIP, whose states are read."""
    hash: str | None = None
    """Of its weights. Filled in when a run begins, from the data or the folder; states of another
    encoder are refused from then on."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run tells while it goes."""

    every: int = 20
    """Steps from one line of scalars to the next."""
    draw_every: int = 1000
    """Steps from one grid of samples to the next; 0 draws none."""
    draw_count: int = 8
    """Clips in a grid."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.draw_every < 0 or self.draw_count < 1:
            raise ValueError(
                f"log.every {self.every} and draw_count {self.draw_count} are at least 1, draw_every "
                f"{self.draw_every} at least 0."
            )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What a run measures when it is done, where its data has a judge or true clips."""

    prompts: int = 96
    """Clips made for it; 0 measures nothing."""
    records_split: str | None = None
    """For recorded data: the split whose captions are prompts and whose clips are the truth."""
    classifier_split: str | None = None
    """For images with labels: the split that a small classifier is trained on, which then judges what
    was made; a fifth of it is kept to judge the classifier by."""

    def __post_init__(self) -> None:
        if self.prompts < 0:
            raise ValueError(f"evaluation.prompts is {self.prompts}: it is at least 0.")


def check_choices(config: Any, name: str = "") -> None:
    """Raises ``ValueError`` for a field, however deep, whose value is none of its type's choices.

    Python checks no types, and a config file is Python; the command line is checked by ``tyro``.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        here = f"{name}.{field.name}" if name else field.name
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), 1, 0.5)
            raise ValueError(
                f"{here} is {value!r}: it is one of {', '.join(map(repr, choices))}."
                + (f" Perhaps {near[0]!r} was meant." if near else "")
            )
        if dataclasses.is_dataclass(value):
            check_choices(value, here)


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of training: a text-to-video model, or one of classes and images."""

    output: str = "runs/default"
    """Directory of the run: checkpoints, logs and samples. A run found there is resumed."""
    steps: int = 1000
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig(patch=PatchConfig(t=2, h=8, w=8, channels=3))
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    attention: AttentionConfig = AttentionConfig()
    codec: CodecConfig = CodecConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: it is at least 1.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: it is at least 0.")
        rows, parts = self.data.packing.rows, self.optimizer.accumulate
        if rows % parts:
            raise ValueError(
                f"data.packing.rows {rows} does not divide into optimizer.accumulate {parts} parts: "
                "make rows a multiple of it."
            )
        if self.model.text.max_tokens > self.data.packing.row_text:
            raise ValueError(
                f"data.packing.row_text {self.data.packing.row_text} is smaller than one caption of "
                f"{self.model.text.max_tokens} tokens: raise it, or lower the limit in model.text."
            )
        drawn = self.sampling
        drawn.check(self.diffusion, self.model.patch.channels)
        try:
            self.model.patch.grid(*self.codec.latent_size(drawn.frames, drawn.height, drawn.width))
        except ValueError as error:
            raise ValueError(
                f"sampling.frames, height, width = {drawn.frames}, {drawn.height}, {drawn.width} do "
                f"not fit the model's patches: {error}"
            ) from error
        if isinstance(self.data.source, ShapesConfig):
            self._check_shapes(self.data.source)
        elif self.model.patch.channels != 3 and self.codec.path is None:
            if self.log.draw_every or self.evaluation.prompts:
                raise ValueError(
                    f"model.patch.channels is {self.model.patch.channels}: these are latents, which "
                    "cannot be drawn as pictures without codec.path. Give it, or set log.draw_every "
                    "and evaluation.prompts to 0."
                )
        if self.text_encoder.path and not isinstance(self.model.text, TextStatesConfig):
            raise ValueError(
                f"text_encoder.path is {self.text_encoder.path!r}, and the model reads no states "
                "(model.text): leave it out, or give the model a TextStatesConfig."
            )
        self._check_labels()

    def _check_labels(self) -> None:
        if self.diffusion.variance == "learned_range" and not self.model.learned_variance:
            raise ValueError(
                "diffusion.variance is 'learned_range', and the model has no second output for it: set "
                "model.learned_variance, or another variance."
            )
        source = self.data.source
        labelled = isinstance(source, RecordsConfig) and source.label_key is not None
        if isinstance(self.model.text, ClassLabelsConfig) and not labelled:
            raise ValueError(
                "model.text are classes, and the data have no labels: give data.source.label_key, the "
                "feature of the records that holds the class."
            )
        if self.evaluation.classifier_split is not None and not labelled:
            raise ValueError(
                f"evaluation.classifier_split is {self.evaluation.classifier_split!r}, and the data "
                "have no labels: give data.source.label_key, or leave it unset."
            )

    def _check_shapes(self, source: ShapesConfig) -> None:
        if self.model.patch.channels != 3:
            raise ValueError(
                f"model.patch.channels is {self.model.patch.channels}: moving shapes have 3 (pixels)."
            )
        clips = [(frames, h, w) for frames in source.frames for h, w in source.sizes]
        images = [(1, h, w) for h, w in source.image_sizes] if source.image_fraction else []
        limit = self.data.packing.row_tokens
        for clip in clips + images:
            count = self.model.patch.num_tokens(*clip)
            if count > limit:
                raise ValueError(
                    f"data.packing.row_tokens {limit} is smaller than one clip: "
                    f"{clip[0]} x {clip[1]} x {clip[2]} has {count} tokens. Raise it to at least "
                    f"{count}, or use larger patches."
                )


def load_config(path: str) -> Config:
    """The config that the file's ``get_config()`` builds."""
    file = Path(path)
    if not file.is_file():
        near = sorted(str(p) for p in Path("configs").glob("*.py"))
        raise ValueError(
            f"--config {path!r} is not a file. "
            + (f"In configs/ there are: {', '.join(near)}." if near else "Give a path to one.")
        )
    spec = importlib.util.spec_from_file_location(f"dit_jax_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config {path!r} is not a Python file: give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # A config may be built from another that lies beside it: `from video_1b3 import ...`.
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config() that returns a Config: add one.")
    config = module.get_config()
    if not isinstance(config, Config):
        raise ValueError(f"get_config() of {path} returned {type(config).__name__}, not a Config.")
    return config


def parse_config(arguments: Sequence[str], prog: str, description: str) -> Config:
    """A config from ``--config FILE`` and dotted overrides.

    Prints a message and exits with 2 where something is wrong, before anything else is done.
    """
    arguments = list(arguments)
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            arguments[i : i + 1] = argument.split("=", 1)
            break
    try:
        if "--config" in arguments[:-1]:
            at = arguments.index("--config")
            default = load_config(arguments[at + 1])
            del arguments[at : at + 2]
        elif {"-h", "--help"} & set(arguments):
            default = Config()
        else:
            raise ValueError("--config FILE is required, e.g. --config configs/quickstart.py.")
        return tyro.cli(
            Config,
            args=arguments,
            default=default,
            prog=f"{prog} --config FILE",
            description=description,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def to_dict(config: Any) -> Any:
    """A config as JSON values; a choice between dataclasses is named by ``type``."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        tag = {"type": type(config).__name__} if isinstance(config, CHOICES) else {}
        return tag | fields
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return config


def from_dict(kind: Any, values: Any) -> Any:
    """Inverse of ``to_dict``; unknown fields are refused by name."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if values is None:
            return None
        if isinstance(values, dict) and "type" in values:
            named = {option.__name__: option for option in options}
            return from_dict(
                named[values["type"]], {k: v for k, v in values.items() if k != "type"}
            )
        return from_dict(next(o for o in options if o is not types.NoneType), values)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(values) - set(hints)):
            raise ValueError(
                f"the stored config has {unknown[0]!r}, which {kind.__name__} does not: the run was "
                "made by another version of dit_jax; use that version to read it."
            )
        return kind(**{name: from_dict(hints[name], value) for name, value in values.items()})
    if origin is tuple:
        args = typing.get_args(kind)
        inner = [args[0]] * len(values) if args[-1] is Ellipsis else args
        return tuple(from_dict(k, v) for k, v in zip(inner, values, strict=True))
    return values


def stored_config(values: Any, where: str | Path) -> Config:
    """The config that was stored in the file ``where`` as these values."""
    try:
        return from_dict(Config, values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(where)!r} holds no config that this version of dit_jax can use "
            f"({type(error).__name__}: {error}): restore the file, or use the version that wrote it."
        ) from error


def read_config(path: Path) -> Config:
    """The config that was stored in a file."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as JSON ({error}): restore it (every checkpoint has a copy, "
            "in checkpoints/STEP/config/metadata)."
        ) from error
    return stored_config(values, path)


def differences(now: Any, before: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields, by their dotted names, in which two configs are not the same, and both values."""
    if isinstance(now, dict) and isinstance(before, dict):
        for key in sorted(now | before):
            inner = f"{name}.{key}" if name else key
            yield from differences(now.get(key), before.get(key), inner)
    elif dataclasses.is_dataclass(now):
        yield from differences(to_dict(now), to_dict(before), name)
    elif now != before:
        yield name, now, before
