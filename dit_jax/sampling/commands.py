"""The modes of ``python -m dit_jax.sample``: their options, and the generations that these ask for.

The text behind an option is its help.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import numpy as np
import tyro

from dit_jax.files import InputError
from dit_jax.parallel import MeshConfig
from dit_jax.sampling import modes
from dit_jax.sampling.long import NOISE, read_storyboard
from dit_jax.sampling.modes import Generation
from dit_jax.sampling.pipeline import Pipeline
from dit_jax.sampling.request import Request, Space, read_prompts
from dit_jax.sampling.sampler import SamplerConfig
from dit_jax.types import NonNegativeFloat, PositiveFloat, PositiveInt, Range

Texts = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]
Noise = Annotated[float, Range(0, 0.999)]
Strength = Annotated[float, Range(1e-3, 1)]
Length = str  # "2s", or a number of frames
_how_long = tyro.conf.create_mutex_group(required=False)
_how_joined = tyro.conf.create_mutex_group(required=False)


def seconds_of(length: Length, fps: float, least: float = 1e-9) -> float:
    """``2s``, ``1.5s``, or a number of frames, in seconds."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(s?)", length)
    number = float(match[1]) if match else -1.0
    if match is None or number < least or not match[2] and number % 1:
        raise InputError(f"length {length}: give seconds, as 2s, or a number of frames, as 16.")
    return number if match[2] else number / fps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What all modes take."""

    checkpoint: str  # Directory of the run.
    prompt: Annotated[Texts, tyro.conf.arg(metavar='"TEXT" ["TEXT" ...]')] = ()
    """What to make; several prompts make several clips."""
    prompts_file: str | None = None
    """A text file with a prompt on every line, or a .csv, .tsv, .json or .jsonl file with a column or
    key "prompt"."""
    label: Annotated[tuple[tuple[int, ...], ...], tyro.conf.UseAppendAction] = ()
    """Classes, by number, for a model of classes: in place of prompts."""
    negative_prompt: str = ""  # What guidance leads away from, in place of the empty prompt.
    output: str = "samples.mp4"
    """A file ending in .mp4, .gif or .png (several clips share it, as a grid), or a directory that
    gets a file for each clip."""
    format: Literal["mp4", "gif", "png"] = "mp4"  # Of the files in a directory.
    scale: PositiveInt = 1  # Enlarges every pixel of the file by this factor.
    num: PositiveInt = 1  # Clips for each prompt.
    seed: int = 0  # Clip number i (from 0) is made from noise of seed + i.
    step: int | None = None  # Of the checkpoint; the newest if unset.
    codec: str | None = None
    """Folder of the autoencoder, for a model of latents. Unset: the one that the run's config names."""
    text_encoder: str | None = None
    """Folder of the text encoder, for a model that reads states. Unset: the one of the run's config."""
    config: str | None = None
    """The run's config file, if its model has conditioners of a module of your own."""
    sampling: tyro.conf.OmitArgPrefixes[SamplerConfig] = SamplerConfig()
    """By default as the run's config says (``sampling``)."""
    mesh: MeshConfig = MeshConfig()
    spread_parameters: bool = False
    """Shard parameters over mesh.context too: for models too large for one device, at the price of
    gathering them in every step."""

    @property
    def prompts(self) -> list[str | int]:
        """Texts, or numbers of classes, each ``num`` times."""
        prompts: list[str | int] = [one for some in (*self.prompt, *self.label) for one in some]
        prompts.extend(read_prompts(self.prompts_file) if self.prompts_file else ())
        return [prompt for prompt in prompts for _ in range(self.num)]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A run, and what was read of files."""

    pipeline: Pipeline
    frames: int
    height: int
    width: int
    fps: float
    media: dict[str, np.ndarray]
    """Of each file uint8 ``[t, h, w, 3]``, at the size and rate of the job."""

    @property
    def space(self) -> Space:
        return self.pipeline.space

    def count(self, length: Length, rule: Callable[[float, float], int]) -> int:
        """The frames nearest to a length by ``Space.new``, ``Space.gap`` or ``FrameGrid.nearest``."""
        return rule(seconds_of(length, self.fps), self.fps)

    def whole(self, length: Length | None) -> int | None:
        """The nearest ``1 + n stride`` frames; None for None."""
        return None if length is None else self.count(length, self.space.grid.nearest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Command):
    """Text to video, or with one frame to an image."""

    frames: Annotated[PositiveInt | None, _how_long] = None
    """As the run's config says if unset; 1 is a still image."""
    duration: Annotated[Length | None, _how_long] = None
    """2s: the nearest number of frames that the model can make."""
    height: PositiveInt | None = None
    """Unset: of the first file that is given, or else of the run's config; and so --width."""
    width: PositiveInt | None = None
    fps: PositiveFloat | None = None
    """Frames a second. Unset: those of the first clip that is given, or else of the run's config."""

    pictures: ClassVar[bool] = False
    """Whether files give their first frame alone."""

    @property
    def files(self) -> list[str]:
        """Pictures and clips to read; the first decides about size and rate."""
        named = (getattr(self, name, None) or () for name in ("video", "videos", "start"))
        return [file for one in named for file in ([one] if isinstance(one, str) else one)]

    def generation(self, job: Job, template: Request) -> Generation:
        """What is made for one prompt."""
        del job
        return modes.plain(template)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image(Text):
    """Image to video: a picture to begin with, to end with, or at any time."""

    image: str | None = None  # A picture to begin with.
    last_image: str | None = None  # A picture to end with.
    keyframe: Annotated[Texts, tyro.conf.arg(metavar="T=FILE [T=FILE ...]")] = ()
    """Pictures to be shown at some time: 12=FILE is frame 12, 1.5s=FILE after a second and a half."""
    noise: Noise = 0.0
    """Noise on the pictures: a little (0.02 to 0.1) frees motion that is frozen, and is not seen."""

    pictures: ClassVar[bool] = True

    @property
    def keyframes(self) -> list[tuple[str, str]]:
        """(time, file) of every picture; the time of the last is empty."""
        pairs = [one.partition("=") for some in self.keyframe for one in some]
        first = [("0", self.image)] if self.image else []
        last = [("", self.last_image)] if self.last_image else []
        return [*first, *((time, file) for time, _, file in pairs), *last]

    @property
    def files(self) -> list[str]:
        return [file for _, file in self.keyframes]

    def generation(self, job: Job, template: Request) -> Generation:
        images: dict[int, np.ndarray] = {}
        for time, file in self.keyframes:
            frame = round(seconds_of(time, job.fps, 0) * job.fps) if time else job.frames - 1
            if not 0 <= frame < job.frames or frame in images:
                raise InputError(
                    f"{time or 'last'}={file} is frame {frame} of a clip of {job.frames} at "
                    f"{job.fps:g} frames a second: give other frames, each once, or a longer clip."
                )
            images[frame] = job.media[file][0]
        return modes.image_to_video(job.space, template, images, self.noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video(Text):
    """Video to video: a clip is remade in another style. --frames or --duration of it are read."""

    video: str  # The clip.
    strength: Strength = 0.7  # How much of it is made anew, above 0 to 1.

    def clip(self, job: Job) -> np.ndarray:
        """What is read of the clip."""
        cut = self.frames is not None or self.duration is not None
        return job.media[self.video][: job.frames if cut else None]

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
    """Length of the part of each clip that the model is shown. Unset: what is left of --frames beside
    what is made."""
    noise: Noise = 0.0
    """Noise on that: a little (0.02 to 0.1) frees motion that is frozen, and is not seen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extend(Context):
    """New frames behind a clip, before it, or both."""

    video: str  # The clip.
    forward: Length | None = None  # Length of what follows.
    backward: Length | None = None  # Length of what comes before.

    def generation(self, job: Job, template: Request) -> Generation:
        if not (self.forward or self.backward):
            raise InputError("extend: give --forward LENGTH, --backward LENGTH or both.")
        forward, backward = (
            job.count(x, job.space.new) if x else 0 for x in (self.forward, self.backward)
        )
        clip, context = job.media[self.video], job.whole(self.context)
        return modes.extend(job.space, template, clip, forward, backward, context, self.noise)


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
        gap, context = job.count(self.gap, job.space.gap), job.whole(self.context)
        return modes.connect(job.space, template, first, second, gap, context, self.noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(Context):
    """The last frame is followed by the first: of text alone, or of a clip with --gap frames more."""

    video: str | None = None  # A clip to close. --duration of it is read.
    gap: Length = "0.5s"  # Length of what is made between its end and its beginning.

    def generation(self, job: Job, template: Request) -> Generation:
        window = job.pipeline.config.model.dit.window
        if self.video is not None:
            clip = job.media[self.video][: job.frames if self.duration else None]
            gap, context = job.count(self.gap, job.space.gap), job.whole(self.context)
            return modes.loop_clip(job.space, template, clip, gap, context, self.noise)
        if job.frames == 1 or window is not None:
            raise InputError(
                f"a loop of {job.frames} frame(s) from text, by a model whose local attention window "
                f"is {window} tokens: give more than 1 frame, or close a clip (--video FILE), because "
                "a window never reaches from the last frame to the first."
            )
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

    @property
    def prompts(self) -> list[str | int]:
        if self.storyboard is None:
            return super().prompts
        return list(read_storyboard(self.storyboard).prompts[:1] * self.num)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upscale(Command):
    """Super-resolution: clips at several times their size, by a model that was trained for it."""

    videos: tuple[str, ...]
    """Files, or a directory that samples were written to. A prompt for each, one for all, or none."""
    augmentation: NonNegativeFloat = 0.0
    """Noise level of the clips, up to what training did: 0 for clips as they were filmed, about 0.1 for
    what a model generated."""


MODES = Text, Image, Video, Extend, Connect, Loop, Interpolate, Long, Upscale
COMMANDS = {command.__name__.lower(): command for command in MODES}
