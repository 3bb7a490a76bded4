"""``python -m dit_jax.sample --checkpoint RUN --prompt "..."``: clips from a trained model.

Everything is checked before the weights are read: the output can be written, the run has a
checkpoint, and the model can make clips of the size that was asked for.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from dit_jax import tasks
from dit_jax.config import Config
from dit_jax.models import ClassLabelsConfig
from dit_jax.parallel import (
    PROCESS_HELP,
    MeshConfig,
    joined,
    make_mesh,
    restart_with_huge_pages,
    take_process_flags,
)
from dit_jax.sampling import (
    Request,
    check_output,
    check_request,
    grid,
    make_clips,
    read_prompts,
    upscale,
    write_video,
)

PROG = "python -m dit_jax.sample"


@dataclasses.dataclass(frozen=True)
class SampleArguments:
    """Makes clips from the averaged weights of a training run."""

    checkpoint: str
    """Directory of the run."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar='"TEXT" ["TEXT" ...]')] = ()
    """What to make; several prompts make several clips."""
    prompts_file: str | None = None
    """A text file with a prompt on every line."""
    label: tuple[int, ...] = ()
    """Classes, by number, for a model of classes: in place of prompts."""
    output: str = "samples.mp4"
    """A file ending in .mp4, .gif or .png (several clips share it, as a grid), or a directory that
    gets a file for each clip."""
    format: Literal["mp4", "gif", "png"] = "mp4"
    """Of the files in a directory."""
    num: int = 1
    """Clips for each prompt."""
    seed: int = 0
    """Clip number i (from 0) is made from noise of seed + i; the same seed gives the same file."""
    sampling: tyro.conf.OmitArgPrefixes[tasks.SamplingOverrides] = tasks.SamplingOverrides()  # pyright: ignore[reportInvalidTypeForm]
    """What else the run's config says (``sampling``), size and solver among it; 1 frame is a still
    image."""
    codec: str | None = None
    """Folder of the autoencoder, for a model of latents. Unset: the one that the run's config names."""
    text_encoder: str | None = None
    """Folder of the text encoder, for a model that reads its states. Unset: the one that the run's
    config names."""
    step: int | None = None
    """Of the checkpoint; the newest if unset."""
    scale: int = 1
    """Enlarges every pixel so many times in the file."""
    mesh: MeshConfig = MeshConfig()
    spread_parameters: bool = False
    """Shard parameters over mesh.context too: for models too large for one device, at the price of
    gathering them in every step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples what the command line says; returns the exit status."""
    arguments, flags = take_process_flags(sys.argv[1:] if arguments is None else arguments)
    description = f"{SampleArguments.__doc__} {PROCESS_HELP}"
    given = tyro.cli(SampleArguments, args=arguments, prog=PROG, description=description)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with joined(flags, PROG):
            sample(given)
    except ValueError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _prompts(given: SampleArguments) -> list[str | int]:
    """What is asked for: texts, or numbers of classes."""
    prompts: list[str | int] = [*given.prompt, *given.label]
    if given.prompts_file is not None:
        prompts += read_prompts(given.prompts_file)
    if not prompts:
        raise ValueError(
            'nothing to make: give --prompt "...", --prompts-file FILE or --label NUMBER.'
        )
    if given.num < 1 or given.scale < 1:
        raise ValueError(f"--num {given.num} and --scale {given.scale} are at least 1.")
    return [prompt for prompt in prompts for _ in range(given.num)]


def _requests(config: Config, prompts: list[str | int], seed: int) -> list[Request]:
    """One clip for each prompt; raises ``ValueError`` where the model reads no such prompts."""
    made, text = config.sampling, config.model.text
    classes = isinstance(text, ClassLabelsConfig)
    for prompt in prompts:
        if classes and not isinstance(prompt, int):
            raise ValueError(
                f"the model knows classes and reads no prompts: in place of {prompt[:60]!r} give "
                f"--label with numbers of 0 to {text.classes - 1}."
            )
        if not classes and isinstance(prompt, int):
            raise ValueError(
                f"--label {prompt}: the model reads prompts and knows no classes. Give --prompt."
            )
        if classes:
            config.model.text_tokens("", label=int(prompt))
    size = config.codec.latent_size(made.frames, made.height, made.width)
    return [
        Request("", *size, made.fps, seed + i, label=prompt)
        if isinstance(prompt, int)
        else Request(prompt, *size, made.fps, seed + i)
        for i, prompt in enumerate(prompts)
    ]


def sample(given: SampleArguments) -> None:
    """Makes the clips and writes them."""
    directory = Path(given.output)
    single = bool(directory.suffix) and not directory.is_dir()
    if single:
        check_output(given.output)
    else:
        check_output(directory / f"0.{given.format}")
    prompts = _prompts(given)
    trained = tasks.Trained(
        given.checkpoint, given.step, given.sampling, given.codec, given.text_encoder
    )
    config = trained.config
    made = config.sampling
    requests = _requests(config, prompts, given.seed)
    check_request(requests[0], config.model.patch)
    codec = tasks.open_codec(config)

    mesh = make_mesh(given.mesh)
    # Gone again before the model's own weights are read.
    requests = tasks.with_states(requests, tasks.open_text_encoder(config, mesh))
    generator, params = trained.load(mesh, given.spread_parameters)
    decode = None if codec is None else codec.decode
    clips = make_clips(generator, params, requests, config.model, mesh, True, decode)
    if jax.process_index() == 0:
        _write(given, directory, single, prompts, clips, made.fps)


def _write(
    given: SampleArguments,
    directory: Path,
    single: bool,
    prompts: list[str | int],
    clips: list[np.ndarray],
    fps: float,
) -> None:
    large = [upscale(clip, given.scale) for clip in clips]
    if single:
        write_video(directory, large[0] if len(large) == 1 else grid(large), fps)
        print(f"{len(large)} clip(s): {directory}")
        return
    for i, (prompt, clip) in enumerate(zip(prompts, large, strict=True)):
        words = prompt if isinstance(prompt, str) else f"class {prompt}"
        slug = re.sub(r"\W+", "-", words.lower()).strip("-")[:60]
        write_video(directory / f"{i:04d}-{slug}.{given.format}", clip, fps)
    print(f"{len(large)} clip(s) in {directory}/")


if __name__ == "__main__":
    restart_with_huge_pages()
    raise SystemExit(main())
