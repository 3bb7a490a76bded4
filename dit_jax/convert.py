"""``python -m dit_jax.convert --input FILE --output RUN --to run``: published weights in and out.

Reads files of transformers as their authors store them, folders as Diffusers does, our own folders of
codecs, and runs, and writes each of them (docs/convert.md); which models, ``interop.registry`` says.
Everything is checked before the weights are read, and pickles are never run. One process does it, with
all of its devices.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
import tyro

from dit_jax import interop
from dit_jax.config import CodecConfig, Run, VideoRun, check_types, stored_config, to_dict
from dit_jax.files import (
    absolute,
    as_path,
    atomic_path,
    check_exists,
    check_writable,
    is_remote,
    local_copy,
    refuse_if,
    run_verb,
    write_json,
)
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling.pipeline import check_finite
from dit_jax.training import CheckpointConfig, Checkpointer, abstract_params, open_run
from dit_jax.training.video_task import init_params, make_model
from dit_jax.types import Params

PROG = "python -m dit_jax.convert"
FILES = (".pt", ".pth", ".bin", ".safetensors")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class ConvertArguments:
    """Converts weights between runs, the authors' files and Diffusers' folders."""

    input: str
    """A file of a transformer's authors (.pt, .pth, .safetensors), a folder of Diffusers' with a
    config.json, or that of a whole pipeline, the folder of a codec, or the directory of a run."""
    output: str
    """What to write; it must not be there yet."""
    to: Literal["run", "safetensors", "diffusers", "codec"]
    """run: a directory that ``python -m dit_jax.sample`` opens, or of a codec one that
    ``checkpoint.initial`` names, to fine-tune it. safetensors: a file with the authors'
    keys. diffusers: a folder with config.json and safetensors. codec: our own folder of an
    autoencoder of video."""
    family: Literal["dit", "sit"] = "dit"
    """Whose file it is, where the file does not say: SiT's look like DiT's."""
    heads: int | None = None
    """Attention heads of the authors' file, where its size is no published one."""
    time_divisor: int = 128
    """Of the rates in which noise levels are told, for a run (``DiTConfig.time_divisor``): 127 computes
    what Diffusers' class does, and not DiT's authors."""
    part: str | None = None
    """Which weights of the authors' training checkpoint: ema (unset) or model."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of what is written to files and folders; runs are float32."""
    old_names: bool = False
    """Write an autoencoder's attention by its names of before Diffusers 0.16."""
    codec: str | None = None
    """Folder of the autoencoder whose latents the model makes, for a run to name. Unset, the run has
    none, and its latents are taken to be an eighth of a picture's side (pixels, where channels are 3);
    ``python -m dit_jax.sample`` takes one with --codec."""
    step: int | None = None
    """Of a run's checkpoint; the newest if unset."""
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)
    """How weights are spread over devices while they pass through."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts what the command line says; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = tyro.cli(
        ConvertArguments, args=arguments, prog=PROG, config=(tyro.conf.FlagCreatePairsOff,)
    )
    logging.getLogger("absl").setLevel(logging.ERROR)

    def work() -> None:
        check_types(given)
        print(convert(given))

    return run_verb(PROG, work)


def convert(given: ConvertArguments) -> str:
    """Writes the output; returns a line that says what it holds. If anything given is wrong, nothing
    is written."""
    source, target = check_exists(given.input, "--input"), as_path(given.output)
    check_target(target, given.to)
    if (source / "checkpoints").is_dir():
        return _from_run(given, source, target)
    source = local_copy(source)
    if source.is_dir() and _class(source) in interop.CODECS:
        return _codec(given, source, target)
    return _from_published(given, source, target)


def check_target(target: Path, kind: str) -> None:
    """Refuses an output that is there already, or that could not be written."""
    check_writable(target.parent)
    shown, file = f"--output {str(target)!r}", kind == "safetensors"
    refuse_if(
        [
            (target.exists(), f"{shown} exists: move it away, or name another."),
            (
                file and target.suffix != ".safetensors",
                f"{shown} is to be a file that ends in .safetensors.",
            ),
            (
                not file and target.suffix in FILES,
                f"{shown} is to be a folder, and looks like a file.",
            ),
        ]
    )


def _from_published(given: ConvertArguments, source: Path, target: Path) -> str:
    """A file of authors', a folder of Diffusers', or that of a pipeline: keys and shapes are checked
    before weights are read."""
    folder = source.is_dir() and not (source / "config.json").exists()
    pipeline = interop.pipeline_of(source, absolute(given.input)) if folder else None
    pipeline = pipeline or interop.Pipeline({"": source})
    _check_no_codec(given)
    folders = [path.name for path in pipeline.transformers.values()]
    message = (
        f"--input {given.input!r} has the transformers {', '.join(folders)}: give the folder of one "
        f"for --to {given.to}."
    )
    refuse_if([(len(folders) > 1 and given.to != "run", message)])
    parts = {name: _read(given, part) for name, part in pipeline.transformers.items()}
    file, table, arrays, where = parts[""]
    if given.to != "run":
        return _write_published(given, file, table.read(arrays, where), target)
    codec = find_codec(given.codec or pipeline.codec, file.model.patch.channels, file.strides)
    configs = {}
    for name, (one, *_) in parts.items():
        own = one.run(absolute(as_path(given.output) / name), codec, given.time_divisor)
        configs[name] = pipeline.configure(name, own)

    def write(path: Path) -> None:
        for name, (_, table, arrays, where) in parts.items():
            params = table.load(arrays, where, *_abstract(configs[name], given.mesh))
            write_run(path / name, configs[name], params)

    _write(target, write, run=True)
    return f"{file}: a run in {target}/"


def _read(given: ConvertArguments, source: Path) -> tuple[Any, interop.Map, Any, str]:
    """What a file or folder of weights is, its table, its arrays, which the table can read, and their
    file in messages."""
    where, kind = repr(str(source)), "safetensors"
    if source.is_dir():
        values, named = interop.read_config(source), repr(str(source / "config.json"))
        tools = interop.transformer_of_class(values.get("_class_name"), named)
        arrays, path = interop.read_weights(source)
        file, kind = tools.from_folder(values, named, given.family, arrays)
        where = repr(str(path))
    else:
        unknown = (
            f"--input {where} is not a file of weights ({', '.join(FILES)}), a folder of Diffusers' "
            "with a config.json, or a run with a folder 'checkpoints'."
        )
        refuse_if([(source.suffix not in FILES, unknown)])
        arrays = interop.read_arrays(source)
        tools = interop.transformer_of_keys(arrays, where)
        file, arrays = tools.from_arrays(arrays, given.family, given.heads, given.part)
    table = file.table(kind)
    table.check(table.named(arrays), where)
    return file, table, arrays, where


def _from_run(given: ConvertArguments, source: Path, target: Path) -> str:
    """A run as a published file or folder."""
    again = f"--input {given.input!r} is a run already: copy it."
    refuse_if([(given.to == "run", again)])
    checkpointer, step = open_run(source, given.step)
    where = checkpointer.path(step) / "config"
    config = stored_config(checkpointer.config(step), where, Run)
    if not isinstance(config, VideoRun):  # The other kind of run is a codec's.
        message = (
            f"--step is {given.step}, and the run is of a codec, which is whole at its end alone, when "
            "its latents' shift and scale are measured: leave --step out."
        )
        refuse_if([(given.step is not None, message)])
        return _codec(given, interop.codec_tools().finished_codec(source), target)
    _check_no_codec(given)
    file = interop.transformer_of_run(config, given.to)
    params = checkpointer.restore_ema(step, *_abstract(config, given.mesh))
    checkpointer.close()
    check_finite(params, str(checkpointer.path(step)))
    return _write_published(given, file, params, target)


def _write_published(given: ConvertArguments, file: Any, params: Params, target: Path) -> str:
    written = file.table(given.to).export(params, DTYPES[given.dtype])
    if given.to == "safetensors":
        _write(target, lambda path: interop.write_safetensors(path, written))
    else:
        values = file.config_json()
        _write(target, lambda path: interop.write_folder(path, values, written))
    return f"{file}: {len(written)} arrays in {target}"


def find_codec(
    path: str | None, channels: int, strides: tuple[int, int, int] = (1, 8, 8)
) -> CodecConfig:
    """The strides of the latents, by themselves or with the folder that they are known from."""
    tools = interop.codec_tools()
    if path is None:
        t, h, w = strides
        return tools.LatentCodecConfig(t=t, h=h, w=w)
    found, _ = tools.codec_config(local_copy(path))
    message = (
        f"--codec {path!r} has latents of {found.latent_channels} channels, and the model makes "
        f"{channels}: give the autoencoder that it was trained with."
    )
    refuse_if([(found.latent_channels != channels, message)])
    t, h, w = found.stride
    config = tools.LatentCodecConfig(path=absolute(path), t=t, h=h, w=w)
    return dataclasses.replace(config, hash=config.weights_hash())


def _abstract(config: VideoRun, mesh_config: MeshConfig) -> tuple[Params, Params]:
    """Shapes and shardings of the parameters of a run's model."""
    mesh = make_mesh(mesh_config)
    model = make_model(config.model, mesh)
    return abstract_params(partial(init_params, model), mesh)


def _codec(given: ConvertArguments, folder: Path, target: Path) -> str:
    """A folder of a codec, read and written again."""
    message = (
        f"--input {given.input!r} is a codec, and --to safetensors is of transformers: --to diffusers "
        "writes it again."
    )
    refuse_if([(given.to == "safetensors", message)])
    codec = interop.codec_tools(_class(folder)).read_codec_folder(folder)
    dtype = DTYPES[given.dtype]
    if given.to == "run":
        config, params = codec.as_run(absolute(given.output))
        _write(target, lambda path: write_run(path, config, params), run=True)
    elif given.to == "codec":
        _write(target, lambda path: codec.write_codec(path, dtype))
    else:
        _write(target, lambda path: codec.write_diffusers(path, dtype, given.old_names))
    count = sum(leaf.size for leaf in jax.tree.leaves(codec.params))
    return f"{codec.name} of {count / 1e6:.1f} M parameters: {given.to} in {target}/"


def _check_no_codec(given: ConvertArguments) -> None:
    message = (
        f"--input {given.input!r} is no codec, and --to is 'codec': give the folder of one, or --to "
        "run, safetensors or diffusers."
    )
    refuse_if([(given.to == "codec", message)])


def write_run(target: Path, config: Run, params: Params) -> None:
    """A run of no steps that has these averaged parameters."""
    values = to_dict(config)
    checkpointer = Checkpointer(target, CheckpointConfig())
    checkpointer.save_weights(params, values)
    checkpointer.wait()
    checkpointer.close()
    write_json(target / "config.json", values)


def _class(folder: Path) -> Any:
    """The class that a folder's ``config.json`` names, if there is one."""
    if not (folder / "config.json").exists():
        return None
    return interop.read_config(folder).get("_class_name")


def _write(target: Path, write: Callable[[Path], Any], run: bool = False) -> None:
    """Writes a file or folder whole; a run on Cloud Storage in place, where Orbax marks what is."""
    if run and is_remote(target):
        write(target)
        return
    with atomic_path(target) as path:
        write(path)


if __name__ == "__main__":
    raise SystemExit(main())
