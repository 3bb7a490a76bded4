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
import inspect
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

from dit_jax.data import PackingConfig, ShapesConfig, TransformConfig
from dit_jax.diffusion import DiffusionConfig
from dit_jax.files import InputError, absolute, local_copy, read_bytes
from dit_jax.model import ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.parallel import AttentionConfig, MeshConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import CheckpointConfig, ClipsEvaluator, HeldOutLoss, OptimizerConfig, Task
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
    """What a run logs and pictures."""

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
    """What is measured while it trains and at its end: objects with a method ``build(parts) ->
    Evaluator``, of any module (``dit_jax.training.task``; on the command line by their places)."""

    def __post_init__(self) -> None:
        check_types(self)
        for wrong, message in self.constraints():
            if wrong:
                raise InputError(message)

    def constraints(self) -> Iterator[tuple[bool, str]]:
        """What must not be true of the fields together, and the message if it is; in order: the checks
        behind one that fails are not evaluated."""
        parts = self.optimizer.accumulate
        yield (
            self.rows % parts > 0,
            f"{self.ROWS} {self.rows} does not divide into optimizer.accumulate {parts} parts: make "
            "rows a multiple of it.",
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
    """Whether records that cannot be packed, read or trained on are left out, counted and named, or the
    run is refused before it begins (as far as the sizes in the data's metadata tell)."""
    max_bad_records: NonNegativeInt = 1000
    """Records that may be left out in the middle of a run, besides those known before it."""
    eval_split: str | None = None
    """For recorded data: the split that is held out; its captions are the prompts of pictures and
    reports, its clips the truth. Unset, these are of the training data."""


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
        """Latent frames, rows and columns of so many frames of so many pixels."""
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

    def with_hashes(self) -> VideoRun:
        """See ``Run.with_hashes``: of its codec and its text encoder."""
        from dit_jax.training.video_task import with_hashes  # It imports this module.

        return with_hashes(self)

    def build(self, mesh: Mesh) -> Task:
        from dit_jax.training.video_task import build_text_to_video  # It imports this module.

        return build_text_to_video(self, mesh)

    def constraints(self) -> Iterator[tuple[bool, str]]:
        yield from super().constraints()
        packing, model, sampling = self.data.packing, self.model, self.sampling
        channels, source = model.patch.channels, self.data.source
        latents = channels != PixelCodec.channels and self.codec.path is None
        yield (
            model.text.max_tokens > packing.row_text,
            f"data.packing.row_text {packing.row_text} is smaller than one caption of "
            f"{model.text.max_tokens} tokens: raise it, or lower the limit in model.text.",
        )
        sampling.check(self.diffusion, channels)
        size = (sampling.frames, sampling.height, sampling.width)
        try:
            model.patch.grid(*self.codec.latent_size(*size))
        except ValueError as error:
            sizes = ", ".join(map(str, size))
            yield True, f"sampling.frames, height, width = {sizes} do not fit the patches: {error}"
        if isinstance(source, ShapesConfig):
            yield (
                latents,
                f"model.patch.channels is {channels}: moving shapes have 3 (pixels). Give codec.path, "
                "a codec whose latents have so many.",
            )
            clips = [(frames, h, w) for frames in source.frames for h, w in source.sizes]
            images = [(1, h, w) for h, w in source.image_sizes] if source.image_fraction else []
            for t, h, w in clips + images:
                count = model.patch.num_tokens(*self.codec.latent_size(t, h, w))
                yield (
                    count > packing.row_tokens,
                    f"data.packing.row_tokens {packing.row_tokens} is smaller than one clip: {t} x "
                    f"{h} x {w} has {count} tokens. Raise it to at least {count}, or use larger "
                    "patches.",
                )
        yield (
            latents and bool(self.log.draw_every or any(map(_draws, self.evaluators))),
            f"model.patch.channels is {channels}: these are latents, which cannot be drawn as pictures "
            "without codec.path. Give it, or set log.draw_every to 0, and the prompts of evaluators.",
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


def _draws(evaluator: Any) -> bool:
    """Whether an evaluator needs clips of pixels."""
    return isinstance(evaluator, ClipsEvaluator) and evaluator.prompts > 0


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
    """The config that the file's ``get_config()`` builds, for a kind of run; errors name the line."""
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
    """A config of a ``kind`` of run from ``--config FILE`` and dotted overrides; prints a message and
    exits with 2 if something is wrong, before anything else is done."""
    arguments = [
        part
        for one in arguments  # --config=FILE is --config FILE
        for part in (one.split("=", 1) if one.startswith("--config=") else [one])
    ]
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


def absolute_paths(config: Any) -> Any:
    """The config with absolute paths, as a run stores it: it means the same from any directory.

    ``~`` is expanded and ``gs://`` kept. Which fields are paths each config says (``paths``).
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
    "evaluation.records_split": "data.eval_split",
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
SATELLITES = {
    "codec": "dit_jax.codec.config:LatentCodecConfig",
    "text_encoder": "dit_jax.text.config:TextEncoderConfig",
}
EVALUATORS = "dit_jax.evaluate.evaluators"
FIRST_EDITION = "dit_jax 0.1 (commit 57ee8cf)"


@dataclasses.dataclass(frozen=True)
class External:
    """An object of a user's own module, as a stored config knows it."""

    type: str


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


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
    ours = next((one for one in kind.__mro__ if one.__module__.split(".")[0] == __package__), None)
    # An abstract base (Conditioner) could not be made again from its fields.
    if ours is None or not dataclasses.is_dataclass(ours) or inspect.isabstract(ours):
        return {"type": _class_name(kind), "external": True}
    hints = _field_types(ours)
    fields = {name: to_dict(getattr(config, name), hint) for name, hint in hints.items()}
    tag = {} if ours is declared and ours is kind else {"type": _class_name(ours)}
    if ours is not kind:
        tag["subclass"] = _class_name(kind)
    return ({"format": FORMAT} if isinstance(config, Run) else {}) | tag | fields


def from_dict(kind: Any, values: Any) -> Any:
    """The dataclass that JSON values describe: objects for dataclasses, lists for tuples."""
    return _walk(values, kind, "", stored=True)


def _named_class(tag: Any, declared: Sequence[Any], name: str) -> Any:
    """The dataclass "module:Class" of ours; of those that the field may hold, if it says which."""
    module, _, title = tag.partition(":") if isinstance(tag, str) else ("", "", "")
    kind: Any = None
    if module.startswith(f"{__package__}."):
        with contextlib.suppress(ImportError):
            kind = getattr(importlib.import_module(module), title, None)
    fits = isinstance(kind, type) and issubclass(kind, tuple(declared) or object)
    if not (fits and dataclasses.is_dataclass(kind)):
        raise InputError(
            f"{name} is {_repr.repr(tag)}: it is the name of a class of dit_jax, module:Class"
            + (f", such as {', '.join(map(_class_name, declared))}." if declared else ".")
        )
    return kind


def stored_config(values: Any, where: str | Path, kind: type[Kind] = VideoRun) -> Kind:
    """The config that was stored in the file ``where`` as these values."""
    version = "the version that wrote it"
    try:
        if isinstance(values, dict) and "format" not in values:
            version, values = FIRST_EDITION, migrate(values)
        config = from_dict(Run, values)
    except (AttributeError, TypeError, ValueError) as error:
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

    def holder(name: str) -> tuple[dict[str, Any], str]:
        """The object that holds the field of a dotted name, and the field's own."""
        *way, last = name.split(".")
        inner = values
        for part in way:
            inner = inner.get(part) or {}
        return inner, last

    values = {"type": _class_name(VideoRun)} | tagged(values)
    if values["type"] != _class_name(VideoRun):
        return values
    for name, fine in REMOVED.items():
        inner, last = holder(name)
        if last in inner and inner[last] in fine:
            del inner[last]
    for name, new in RENAMED.items():
        inner, last = holder(name)
        if last in inner:
            value = inner.pop(last)
            inner, last = holder(new)
            inner[last] = value
    # One class had the folder of weights and what is known without them.
    for field, satellite in SATELLITES.items():
        if isinstance(part := values.get(field), dict) and part.get("path") is not None:
            part["type"] = satellite
        elif isinstance(part, dict):
            for one in ("path", "tiles"):
                part.pop(one, None)
    # What was measured at the end followed from the data; now evaluators say it.
    if isinstance(old := values.pop("evaluation", None), dict):
        data, prompts = values.get("data") or {}, {"prompts": old.get("prompts", 96)}
        shapes = (data.get("source") or {}).get("type") == TYPES["ShapesConfig"]
        values["evaluators"] = [{"type": _class_name(HeldOutLoss)}]
        if (split := old.get("classifier_split")) is not None:
            one = {"type": f"{EVALUATORS}:ClassEvaluator", **prompts, "split": split}
            values["evaluators"].append(one)
        elif shapes or data.get("eval_split") is not None:
            kind = "ShapeEvaluator" if shapes else "RecordsEvaluator"
            values["evaluators"].append({"type": f"{EVALUATORS}:{kind}", **prompts})
    return values


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


def check_types(config: Any, name: str = "") -> None:
    """Raises ``InputError`` for a field, however deep, whose value is not of its type or in its range.
    Call it where a user's values enter: on a config or on the arguments of a command."""
    for field, hint in _field_types(type(config)).items():
        _walk(getattr(config, field), hint, f"{name}.{field}" if name else field)


def _walk(value: Any, hint: Any, name: str, stored: bool = False) -> Any:
    """A value of the field ``name``, checked against its type with all that is inside it; a stored one
    is converted on the way."""
    prefix = f"{name}." if name else ""
    if stored and isinstance(value, dict):
        if value.get("external"):
            return External(str(value.get("type")))
        own: list[Any] = [one for one in _options(hint) if dataclasses.is_dataclass(one)]
        if own or "type" in value:
            kind = _named_class(value["type"], own, f"{prefix}type") if "type" in value else own[0]
            inner = {k: v for k, v in value.items() if k not in ("format", "type", "subclass")}
            hints = _field_types(kind)
            for field in sorted(set(inner) - set(hints))[:1]:
                raise InputError(
                    f"the stored config has {field!r}, which {kind.__name__} does not: the run was "
                    "made by another version of dit_jax; use that version to read it."
                )
            return kind(**{k: _walk(v, hints[k], prefix + k, stored) for k, v in inner.items()})
    if stored and isinstance(value, list):
        value = tuple(value)

    option = next((one for one in _options(hint) if _is(value, one)), None)
    if option is None:
        choices = [str(one) for kind in _options(hint) for one in typing.get_args(kind)]
        near = isinstance(value, str) and difflib.get_close_matches(value, choices, 1, 0.5)
        raise InputError(
            f"{name or 'the config'} is {_repr.repr(value)}: it is {_describe(hint)}."
            + (f" Perhaps {near[0]!r} was meant." if near else "")
        )
    if typing.get_origin(option) is tuple:
        kinds = enumerate(zip(value, _item_types(option, len(value)), strict=True))
        return tuple(_walk(item, kind, f"{name}[{i}]", stored) for i, (item, kind) in kinds)
    if isinstance(value, dict):
        kind = (*typing.get_args(option), Any, Any)[1]
        return {key: _walk(item, kind, f"{prefix}{key}", stored) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        check_types(value, name)
    return value


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


def _item_types(hint: Any, count: int) -> tuple[Any, ...]:
    """The types of the items of a tuple that has ``count`` of them."""
    args = typing.get_args(hint)
    return args[:1] * count if args[-1] is Ellipsis else args


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
    if hint is str:
        # Surrogates stand for bytes that are no UTF-8, and could not be stored.
        return isinstance(value, str) and value == value.encode(errors="ignore").decode()
    if origin is tuple:
        return isinstance(value, tuple) and len(_item_types(hint, len(value))) == len(value)
    return isinstance(value, origin or hint)


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
