"""``python -m dit_jax.sample MODE --checkpoint RUN --prompt "..."``: clips from a trained model.

A mode is a class of options (what stands behind an option, or under it, is its help), with the clips
that these ask for; without a mode, text makes clips. Everything is checked before the weights are
read: the output can be written, the run has a checkpoint, and the model can make clips of that size.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
import tyro

from dit_jax import parallel
from dit_jax.config import check_types, load_config
from dit_jax.files import SURROGATES, as_path, local_copy, refuse_if, run_verb, silence_traces
from dit_jax.model import ClassLabels, NoTextConfig
from dit_jax.sampling import media, modes
from dit_jax.sampling.modes import NOISE, Generation
from dit_jax.sampling.pipeline import Pipeline, load_run, stored_sampling
from dit_jax.sampling.request import Request, Space, read_prompts
from dit_jax.sampling.sampler import SamplerConfig, SamplingConfig
from dit_jax.training.video_task import cut_note
from dit_jax.types import NonNegativeFloat, PositiveFloat, PositiveInt, Range

PROG = "python -m dit_jax.sample"
RARE = ("label", "format", "step", "codec", "text_encoder", "config", "sampling", "mesh")
RARE += ("prompts_file", "negative_prompt", "spread_parameters", "unmerged")
"""Options that --help leaves to --help-all."""

Texts = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]
Noise = Annotated[float, Range(0, 0.999)]
Strength = Annotated[float, Range(1e-3, 1)]
Length = str  # "2s", or a number of frames
Prompts = Sequence[str | int]  # texts, or numbers of classes
Clips = Sequence[Iterable[np.ndarray]]  # each in parts [n, h, w, 3], of which one is in memory
_how_long = tyro.conf.create_mutex_group(required=False)
_how_joined = tyro.conf.create_mutex_group(required=False)


def seconds_of(length: Length, fps: float, least: float = 1e-9) -> float:
    """``2s``, ``1.5s``, or a number of frames, in seconds."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(s?)", length)
    number, unit = (float(match[1]), match[2]) if match else (-1.0, "")
    message = f"length {length}: give seconds, as 2s, or a number of frames, as 16."
    refuse_if([(number < least or not unit and number % 1 > 0, message)])
    return number if unit else number / fps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What all modes take."""

    checkpoint: str  # Directory of the run.
    prompt: Annotated[Texts, tyro.conf.arg(metavar='"TEXT" ["TEXT" ...]')] = ()
    """What to make; several prompts make several clips."""
    prompts_file: str | None = None
    """A file with a prompt on every line, or a table or JSON with a column or key "prompt"."""
    label: Annotated[tuple[tuple[int, ...], ...], tyro.conf.UseAppendAction] = ()
    """Classes, by number, for a model of classes: in place of prompts."""
    negative_prompt: str | None = None
    """What guidance leads away from. Unset: what the run's config says, or the empty prompt."""
    output: str = "samples.mp4"
    """A file (.mp4, .gif, .png; several clips share it as a grid), or a directory for many."""
    format: Literal["mp4", "gif", "png"] = "mp4"  # Of the files in a directory.
    scale: PositiveInt = 1  # Enlarges every pixel of the file by this factor.
    num: PositiveInt = 1  # Clips for each prompt.
    seed: int = 0  # Clip number i (from 0) is made from noise of seed + i.
    step: int | None = None  # Of the checkpoint; the newest if unset.
    codec: str | None = None  # Folder of the autoencoder, if not the one of the run's config.
    text_encoder: str | None = None  # Folder of the text encoder, if not the one of the config.
    config: str | None = None  # The run's config file, if it has conditioners of your own module.
    lora: Annotated[Texts, tyro.conf.arg(metavar="PATH[:WEIGHT] [...]")] = ()
    """Adapters to add: runs that train them, or files (docs/lora.md)."""
    unmerged: bool = (
        False  # Computes adapters beside the weights, in place of adding them to these.
    )
    sampling: tyro.conf.OmitArgPrefixes[SamplerConfig] = SamplerConfig()
    """By default as the run's config says (``sampling``)."""
    mesh: parallel.MeshConfig = parallel.MeshConfig()
    spread_parameters: bool = False
    """Shard parameters over mesh.context too: for models too large for one device; slower."""

    def prompts(self) -> Prompts:
        """Each ``num`` times."""
        prompts: list[str | int] = [one for some in (*self.prompt, *self.label) for one in some]
        prompts += read_prompts(self.prompts_file) if self.prompts_file else []
        message = 'nothing to make: give --prompt "...", --prompts-file FILE or --label NUMBER.'
        refuse_if([(not prompts, message)])
        return [prompt for prompt in prompts for _ in range(self.num)]

    def requests(self, pipeline: Pipeline, prompts: Prompts, more: Prompts = ()) -> list[Request]:
        """A plain request for each prompt; ``more`` are other texts that the model will read."""
        config, negative = pipeline.config, self.negative_prompt or ""
        labels = config.model.conditioners.get("label")
        classes = range(labels.classes if isinstance(labels, ClassLabels) else 0)
        reads = f"--label with numbers of 0 to {len(classes) - 1}" if classes else "--prompt"
        wrong = [p for p in prompts if (p not in classes if classes else isinstance(p, int))]
        # Bytes of a command line that are no UTF-8 come as halves of surrogate pairs.
        broken = [p for p in (*prompts, negative) if SURROGATES.search(str(p))]
        deaf = isinstance(config.model.text, NoTextConfig) or config.sampling.cfg_scale == 1
        recode = f"the prompts {broken!r:.200} are no UTF-8: write them anew."
        other = f"{wrong!r:.60}: give {reads}, which {self.checkpoint!r} reads."
        guide = "--negative-prompt needs a model of text, and --cfg-scale not 1."
        refuse_if([(bool(broken), recode), (bool(wrong), other), (bool(negative) and deaf, guide)])
        if self.negative_prompt is None and not deaf:
            negative = config.sampling.negative_prompt
        note = cut_note(config, [*map(str, (*prompts, *more)), negative])
        if note and jax.process_index() == 0:
            print(f"dit_jax.sample: warning: {note}", file=sys.stderr, flush=True)
        return [
            pipeline.request("", self.seed + i, segment_fields={"label": prompt})
            if isinstance(prompt, int)
            else pipeline.request(prompt, self.seed + i, negative=negative)
            for i, prompt in enumerate(prompts)
        ]


class Job(NamedTuple):
    """What the clips of a command are made by, and of."""

    pipeline: Pipeline
    space: Space
    size: SamplingConfig  # the pipeline's own, with the size of the clips
    media: Mapping[str, np.ndarray]  # the files, read at that size

    def nearest(self, length: Length, rule: Callable[[float, float], int]) -> int:
        """The frames nearest to a length by ``Space.new``, ``Space.gap`` or ``FrameGrid.nearest``."""
        return rule(seconds_of(length, self.size.fps), self.size.fps)

    def whole(self, length: Length | None) -> int | None:
        """The nearest ``1 + n stride`` frames; None for None."""
        return None if length is None else self.nearest(length, self.space.grid.nearest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Command):
    """Text to video, or with one frame to an image."""

    frames: Annotated[PositiveInt | None, _how_long] = None  # Of the run's config; 1 is an image.
    duration: Annotated[Length | None, _how_long] = None  # 2s: the nearest that can be made.
    height: PositiveInt | None = None  # Unset: of the first file, or else of the run's config.
    width: PositiveInt | None = None
    fps: PositiveFloat | None = None  # Unset: of the first clip, or else of the run's config.

    pictures: ClassVar[bool] = False  # whether files give their first frame alone

    @property
    def files(self) -> list[str]:
        """Pictures and clips to read; the first decides about size and rate."""
        named = (getattr(self, name, None) or () for name in ("video", "videos", "start"))
        return [file for one in named for file in ([one] if isinstance(one, str) else one)]

    def open(self, pipeline: Pipeline) -> Job:
        """Reads the files, at the size and rate asked for or of the first of them."""
        config, space = pipeline.config.sampling, pipeline.space
        frames, fps = self.frames or config.frames, self.fps or config.fps
        height, width = self.height or config.height, self.width or config.width
        for file in self.files[:1]:
            *sides, rate, still = media.video_shape(file)
            # An asked side scales the other; what is asked for of neither is the picture's own.
            asked = self.height, self.width
            scale = next((a / b for a, b in zip(asked, sides, strict=True) if a), 1.0)
            height, width = (
                size or max(math.floor(side * scale / by + 1e-6) * by, by)
                for size, side, by in zip(asked, sides, space.multiple, strict=True)
            )
            if self.fps is None and not still and not self.pictures:
                fps = rate
        if self.duration is not None:
            frames = space.grid.nearest(seconds_of(self.duration, fps), fps)
        space.check_size(frames, height, width)
        most = 1 if self.pictures else None
        clips = {file: media.read_video(file, height, width, fps, most)[0] for file in self.files}
        size = dataclasses.replace(config, frames=frames, height=height, width=width, fps=fps)
        config = dataclasses.replace(pipeline.config, sampling=size)
        return Job(dataclasses.replace(pipeline, config=config), space, size, clips)

    def generation(self, job: Job, template: Request) -> Generation:
        """What is made for one prompt."""
        return modes.plain(template)

    def clips(self, pipeline: Pipeline) -> tuple[Prompts, Clips, list[float]]:
        """What is made, for names of files, its clips, and their frames a second."""
        job, prompts = self.open(pipeline), self.prompts()
        templates = job.pipeline.encode_text(self.requests(job.pipeline, prompts))
        generations = [self.generation(job, one) for one in templates]
        out = job.pipeline.sample(generations, progress=True)
        fps = job.size.fps * getattr(self, "factor", 1)
        return prompts, [[clip] for clip in out], [fps] * len(out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image(Text):
    """Image to video: a picture to begin with, to end with, or at any time."""

    image: str | None = None  # A picture to begin with.
    last_image: str | None = None  # A picture to end with.
    keyframe: Annotated[Texts, tyro.conf.arg(metavar="T=FILE [T=FILE ...]")] = ()
    """Pictures to be shown at some time: 12=FILE is frame 12, 1.5s=FILE after a second and a half."""
    noise: Noise = 0.0  # Noise on the pictures: a little (0.02 to 0.1) frees motion that is frozen.

    pictures: ClassVar[bool] = True

    @property
    def keyframes(self) -> list[tuple[str, str]]:
        """(time, file) of every picture; the time of the last is empty."""
        pairs = [one.partition("=")[::2] for some in self.keyframe for one in some]
        pairs = [("0", self.image), *pairs, ("", self.last_image)]
        return [(time, file) for time, file in pairs if file is not None]

    @property
    def files(self) -> list[str]:
        return [file for _, file in self.keyframes]

    def generation(self, job: Job, template: Request) -> Generation:
        images: dict[int, np.ndarray] = {}
        count, fps = job.size.frames, job.size.fps
        for time, file in self.keyframes:
            frame = round(seconds_of(time, fps, 0) * fps) if time else count - 1
            message = f"{time or 'last'}={file} is frame {frame} of a clip of {count}: give others."
            refuse_if([(frame >= count or frame in images, message)])
            images[frame] = job.media[file][0]
        reads = job.pipeline.config.model.conditioners
        return modes.image_to_video(job.space, template, images, self.noise, reads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video(Text):
    """Video to video: a clip is remade in another style. --frames or --duration of it are read."""

    video: str  # The clip.
    strength: Strength = 0.7  # How much of it is made anew, above 0 to 1.

    def clip(self, job: Job) -> np.ndarray:
        """What is read of the clip."""
        return job.media[self.video][: job.size.frames if self.frames or self.duration else None]

    def generation(self, job: Job, template: Request) -> Generation:
        return modes.restyle(job.space, template, self.clip(job), self.strength)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolate(Video):
    """More frames a second: new frames between those of a clip."""

    factor: int  # 4 makes four times the frames a second.
    strength: Strength | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """How much of a blend of neighbours is made anew. Unset: 1, and 0.4 if frames share tokens."""

    def generation(self, job: Job, template: Request) -> Generation:
        clip = self.clip(job)
        return modes.interpolate(job.space, template, clip, self.factor, self.strength)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context(Text):
    """What modes take that show the model the ends of clips."""

    context: Length | None = None
    """Length of the part of each clip that the model is shown. Unset: what --frames leave."""
    noise: Noise = 0.0  # Noise on that: a little (0.02 to 0.1) frees motion that is frozen.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extend(Context):
    """New frames behind a clip, before it, or both."""

    video: str  # The clip.
    forward: Length | None = None  # Length of what follows.
    backward: Length | None = None  # Length of what comes before.

    def generation(self, job: Job, template: Request) -> Generation:
        lengths = self.forward, self.backward
        refuse_if([(not any(lengths), "extend: give --forward LENGTH, --backward LENGTH or both.")])
        ahead, before = (job.nearest(one, job.space.new) if one else 0 for one in lengths)
        clip, context = job.media[self.video], job.whole(self.context)
        return modes.extend(job.space, template, clip, ahead, before, context, self.noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Connect(Context):
    """New frames that lead from one clip to another, or one clip that turns into the other."""

    videos: tuple[str, str]  # The two clips.
    gap: Annotated[Length, _how_joined] = "0.5s"  # Length of what is made between them.
    blend: Annotated[Length | None, _how_joined] = None
    """Length of the end of the one and the beginning of the other that become one."""
    strength: Strength = 0.9  # How much of the middle of a --blend is made anew, above 0 to 1.

    def generation(self, job: Job, template: Request) -> Generation:
        first, second = (job.media[file] for file in self.videos)
        if (overlap := job.whole(self.blend)) is not None:
            return modes.blend(job.space, template, first, second, overlap, self.strength)
        gap, context = job.nearest(self.gap, job.space.gap), job.whole(self.context)
        return modes.connect(job.space, template, first, second, gap, context, self.noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(Context):
    """The last frame is followed by the first: of text alone, or of a clip with --gap frames more."""

    video: str | None = None  # A clip to close. --duration of it is read.
    gap: Length = "0.5s"  # Length of what is made between its end and its beginning.

    def generation(self, job: Job, template: Request) -> Generation:
        if self.video is not None:
            clip = job.media[self.video][: job.size.frames if self.duration else None]
            gap, context = job.nearest(self.gap, job.space.gap), job.whole(self.context)
            return modes.loop_clip(job.space, template, clip, gap, context, self.noise)
        window = job.pipeline.config.model.dit.window
        single = "a loop of 1 frame from text: give more --frames."
        local = f"the model's attention is local ({window} tokens): close a clip (--video FILE)."
        refuse_if([(job.size.frames == 1, single), (window is not None, local)])
        return modes.loop_text(job.space, template)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Long(Text):
    """Minutes: windows of --frames, each with the end of the last as history (docs/long.md)."""

    length: Length  # Of the clip: 60s, or a number of frames.
    start: str | None = None  # A picture or clip that it begins with.
    context: Length | None = None
    """Length of the end of --start that the first window is shown. Unset: as of --history."""
    storyboard: str | None = None
    """A file of lines "time: prompt", in place of --prompt: which one is in force when."""
    history: Length | None = None
    """Length of what each window is shown of the one before. Unset: about a third."""
    noise: Noise = NOISE  # Noise on the history, against drift and frozen motion (0.02 to 0.1).

    def clips(self, pipeline: Pipeline) -> tuple[Prompts, Clips, list[float]]:
        job = self.open(pipeline)
        board = modes.read_storyboard(self.storyboard) if self.storyboard else None
        prompts = [board.prompts[0]] * self.num if board else self.prompts()
        templates = self.requests(job.pipeline, prompts, board.prompts if board else ())
        fps, pipeline = job.size.fps, job.pipeline
        length = max(round(seconds_of(self.length, fps) * fps), 1)
        start = job.media[self.start] if self.start else None
        shown = 0 if start is None else len(start)
        history, context = job.whole(self.history), job.whole(self.context)
        windows = modes.plan_windows(job.space, length, job.size.frames, history, shown, context)
        context = job.space.grid.frames(windows[0].history) if shown else 0
        before = shown - context  # frames of the start that no window is shown
        if board:
            modes.check_storyboard(board, windows, templates[0].fps, before / fps, shown / fps)
        clips = [modes.window_requests(one, windows, board, before / fps) for one in templates]
        requests, count = pipeline.encode_text(sum(clips, [])), len(windows)
        heads = None if start is None else [job.space.encode(start[-context:])] * len(prompts)
        parts = [requests[i : i + count] for i in range(0, len(requests), count)]
        generator, params, mesh = pipeline.generator, pipeline.params, pipeline.mesh
        latents = modes.make_long(generator, params, parts, windows, mesh, self.noise, heads, True)
        frames = length - before
        clips = [modes.decode_long(pipeline.codec, one, frames, start, context) for one in latents]
        return prompts, clips, [fps] * len(clips)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upscale(Command):
    """Super-resolution: clips at several times their size, by a model that was trained for it."""

    videos: tuple[str, ...]
    """Files, or a directory that samples were written to. A prompt for each, one for all, or none."""
    augmentation: NonNegativeFloat = 0.0
    """Noise level of the clips, up to that of training: about 0.1 for what a model generated."""

    def clips(self, pipeline: Pipeline) -> tuple[Prompts, Clips, list[float]]:
        conditioners = pipeline.config.model.conditioners.values()
        conditioner: Any = next((one for one in conditioners if hasattr(one, "enlarge")), None)
        files: list[Path] = []
        for path in map(local_copy, self.videos):
            inner = sorted(path.iterdir()) if path.is_dir() else [path]
            files += [one for one in inner if one == path or one.suffix.lower() in media.EXTENSIONS]
        asked = self.prompt or self.label or self.prompts_file
        prompts = list(self.prompts()) if asked else [""] * self.num
        prompts = prompts * len(files) if len(prompts) == self.num else prompts
        unfit = not files or len(prompts) != len(files) * self.num
        count = len(prompts) // self.num
        fit = f"{count} prompts for {len(files)} clips: give one for each, one for all, or none."
        model = f"the model of {self.checkpoint!r} does not enlarge clips: give a run that does."
        refuse_if([(conditioner is None, model), (unfit, fit)])
        videos = [video for video in map(media.read_video, files) for _ in range(self.num)]
        requests = pipeline.encode_text(self.requests(pipeline, prompts))
        config, codec = pipeline.config, pipeline.codec
        generations = conditioner.enlarge(requests, videos, config, codec, self.augmentation)
        out = pipeline.sample(generations, progress=True)
        return prompts, [[clip] for clip in out], [fps for _, fps in videos]


MODES = Text, Image, Video, Extend, Connect, Loop, Interpolate, Long, Upscale
COMMANDS = {command.__name__.lower(): command for command in MODES}

# --- The verb ---


def parse(arguments: Sequence[str]) -> Text | Upscale:
    """The options of a mode, whose defaults are those of the run's own config."""
    name, rest = "text", list(arguments)
    if rest and rest[0] in COMMANDS:
        name = rest.pop(0)
    command: Any = COMMANDS[name]
    stored = vars(stored_sampling(rest))
    settings = {one.name: stored[one.name] for one in dataclasses.fields(SamplerConfig)}
    required = [f.name for f in dataclasses.fields(command) if f.default is dataclasses.MISSING]
    values = dict.fromkeys(required, tyro.MISSING) | {"sampling": SamplerConfig(**settings)}
    about = f"{command.__doc__} Other modes: {', '.join(one for one in COMMANDS if one != name)}."
    if "--help-all" in rest:
        rest, about = ["--help"], f"{about} {parallel.PROCESS_HELP}"
    elif {"-h", "--help"} & {*rest}:
        about += " All options, also of the solver (--steps, --cfg-scale, ...): --help-all."
        # A class of the same name and module: there the help of its options is looked up.
        hidden = [(one, tyro.conf.Suppress[Any]) for one in RARE]
        where = {"__module__": command.__module__}
        command = dataclasses.make_dataclass(
            command.__name__, hidden, bases=(command,), namespace=where, frozen=True, kw_only=True
        )
    prog = f"{PROG} {name}"
    return tyro.cli(command, args=rest, prog=prog, description=about, default=command(**values))


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples what the command line says; returns the exit status."""
    arguments, flags = parallel.take_process_flags(sys.argv[1:] if arguments is None else arguments)
    silence_traces()

    def work() -> None:
        with parallel.joined(flags, PROG):
            command = parse(arguments)
            check_types(command)
            sample(command)

    return run_verb(PROG, work)


def sample(command: Text | Upscale) -> None:
    """Makes the clips of a command and writes them."""
    output = as_path(command.output)
    single = bool(output.suffix) and not output.is_dir()
    media.check_output(output if single else output / f"0.{command.format}")
    weights = command.step, command.codec, command.text_encoder
    where = parallel.make_mesh(command.mesh), command.spread_parameters
    own = load_config(command.config) if command.config else None
    adapters = [one for some in command.lora for one in some], command.unmerged
    parts = *weights, *where, own, *adapters
    pipeline = load_run(command.checkpoint, *parts, **vars(command.sampling))
    prompts, clips, rates = command.clips(pipeline)
    if jax.process_index() != 0:
        return
    message = f"--output {output} cannot show {set(rates)} frames a second: name a directory."
    refuse_if([(single and len(set(rates)) > 1, message)])
    large = [(media.upscale(part, command.scale) for part in clip) for clip in clips]
    if single:
        tiles = (media.grid(list(parts)) for parts in zip(*large, strict=True))
        media.write_video(output, large[0] if len(large) == 1 else tiles, rates[0])
    else:
        for i, (name, parts, fps) in enumerate(zip(prompts, large, rates, strict=True)):
            name = name if isinstance(name, str) else f"class {name}"
            slug = re.sub(r"\W+", "-", name.lower()).strip("-")[:60]
            media.write_video(output / f"{i:04d}-{slug}.{command.format}", parts, fps)
    print(f"{len(large)} clip(s): {output}" if single else f"{len(large)} clip(s) in {output}/")


if __name__ == "__main__":
    parallel.tune_cpu()
    raise SystemExit(main())
