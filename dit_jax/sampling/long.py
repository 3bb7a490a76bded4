"""Clips of any length: windows that slide over the latents, each with the end of the last as history.

The first window is a plain clip. Every other begins with ``history`` latents of the one before, at a
small noise cap: against drift, because the model then doesn't take them for flawless, and against
freezing. Known latents are never replaced. Latents pass from window to window as they are, and are
decoded once, as one clip, at the end; one compiled step serves all windows.

The positions of every window begin at 0, as in training: rotary embeddings know differences alone, and
absolute ones are then never beyond those that were learned. With a causal codec the first latent of a
clip holds one frame. That of a later window does not, but it is history, which is read and not made;
to the decoder only the long clip's own first is a first one.

A storyboard says which prompt is in force when. It is a file of lines in the order of time::

    0s: a red ball rolls to the left
    3.5s: the ball stops
    1:05: night falls

A time is seconds (``3.5s`` or ``3.5``), minutes and seconds or hours, minutes and seconds
(``0:01:05``). Empty lines and lines that begin with # are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dit_jax.files import InputError, MiB, read_bytes
from dit_jax.model import ModelConfig, PatchConfig, unpatchify
from dit_jax.sampling.media import to_uint8
from dit_jax.sampling.request import KnownLatents, Request, Space, check_request
from dit_jax.sampling.sampler import Generator, clips_at_once, make_rows, progress_bar
from dit_jax.types import Codec, Params

NOISE = 0.05
"""Noise cap of the history by default."""
LINE = re.compile(r"(?:(\d+):(?=\d+:\d))?(?:(\d+):(?=\d))?(\d+(?:\.\d+)?)\s*s?\s*:\s*(\S.*)")


# --- storyboards ---


@dataclasses.dataclass(frozen=True)
class Storyboard:
    """Prompts, each from its time (in seconds) to the next one's; the first is at 0."""

    times: tuple[float, ...]
    prompts: tuple[str, ...]

    def at(self, seconds: float) -> str:
        """The prompt in force then; the first before 0."""
        return self.prompts[max(int(np.searchsorted(self.times, seconds, "right")) - 1, 0)]


def read_storyboard(path: str | Path) -> Storyboard:
    """Reads a file of lines ``time: prompt``; see the module."""
    text = read_bytes(path, MiB, "the storyboard").decode("utf-8-sig", errors="replace")
    board: dict[float, str] = {}
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
    lines = [(i, line) for i, line in lines if line and not line.startswith("#")]
    for number, line in lines or [(1, "")]:
        match = LINE.fullmatch(line)
        hours, minutes, seconds, prompt = match.groups() if match else (None, None, "inf", "")
        time = 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)
        fine = minutes is None or float(seconds) < 60 and (hours is None or int(minutes) < 60)
        if match is None or not fine or (time <= max(board) if board else time != 0):
            raise InputError(
                f'{path}:{number}: {line[:60]!r} is no next line "time: prompt", such as "3.5s: a red '
                'ball" or "1:05: a red ball": the first is at 0s, times rise, and minutes and seconds '
                "are below 60."
            )
        board[time] = prompt
    return Storyboard(tuple(board), tuple(board.values()))


# --- windows ---


@dataclasses.dataclass(frozen=True)
class Window:
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
    assert frames >= 1 and 1 <= history < length, (frames, length, history)
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
    storyboard: Storyboard,
    start: float = 0.0,
    head: int = 0,
) -> list[Request]:
    """The request of every window, still without its history.

    A window's prompt is the one in force in the middle of its new frames. The first has the template's
    seed, so that it is the clip which the template alone makes. The first window begins at ``start``
    seconds of the storyboard, with ``head`` known latent frames.
    """

    def request(number: int, window: Window) -> Request:
        state = np.random.SeedSequence((template.seed % 2**32, number)).generate_state(1)
        return dataclasses.replace(
            template,
            prompt=storyboard.at(start + window.middle(head) / template.fps),
            frames=window.length,
            seed=int(state[0]) if number else template.seed,
            frame_fields=_sliced(template.frame_fields, window, template.time_stride),
            pixel_fields=_sliced(template.pixel_fields, window, 1),
        )

    return [request(number, window) for number, window in enumerate(windows)]


def _sliced(fields: Mapping[str, np.ndarray], window: Window, stride: int) -> dict[str, np.ndarray]:
    """A window's part of fields whose frames are ``stride`` to a latent frame.

    Its first latent frame counts as a clip's first, which holds one frame: the last of those that it
    stands for in the long clip. A last window that ends behind the clip repeats the clip's end.
    """
    at = np.arange(window.start * stride, (window.stop - 1) * stride + 1)
    return {name: values[np.minimum(at, len(values) - 1)] for name, values in fields.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class LongPlan:
    """A long clip's length and windows, and the clip that it goes on from."""

    frames: int
    """Of pixels, the start among them."""
    windows: tuple[Window, ...]
    start: np.ndarray | None = None
    """uint8 ``[t, h, w, 3]``: a picture or clip with which it begins."""
    context: int = 0
    """Frames at the end of the start that the first window is given."""
    head: int = 0
    """These in latent frames."""

    @property
    def before(self) -> int:
        """Frames before the first window."""
        return 0 if self.start is None else len(self.start) - self.context

    def requests(
        self, templates: Sequence[Request], storyboard: Storyboard | None, fps: float
    ) -> list[list[Request]]:
        """For each clip the requests of its windows; without a storyboard a clip keeps its prompt.

        ``fps`` counts frames of pixels: the storyboard's times begin with the start.
        """
        begin, head = self.before / fps, self.head
        boards = [storyboard or Storyboard((0.0,), (one.prompt,)) for one in templates]
        middles = [begin + w.middle(head) / templates[0].fps for w in self.windows]
        known, times = (self.before + self.context) / fps, [*boards[0].times, math.inf]
        for time, end in itertools.pairwise(times):
            # A prompt that is over before the start ends is not missed.
            if storyboard and end > known and not any(time <= at < end for at in middles):
                near = sorted(sorted(middles, key=lambda x: abs(x - time))[:3])
                raise InputError(
                    f"the storyboard's prompt at {time:g} s is in force in no window. A window has "
                    "the prompt of the middle of its new frames; the nearest of these are at "
                    f"{', '.join(f'{x:.2f}' for x in near)} s. Change its time, give a longer "
                    "--length or --history, or shorter windows (--frames)."
                )
        return [
            window_requests(one, self.windows, board, begin, head)
            for one, board in zip(templates, boards, strict=True)
        ]

    def heads(self, space: Space, count: int) -> list[np.ndarray] | None:
        """The latents with which each of ``count`` clips begins; None without a start."""
        return None if self.start is None else [space.encode(self.start[-self.context :])] * count

    def assemble(self, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The start and the decoded parts without what the start showed already."""
        left = self.context
        if self.start is not None:
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
    if start is not None:
        whole = 1 + (len(start) - 1) // space.stride * space.stride
        context = min(known, whole) if context is None else context
    count = 0 if start is None else len(start)
    if not 0 < known < window or not (context or 0) <= min(count, window - 1) or frames <= count:
        raise InputError(
            f"--length is {frames} frames in windows (--frames) of {window} with a --history of "
            f"{known}, from a clip of {count} with a --context of {context or 0}: a window has at "
            f"least {1 + space.stride} frames, history and context are shorter than it, and the clip "
            "is longer than its start."
        )
    head = space.grid.latents(context) if context else 0
    plan = LongPlan(frames, (), start, context or 0, head)
    # Enough latents for the last frame: the first holds one, and each other a stride.
    latents = 1 + -(-(frames - plan.before - 1) // space.codec.strides[0])
    windows = plan_windows(latents, length, space.grid.latents(known))
    return dataclasses.replace(plan, windows=tuple(windows))


# --- sampling ---


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
    check_request(clips[0][0], model)
    for count in (windows[-1].history or 1, 1 if heads is None else len(heads[0])):
        model.patch.grid(count, model.patch.h, model.patch.w)  # a token is known as a whole
    # What later windows look like, so that the first, which lacks a history, has their form.
    form = [_with_history(clips[0][0], w.history, None, noise, model) for w in windows[:2]]
    batches = -(-len(clips) // clips_at_once(generator, len(clips), mesh))
    past, out = (None if heads is None else np.stack(heads)), []
    total = len(windows) * batches * generator.config.steps
    with progress_bar(total, f"{len(windows)} windows", progress) as bar:
        for number, window in enumerate(windows):
            known = 0 if past is None else past.shape[1]
            requests = [
                _with_history(clip[number], known, None if past is None else past[i], noise, model)
                for i, clip in enumerate(clips)
            ]
            rows = make_rows(generator, params, requests, model, mesh, bar.update, form)
            latents = np.stack(
                [
                    unpatchify(model.patch, row[: one.num_tokens(model.patch)], *one.size)
                    for one, row in zip(requests, rows, strict=True)
                ]
            )
            if past is not None:
                latents[:, :known] = past  # without the noise that the model saw on it
            out.append(latents[:, window.history :])
            if number + 1 < len(windows):
                past = latents[:, -windows[number + 1].history :]
    return list(np.concatenate(out, 1))


def _with_history(
    request: Request, count: int, past: np.ndarray | None, noise: float, model: ModelConfig
) -> Request:
    """A window's request, whose first ``count`` latents are ``past`` at the cap ``noise``."""
    clean = np.zeros((*request.size, model.patch.channels), np.float32)
    caps = np.ones(request.frames, np.float32)
    caps[:count] = noise
    clean[:count] = 0 if past is None else past
    return dataclasses.replace(request, known=KnownLatents(clean, caps))


def decode_long(codec: Codec, latents: np.ndarray, frames: int) -> Iterator[np.ndarray]:
    """The first ``frames`` frames of latents ``[t, h, w, c]``, decoded as one clip: uint8
    ``[n, h, w, 3]``, some at a time."""
    left = frames
    for part in codec.decode_parts(latents):
        if left <= 0:
            return
        yield to_uint8(part[:left])
        left -= len(part)
