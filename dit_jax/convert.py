"""``python -m dit_jax.convert --input FILE --output RUN --to run``: published weights in and out.

Reads facebookresearch's DiT and SiT files, Diffusers' folders of ``DiTTransformer2DModel``,
``AutoencoderKL`` and ``AutoencoderKLWan``, our own folders of codecs, and runs, and writes each of them
(docs/convert.md).
Everything is checked before the weights are read, and pickles are never run. One process does it, with
all of its devices.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
import tyro

from dit_jax import interop
from dit_jax.config import (
    CodecConfig,
    DataConfig,
    LogConfig,
    Run,
    VideoRun,
    check_types,
    stored_config,
    to_dict,
)
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.diffusion import DiffusionConfig, MaskConfig, PathConfig, TimeConfig
from dit_jax.files import (
    absolute,
    as_path,
    atomic_path,
    check_exists,
    check_writable,
    is_remote,
    local_copy,
    run_verb,
    write_json,
)
from dit_jax.interop import DiTFile, Map
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling import SamplingConfig
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
    """A file of DiT's or SiT's authors (.pt, .safetensors), a folder of Diffusers' with a
    config.json, the folder of a codec, or the directory of a run."""
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


@dataclasses.dataclass(frozen=True)
class Source:
    """A published model: what it is, and its arrays by key, mapped from its file."""

    file: DiTFile
    table: Map
    arrays: Mapping[str, np.ndarray]
    where: str


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
    """Writes the output; returns a line that says what it holds.

    Raises:
        ValueError: where anything given is wrong; nothing is written then.
    """
    source, target = check_exists(given.input, "--input"), as_path(given.output)
    check_target(target, given.to)
    if (source / "checkpoints").is_dir():
        return _from_run(given, source, target)
    source = local_copy(source)
    if source.is_dir() and _class(source) in interop.CODECS:
        return _codec(given, source, target)
    published = open_published(given, source)
    _check_no_codec(given)
    if given.to == "run":
        return _to_run(given, published, target)
    params = published.table.read(published.arrays, published.where)
    return _to_published(given, published.file, params, target)


def check_target(target: Path, kind: str) -> None:
    """Raises ``ValueError`` where the output is there already, or could not be written."""
    check_writable(target.parent)
    if target.exists():
        raise ValueError(f"--output {str(target)!r} exists: move it away, or name another.")
    if kind == "safetensors" and target.suffix != ".safetensors":
        raise ValueError(f"--output {str(target)!r} is to be a file that ends in .safetensors.")
    if kind != "safetensors" and target.suffix in FILES:
        raise ValueError(f"--output {str(target)!r} is to be a folder, and looks like a file.")


def open_published(given: ConvertArguments, source: Path) -> Source:
    """The transformer in a file or folder; its keys and shapes are checked when it is read.

    Raises:
        ValueError: where it is none that is known.
    """
    if source.is_dir():
        if not (source / "config.json").exists() and (source / "transformer").is_dir():
            source = source / "transformer"
        config = interop.read_config(source)
        file = interop.from_diffusers(config, repr(str(source / "config.json")))
        file = dataclasses.replace(
            file, family=given.family, model=interop.with_clock(file.model, given.family)
        )
        arrays, path = interop.read_weights(source)
        return Source(file, interop.diffusers_map(file), arrays, repr(str(path)))
    if source.suffix not in FILES:
        raise ValueError(
            f"--input {str(source)!r} is not a file of weights ({', '.join(FILES)}), a folder of "
            "Diffusers' with a config.json, or a run with a folder 'checkpoints'."
        )
    reads = interop.read_safetensors if source.suffix == ".safetensors" else interop.read_torch
    arrays = interop.pick_weights(reads(source), given.part)
    file = interop.infer_dit(arrays, given.family, given.heads)
    return Source(file, interop.dit_map(file), arrays, repr(str(source)))


def find_codec(path: str | None, channels: int) -> CodecConfig:
    """The strides of the latents, and the folder where they are known from.

    Raises:
        ValueError: where the folder holds no autoencoder, or one of other latents.
    """
    if path is None:
        side = 1 if channels == 3 else 8
        return interop.codec_tools().LatentCodecConfig(h=side, w=side)
    found, _ = interop.codec_tools().codec_config(local_copy(path))
    if found.latent_channels != channels:
        raise ValueError(
            f"--codec {path!r} has latents of {found.latent_channels} channels, and the model makes "
            f"{channels}: give the autoencoder that it was trained with."
        )
    stride = found.stride
    t, h, w = (1, stride, stride) if isinstance(stride, int) else stride
    return interop.codec_tools().LatentCodecConfig(path=absolute(path), t=t, h=h, w=w)


def run_config(file: DiTFile, output: str, codec: CodecConfig) -> VideoRun:
    """The config of a run with the published model: how it was trained, and how it is sampled.

    DiT: 1000 linear betas, predicted noise, learned variance; 250 steps of ancestral sampling (Peebles
    & Xie 2022, section 5 and their code's defaults). SiT: velocities on straight paths; 250 steps of
    its SDE, the last from 0.04 (Ma et al. 2024, section 3.4). Guidance is of 4 on three of four
    channels, as the code of both has it. The data are to be named where it is trained on.
    """
    only_none = MaskConfig.only(none=1)
    uniform = TimeConfig(distribution="uniform")
    height, width = file.size * codec.h, file.size * codec.w
    guided = 3 if file.model.patch.channels > 3 else None
    drawn = SamplingConfig(
        frames=1, height=height, width=width, steps=250, shift=1.0, cfg_channels=guided
    )
    if file.family == "dit":
        learned = file.model.learned_variance
        diffusion = DiffusionConfig(
            path=PathConfig(kind="ddpm", betas="linear"),
            prediction="eps",
            loss="prediction",
            variance="learned_range" if learned else "fixed_small",
            time=uniform,
            masks=only_none,
        )
        sampling = dataclasses.replace(drawn, solver="ddpm", spacing="linspace")
    else:
        diffusion = DiffusionConfig(time=uniform, masks=only_none)
        sampling = dataclasses.replace(drawn, solver="sde", last_step=0.04)
    tokens = file.model.patch.num_tokens(1, file.size, file.size)
    return VideoRun(
        output=output,
        data=DataConfig(
            source=RecordsConfig(path="latents", video_key="image", label_key="label"),
            packing=PackingConfig(rows=8, row_tokens=tokens, row_text=1, row_segments=1),
        ),
        model=file.model,
        diffusion=diffusion,
        codec=codec,
        log=LogConfig(draw_every=0),
        sampling=sampling,
    )


def _to_run(given: ConvertArguments, published: Source, target: Path) -> str:
    codec = find_codec(given.codec, published.file.model.patch.channels)
    model = published.file.model
    dit = dataclasses.replace(model.dit, time_divisor=given.time_divisor)
    file = dataclasses.replace(published.file, model=dataclasses.replace(model, dit=dit))
    config = run_config(file, absolute(given.output), codec)
    published.table.check(published.table.named(published.arrays), published.where)
    shapes, shardings = _abstract(config, given.mesh)
    params = published.table.load(published.arrays, published.where, shapes, shardings)
    _write(target, lambda path: write_run(path, config, params), run=True)
    return f"{_said(published.file)}: a run in {target}/"


def _from_run(given: ConvertArguments, source: Path, target: Path) -> str:
    if given.to == "run":
        raise ValueError(f"--input {given.input!r} is a run already: copy it.")
    checkpointer, step = open_run(source, given.step)
    where = checkpointer.path(step) / "config"
    config = stored_config(checkpointer.config(step), where, Run)
    if not isinstance(config, VideoRun):  # The other kind of run is a codec's.
        if given.step is not None:
            raise ValueError(
                f"--step is {given.step}, and the run is of a codec, which is whole at its end alone, "
                "when its latents' shift and scale are measured: leave --step out."
            )
        return _codec(given, interop.codec_tools().finished_codec(source), target)
    assert isinstance(config, VideoRun)
    _check_no_codec(given)
    family = _published_family(config, given.to)
    drawn = config.sampling
    _, size, width = config.codec.latent_size(1, drawn.height, drawn.width)
    if size != width:
        raise ValueError(
            f"the run samples {drawn.height} x {drawn.width}, and published files are of squares: set "
            "sampling.height and width in its config."
        )
    file = DiTFile(config.model, size, family)
    shapes, shardings = _abstract(config, given.mesh)
    params = checkpointer.restore_ema(step, shapes, shardings)
    checkpointer.close()
    check_finite(params, str(checkpointer.path(step)))
    return _to_published(given, file, params, target)


def _published_family(config: VideoRun, kind: str) -> interop.Family:
    """Whose model a run is, DiT's or SiT's.

    Raises:
        ValueError: where it is neither's, by its network or by what it is trained to predict: a reader
            of a published file could not know.
    """
    interop.check_published(config.model, interop.DIVISORS if kind == "diffusers" else (128,))
    family = interop.family_of(config.model)
    has, path = config.diffusion, config.diffusion.path
    if family == "dit":
        wanted = "'eps' on a path of kind 'ddpm' with 1000 linear betas"
        same = has.prediction == "eps" and path == PathConfig(kind="ddpm", betas="linear")
    else:
        wanted = "'velocity' on a path of kind 'rectified_flow'"
        same = has.prediction == "velocity" and path.kind == "rectified_flow"
    if not same:
        raise ValueError(
            f"the run has the clock of {family.upper()} (dit.time_scale and time_offset), whose files "
            f"are of models that predict {wanted}; it predicts {has.prediction!r}, on {path}: keep "
            "this model as a run."
        )
    return family


def _abstract(config: VideoRun, mesh_config: MeshConfig) -> tuple[Params, Params]:
    """Shapes and shardings of the parameters of a run's model."""
    mesh = make_mesh(mesh_config)
    model = make_model(config.model, mesh)
    return abstract_params(partial(init_params, model), mesh)


def _to_published(given: ConvertArguments, file: DiTFile, params: Params, target: Path) -> str:
    dtype = DTYPES[given.dtype]
    if given.to == "safetensors":
        written = interop.dit_map(file).export(params, dtype)
        _write(target, lambda path: interop.write_safetensors(path, written))
    else:
        config = interop.to_diffusers(file)
        written = interop.diffusers_map(file).export(params, dtype)
        _write(target, lambda path: interop.write_folder(path, config, written))
    return f"{_said(file)}: {len(written)} arrays in {target}"


def _codec(given: ConvertArguments, folder: Path, target: Path) -> str:
    """A folder of a codec, read and written again."""
    if given.to == "safetensors":
        raise ValueError(
            f"--input {given.input!r} is a codec, and --to safetensors is of transformers: --to "
            "diffusers writes it again."
        )
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
    if given.to == "codec":
        raise ValueError(
            f"--input {given.input!r} is no codec, and --to is 'codec': give the folder of one, or "
            "--to run, safetensors or diffusers."
        )


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


def _said(file: DiTFile) -> str:
    """A model in words."""
    dit, name = file.model.dit, interop.preset_name(file.model)
    size = name or f"of width {dit.width}, depth {dit.depth}, patch {file.model.patch.h}"
    return f"{'SiT' if file.family == 'sit' else 'DiT'} {size}, {file.size} x {file.size} latents"


if __name__ == "__main__":
    raise SystemExit(main())
