"""What a command line asks for besides text: images and clips as prompts, extensions, loops.

``ModeArguments`` are the options and refuse what contradicts itself; ``Plan`` says which files are to
be read, in what size and at what rate, and makes the edits of ``sampling.modes`` of them. Reading files
is the caller's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from dit_jax.config import VideoRun
from dit_jax.model import NoTextConfig
from dit_jax.sampling import (
    Edit,
    Request,
    Space,
    blend,
    connect,
    extend,
    image_to_video,
    interpolate,
    loop_clip,
    loop_text,
    plain,
    restyle,
)
from dit_jax.sampling.options import parse_length

RESTYLE_STRENGTH, BLEND_STRENGTH = 0.7, 0.9
GAP = "0.5s"
SOURCES = ("image", "video", "extend", "connect")


@dataclasses.dataclass(frozen=True)
class ModeArguments:
    """Lengths are seconds (``2s``) or frames (``16``)."""

    negative_prompt: str | None = None
    """What guidance leads away from, in place of the empty prompt."""
    duration: str | None = None
    """Length, in place of --frames: the nearest that the model can make. Of --video: what is read."""
    image: str | None = None
    """A picture to begin with."""
    last_image: str | None = None
    """A picture to end with."""
    keyframe: Annotated[tuple[str, ...], tyro.conf.arg(metavar="T=FILE [T=FILE ...]")] = ()
    """Pictures to be shown at some time: 12=FILE is frame 12, 1.5s=FILE after a second and a half."""
    video: str | None = None
    """A clip to restyle (--strength), to interpolate, or to close to a loop."""
    strength: float | None = None
    """How much of --video is made anew, above 0 to 1: unset, 0.7, and for --interpolate what suits the
    model. Of the middle of a --blend: 0.9."""
    interpolate: str | None = None
    """4x makes --video have four times the frames a second."""
    extend: str | None = None
    """A clip to go on with: --forward, --backward or both; or --long."""
    forward: str | None = None
    """Length of what follows."""
    backward: str | None = None
    """Length of what comes before."""
    connect: tuple[str, str] | None = None
    """Two clips to connect (--gap), or of which one turns into the other (--blend)."""
    gap: str | None = None
    """Length of what is made between two clips, or between the end and the beginning of a --loop of
    --video. Unset: 0.5s."""
    blend: str | None = None
    """Length of the end of the one clip and the beginning of the other that become one."""
    loop: bool = False
    """The last frame is followed by the first: --video is closed, or a loop made of text alone."""
    context: str | None = None
    """Length of the part of each clip that the model is shown, to extend, connect or close it. Unset:
    what is left of --frames beside what is made."""
    given_noise: float = 0.0
    """Noise on what is given: a little (0.02 to 0.1) frees motion that is frozen, and is not seen."""

    @property
    def source(self) -> str | None:
        """What is given: one of ``SOURCES``, or nothing but text."""
        given = [name for name in SOURCES if self._has(name)]
        return given[0] if given else None

    def _has(self, source: str) -> bool:
        if source == "image":
            return bool(self.image or self.last_image or self.keyframe)
        return getattr(self, source) is not None

    def check(self, sampling: Mapping[str, Any], long: bool = False) -> None:
        """Raises ``ValueError`` where options contradict each other, or those of ``sampling`` that are
        given. A ``long`` clip says elsewhere how far it goes."""
        sources = [name for name in SOURCES if self._has(name)]
        if len(sources) > 1:
            names = " and ".join(f"--{name}" for name in sources)
            raise ValueError(f"{names}: each makes a clip of its own, so give one of them.")
        for name, wanted, allowed in self._needs():
            if not allowed:
                raise ValueError(
                    f"--{name} says something of {wanted}: give that, or leave it out."
                )
        if self.extend is not None and not (self.forward or self.backward or long):
            raise ValueError("--extend: give --forward LENGTH, --backward LENGTH or both.")
        if self.gap is not None and self.blend is not None:
            raise ValueError(
                "--gap puts new frames between two clips and --blend mixes theirs: give one of them."
            )
        if self.loop and self.source not in (None, "video"):
            raise ValueError(
                f"--loop and --{self.source}: a loop is made of text alone or of --video. Give one."
            )
        if self.loop and self.interpolate is not None:
            raise ValueError("--loop and --interpolate: do one, and the other to its output.")
        frames = sampling.get("frames")
        if self.duration is not None and frames is not None:
            raise ValueError(
                f"--duration {self.duration} and --frames {frames} both say how long: give "
                "one of them."
            )
        for name in ("context", "blend"):
            if getattr(self, name) is not None and frames is not None and not long:
                raise ValueError(
                    f"--frames {frames} and --{name} {getattr(self, name)} both say how much "
                    "of a clip the model is shown: give one of them."
                )
        if self.negative_prompt is not None and sampling.get("cfg_scale") == 1:
            raise ValueError(
                "--negative-prompt: --cfg-scale 1 is no guidance. Raise it, or leave it."
            )
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"--strength {self.strength}: it is above 0 and at most 1.")
        if not 0 <= self.given_noise < 1:
            raise ValueError(f"--given-noise {self.given_noise}: it is at least 0 and below 1.")
        for name in ("duration", "forward", "backward", "gap", "blend", "context"):
            if (length := getattr(self, name)) is not None:
                parse_length(length, f"--{name}")
        _ = self.factor, self.keyframes

    def _needs(self) -> list[tuple[str, str, bool]]:
        """(option, what it belongs to, whether that is there) of the options that are given."""
        remade = self.video is not None and not self.loop or self.blend is not None
        between = self.connect is not None or self.video is not None and self.loop
        shown = self.extend is not None or between and self.blend is None
        contexts = "--extend, --connect with --gap, or --video with --loop"
        belongs = {
            "strength": ("--video (not of a loop) or --blend", remade),
            "interpolate": ("--video", self.video is not None),
            "forward": ("--extend", self.extend is not None),
            "backward": ("--extend", self.extend is not None),
            "gap": ("--connect or --video with --loop", between),
            "blend": ("--connect", self.connect is not None),
            "context": (contexts, shown),
            "given_noise": (f"--image, {contexts}", shown or self._has("image")),
            "duration": ("text, images or --video", self.source in (None, "image", "video")),
        }
        return [
            (name.replace("_", "-"), *of) for name, of in belongs.items() if getattr(self, name)
        ]

    @property
    def factor(self) -> int | None:
        """Of --interpolate."""
        if self.interpolate is None:
            return None
        found = re.fullmatch(r"([0-9]+)x?", self.interpolate)
        if found is None or int(found[1]) < 2:
            raise ValueError(f"--interpolate {self.interpolate}: give a whole number from 2x on.")
        return int(found[1])

    @property
    def keyframes(self) -> list[tuple[str, str]]:
        """(time, file) of every picture, the first and last ones among them."""
        found = [("0", self.image)] if self.image else []
        for one in self.keyframe:
            time, sign, file = one.partition("=")
            if not sign or not file:
                raise ValueError(f"--keyframe {one}: give T=FILE, as 12=a.png or 1.5s=a.png.")
            parse_length(time, "--keyframe", least=0)
            found.append((time, file))
        return found + ([("-1", self.last_image)] if self.last_image else [])

    @property
    def files(self) -> list[str]:
        """What is to be read, in the order of options; the first decides about size and rate."""
        pictures = [file for _, file in self.keyframes]
        clips = [one for one in (self.video, self.extend) if one]
        return list(dict.fromkeys([*pictures, *clips, *(self.connect or ())]))


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a file's pictures are: ``height`` and ``width`` as displayed, and frames a second; ``still``
    of one frame, whose rate means nothing."""

    height: int
    width: int
    fps: float
    still: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is made, in which size and at which rate, and how long."""

    given: ModeArguments
    height: int
    width: int
    fps: float
    """Of what is given and made; interpolation multiplies it."""
    frames: int | None
    """That were asked for; unset, as many as the run's config says, or a clip has."""
    default_frames: int

    @property
    def output_fps(self) -> float:
        return self.fps * (self.given.factor or 1)

    def likes(self, requests: Sequence[Request], space: Space) -> list[Request]:
        """Plain requests with this plan's size, length and rate."""
        t, h, w = space.codec.strides
        frames = self._frames(space)
        size = {
            "frames": space.latents(frames),
            "height": self.height // h,
            "width": self.width // w,
        }
        return [dataclasses.replace(one, **size, fps=self.fps / t) for one in requests]

    def _frames(self, space: Space) -> int:
        if self.frames is not None:
            return self.frames
        if self.given.duration is not None:
            return space.whole(self._seconds(self.given.duration), self.fps)
        return self.default_frames

    def _seconds(self, length: str) -> float:
        number, seconds = parse_length(length, "")
        return number if seconds else number / self.fps

    def context(self, space: Space) -> int | None:
        """Frames of a clip that the model is shown; None where that was not asked for."""
        if self.given.context is None:
            return None
        return space.whole(self._seconds(self.given.context), self.fps)

    def beginning(self, media: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """What a long clip begins with; None where that is text alone."""
        file = self.given.extend or self.given.image
        return None if file is None else media[file]

    def edits(
        self, likes: Sequence[Request], space: Space, media: Mapping[str, np.ndarray]
    ) -> list[Edit]:
        """One for each request; ``media`` are the files' frames uint8 ``[t, h, w, 3]``.

        Raises:
            ValueError: where a clip is too short, or a time lies outside.
        """
        make = self._maker(space, media)
        return [make(like) for like in likes]

    def _maker(self, space: Space, media: Mapping[str, np.ndarray]) -> Callable[[Request], Edit]:
        given, noise, context = self.given, self.given.given_noise, self.context(space)

        def new(length: str | None) -> int:
            return space.new(self._seconds(length), self.fps) if length else 0

        if given.source == "image":
            images = self._images(space, media)
            return lambda like: image_to_video(space, like, images, noise)
        if given.extend is not None:
            added, clip = (new(given.forward), new(given.backward)), media[given.extend]
            return lambda like: extend(space, like, clip, *added, context, noise)
        gap = space.gap(self._seconds(given.gap or GAP), self.fps)
        if given.connect is not None:
            first, second = (media[file] for file in given.connect)
            if given.blend is None:
                return lambda like: connect(space, like, first, second, gap, context, noise)
            overlap = space.whole(self._seconds(given.blend), self.fps)
            strength = given.strength or BLEND_STRENGTH
            return lambda like: blend(space, like, first, second, overlap, strength)
        if given.video is None:
            return (lambda like: loop_text(space, like)) if given.loop else plain
        clip = self._cut(media[given.video], space)
        if given.loop:
            return lambda like: loop_clip(space, like, clip, gap, context, noise)
        if (factor := given.factor) is not None:
            return lambda like: interpolate(space, like, clip, factor, given.strength)
        return lambda like: restyle(space, like, clip, given.strength or RESTYLE_STRENGTH)

    def _cut(self, clip: np.ndarray, space: Space) -> np.ndarray:
        asked = self.given.duration is not None or self.frames is not None and not self.given.loop
        return clip[: self._frames(space)] if asked else clip

    def _images(self, space: Space, media: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
        last, images = self._frames(space) - 1, {}
        for time, file in self.given.keyframes:
            frame = last if time == "-1" else round(self._seconds_or_zero(time) * self.fps)
            if frame > last:
                raise ValueError(
                    f"--keyframe {time}={file} is frame {frame} of a clip of {last + 1} at "
                    f"{self.fps:g} frames a second: give an earlier time, or a longer --duration."
                )
            if frame in images:
                raise ValueError(f"frame {frame} is given twice ({file}): leave one out.")
            images[frame] = media[file][0]
        return images

    def _seconds_or_zero(self, time: str) -> float:
        return 0.0 if float(time.rstrip("s")) == 0 else self._seconds(time)


def make_plan(
    given: ModeArguments, asked: Mapping[str, Any], config: VideoRun, shapes: Sequence[Shape]
) -> Plan:
    """The size and rate that are asked for, or the first file's, or the config's.

    Args:
        asked: the options of ``sampling`` that are given.
        shapes: of ``given.files``, in that order.

    Raises:
        ValueError: where a picture is smaller than a patch, or the model has no use for an option.
    """
    made, codec, patch = config.sampling, config.codec, config.model.patch
    if given.negative_prompt is not None:
        if isinstance(config.model.text, NoTextConfig):
            raise ValueError("--negative-prompt: the model reads no prompts.")
        if not made.guidance.active:
            raise ValueError("--negative-prompt: the run's cfg_scale is 1, no guidance. Raise it.")
    height, width = made.height, made.width
    if shapes:
        multiples = codec.h * patch.h, codec.w * patch.w
        height, width = _size(
            shapes[0], asked.get("height"), asked.get("width"), multiples, given.files[0]
        )
    _check_latents(config, made.frames, height, width)
    fps = made.fps
    if shapes and "fps" not in asked and given.source != "image" and not shapes[0].still:
        fps = shapes[0].fps
    if made.frames == 1 and given.duration is None:
        if given.loop and given.source is None:
            raise ValueError("1 frame is a still image, which has no time: give more --frames.")
        if given.source == "image":
            raise ValueError(
                "1 frame, which is given: nothing is to be made. Give more --frames, or --video with "
                "--strength to remake a picture."
            )
    if given.loop and given.source is None and config.model.dit.band is not None:
        raise ValueError(
            f"--loop of text: most layers see {config.model.dit.band} tokens to either side (model.dit."
            "band), never from the last frame to the first. Close a clip instead (--video FILE --loop)."
        )
    return Plan(given, height, width, fps, asked.get("frames"), made.frames)


def _check_latents(config: VideoRun, frames: int, height: int, width: int) -> None:
    """Raises ``ValueError``, in pixels, where the patches of latents do not divide a clip; of pixels
    the patch itself says so."""
    codec, patch = config.codec, config.model.patch
    by = codec.t * patch.t
    if codec.t > 1 and (frames < 1 or (frames - 1) % by):
        low = 1 + max(frames - 1, 0) // by * by
        raise ValueError(
            f"{frames} frames: give 1 + {by}n, the codec's {codec.t} by the patch's {patch.t}. The "
            f"nearest are {low} and {low + by}."
        )
    for name, side, stride, part in (
        ("height", height, codec.h, patch.h),
        ("width", width, codec.w, patch.w),
    ):
        by = stride * part
        if stride > 1 and (side < by or side % by):
            low = max(side // by, 1) * by
            raise ValueError(
                f"{name} {side} is not a multiple of {by}, the codec's {stride} by the patch's {part}. "
                f"The nearest are {low} and {low + by}."
            )


def _size(
    shape: Shape, height: int | None, width: int | None, multiples: tuple[int, int], file: str
) -> tuple[int, int]:
    """What is asked for; of what is not, the picture's own at multiples, in its aspect ratio."""
    sides = (shape.height, shape.width)
    if height is not None and width is not None:
        return height, width
    scale = 1.0
    if height is not None or width is not None:
        scale = height / shape.height if height else (width or 0) / shape.width
    fitted = [
        math.floor(side * scale / by + 1e-6) * by for side, by in zip(sides, multiples, strict=True)
    ]
    if 0 in fitted:
        raise ValueError(
            f"{file!r} shows {sides[0]} x {sides[1]} pixels, less than one patch of {multiples[0]} x "
            f"{multiples[1]}: give --height and --width, and it is enlarged."
        )
    return height or fitted[0], width or fitted[1]
