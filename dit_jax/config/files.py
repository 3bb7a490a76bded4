"""Configs in files: written in Python, overridden on the command line, stored as JSON.

A file of ``configs/`` builds a config in its function ``get_config``; the command line overrides any
field by its dotted name (``--optimizer.learning-rate 3e-4``), with ``tyro`` refusing unknown names and
wrong types. A config is stored with every checkpoint as JSON and read back from there.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

from dit_jax.checks import check_types, culprits, from_dict
from dit_jax.config.run import Run
from dit_jax.config.text_to_video import Config
from dit_jax.data import MixtureConfig, RecordsConfig, ShapesConfig
from dit_jax.files import InputError, absolute, as_path, local_copy, read_bytes
from dit_jax.model import ByteEncoderConfig, ClassLabelsConfig, TextStatesConfig

CHOICES = (
    ShapesConfig,
    RecordsConfig,
    MixtureConfig,
    ByteEncoderConfig,
    TextStatesConfig,
    ClassLabelsConfig,
)
"""Dataclasses that stand where another may stand: stored with their name."""
MAX_BYTES = 2**20
"""Of a stored config, which has some kB."""
Kind = TypeVar("Kind", bound=Run)


def _codec_run() -> type[Run]:
    """The config of a codec's run, which builds on the others: not imported before it is asked for."""
    return importlib.import_module("dit_jax.codec.run").CodecRun


def _check_kind(config: Run, kind: type[Kind], where: str) -> Kind:
    """Raises ``InputError`` if a config is of another kind of run than is wanted."""
    if not isinstance(config, kind):
        said = "a codec (CodecRun)" if isinstance(config, _codec_run()) else "a model (Config)"
        wanted = "a codec (CodecRun)" if issubclass(kind, _codec_run()) else "a model (Config)"
        raise InputError(f"{where} is of a run of {said}: give one of {wanted}.")
    return config


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """A config may be built from another that lies beside it: ``from video_1b3 import ...``.

    So its neighbours' names are theirs while it is read, and no longer: other modules may have them.
    """
    names = {file.stem for file in folder.glob("*.py")} - sys.stdlib_module_names
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.pop(0)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def load_config(path: str, kind: type[Kind] = Config) -> Kind:
    """The config that the file's ``get_config()`` builds, for a kind of run.

    Raises:
        InputError: if the file is absent, no such file, or fails; the message names the line.
    """
    file = local_copy(path)
    if not file.is_file():
        near = sorted(str(p) for p in Path("configs").glob("*.py"))
        raise InputError(
            f"--config {path!r} is not a file. "
            + (f"In configs/ there are: {', '.join(near)}." if near else "Give a path to one.")
        )
    spec = importlib.util.spec_from_file_location(f"dit_jax_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--config {path!r} is not a Python file: give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with _importing_from(file.parent.resolve()):
            spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise InputError(f"{path} has no function get_config() that returns a Config: add one.")
        config = module.get_config()
    except InputError:
        raise
    except Exception as error:
        # A value of a wrong type fails first where its own config compares it.
        for part in culprits(error):
            check_types(part, type(part).__name__)
        lines = [at for at in traceback.extract_tb(error.__traceback__) if at.filename == str(file)]
        line = f", line {lines[-1].lineno}" if lines else ""
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"--config {path!r}{line}: {what}{error}") from error
    if not isinstance(config, Run):
        raise InputError(f"get_config() of {path} returned {type(config).__name__}, not a Config.")
    return _check_kind(config, kind, f"--config {path!r}")


def parse_config(
    arguments: Sequence[str], prog: str, description: str, kind: type[Kind] = Config
) -> Kind:
    """A config of a ``kind`` of run from ``--config FILE`` and dotted overrides.

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
            default = load_config(arguments[at + 1], kind)
            del arguments[at : at + 2]
        elif {"-h", "--help"} & set(arguments):
            default = _check_kind(Config(), kind, "the default")
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


def to_dict(config: Any) -> Any:
    """A config as JSON values; a choice between dataclasses is named by ``type``."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        tag = (
            {"type": type(config).__name__} if isinstance(config, (*CHOICES, _codec_run())) else {}
        )
        return tag | fields
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return config


def stored_config(values: Any, where: str | Path, kind: type[Kind] = Config) -> Kind:
    """The config that was stored in the file ``where`` as these values, of a kind of run."""
    try:
        of_codec = isinstance(values, dict) and values.get("type") == "CodecRun"
        config = from_dict(_codec_run() if of_codec else Config, values)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{str(where)!r} holds no config that this version of dit_jax can use "
            f"({error}): restore the file, or use the version that wrote it."
        ) from error
    return _check_kind(config, kind, repr(str(where)))


def read_config(path: str | Path, kind: type[Kind] = Config) -> Kind:
    """The config that was stored in a file, local or on Cloud Storage, of a kind of run."""
    try:
        values = json.loads(read_bytes(path, MAX_BYTES, "the config"))
    except (RecursionError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} cannot be read as JSON ({error}): restore it (every checkpoint has a copy, "
            "in checkpoints/STEP/config/metadata)."
        ) from error
    return stored_config(values, path, kind)


def _is_directory(path: str) -> bool:
    return bool(path) and as_path(path).is_dir()


def absolute_paths(config: Kind) -> Kind:
    """The config with absolute paths, as a run stores it: it means the same from any directory.

    ``~`` is expanded and ``gs://`` kept. ``data.source.path`` is only a path if it is a directory;
    otherwise it is the name of a TFDS data set and stays as it is.

    Raises:
        InputError: for an empty path, one that names no bucket, or one on Cloud Storage without gcsfs.
    """

    def place(part: Any, *names: str) -> Any:
        values = {name: getattr(part, name) for name in names}
        return replace(part, **{k: absolute(v) for k, v in values.items() if v is not None})

    def records(source: Any) -> Any:
        if isinstance(source, MixtureConfig):
            return replace(source, sets=tuple(records(one) for one in source.sets))
        if isinstance(source, RecordsConfig):
            names = ("path", "data_dir") if _is_directory(source.path) else ("data_dir",)
            return place(source, *names)
        return source

    of_codec = isinstance(config, _codec_run())
    run: Any = replace(place(config, "output"), checkpoint=place(config.checkpoint, "initial"))
    run = replace(run, data=replace(run.data, source=records(run.data.source)))
    if of_codec:
        return replace(run, loss=place(run.loss, "vgg", "lpips"))
    encoder = place(run.text_encoder, "path")
    return replace(run, codec=place(run.codec, "path"), text_encoder=encoder)


def _holds_dicts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def differences(now: Any, before: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields, by their dotted names, in which two configs are not the same, and both values."""
    if isinstance(now, dict) and isinstance(before, dict):
        for key in sorted(now | before):
            inner = f"{name}.{key}" if name else key
            yield from differences(now.get(key), before.get(key), inner)
    elif dataclasses.is_dataclass(now):
        yield from differences(to_dict(now), to_dict(before), name)
    elif _holds_dicts(now) and _holds_dicts(before) and len(now) == len(before):
        for i, (one, other) in enumerate(zip(now, before, strict=True)):
            yield from differences(one, other, f"{name}.{i}")
    elif now != before:
        yield name, now, before
