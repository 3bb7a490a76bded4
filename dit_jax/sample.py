"""``python -m dit_jax.sample MODE --checkpoint RUN --prompt "..."``: clips from a trained model.

Each mode has options of its own and a ``--help``; without a mode, text makes clips. Everything is
checked before the weights are read: the output can be written, the run has a checkpoint, and the model
can make clips of the size that was asked for.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from dit_jax.config import check_types, load_config
from dit_jax.files import InputError, as_path, local_copy, run_verb
from dit_jax.model import ClassLabels, NoTextConfig
from dit_jax.parallel import PROCESS_HELP, joined, make_mesh, take_process_flags
from dit_jax.sampling.commands import (
    COMMANDS,
    Command,
    Interpolate,
    Job,
    Long,
    Text,
    Upscale,
    seconds_of,
)
from dit_jax.sampling.long import decode_long, make_long, plan_long, read_storyboard
from dit_jax.sampling.media import (
    EXTENSIONS,
    check_output,
    grid,
    read_video,
    upscale,
    video_shape,
    write_video,
)
from dit_jax.sampling.pipeline import Pipeline, load_run, stored_sampling
from dit_jax.sampling.request import Request
from dit_jax.sampling.sampler import SamplerConfig
from dit_jax.training.video_task import cut_note

PROG = "python -m dit_jax.sample"


def parse(arguments: Sequence[str]) -> Command:
    """The options of a mode, whose defaults are those of the run's own config."""
    name, rest = "text", list(arguments)
    if rest and rest[0] in COMMANDS:
        name = rest.pop(0)
    command, stored = COMMANDS[name], stored_sampling(rest)
    names = [field.name for field in dataclasses.fields(SamplerConfig)]
    settings = SamplerConfig(**{name: getattr(stored, name) for name in names})
    fields = dataclasses.fields(command)
    required = {one.name: tyro.MISSING for one in fields if one.default is dataclasses.MISSING}
    others = ", ".join(one for one in COMMANDS if one != name)
    return tyro.cli(
        command,
        args=rest,
        prog=f"{PROG} {name}",
        description=f"{command.__doc__} Other modes: {others}. {PROCESS_HELP}",
        default=command(**required, sampling=settings),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples what the command line says; returns the exit status."""
    arguments, flags = take_process_flags(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)

    def work() -> None:
        with joined(flags, PROG):
            command = parse(arguments)
            check_types(command)
            sample(command)

    return run_verb(PROG, work)


def sample(command: Command) -> None:
    """Makes the clips of a command and writes them."""
    output = as_path(command.output)
    single = bool(output.suffix) and not output.is_dir()
    check_output(output if single else output / f"0.{command.format}")
    prompts = command.prompts
    if isinstance(command, Upscale) and not prompts:
        prompts += [""] * command.num
    if not prompts:
        raise InputError(
            'nothing to make: give --prompt "...", --prompts-file FILE or --label NUMBER.'
        )
    settings = {**vars(command.sampling)}
    for name in ("frames", "height", "width", "fps"):
        if (value := getattr(command, name, None)) is not None:
            settings[name] = value
    pipeline = load_run(
        command.checkpoint,
        command.step,
        command.codec,
        command.text_encoder,
        make_mesh(command.mesh),
        command.spread_parameters,
        load_config(command.config) if command.config else None,
        **settings,
    )
    if isinstance(command, Upscale):
        prompts, clips, rates = upscale_clips(command, pipeline, prompts)
    else:
        assert isinstance(command, Text)
        clips, rates = sample_clips(command, pipeline, prompts)
    if jax.process_index() != 0:
        return
    if single and len(set(rates)) > 1:
        raise InputError(
            f"--output {output} would show clips of {sorted(set(rates))} frames a second side by side: "
            "name a directory, which gets a file for each."
        )
    large = [(upscale(part, command.scale) for part in clip) for clip in clips]
    if single:
        tiles = (grid(list(parts)) for parts in zip(*large, strict=True))
        write_video(output, large[0] if len(large) == 1 else tiles, rates[0])
    else:
        for i, (name, parts, fps) in enumerate(zip(prompts, large, rates, strict=True)):
            name = name if isinstance(name, str) else f"class {name}"
            slug = re.sub(r"\W+", "-", name.lower()).strip("-")[:60]
            write_video(output / f"{i:04d}-{slug}.{command.format}", parts, fps)
    print(f"{len(large)} clip(s): {output}" if single else f"{len(large)} clip(s) in {output}/")


Clips = Sequence[Iterable[np.ndarray]]
"""Clips in parts uint8 ``[n, h, w, 3]``, of which one at a time is in memory."""


def make_requests(
    command: Command, pipeline: Pipeline, prompts: Sequence[str | int], more: Sequence[str] = ()
) -> list[Request]:
    """A plain request for each prompt or class; ``more`` are other texts that the model will read."""
    model, negative = pipeline.config.model, command.negative_prompt
    labels = model.conditioners.get("label")
    classes = labels.classes if isinstance(labels, ClassLabels) else 0
    reads = f"--label with numbers of 0 to {classes - 1}" if classes else "--prompt"
    for prompt in prompts:
        if isinstance(prompt, int) != bool(classes) or classes and not -1 < int(prompt) < classes:
            raise InputError(
                f"{str(prompt)[:60]!r}: give {reads}, because that is what the model of "
                f"{command.checkpoint!r} reads."
            )
    guided = pipeline.config.sampling.guidance.active
    if negative and (isinstance(model.text, NoTextConfig) or not guided):
        raise InputError(
            "--negative-prompt needs a model of text, and guidance (--cfg-scale above 1): leave it out."
        )
    texts = [*(str(prompt) for prompt in prompts), *more, negative]
    if jax.process_index() == 0 and (note := cut_note(pipeline.config, texts)):
        print(f"{PROG}: warning: {note}", file=sys.stderr, flush=True)
    return [
        pipeline.request("", command.seed + i, segment_fields={"label": prompt})
        if isinstance(prompt, int)
        else pipeline.request(prompt, command.seed + i, negative=negative)
        for i, prompt in enumerate(prompts)
    ]


def open_job(command: Text, pipeline: Pipeline) -> Job:
    """Reads the files of a command, at the size and rate asked for or of the first of them."""
    config, space, files = pipeline.config.sampling, pipeline.space, command.files
    height, width, fps = config.height, config.width, config.fps
    if files:
        *sides, rate, still = video_shape(files[0])
        # An asked side scales the other; what is asked for of neither is the picture's own.
        scales = [a / b for a, b in zip((command.height, command.width), sides, strict=True) if a]
        scale = scales[0] if scales else 1.0
        fitted = [
            max(math.floor(side * scale / by + 1e-6) * by, by)
            for side, by in zip(sides, space.multiple, strict=True)
        ]
        height, width = command.height or fitted[0], command.width or fitted[1]
        if command.fps is None and not still and not command.pictures:
            fps = rate
    frames = config.frames
    if command.duration is not None:
        frames = space.grid.nearest(seconds_of(command.duration, fps), fps)
    space.check_size(frames, height, width)
    count = 1 if command.pictures else None
    media = {file: read_video(file, height, width, fps, count)[0] for file in set(files)}
    return Job(pipeline, frames, height, width, fps, media)


def sample_clips(
    command: Text, pipeline: Pipeline, prompts: Sequence[str | int]
) -> tuple[Clips, list[float]]:
    """The clips of any mode but upscale, and their rates."""
    config, job = pipeline.config, open_job(command, pipeline)
    board = None
    if isinstance(command, Long) and command.storyboard:
        board = read_storyboard(command.storyboard)
    requests = make_requests(command, pipeline, prompts, board.prompts if board else ())
    size = config.codec.latent_size(job.frames, job.height, job.width)
    shape = dict(zip(("frames", "height", "width"), size, strict=True))
    rate = config.codec.latent_fps(job.fps)
    templates = [dataclasses.replace(one, **shape, fps=rate) for one in requests]
    if not isinstance(command, Long):
        generations = [command.generation(job, one) for one in pipeline.encode_text(templates)]
        fps = job.fps * (command.factor if isinstance(command, Interpolate) else 1)
        return [[clip] for clip in pipeline.sample(generations, progress=True)], [fps] * len(
            generations
        )
    plan = plan_long(
        pipeline.space,
        max(round(seconds_of(command.length, job.fps) * job.fps), 1),
        job.frames,
        job.whole(command.history),
        job.media[command.start] if command.start else None,
        job.whole(command.context),
    )
    flat = sum(plan.requests(templates, board, job.fps), [])
    flat, count = pipeline.encode_text(flat), len(plan.windows)
    windows = [flat[i : i + count] for i in range(0, len(flat), count)]
    latents = make_long(
        pipeline.generator,
        pipeline.params,
        windows,
        plan.windows,
        config.model,
        pipeline.mesh,
        command.noise,
        plan.heads(pipeline.space, len(windows)),
        progress=True,
    )
    new = plan.frames - plan.before
    clips = [plan.assemble(decode_long(pipeline.codec, one, new)) for one in latents]
    return clips, [job.fps] * len(clips)


def upscale_clips(
    command: Upscale, pipeline: Pipeline, prompts: list[str | int]
) -> tuple[list[str | int], Clips, list[float]]:
    """Prompts, clips and rates of a model of super-resolution, of each clip ``num`` times."""
    conditioners = pipeline.config.model.conditioners.values()
    conditioner: Any = next((one for one in conditioners if hasattr(one, "enlarge")), None)
    if conditioner is None:
        raise InputError(
            f"the model of {command.checkpoint!r} does not enlarge clips: give a run of "
            "super-resolution."
        )
    files: list[Path] = []
    for name in command.videos:
        path = local_copy(name)
        inner = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [one for one in inner if one == path or one.suffix.lower() in EXTENSIONS]
    videos = [video for video in map(read_video, files) for _ in range(command.num)]
    if len(prompts) == command.num:
        prompts = prompts * len(files)
    if len(prompts) != len(videos) or not videos:
        raise InputError(
            f"{len(prompts) // command.num} prompts for {len(files)} clips of --videos: give clips "
            f"({', '.join(EXTENSIONS)}), and a prompt for each, one for all, or none."
        )
    requests = pipeline.encode_text(make_requests(command, pipeline, prompts))
    config, codec = pipeline.config, pipeline.codec
    generations = conditioner.enlarge(requests, videos, config, codec, command.augmentation)
    clips = [[clip] for clip in pipeline.sample(generations, progress=True)]
    return prompts, clips, [fps for _, fps in videos]


if __name__ == "__main__":
    raise SystemExit(main())
