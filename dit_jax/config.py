"""Configs: frozen dataclasses in Python files, overridden on the command line, stored as JSON.

A config file builds a ``Run`` in its function ``get_config``. Any field can be given on the command
line by its dotted name (``--optimizer.learning-rate 3e-4``). A run's config is stored as JSON beside it
and in every checkpoint::

    {"format": 2, "type": "dit_jax.config:VideoRun", "steps": 2100,
     "data": {"source": {"type": "dit_jax.data.shapes:ShapesConfig", ...}}, ...}

A dataclass names its class where its field could hold another. Only classes of dit_jax are imported
from a stored config. An object of a user's own module is stored by its name alone, ``{"type":
"my_module:MySource", "external": true}``, and comes from the config file when the run is resumed; a
subclass of one of our dataclasses is stored as ours, with its own name under "subclass".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tyro
from jax.sharding import Mesh

from dit_jax import data
from dit_jax.diffusion import DiffusionConfig
from dit_jax.files import InputError, absolute, checking_input, local_copy, read_json, refuse_if
from dit_jax.model import ByteEncoderConfig, ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.parallel import AttentionConfig, MeshConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import CheckpointConfig, ClipsEvaluator, HeldOutLoss, OptimizerConfig, Task
from dit_jax.types import (
    Codec,
    FrameGrid,
    NonNegativeFloat,
    NonNegativeInt,
    PixelCodec,
    PositiveInt,
    Range,
    TextEncoder,
    UnitInterval,
)

# ---------------------------------------------------------------------------------------------------
# What a run is. Comments above fields are the help of the command line.
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run logs and plots."""

    # Steps from one line of scalars to the next.
    every: PositiveInt = 20
    # Steps from one grid of samples to the next, the last one always; 0 makes none.
    draw_every: NonNegativeInt = 1000
    # Clips in a grid.
    draw_count: PositiveInt = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of training: what the loop needs to know of it. Subclasses say what is trained."""

    # The dotted name of the field that says how many rows the global batch has.
    ROWS: ClassVar[str]
    # Fields that hold paths: stored absolute. Any config may have this attribute.
    paths: ClassVar[tuple[str, ...]] = ("output",)

    output: str = "runs/default"
    """Directory of the run: checkpoints, logs and samples. A run found there is resumed."""
    steps: PositiveInt = 1000
    seed: typing.Annotated[int, Range(0, 2**32 - 1)] = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    # What is measured while it trains and at its end: objects of any module with a method
    # `build(parts) -> Evaluator` (on the command line by their places).
    evaluators: tuple[Any, ...] = (HeldOutLoss(),)

    def __post_init__(self) -> None:
        check_types(self)
        refuse_if(self.constraints())

    def constraints(self) -> Iterator[tuple[bool, str]]:
        """What must not be true of the fields together, and the message if it is, in order."""
        name, rows, parts = self.ROWS, self.rows, self.optimizer.accumulate
        text = f"{name} {rows} does not divide into optimizer.accumulate {parts}: give a multiple."
        yield rows % parts > 0, text

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return attrgetter(self.ROWS)(self)

    def with_hashes(self: Kind) -> Kind:
        """The config as a new run stores it: with the hashes of frozen weights that it depends on."""
        return self

    def build(self, mesh: Mesh) -> Task:
        """The task on a mesh; opens the data, and initialises nothing yet."""
        raise NotImplementedError


Kind = TypeVar("Kind", bound=Run)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is packed."""

    source: Any = data.ShapesConfig()
    """A config with a method ``open() -> Source``, or a ``Source`` itself, of any module."""
    packing: data.PackingConfig = data.PackingConfig()
    transform: data.TransformConfig = data.TransformConfig()
    # Whether records that cannot be packed, read or trained on are left out, counted and named, or the
    # run is refused before it begins (as far as the sizes in the data's metadata tell).
    bad_records: Literal["skip", "refuse"] = "skip"
    # Records that may be left out in the middle of a run, besides those known before it.
    max_bad_records: NonNegativeInt = 1000
    # For recorded data: the split that is held out, whose captions are the prompts of evaluators and
    # whose clips the truth. Unset, these are of the training data.
    eval_split: str | None = None


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """What the data's latents are to pixels, for models of pixels and records of latents; with a folder
    of weights it is a ``dit_jax.codec.config.LatentCodecConfig``."""

    path: ClassVar[str | None] = None

    # Frames, rows and columns of pixels to one latent: 1 x 8 x 8 for Stable Diffusion's. The first
    # frame has a latent of its own. Sizes in `sampling` count pixels.
    t: PositiveInt = 1
    h: PositiveInt = 1
    w: PositiveInt = 1
    # Of the codec's weights. Filled in when a run begins, from the data or the folder; another codec is
    # refused from then on.
    hash: str | None = None

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of so many frames of so many pixels."""
        odd = height % self.h + width % self.w > 0
        refuse_if([(odd, f"{height} x {width} pixels: give multiples of {self.h} x {self.w}.")])
        return FrameGrid(self.t).latents(frames), height // self.h, width // self.w

    def latent_fps(self, fps: float) -> float:
        """Latent frames a second of clips with so many frames a second."""
        return fps / self.t

    def open(self, channels: int, mesh: Mesh | None = None) -> Codec | None:
        """The codec for a model of so many channels: of pixels, or None for latents alone."""
        return PixelCodec() if channels == PixelCodec.channels else None

    def weights_hash(self) -> str | None:
        """The hash of the folder's weights, if there is one."""


@dataclasses.dataclass(frozen=True)
class StatesConfig:
    """Which text encoder made the caption states that the model reads; with a folder of weights it is a
    ``dit_jax.text.config.TextEncoderConfig``."""

    path: ClassVar[str | None] = None

    # Of the encoder's weights. Filled in when a run begins, from the data or the folder; states of
    # another encoder are refused from then on.
    hash: str | None = None

    def open(self, text: Any, mesh: Mesh | None = None) -> TextEncoder | None:
        """The encoder for a model of this ``text``, if there is a folder."""

    def identity(self) -> tuple[str, str] | None:
        """Name and hash of the encoder in the folder, if there is one."""

    def length(self) -> tuple[Callable[[str], int], int] | None:
        """How many tokens a text is, and how many are read, if there is a folder."""

    def known_as(self, text: Any, name: str | None, digest: str | None, what: str) -> StatesConfig:
        """The config with the hash of an encoder that made states. Raises ``InputError`` if it is not
        that of the model's ``text``: by the hashes or, if one is unknown, by the names."""
        other = self.hash != digest if self.hash and digest else name not in (None, text.encoder)
        message = (
            f"{what} the encoder {name!r} ({digest or 'no hash'}), and the model reads states of "
            f"{text.encoder!r} ({self.hash or 'no hash'}): give the one that it is trained on "
            "(text_encoder.path, data.source), or name it (model.text.encoder)."
        )
        refuse_if([(other, message)])
        return dataclasses.replace(self, hash=digest or self.hash)


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """A second run of the same model config, which takes over at low noise levels in sampling."""

    paths: ClassVar[tuple[str, ...]] = ("path",)

    path: str | None = None  # Its directory; None: there is none.
    below: UnitInterval = 0.875  # The noise levels that are its.
    cfg_scale: NonNegativeFloat | None = None  # Its guidance; unset: that of the first.


@dataclasses.dataclass(frozen=True)
class VideoRun(Run):
    """A run of training: a text-to-video model, or one of classes and images."""

    ROWS = "data.packing.rows"

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig(patch=PatchConfig(t=2, h=8, w=8, channels=3))
    diffusion: DiffusionConfig = DiffusionConfig()
    attention: AttentionConfig = AttentionConfig()
    codec: CodecConfig = CodecConfig()
    text_encoder: StatesConfig = StatesConfig()
    expert: ExpertConfig = ExpertConfig()
    sampling: SamplingConfig = SamplingConfig()

    def with_hashes(self) -> VideoRun:
        """The config with the hashes of its codec and text encoder, as far as data or folders tell.
        Raises ``InputError`` if data, folders and config name different ones."""
        text, codec, encoder = self.model.text, self.codec, self.text_encoder
        sets = [data.RecordsSource(one) for one in getattr(self.data.source, "record_sets", ())]
        hashes = [codec.hash, *(one.codec for one in sets), codec.weights_hash()]
        known = list(dict.fromkeys(filter(None, hashes)))
        message = (
            f"codec.hash {codec.hash!r}, the latents of the data and the codec {codec.path!r} are of "
            f"the codecs {', '.join(known)}: give the one that made the latents, or "
            "make them anew for this run (python -m dit_jax.prepare --for-run)."
        )
        refuse_if([(len(known) > 1, message)])
        codec = dataclasses.replace(codec, hash=known[0] if known else None)
        for one in sets if isinstance(text, TextStatesConfig) else ():
            if one.config.captioned and one.config.text_states_key is not None:
                what = f"the states of {one.config.path!r} were made by"
                encoder = encoder.known_as(text, one.text_encoder_name, one.text_encoder, what)
        if (own := encoder.identity()) is not None:
            encoder = encoder.known_as(text, *own, f"text_encoder.path {encoder.path!r} is")
        return dataclasses.replace(self, codec=codec, text_encoder=encoder)

    def build(self, mesh: Mesh) -> Task:
        from dit_jax.training.video_task import build_text_to_video  # It imports this module.

        return build_text_to_video(self, mesh)

    def constraints(self) -> Iterator[tuple[bool, str]]:
        yield from super().constraints()
        packing, model, sampling = self.data.packing, self.model, self.sampling
        channels, source, limit = model.patch.channels, self.data.source, model.text.max_tokens
        latents = channels != PixelCodec.channels and self.codec.path is None
        text = f"data.packing.row_text {packing.row_text} is smaller than one caption of {limit} "
        yield limit > packing.row_text, text + "tokens: raise it, or lower the limit in model.text."
        sampling.check(self.diffusion, channels)
        size = (sampling.frames, sampling.height, sampling.width)
        with checking_input(f"sampling.frames, height, width = {size} do not fit", "change them"):
            model.patch.grid(*self.codec.latent_size(*size))
        if isinstance(source, data.ShapesConfig):
            text = f"model.patch.channels is {channels}: moving shapes have 3, so give codec.path."
            yield latents, text
            clips = [(frames, h, w) for frames in source.frames for h, w in source.sizes]
            clips += [(1, h, w) for h, w in source.image_sizes if source.image_fraction]
            for t, h, w in clips:
                count = model.patch.num_tokens(*self.codec.latent_size(t, h, w))
                text = f"data.packing.row_tokens {packing.row_tokens} is smaller than one clip: "
                text += f"{t} x {h} x {w} has {count} tokens. Raise it to at least {count}, or "
                yield count > packing.row_tokens, text + "use larger patches."
        plots = any(isinstance(one, ClipsEvaluator) and one.prompts for one in self.evaluators)
        text = f"model.patch.channels is {channels}: these are latents, plotted by codec.path. "
        text += "Give it, or set log.draw_every to 0, and the prompts of evaluators."
        yield latents and bool(self.log.draw_every or plots), text
        folder, states = self.text_encoder.path, isinstance(model.text, TextStatesConfig)
        text = f"text_encoder.path is {folder!r}, and the model reads no states: leave it out, or give "
        yield bool(folder) and not states, text + "model.text a TextStatesConfig."
        dropout, padded = self.diffusion.caption_dropout, getattr(model.text, "padded", False)
        text = f"diffusion.caption_dropout is {dropout}: set it to 0, for the empty caption of a model "
        yield padded and dropout > 0, text + "with text.padded has states of its own."
        bare = [x.path for x in getattr(source, "record_sets", ()) if not x.captioned]
        text = (
            f"data.source: {', '.join(bare)!r} has captioned False, and a model with text.padded "
        )
        yield padded and bool(bare), text + "reads states: prepare those of the empty caption."
        fixed = self.diffusion.variance == "learned_range" and not model.learned_variance
        text = "diffusion.variance is 'learned_range': set model.learned_variance, or another variance."
        yield fixed, text


# ---------------------------------------------------------------------------------------------------
# From files and the command line
# ---------------------------------------------------------------------------------------------------


def load_config(path: str, kind: type[Kind] = VideoRun) -> Kind:
    """The config that the file's ``get_config()`` builds, for a kind of run; errors name the line."""
    file = local_copy(path)
    near = ", ".join(sorted(map(str, Path("configs").glob("*.py")))) or "a path to one"
    absent = file.suffix != ".py" or not file.is_file()
    refuse_if([(absent, f"--config {path!r} is not a Python file: give one, of {near}.")])
    spec = importlib.util.spec_from_file_location(f"dit_jax_config_{file.stem}", file)
    assert spec and spec.loader
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    # A config may import what lies beside it (`from video_1b3 import ...`): each folder's files are
    # read anew under their bare names, and other modules of these names keep them afterwards.
    folder = file.parent.resolve()
    names = {other.stem for other in folder.glob("*.py")} - sys.stdlib_module_names
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(file)][-1:]
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"--config {path!r}{''.join(lines)}: {what}{error}") from error
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(others)
    return _of_kind(config, kind, f"--config {path!r}")


def _of_kind(config: Any, kind: type[Kind], where: str) -> Kind:
    other = not isinstance(config, kind)
    refuse_if([(other, f"{where} is a {type(config).__name__}: give a {kind.__name__}.")])
    return config


def parse_config(
    arguments: Sequence[str], prog: str, description: str, kind: type[Kind] = VideoRun
) -> Kind:
    """A config of a ``kind`` of run from ``--config FILE`` and dotted overrides; prints a message and
    exits with 2 if something is wrong, before anything else is done."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        given, rest = parser.parse_known_args(arguments)
        bare = given.config is None and not {"-h", "--help"} & set(arguments)
        refuse_if([(bare, "--config FILE is required, e.g. --config configs/quickstart.py.")])
        default: Any = load_config(given.config, kind) if given.config else VideoRun()
        return tyro.cli(
            type(default),
            args=rest,
            default=default,
            prog=f"{prog} --config FILE",
            description=description,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    except (ValueError, argparse.ArgumentError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


def absolute_paths(config: Any) -> Any:
    """The config with absolute paths, as a run stores it: it means the same from any directory."""
    if isinstance(config, tuple):
        return tuple(map(absolute_paths, config))
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    paths, changes = getattr(config, "paths", ()), {}
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        is_path = field.name in paths and isinstance(value, str)
        new = absolute(value) if is_path else absolute_paths(value)
        changes |= {field.name: new} if new != value else {}
    return dataclasses.replace(config, **changes) if changes else config


# ---------------------------------------------------------------------------------------------------
# To JSON and back
# ---------------------------------------------------------------------------------------------------


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def to_dict(config: Any, declared: Any = None) -> Any:
    """A config as JSON values; see the top of this module. ``declared`` is the type of its field."""
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {name: to_dict(item) for name, item in config.items()}
    if config is None or isinstance(config, str | int | float):
        return config
    kind = type(config)
    ours = next((one for one in kind.__mro__ if one.__module__.split(".")[0] == __package__), None)
    if ours is None or not dataclasses.is_dataclass(ours):
        return {"type": _class_name(kind), "external": True}
    out: dict[str, Any] = {"format": 2} if isinstance(config, Run) else {}
    if ours is not declared or ours is not kind:
        out["type"] = _class_name(ours)
    for name, hint in _field_types(ours).items():
        out[name] = to_dict(getattr(config, name), hint)
    return out if ours is kind else out | {"subclass": _class_name(kind)}


def from_dict(kind: Any, values: Any) -> Any:
    """The dataclass that JSON values describe: objects for dataclasses, lists for tuples."""
    return _walk(values, kind, "", stored=True)


def stored_config(values: Any, where: str | Path, kind: type[Kind] = VideoRun) -> Kind:
    """The config that was stored in the file ``where`` as these values."""
    old = isinstance(values, dict) and "format" not in values
    version = "dit_jax 0.1 (commit 57ee8cf)" if old else "the version that wrote it"
    prefix = f"{str(where)!r} holds no config that this version of dit_jax can use"
    with checking_input(prefix, f"restore the file, or use {version}"):
        config = from_dict(Run, migrate(values) if old else values)
    return _of_kind(config, kind, repr(str(where)))


def read_config(path: str | Path, kind: type[Kind] = VideoRun) -> Kind:
    """The config that was stored in a file, local or on Cloud Storage, of a kind of run."""
    return stored_config(read_json(path, "the config"), path, kind)


def flatten(values: Any, name: str) -> dict[str, Any]:
    """The values in nested objects and lists of objects by their dotted names."""
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = dict(enumerate(values))
    if not isinstance(values, dict) or not values:
        return {name: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{name}.{key}" if name else str(key))
    return flat


def differences(now: Any, before: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields, by their dotted names, in which two configs are not the same, and both values."""
    now, before = (flatten(to_dict(one), name) for one in (now, before))
    for field in sorted(now | before):
        # A stored config was read as one of ours, whatever subclass of it made it.
        if now.get(field) != before.get(field) and not field.endswith("subclass"):
            yield field, now.get(field), before.get(field)


# Format 1 was that of dit_jax 0.1. It named these classes by their bare names,
BARE = (data.ShapesConfig, data.RecordsConfig, data.MixtureConfig)
BARE += (ByteEncoderConfig, TextStatesConfig)
CLASSES = {kind.__name__: _class_name(kind) for kind in BARE}
CLASSES["CodecRun"] = "dit_jax.codec.run:CodecRun"
# had one class for what now has another if there is a folder of weights,
FOLDERS = {
    "codec": "dit_jax.codec.config:LatentCodecConfig",
    "text_encoder": "dit_jax.text.config:TextEncoderConfig",
}
# called these fields of today's classes otherwise,
RENAMED: dict[str, dict[str, str]] = {
    "DiffusionConfig": {"ceilings": "masks"},
    "MaskConfig": {"free": "none"},
    "DiTConfig": {"band": "window", "dense_every": "global_every"},
}
# and had these, as format 2 had some. Of these values nothing is lost; with
# others they are refused by name.
REMOVED: dict[str, dict[str, Any]] = {
    "ModelConfig": {"upscale": 1},
    "DiffusionConfig": {"augmentation": 0.3, "weighting": "none", "min_snr_gamma": 5.0},
    "MaskConfig": {"independent": 0.0, "levels": 16},
    "SamplingConfig": {
        "augmentation": 0.0,
        "cfg_zero_star": False,
        "cfg_zero_init": 0,
        "cfg_rescale": 0.0,
    },
    "PackingConfig": {"packer": "first_fit"},
    "TransformConfig": {"max_area": None, "whole_patches": False},
    "StatesConfig": {"layer": "last"},
    "TextEncoderConfig": {"layer": "last"},
}


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """A config of format 1 with the sections of format 2; its evaluators are those of a config by
    default. Names of fields are read by ``_walk``."""
    values = {"type": _class_name(VideoRun)} | values
    if values["type"] == _class_name(VideoRun):
        split = values.pop("evaluation", {}).get("records_split")
        values["data"] = values.get("data", {}) | {"eval_split": split}
        for name, kind in FOLDERS.items():
            inner = {"type": kind} | values.get(name, {})
            if inner.get("path") is None:
                inner = {k: v for k, v in inner.items() if k not in ("type", "path", "tiles")}
            values[name] = inner
    return values


# ---------------------------------------------------------------------------------------------------
# The values of fields, checked against their types
# ---------------------------------------------------------------------------------------------------
# Python itself checks none: a config file is Python and a stored config is JSON, so steps=1e1 or
# scan="False" would be noticed late or never. The command line is read by tyro, which takes nan.


def check_types(config: Any, name: str = "") -> None:
    """Raises ``InputError`` for a field, however deep, whose value is not of its type or in its range.
    Call it where a user's values enter: on a config or on the arguments of a command."""
    _walk(config, type(config), name)


def _walk(value: Any, hint: Any, name: str, stored: bool = False) -> Any:
    """A value of the field ``name``, checked against its type with all that is inside it; a stored one
    is converted on the way."""
    prefix = f"{name}." if name else ""
    if stored and isinstance(value, dict):
        if value.get("external"):
            return value
        kinds: list[Any] = [one for one in _options(hint) if dataclasses.is_dataclass(one)]
        if kinds or "type" in value:
            kind = _named_class(value["type"], kinds, prefix) if "type" in value else kinds[0]
            hints, title, inner = _field_types(kind), kind.__name__, {}
            removed, renamed = REMOVED.get(title, {}), RENAMED.get(title, {})
            fields: list[str] = sorted(value.keys() - {"format", "type", "subclass"})
            for field in fields:
                item = value[field]
                if (field, item) not in removed.items():
                    field = renamed.get(field, field)
                    message = f"the stored config has {field!r}, which {title} does not"
                    refuse_if([(field not in hints, message)])
                    inner[field] = _walk(item, hints[field], prefix + field, stored)
            return kind(**inner)
    if stored and isinstance(value, list):
        value = tuple(value)

    option = next((one for one in _options(hint) if _is(value, one)), None)
    if option is None:
        # Cut: values may be large or deeply nested.
        text = f"{name or 'the config'} is {value!r:.200}: it is {_describe(hint, value)}."
        raise InputError(text)
    if isinstance(value, tuple) and typing.get_origin(option) is tuple:
        args = typing.get_args(option)
        hints = args[:1] * len(value) if args[-1] is Ellipsis else args
        items = enumerate(zip(value, hints, strict=True))
        return tuple(_walk(item, one, f"{name}[{i}]", stored) for i, (item, one) in items)
    if isinstance(value, dict):
        hint = (*typing.get_args(option), Any, Any)[1]
        return {key: _walk(item, hint, f"{prefix}{key}", stored) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        for field, one in _field_types(type(value)).items():
            _walk(getattr(value, field), one, prefix + field)
    return value


def _named_class(tag: Any, kinds: list[Any], prefix: str) -> Any:
    """The dataclass "module:Class" of ours; of those that the field may hold, if it says which."""
    module, _, title = CLASSES.get(str(tag), str(tag)).partition(":")
    kind: Any = None
    if module.startswith(f"{__package__}."):
        with contextlib.suppress(ImportError):
            kind = getattr(importlib.import_module(module), title, None)
    fits = isinstance(kind, type) and issubclass(kind, tuple(kinds) or object)
    names = ", ".join(map(_class_name, kinds)) or "module:Class"
    other = not fits or not dataclasses.is_dataclass(kind)
    refuse_if([(other, f"{prefix}type is {tag!r:.200}: it is a class of dit_jax, as {names}.")])
    return kind


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _options(hint: Any) -> tuple[Any, ...]:
    """What a union may be; the type itself if it is none."""
    args, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is typing.Annotated:
        return (hint,) if any(isinstance(one, Range) for one in args) else _options(args[0])
    return args if origin in (typing.Union, types.UnionType) else (hint,)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type and in its range; of a tuple, whether it has as many items."""
    args, origin = typing.get_args(hint), typing.get_origin(hint)
    if hint is Any:
        return True
    if origin is typing.Annotated:
        return _is(value, args[0]) and all(value in one for one in args if isinstance(one, Range))
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in args)
    if hint is float:
        # A whole number may stand for a float. NaN compares false; any int can be compared.
        return (_is(value, int) or isinstance(value, float)) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, tuple) and (args[-1] is Ellipsis or len(args) == len(value))
    return isinstance(value, origin or hint)


def _describe(hint: Any, value: Any) -> str:
    """What a type takes, for readers of an error about a value."""
    if len(options := _options(hint)) > 1:
        return " or ".join(_describe(one, value) for one in options)
    args = typing.get_args(hint)
    if ranges := [str(one) for one in args if isinstance(one, Range)]:
        return ranges[0] if _is(value, args[0]) else f"{_describe(args[0], value)}, {ranges[0]}"
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return text.replace("typing.", "").replace("Literal", "one of ")
