"""Clips of any length: windows that slide over the latents, each with the end of the last as history.

The first window is a plain clip. Every other begins with ``history`` latents of the one before, at a
small noise cap: against drift, because the model then doesn't take them for flawless, and against
freezing. Known latents are never replaced. Latents pass from window to window as they are, and are
decoded once, as one clip, at the end; one compiled step serves all windows.

The positions of every window begin at 0, as in training: rotary embeddings know differences alone, and
absolute ones are then never beyond those that were learned. With a causal codec the first latent of a
clip holds one frame. That of a later window does not, but it is history, which is read and not made;
to the decoder only the long clip's own first is a first one.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from dit_jax.files import InputError, MiB, read_bytes, refuse_if
from dit_jax.model import ModelConfig, PatchConfig
from dit_jax.sampling.media import to_uint8
from dit_jax.sampling.request import KnownLatents, Request, Space, check_request
from dit_jax.sampling.sampler import Generator, make_latents
from dit_jax.types import Codec, Params

NOISE = 0.05  # the noise cap of the history by default
LINE = re.compile(r"((?:\d+:){0,2}\d+(?:\.\d+)?)\s*s?\s*:\s*(\S.*)")  # "1:05: night falls"


class Storyboard(NamedTuple):
    """Prompts, each from its time (in seconds) to the next one's; the first is at 0."""

    times: tuple[float, ...]
    prompts: tuple[str, ...]

    def at(self, seconds: float) -> str:
        """The prompt in force then; the first before 0."""
        return self.prompts[max(bisect.bisect_right(self.times, seconds) - 1, 0)]


def read_storyboard(path: str | Path) -> Storyboard:
    """Reads lines ``time: prompt``; those that are empty or begin with # are left out."""
    text = read_bytes(path, MiB, "the storyboard").decode("utf-8-sig", errors="replace")
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
    board: dict[float, str] = {}
    for number, line in [one for one in lines if one[1] and one[1][0] != "#"] or [(1, "")]:
        match = LINE.fullmatch(line)
        clock = [float(part) for part in match[1].split(":")] if match else [math.inf]
        time = 0.0
        for part in clock:
            time = 60 * time + part
        later = time > max(board) if board else time == 0
        if match is None or not later or max(clock[1:], default=0) >= 60:
            raise InputError(
                f"{path}:{number}: {line[:60]!r} is no line 'time: prompt', as '3.5s: a ball' or "
                "'1:05: a ball': the first is at 0s, times rise, and minutes and seconds are below 60."
            )
        board[time] = match[2]
    return Storyboard(tuple(board), tuple(board.values()))


class Window(NamedTuple):
    """A part of a long clip, in its latent frames."""

    start: int
    length: int
    history: int
    """Latent frames at the beginning that windows before have made."""

    @property
    def stop(self) -> int:
        return self.start + self.length

    def middle(self, head: int = 0) -> float:
        """The middle of its new latent frames, which in a clip's first window begin behind its head."""
        return (self.start + (self.history or head) + self.stop - 1) / 2


def plan_windows(frames: int, length: int, history: int) -> list[Window]:
    """Windows of one length that cover ``frames`` latent frames, with ``history`` in common.

    The last may end behind the clip: what is made there is cut.
    """
    assert 1 <= history < length, (length, history)
    windows = [Window(0, length, 0)]
    while windows[-1].stop < frames:
        windows.append(Window(windows[-1].stop - history, length, history))
    return windows


def default_history(length: int, patch: PatchConfig) -> int:
    """About a third of a window of ``length`` latent frames, in whole tokens."""
    tokens = patch.grid(length, patch.h, patch.w)[0] - 1
    return 1 + min(round(tokens / 3), tokens - 1) * patch.t


def window_requests(
    template: Request,
    windows: Sequence[Window],
    board: Storyboard,
    start: float = 0.0,
    head: int = 0,
) -> list[Request]:
    """The request of every window, still without its history: its prompt is the one in force in the
    middle of its new frames. The first window begins at ``start`` seconds of the storyboard, with
    ``head`` known latent frames."""
    requests = []
    for number, window in enumerate(windows):
        state = np.random.SeedSequence((template.seed % 2**32, number)).generate_state(1)
        request = dataclasses.replace(
            template,
            prompt=board.at(start + window.middle(head) / template.fps),
            frames=window.length,
            # The first window is the clip that the template alone makes.
            seed=int(state[0]) if number else template.seed,
            frame_fields=_slice(template.frame_fields, window, template.time_stride),
            pixel_fields=_slice(template.pixel_fields, window, 1),
        )
        requests.append(request)
    return requests


def _slice(fields: Mapping[str, np.ndarray], window: Window, stride: int) -> dict[str, np.ndarray]:
    """A window's part of fields that have ``stride`` frames to a latent frame."""
    # Its first latent frame counts as a clip's first, which holds one frame: the last of those that it
    # stands for in the long clip. A last window that ends behind the clip repeats the clip's end.
    at = np.arange(window.start * stride, (window.stop - 1) * stride + 1)
    return {name: values[np.minimum(at, len(values) - 1)] for name, values in fields.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class LongPlan:
    """A long clip's length and windows, and the clip that it goes on from."""

    frames: int  # of pixels, the start among them
    windows: Sequence[Window]
    start: np.ndarray  # uint8 [t, h, w, 3]: a picture or clip with which it begins, or no frames
    context: int  # frames at the end of the start that the first window is given
    head: int  # these in latent frames

    @property
    def before(self) -> int:
        """Frames of the start before the first window."""
        return len(self.start) - self.context

    def requests(
        self, templates: Sequence[Request], storyboard: Storyboard | None, fps: float
    ) -> list[list[Request]]:
        """For each clip the requests of its windows; without a storyboard a clip keeps its prompt. The
        storyboard's times begin with the start, of ``fps`` frames a second."""
        begin, end_of_start = self.before / fps, len(self.start) / fps
        middles = [begin + w.middle(self.head) / templates[0].fps for w in self.windows]
        times = storyboard.times if storyboard else ()
        for time, end in itertools.pairwise([*times, math.inf]):
            near = sorted(sorted(middles, key=lambda at: abs(at - time))[:3])
            # A prompt that is over before the start ends is not missed.
            unused = end > end_of_start and not any(time <= at < end for at in middles)
            message = (
                f"the storyboard's prompt at {time:g} s is in force in the middle of no window's new "
                f"frames (the nearest: {', '.join(f'{at:.2f}' for at in near)} s): change its time, or "
                "give a longer --length or --history or shorter windows (--frames)."
            )
            refuse_if([(unused, message)])
        boards = [storyboard or Storyboard((0.0,), (one.prompt,)) for one in templates]
        return [
            window_requests(one, self.windows, board, begin, self.head)
            for one, board in zip(templates, boards, strict=True)
        ]

    def heads(self, space: Space, count: int) -> list[np.ndarray] | None:
        """The latents with which each of ``count`` clips begins; None without a start."""
        return [space.encode(self.start[-self.context :])] * count if self.context else None

    def assemble(self, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The start and the decoded parts without what the start showed already."""
        left = self.context
        if len(self.start):
            yield self.start
        for part in parts:
            if len(part) > left:
                yield part[left:]
            left = max(left - len(part), 0)


def plan_long(
    space: Space,
    frames: int,
    window: int,
    history: int | None = None,
    start: np.ndarray | None = None,
    context: int | None = None,
) -> LongPlan:
    """A clip of ``frames`` in windows of ``window``, all counted in frames of pixels.

    Args:
        history: of a window, ``1 + n stride``. Unset: about a third of it.
        start: a picture or clip uint8 ``[t, h, w, 3]`` that it begins with.
        context: frames of the start's end that the first window is given. Unset: as many as a history.
    """
    length = space.grid.latents(window)
    known = space.grid.frames(default_history(length, space.patch)) if history is None else history
    start = np.zeros((0, 1, 1, 3), np.uint8) if start is None else start
    count = len(start)
    if context is None:
        context = min(known, space.grid.whole(count)) if count else 0
    wrong = not 0 < known < window or context > min(count, window - 1) or frames <= count
    message = (
        f"--length {frames}, windows (--frames) of {window}, --history {known}, from a clip of {count} "
        f"with a --context of {context}: a window has at least {1 + space.stride} frames, history and "
        "context are shorter than it, and the clip is longer than its start."
    )
    refuse_if([(wrong, message)])
    # Enough latents for the last frame: the first holds one, and each other a stride.
    latents = 1 + -(-(frames - count + context - 1) // space.codec.strides[0])
    windows = plan_windows(latents, length, space.grid.latents(known))
    head = space.grid.latents(context) if context else 0
    return LongPlan(frames, windows, start, context, head)


def make_long(
    generator: Generator,
    params: Params,
    clips: Sequence[Sequence[Request]],
    windows: Sequence[Window],
    model: ModelConfig,
    mesh: Mesh,
    noise: float = NOISE,
    heads: Sequence[np.ndarray] | None = None,
    progress: bool = False,
) -> list[np.ndarray]:
    """The latents ``[t, h, w, c]`` of long clips of one size, to the end of the last window.

    Args:
        clips: of each clip the requests of all windows (see ``window_requests``).
        noise: cap of the history: 0 keeps it exactly, 0.02 to 0.1 is usual.
        heads: latents with which the clips begin, in place of the history that the first window lacks.
    """
    plain, patch, history = clips[0][0], model.patch, windows[-1].history
    check_request(plain, model)
    past = np.stack([np.zeros((0, *plain.size[1:], patch.channels))] * len(clips))
    past = past if heads is None else np.stack(heads)  # [clips, t, h, w, c]
    for known in (history or 1, past.shape[1] or 1):
        patch.grid(known, patch.h, patch.w)  # a token is known as a whole
    # What later windows look like, so that the first, which lacks a history, has their form.
    none = np.zeros((history, *past.shape[2:]))
    form = [_with_history(plain, none[:known], noise) for known in (0, history)]
    out = []
    for number, window in enumerate(windows):
        requests = [
            _with_history(clip[number], one, noise) for clip, one in zip(clips, past, strict=True)
        ]
        name = f"window {number + 1} of {len(windows)}" if progress else ""
        latents = np.stack(make_latents(generator, params, requests, model, mesh, name, form))
        latents[:, : past.shape[1]] = past  # without the noise that the model saw on it
        out.append(latents[:, window.history :])
        past = latents[:, -history:]
    return list(np.concatenate(out, 1))


def _with_history(request: Request, past: np.ndarray, noise: float) -> Request:
    """A window's request, whose first latents are ``past`` at the cap ``noise``."""
    clean = np.zeros((*request.size, past.shape[-1]), np.float32)
    caps = np.ones(request.frames, np.float32)
    clean[: len(past)], caps[: len(past)] = past, noise
    return dataclasses.replace(request, known=KnownLatents(clean, caps))


def decode_long(codec: Codec, latents: np.ndarray, frames: int) -> Iterator[np.ndarray]:
    """The first ``frames`` frames of latents ``[t, h, w, c]``, decoded as one clip: uint8
    ``[n, h, w, 3]``, some at a time."""
    for part in codec.decode_parts(latents):
        if frames <= 0:
            return
        yield to_uint8(part[:frames])
        frames -= len(part)
