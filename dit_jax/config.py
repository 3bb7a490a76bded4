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

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import reprlib
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

from dit_jax.data import MixtureConfig, PackingConfig, RecordsConfig, ShapesConfig, TransformConfig
from dit_jax.diffusion import DiffusionConfig
from dit_jax.files import InputError, absolute, local_copy, read_bytes
from dit_jax.model import ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.parallel import AttentionConfig, MeshConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import CheckpointConfig, HeldOutLoss, OptimizerConfig, Task
from dit_jax.types import (
    Codec,
    FrameGrid,
    NonNegativeInt,
    PixelCodec,
    PositiveInt,
    Range,
    TextEncoder,
)

# ---------------------------------------------------------------------------------------------------
# What a run is
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run tells while it goes."""

    every: PositiveInt = 20
    """Steps from one line of scalars to the next."""
    draw_every: NonNegativeInt = 1000
    """Steps from one grid of samples to the next, the last one always; 0 draws none."""
    draw_count: PositiveInt = 8
    """Clips in a grid."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of training: what the loop needs to know of it. Subclasses say what is trained."""

    ROWS: ClassVar[str]
    """The dotted name of the field that says how many rows the global batch has."""
    paths: ClassVar[tuple[str, ...]] = ("output",)
    """Fields that hold paths: stored absolute. Any config may have this attribute."""

    output: str = "runs/default"
    """Directory of the run: checkpoints, logs and samples. A run found there is resumed."""
    steps: PositiveInt = 1000
    seed: typing.Annotated[int, Range(0, 2**32 - 1)] = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    evaluators: tuple[Any, ...] = (HeldOutLoss(),)
    """What is measured while it trains, besides what the task itself measures: objects with a method
    ``build(parts) -> Evaluator``, of any module (``dit_jax.training.evaluators``)."""

    def __post_init__(self) -> None:
        check_types(self)
        for wrong, message in self.constraints():
            if wrong:
                raise InputError(message)

    def constraints(self) -> Iterator[tuple[bool, str]]:
        """What must not be true of the fields together, and what to say if it is; in order: the checks
        behind one that fails are not evaluated."""
        accumulate = self.optimizer.accumulate
        yield (
            self.rows % accumulate > 0,
            f"{self.ROWS} {self.rows} does not divide into optimizer.accumulate {accumulate} parts: "
            "make rows a multiple of it.",
        )

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

    source: Any = ShapesConfig()
    """A config with a method ``open() -> Source``, or a ``Source`` itself, of any module."""
    packing: PackingConfig = PackingConfig()
    transform: TransformConfig = TransformConfig()
    bad_records: Literal["skip", "refuse"] = "skip"
    """What becomes of records that cannot be packed, read or trained on: they are left out, counted and
    named, or the run is refused before it begins (as far as the sizes in the data's metadata tell)."""
    max_bad_records: NonNegativeInt = 1000
    """Records that may be left out in the middle of a run, besides those known before it."""


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """What the data's latents are to pixels. By itself it encodes nothing: it is for models of pixels,
    and for records of latents. ``dit_jax.codec.config.LatentCodecConfig`` has a folder of weights."""

    path: ClassVar[str | None] = None

    t: PositiveInt = 1
    h: PositiveInt = 1
    w: PositiveInt = 1
    """Frames, rows and columns of pixels to one latent: 1 x 8 x 8 for Stable Diffusion's. The first
    frame has a latent of its own. Sizes in ``sampling`` count pixels."""
    hash: str | None = None
    """Of the codec's weights. Filled in when a run begins, from the data or the folder; another codec
    is refused from then on."""

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of so many frames of so many pixels.

        Raises ``ValueError`` if the strides do not divide them.
        """
        if height % self.h or width % self.w:
            raise ValueError(
                f"{height} x {width} pixels have no whole latents of {self.h} x {self.w}: give "
                "multiples of these."
            )
        return FrameGrid(self.t).latents(frames), height // self.h, width // self.w

    def latent_fps(self, fps: float) -> float:
        """Latent frames a second of clips with so many frames a second."""
        return fps / self.t

    def open(self, channels: int, mesh: Mesh | None = None) -> Codec | None:
        """The codec for a model of so many channels: of pixels, or None for latents alone."""
        del mesh
        return PixelCodec() if channels == PixelCodec.channels else None

    def weights_hash(self) -> str | None:
        """Of the folder's weights, if there is one."""
        return None


@dataclasses.dataclass(frozen=True)
class StatesConfig:
    """Which text encoder made the caption states that the model reads (``model.text``). By itself it
    encodes nothing: ``dit_jax.text.config.TextEncoderConfig`` has a folder of weights."""

    path: ClassVar[str | None] = None

    hash: str | None = None
    """Of the encoder's weights. Filled in when a run begins, from the data or the folder; states of
    another encoder are refused from then on."""

    def open(self, mesh: Mesh | None = None, check: Any = None) -> TextEncoder | None:
        """The encoder, if there is a folder; ``check(name, hash, width)`` may refuse it."""
        del mesh, check
        return None

    def identity(self) -> tuple[str, str] | None:
        """Name and hash of the encoder in the folder, if there is one."""
        return None

    def length(self) -> tuple[Callable[[str], int], int] | None:
        """How many tokens a text is, and how many are read, if there is a folder."""
        return None


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What a run measures when it is done, where its data has a judge or true clips."""

    prompts: NonNegativeInt = 96
    """Clips made for it; 0 measures nothing."""
    records_split: str | None = None
    """For recorded data: the split whose captions are prompts and whose clips are the truth."""
    classifier_split: str | None = None
    """For images with labels: the split that a small classifier is trained on, which then judges what
    was made; a fifth of it is kept to judge the classifier by."""


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
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def with_hashes(self) -> VideoRun:
        """The config with the hashes of its codec and its text encoder.

        Raises:
            ValueError: if the data, the folders and the config name different ones.
        """
        from dit_jax.training.kinds import with_hashes  # It imports this module.

        return with_hashes(self)

    def build(self, mesh: Mesh) -> Task:
        """See ``Run.build``."""
        from dit_jax.training.video_task import build_text_to_video  # It imports this module.

        return build_text_to_video(self, mesh)

    def constraints(self) -> Iterator[tuple[bool, str]]:
        """See ``Run.constraints``."""
        yield from super().constraints()
        packing, model, sampling = self.data.packing, self.model, self.sampling
        yield (
            model.text.max_tokens > packing.row_text,
            f"data.packing.row_text {packing.row_text} is smaller than one caption of "
            f"{model.text.max_tokens} tokens: raise it, or lower the limit in model.text.",
        )
        sampling.check(self.diffusion, model.patch.channels)
        size = (sampling.frames, sampling.height, sampling.width)
        try:
            model.patch.grid(*self.codec.latent_size(*size))
        except ValueError as error:
            yield (
                True,
                f"sampling.frames, height, width = {', '.join(map(str, size))} do not fit the model's "
                f"patches: {error}",
            )
        source, latents = self.data.source, model.patch.channels != 3 and self.codec.path is None
        if isinstance(source, ShapesConfig):
            yield (
                latents,
                f"model.patch.channels is {model.patch.channels}: moving shapes have 3 (pixels). "
                "Give codec.path, a codec whose latents have so many.",
            )
            clips = [(frames, h, w) for frames in source.frames for h, w in source.sizes]
            images = [(1, h, w) for h, w in source.image_sizes] if source.image_fraction else []
            for clip in clips + images:
                count = model.patch.num_tokens(*self.codec.latent_size(*clip))
                yield (
                    count > packing.row_tokens,
                    f"data.packing.row_tokens {packing.row_tokens} is smaller than one clip: "
                    f"{clip[0]} x {clip[1]} x {clip[2]} has {count} tokens. Raise it to at least "
                    f"{count}, or use larger patches.",
                )
        yield (
            latents and bool(self.log.draw_every or self.evaluation.prompts),
            f"model.patch.channels is {model.patch.channels}: these are latents, which cannot be drawn "
            "as pictures without codec.path. Give it, or set log.draw_every and evaluation.prompts to "
            "0.",
        )
        yield (
            bool(self.text_encoder.path) and not isinstance(model.text, TextStatesConfig),
            f"text_encoder.path is {self.text_encoder.path!r}, and the model reads no states "
            "(model.text): leave it out, or give the model a TextStatesConfig.",
        )
        yield (
            self.diffusion.variance == "learned_range" and not model.learned_variance,
            "diffusion.variance is 'learned_range', and the model has no second output for it: set "
            "model.learned_variance, or another variance.",
        )
        shown = source.shown_set if isinstance(source, MixtureConfig) else source
        unlabelled = isinstance(shown, ShapesConfig) or (
            isinstance(shown, RecordsConfig) and shown.label_key is None
        )
        yield (
            self.evaluation.classifier_split is not None and unlabelled,
            f"evaluation.classifier_split is {self.evaluation.classifier_split!r}, and the data "
            "have no labels: give data.source.label_key, or leave it unset.",
        )


# ---------------------------------------------------------------------------------------------------
# From files and the command line
# ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """A config may import what lies beside it: ``from video_1b3 import ...``.

    Each folder's files are read anew under their bare names, and modules of the same names that were
    imported before keep these afterwards.
    """
    names = {file.stem for file in folder.glob("*.py")} - sys.stdlib_module_names
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.pop(0)
        sys.modules.update(others)


def load_config(path: str, kind: type[Kind] = VideoRun) -> Kind:
    """The config that the file's ``get_config()`` builds, for a kind of run.

    Raises:
        InputError: if the file is absent, no such file, or fails; the message names the line.
    """
    file = local_copy(path)
    spec = importlib.util.spec_from_file_location(f"dit_jax_config_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        near = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise InputError(
            f"--config {path!r} is not a Python file. "
            + (f"In configs/ there are: {near}." if near else "Give a path to one.")
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with _importing_from(file.parent.resolve()):
            spec.loader.exec_module(module)
            config = module.get_config()
    except InputError:
        raise
    except Exception as error:
        # A value of a wrong type fails first where its own config compares it: in a __post_init__ that
        # the error passed through. Its type says more than the comparison.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            this = frame.f_locals.get("self")
            if frame.f_code.co_name == "__post_init__" and dataclasses.is_dataclass(this):
                check_types(this, type(this).__name__)
        lines = [at for at in traceback.extract_tb(error.__traceback__) if at.filename == str(file)]
        line = f", line {lines[-1].lineno}" if lines else ""
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"--config {path!r}{line}: {what}{error}") from error
    return _of_kind(config, kind, f"--config {path!r}")


def _of_kind(config: Any, kind: type[Kind], where: str) -> Kind:
    """The config. Raises ``InputError`` if it is not of the kind of run that is asked for."""
    if not isinstance(config, kind):
        raise InputError(f"{where} is a {type(config).__name__}: give a {kind.__name__}.")
    return config


def parse_config(
    arguments: Sequence[str], prog: str, description: str, kind: type[Kind] = VideoRun
) -> Kind:
    """A config of a ``kind`` of run from ``--config FILE`` and dotted overrides.

    Prints a message and exits with 2 if something is wrong, before anything else is done.
    """
    arguments = [part for one in arguments for part in _split_option(one, "--config")]
    try:
        if "--config" in arguments[:-1]:
            at = arguments.index("--config")
            default = load_config(arguments[at + 1], kind)
            del arguments[at : at + 2]
        elif {"-h", "--help"} & set(arguments):
            default = _of_kind(VideoRun(), kind, "the default")
        else:
            raise InputError("--config FILE is required, e.g. --config configs/quickstart.py.")
        return tyro.cli(
            type(default),
            args=arguments,
            default=default,
            prog=f"{prog} --config FILE",
            description=description,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _split_option(argument: str, name: str) -> list[str]:
    """``--name=value`` as two arguments; others as they are."""
    return argument.split("=", 1) if argument.startswith(f"{name}=") else [argument]


def absolute_paths(config: Any) -> Any:
    """The config with absolute paths, as a run stores it: it means the same from any directory.

    ``~`` is expanded and ``gs://`` kept. Which fields are paths each config says (``paths``).

    Raises:
        InputError: for an empty path, one that names no bucket, or one on Cloud Storage without gcsfs.
    """
    if isinstance(config, tuple):
        return tuple(absolute_paths(one) for one in config)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    paths, changes = getattr(config, "paths", ()), {}
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        is_path = field.name in paths and isinstance(value, str)
        new = absolute(value) if is_path else absolute_paths(value)
        if new != value:
            changes[field.name] = new
    return dataclasses.replace(config, **changes) if changes else config


# ---------------------------------------------------------------------------------------------------
# To JSON and back
# ---------------------------------------------------------------------------------------------------

FORMAT = 2
MAX_BYTES = 2**20
"""Of a stored config, which has some kB."""
TYPES = {
    "CodecRun": "dit_jax.codec.run:CodecRun",
    "ShapesConfig": "dit_jax.data.shapes:ShapesConfig",
    "RecordsConfig": "dit_jax.data.records:RecordsConfig",
    "MixtureConfig": "dit_jax.data.mixing:MixtureConfig",
    "ByteEncoderConfig": "dit_jax.model.text:ByteEncoderConfig",
    "TextStatesConfig": "dit_jax.model.text:TextStatesConfig",
}
"""Format 1 named these classes by their bare names."""
RENAMED: dict[str, str] = {
    "diffusion.ceilings": "diffusion.masks",
    "diffusion.masks.free": "diffusion.masks.none",
    "model.dit.band": "model.dit.window",
    "model.dit.dense_every": "model.dit.global_every",
}
"""Dotted names of fields in format 1, and what they are called now."""
REMOVED: dict[str, tuple[Any, ...]] = {
    "model.upscale": (1,),
    "diffusion.augmentation": (0.3,),
    "sampling.augmentation": (0.0,),
    "sampling.cfg_zero_star": (False,),
    "sampling.cfg_zero_init": (0,),
    "data.packing.packer": ("first_fit",),
    "data.transform.max_area": (None,),
    "data.transform.whole_patches": (False,),
    "text_encoder.layer": ("last",),
}
"""Dotted names of fields in format 1 that are gone, and the values of which nothing is lost."""
FIRST_EDITION = "dit_jax 0.1 (commit 57ee8cf)"


@dataclasses.dataclass(frozen=True)
class External:
    """An object of a user's own module, as a stored config knows it."""

    type: str


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __package__


def to_dict(config: Any, declared: Any = None) -> Any:
    """A config as JSON values; see the top of this module. ``declared`` is the type of its field."""
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {name: to_dict(item) for name, item in config.items()}
    if isinstance(config, External):
        return {"type": config.type, "external": True}
    if config is None or isinstance(config, str | int | float):
        return config
    kind = type(config)
    ours = next((one for one in kind.__mro__ if _is_ours(one)), None)
    if ours is None or not dataclasses.is_dataclass(ours):
        return {"type": _class_name(kind), "external": True}
    hints = _field_types(ours)
    fields = {name: to_dict(getattr(config, name), hint) for name, hint in hints.items()}
    tag = {} if ours is declared and ours is kind else {"type": _class_name(ours)}
    if ours is not kind:
        tag["subclass"] = _class_name(kind)
    return ({"format": FORMAT} if isinstance(config, Run) else {}) | tag | fields


def from_dict(kind: Any, values: Any, name: str = "") -> Any:
    """The dataclass that JSON values describe: objects for dataclasses, lists for tuples.

    ``kind`` is the type of the field that holds the values, and ``name`` its dotted name.

    Raises:
        InputError: for unknown fields and values of wrong types, by their dotted names.
    """
    if isinstance(values, dict) and values.get("external"):
        return External(str(values.get("type")))
    own: list[Any] = [one for one in _options(kind) if dataclasses.is_dataclass(one)]
    if isinstance(values, dict) and (own or "type" in values):
        values = {key: value for key, value in values.items() if key not in ("format", "subclass")}
        if "type" in values:
            own = [_named_class(values.pop("type"), own, f"{name}.type" if name else "type")]
        known = _field_types(own[0])
        for field in sorted(set(values) - set(known))[:1]:
            raise InputError(
                f"the stored config has {field!r}, which {own[0].__name__} does not: the run was "
                "made by another version of dit_jax; use that version to read it."
            )
        return own[0](
            **{
                field: from_dict(known[field], value, f"{name}.{field}" if name else field)
                for field, value in values.items()
            }
        )
    if isinstance(values, list):
        kinds = next((one for one in _options(kind) if typing.get_origin(one) is tuple), None)
        if kinds:
            kinds = _item_types(kinds, len(values))
            values = tuple(
                from_dict(kinds[min(i, len(kinds) - 1)], value, f"{name}[{i}]")
                for i, value in enumerate(values)
            )
    elif isinstance(values, dict) and typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        values = {key: from_dict(inner, value, f"{name}.{key}") for key, value in values.items()}
    check_value(values, kind, name or "the config")
    return values


def _named_class(tag: Any, declared: Sequence[Any], name: str) -> Any:
    """The dataclass "module:Class" of ours; of those that the field may hold, if it says which."""
    module, _, title = tag.partition(":") if isinstance(tag, str) else ("", "", "")
    found: Any = None
    if module.startswith(f"{__package__}."):
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(module), title, None)
    base = tuple(declared) or object
    if not (
        isinstance(found, type) and dataclasses.is_dataclass(found) and issubclass(found, base)
    ):
        raise InputError(
            f"{name} is {_repr.repr(tag)}: it is the name of a class of dit_jax, module:Class"
            + (f", such as {', '.join(map(_class_name, declared))}." if declared else ".")
        )
    return found


def stored_config(values: Any, where: str | Path, kind: type[Kind] = VideoRun) -> Kind:
    """The config that was stored in the file ``where`` as these values, of a kind of run."""
    version = "the version that wrote it"
    try:
        if isinstance(values, dict) and "format" not in values:
            version, values = FIRST_EDITION, migrate(values)
        config = from_dict(Run, values)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{str(where)!r} holds no config that this version of dit_jax can use "
            f"({error}): restore the file, or use {version}."
        ) from error
    return _of_kind(config, kind, repr(str(where)))


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """A config of format 1 as one of format 2; what is gone stays, and is refused by its name."""

    def tagged(value: Any) -> Any:
        if isinstance(value, list):
            return [tagged(one) for one in value]
        if not isinstance(value, dict):
            return value
        tag = value.get("type")
        tag = {"type": TYPES.get(tag, tag)} if isinstance(tag, str) else {}
        return {key: tagged(one) for key, one in value.items()} | tag

    values = tagged(values)
    values.setdefault("type", _class_name(VideoRun))
    for field, satellite in (
        ("codec", "dit_jax.codec.config:LatentCodecConfig"),
        ("text_encoder", "dit_jax.text.config:TextEncoderConfig"),
    ):
        if isinstance(part := values.get(field), dict):
            if part.get("path") is not None:
                part["type"] = satellite
            else:
                keep = ("t", "h", "w", "hash")
                values[field] = {key: one for key, one in part.items() if key in keep}
    for name, fine in REMOVED.items():
        inner, last = _inner(values, name)
        if last in inner and inner[last] in fine:
            del inner[last]
    for name, new in RENAMED.items():
        inner, last = _inner(values, name)
        if last in inner:
            value = inner.pop(last)
            inner, last = _inner(values, new)
            inner[last] = value
    return values


def _inner(values: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The object that holds the field of a dotted name, and the field's own."""
    *way, last = name.split(".")
    for part in way:
        values = values.get(part) or {}
    return values, last


def read_config(path: str | Path, kind: type[Kind] = VideoRun) -> Kind:
    """The config that was stored in a file, local or on Cloud Storage, of a kind of run."""
    try:
        values = json.loads(read_bytes(path, MAX_BYTES, "the config"))
    except (RecursionError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} cannot be read as JSON ({error}): restore it (every checkpoint has a copy, "
            "in checkpoints/STEP/config/metadata)."
        ) from error
    return stored_config(values, path, kind)


def differences(now: Any, before: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields, by their dotted names, in which two configs are not the same, and both values."""
    if isinstance(now, Run):
        now, before = to_dict(now), to_dict(before)
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        if all(isinstance(one, dict) for one in now + before):
            now, before = dict(enumerate(now)), dict(enumerate(before))
    if isinstance(now, dict) and isinstance(before, dict):
        for key in sorted(now | before):
            # A stored config was read as one of ours, whatever subclass of it made it.
            if key != "subclass":
                inner = f"{name}.{key}" if name else str(key)
                yield from differences(now.get(key), before.get(key), inner)
    elif now != before:
        yield name, now, before


# ---------------------------------------------------------------------------------------------------
# The values of fields, checked against their types: Python itself checks none
# ---------------------------------------------------------------------------------------------------
# A config file is Python and a stored config is JSON, so steps=1e1 or scan="False" would be noticed
# late or never. The command line is read by tyro, which takes nan for a float.

_repr = reprlib.Repr()  # Cut: values may be large or deeply nested.
_repr.maxstring = _repr.maxother = 200
SCALARS = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "text in quotes",
    types.NoneType: "None",
}


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _options(hint: Any) -> tuple[Any, ...]:
    """What a union may be; the type itself if it is none."""
    if typing.get_origin(hint) is typing.Annotated:
        bounds = any(isinstance(one, Range) for one in typing.get_args(hint))
        return (hint,) if bounds else _options(typing.get_args(hint)[0])
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _item_types(hint: Any, count: int) -> tuple[Any, ...]:
    """The types of the items of a tuple that has ``count`` of them."""
    args = typing.get_args(hint)
    return args[:1] * count if args[-1] is Ellipsis else args


def _describe(hint: Any) -> str:
    """What a type takes, for readers of an error."""
    args, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is tuple:
        inner = dict.fromkeys(_describe(one) for one in args if one is not Ellipsis)
        count = "any number" if args[-1] is Ellipsis else str(len(args))
        return f"a tuple of {count}, each {' or '.join(inner)}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is typing.Annotated:
        return str(next((one for one in args if isinstance(one, Range)), _describe(args[0])))
    if len(_options(hint)) > 1:
        return ", or ".join(_describe(one) for one in _options(hint))
    return SCALARS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


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
        # NaN compares false, and a whole number of any size can be compared.
        return (_is(value, int) or isinstance(value, float)) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        # Surrogates stand for bytes that are no UTF-8, and could not be stored.
        return isinstance(value, str) and value == value.encode(errors="ignore").decode()
    if origin is tuple:
        return isinstance(value, tuple) and len(_item_types(hint, len(value))) == len(value)
    return isinstance(value, origin or hint)


def check_value(value: Any, hint: Any, name: str) -> None:
    """Raises ``InputError`` if a value, or one inside it, is not of its type, or out of its range.

    A whole number may stand for a float. ``name`` is the dotted name of the field that holds it.
    """
    own = next((one for one in _options(hint) if _is(value, one)), None)
    if own is None:
        choices = [str(one) for kind in _options(hint) for one in typing.get_args(kind)]
        near = isinstance(value, str) and difflib.get_close_matches(value, choices, 1, 0.5)
        raise InputError(
            f"{name} is {_repr.repr(value)}: it is {_describe(hint)}."
            + (f" Perhaps {near[0]!r} was meant." if near else "")
        )
    if typing.get_origin(own) is tuple:
        for i, (item, kind) in enumerate(zip(value, _item_types(own, len(value)), strict=True)):
            check_value(item, kind, f"{name}[{i}]")
    if isinstance(value, dict):
        for key, item in value.items():
            check_value(item, (*typing.get_args(own), Any, Any)[1], f"{name}.{key}")
    if dataclasses.is_dataclass(value):
        check_types(value, name)


def check_types(config: Any, name: str = "") -> None:
    """Raises ``InputError`` for a field, however deep, whose value is not of its type, or not finite.

    Call it where a user's values enter: on a config or on the arguments of a command. ``name`` is the
    dotted name of the config itself.
    """
    for field, hint in _field_types(type(config)).items():
        check_value(getattr(config, field), hint, f"{name}.{field}" if name else field)
