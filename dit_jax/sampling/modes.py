"""Every mode of generation, as known latents with noise caps, and clips of any length.

A mode is a function from clips (uint8 ``[t, h, w, 3]``) to a ``Generation``: requests whose latents
have noise caps (0 is kept, 1 is generated, between them a latent is remade from that much noise), and
what turns the sampled clips into the one that was asked for. No model, solver or step knows of modes.
All take ``template``, the request of a plain clip: its prompt, seed, size, and frames a second.

Frames that are known come out as they went in: they are pasted over what the model and codec made of
them. docs/modes.md has an example of each mode.

A long clip is made in windows that slide over its latents. The first is a plain clip. Every other
begins with ``history`` latents of the one before, at a small noise cap: against drift, because the
model then doesn't take them for flawless, and against freezing. Known latents are never replaced.
Latents pass from window to window as they are, and are decoded once, as one clip, at the end; one
compiled step serves all windows.

The positions of every window begin at 0, as in training: rotary embeddings know differences alone, and
absolute ones are then never beyond those that were learned. With a causal codec the first latent of a
clip holds one frame. That of a later window does not, but it is history, which is read and not made;
to the decoder only the long clip's own first is a first one.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dit_jax.files import InputError, MiB, read_bytes, refuse_if
from dit_jax.model import Conditioner, PatchConfig
from dit_jax.sampling.media import to_uint8
from dit_jax.sampling.request import KnownLatents, Request, Space, check_request, filled
from dit_jax.sampling.sampler import Decode, Generator, decode_loop, make_latents
from dit_jax.types import Codec, Params

NOISE = 0.05  # the noise cap of a window's history by default
LINE = re.compile(r"((?:\d+:){0,2}\d+(?:\.\d+)?)\s*s?\s*:\s*(\S.*)")  # "1:05: night falls"
Clip = np.ndarray
"""uint8 ``[t, h, w, 3]``."""


class Generation(NamedTuple):
    """Requests to sample, and how their clips become the one that was asked for."""

    requests: tuple[Request, ...]
    finish: Callable[[Sequence[Clip]], Clip] = lambda clips: clips[0]


def make_clips(
    generator: Generator,
    params: Params,
    generations: Sequence[Generation],
    mesh: Mesh,
    progress: bool = False,
    decode: Decode | None = None,
) -> list[Clip]:
    """The clips of generations of any modes and sizes (in latents, if ``decode`` turns these into
    pixels), which share batches; the same on every process."""
    requests = [request for one in generations for request in one.requests]
    name = "sampling" if progress else ""
    latents = iter(make_latents(generator, params, requests, mesh, name))

    def next_clip(loop: bool) -> Clip:
        clip = next(latents)
        if decode is not None:
            clip = decode_loop(decode, clip) if loop else decode(clip)
        return to_uint8(clip)

    return [one.finish([next_clip(each.loop) for each in one.requests]) for one in generations]


def plain(template: Request) -> Generation:
    """Text to video, or with one frame to an image."""
    return Generation((template,))


def image_to_video(
    space: Space,
    template: Request,
    images: Mapping[int, np.ndarray],
    noise: float = 0.0,
    conditioners: Mapping[str, Conditioner] | None = None,
) -> Generation:
    """Some frames are known: ``{0: first, -1: last}`` or others, as uint8 ``[h, w, 3]``.

    An image that is not the first frame stands still for the frames of its token, because a token is
    kept as a whole. A little ``noise`` (0.02 to 0.1) frees motion that is frozen. A model whose
    ``conditioners`` read images is shown them so.
    """
    numbers, part = range(space.grid.frames(template.frames)), space.patch.t
    frames = {numbers[number]: image for number, image in images.items()}
    pasted, request = {at: image[None] for at, image in frames.items()}, template
    for name, one in (conditioners or {}).items():
        request = one.with_images(name, request, space, frames) or request
    if request is not template:
        return _pasting(request, pasted)
    # Token 0 holds frame 0 alone, and token j the frames up to j stride.
    tokens = {-(-frame // space.stride): image for frame, image in frames.items()}
    full = len(tokens) < len(frames) or len(tokens) > (len(numbers) - 1) // space.stride
    message = (
        f"frames {', '.join(map(str, sorted(frames)))} are known of a clip of {len(numbers)}: give at "
        f"most one for a token of {space.stride} frames, and leave a token to generate (--frames)."
    )
    refuse_if([(full, message)])
    parts = [
        (slice(1 + (token - 1) * part, 1 + token * part), space.still(image))
        if token
        else (slice(1), space.encode(image[None]))
        for token, image in tokens.items()
    ]
    return _pasting(_known(space.patch, template, parts, noise), pasted)


def restyle(space: Space, template: Request, clip: Clip, strength: float) -> Generation:
    """Video to video: the clip is remade from noise of ``strength`` (SDEdit, Meng et al. 2021), where 0
    gives the clip back and 1 forgets it."""
    # The last frame stands still until its token is full, and is cut again.
    clean = space.encode(filled(clip, space.stride))
    known = KnownLatents(clean, np.full(len(clean), strength, np.float32))
    request = replace(template, frames=len(clean), known=known)
    return Generation((request,), lambda clips: clips[0][: len(clip)])


def extend(
    space: Space,
    template: Request,
    clip: Clip,
    forward: int = 0,
    backward: int = 0,
    context: int | None = None,
    noise: float = 0.0,
) -> Generation:
    """``forward`` new frames behind a clip, ``backward`` before it: multiples of ``space.stride``.

    The model sees ``context`` frames of the clip, next to the new ones: ``1 + n stride``. Unset: what
    the new ones leave of the template's, at least a token.
    """
    # Neither end can be cut out of the clip's own latents, of which the first holds one frame: each is
    # encoded as a clip.
    none, requests = clip[:0], []
    if forward:
        requests.append(_between(space, template, [clip, none], forward, context, noise)[0])
    if backward:
        requests.append(_between(space, template, [none, clip], backward, context, noise)[0])

    def finish(clips: Sequence[Clip]) -> Clip:
        after = clips[0][len(clips[0]) - forward :]
        return np.concatenate([clips[-1][:backward], clip, after])

    return Generation(tuple(requests), finish)


def connect(
    space: Space,
    template: Request,
    first: Clip,
    second: Clip,
    gap: int,
    context: int | None = None,
    noise: float = 0.0,
) -> Generation:
    """One clip, ``gap`` (``n stride - 1``) frames that lead from it to the other, and the other.

    The model sees ``context`` frames (``1 + n stride``) of each clip; unset, half of what the gap
    leaves of the template's.
    """
    # The last of gap + 1 new frames is the second clip's first.
    request, seen = _between(space, template, [first, second], gap + 1, context, noise)
    new = slice(seen, seen + gap)
    return Generation((request,), lambda clips: np.concatenate([first, clips[0][new], second]))


def loop_clip(space: Space, template: Request, clip: Clip, *gap: Any, **more: Any) -> Generation:
    """The clip, and frames that lead from its end back to its beginning: ``gap`` of them, with a
    ``context`` and ``noise`` as of ``connect``."""
    requests, finish = connect(space, template, clip, clip, *gap, **more)
    return Generation(requests, lambda clips: finish(clips)[: -len(clip)])


def loop_text(space: Space, template: Request) -> Generation:
    """A seamless loop from text alone: time is a circle, which every step cuts elsewhere.

    Of ``1 + n`` frames the last is left out if frames share tokens: the first follows it.
    """
    if space.stride > 1:
        return plain(replace(template, loop=True, frames=template.frames - 1))
    # All frames are alike, and the first is at time 0 as always.
    return plain(replace(template, loop=True, times=np.arange(template.frames)))


def blend(
    space: Space, template: Request, first: Clip, second: Clip, overlap: int, strength: float = 0.9
) -> Generation:
    """One clip turns into the other while both go on: their latents are mixed over ``overlap`` frames
    (``1 + n stride``), and remade from noise that is ``strength`` in the middle and 0 at both ends."""
    count, shorter, part = space.grid.latents(overlap), min(len(first), len(second)), space.patch.t
    least = 1 + 2 * space.stride
    message = f"an overlap of {overlap} frames: give {least} (less has no middle) to {shorter}."
    refuse_if([(overlap > shorter or count < 2 + part, message)])
    share = np.linspace(0, 1, 1 + (count - 1) // part)  # by token, then by latent
    share = np.repeat(share, [1] + [part] * (len(share) - 1)).astype(np.float32)
    weight = share[:, None, None, None]
    tail, head = first[-overlap:], second[:overlap]
    clean = (1 - weight) * space.encode(tail) + weight * space.encode(head)
    known = KnownLatents(clean, strength * np.sin(np.pi * share) * (share < 1))
    # At both ends the cap is 0: of one frame at the first, of a token at the last.
    ends = {0: tail[:1], overlap - space.stride: head[-space.stride :]}
    requests, middle = _pasting(replace(template, frames=count, known=known), ends)
    start, end = first[:-overlap], second[overlap:]
    return Generation(requests, lambda clips: np.concatenate([start, middle(clips), end]))


def interpolate(
    space: Space, template: Request, clip: Clip, factor: int, strength: float | None = None
) -> Generation:
    """``factor`` times the frames: every ``factor``-th is known, ``template.fps`` being the clip's.

    The others are remade from noise of ``strength`` on a blend of their neighbours. Unset: 1, and 0.4
    if frames share tokens.
    """
    few = factor < 2 or len(clip) < 2
    refuse_if([(few, f"{len(clip)} frames, {factor} times: give at least 2 of both.")])
    count = 1 + (len(clip) - 1) * factor
    # Linear between frames; the last one stands still until its token is full.
    at = np.arange(count + (1 - count) % space.stride) / factor
    low = np.minimum(at.astype(int), len(clip) - 2)
    part = (np.minimum(at, len(clip) - 1) - low)[:, None, None, None]
    mixed = np.rint((1 - part) * clip[low] + part * clip[low + 1]).astype(np.uint8)
    clean = space.encode(mixed)
    strength = (1.0 if space.stride == 1 else 0.4) if strength is None else strength
    caps = np.full(len(clean), strength, np.float32)
    # Latents of several frames cannot be taken apart: of a causal codec the first alone is known.
    caps[slice(0, count, factor) if space.codec.strides[0] == 1 else slice(1)] = 0
    rate, known = template.fps * factor, KnownLatents(clean, caps)
    request = replace(template, frames=len(clean), fps=rate, known=known)
    requests, finish = _pasting(request, {i * factor: clip[i : i + 1] for i in range(len(clip))})
    return Generation(requests, lambda clips: finish(clips)[:count])


def _pasting(request: Request, pasted: Mapping[int, Clip]) -> Generation:
    """A request over whose clip frames are pasted, by the number of their first."""

    def finish(clips: Sequence[Clip]) -> Clip:
        out = clips[0].copy()
        for start, frames in pasted.items():
            out[start : start + len(frames)] = frames
        return out

    return Generation((request,), finish)


def _between(
    space: Space, template: Request, clips: list[Clip], new: int, context: int | None, noise: float
) -> tuple[Request, int]:
    """``new`` generated frames (the last of which the second clip may begin with) between two clips, of
    which one may be empty, and how many frames of each the model sees."""
    lengths = [len(clip) for clip in clips if len(clip)]
    if context is None:
        left = (space.grid.frames(template.frames) - 1 - new) // len(lengths) // space.stride
        context = 1 + min(max(left, 1), (min(lengths) - 1) // space.stride) * space.stride
    message = f"--context is {context} frames, of clips of at least {min(lengths)}: give less."
    refuse_if([(context > min(lengths), message)])
    before, after = clips[0][-context:], clips[1][:context]
    parts, known = [], (context - 1) * len(lengths)
    if len(before):
        start = space.encode(before)
        parts.append((slice(len(start)), start))
    if len(after):
        end = space.at_end(after)
        parts.append((slice(-len(end), None), end))
        if space.stands_still(after):
            known += space.stride  # behind the new frames, the last of which is the picture itself
    template = replace(template, frames=space.grid.latents(1 + new + known))
    return _known(space.patch, template, parts, noise), context


def _known(
    patch: PatchConfig, template: Request, parts: Sequence[tuple[slice, np.ndarray]], noise: float
) -> Request:
    """The template with known latents in some places, at the cap ``noise``."""
    clean = np.zeros((*template.size, patch.channels), np.float32)
    caps = np.ones(template.frames, np.float32)
    for where, latents in parts:
        clean[where], caps[where] = latents, noise
    # What shares a token with generated latents is put back at that token's own noise level.
    tokens = caps[1:].reshape(-1, patch.t)
    tokens[(tokens < 1) & (tokens.max(1, keepdims=True) == 1)] = 0
    return replace(template, known=KnownLatents(clean, caps))


# --- Long clips ---


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
        time = sum(part * 60**i for i, part in enumerate(reversed(clock)))
        later = time > max(board) if board else time == 0
        if match is None or not later or max(clock[1:], default=0) >= 60:
            raise InputError(
                f"{path}:{number}: {line[:60]!r} is no line 'time: prompt', as '3.5s: a ball' or "
                "'1:05: a ball': the first is at 0s, times rise, and minutes and seconds are below 60."
            )
        board[time] = match[2]
    return Storyboard(tuple(board), tuple(board.values()))


def check_storyboard(
    board: Storyboard, windows: Sequence[Window], fps: float, begin: float = 0.0, shown: float = 0.0
) -> None:
    """Raises ``InputError`` for a prompt that no window of ``fps`` latent frames a second has, unless
    it is over at ``shown`` seconds, when what is known of the clip ends; windows begin at ``begin``."""
    middles = [begin + window.middle / fps for window in windows]
    for time, end in itertools.pairwise([*board.times, math.inf]):
        near = sorted(sorted(middles, key=lambda at: abs(at - time))[:3])
        unused = end > shown and not any(time <= at < end for at in middles)
        message = (
            f"the storyboard's prompt at {time:g} s is in force in the middle of no window's new frames"
            f" ({', '.join(f'{at:.2f}' for at in near)} s): change it, --length, --history or --frames."
        )
        refuse_if([(unused, message)])


class Window(NamedTuple):
    """A part of a long clip, in its latent frames."""

    start: int
    length: int
    history: int
    """Latent frames at the beginning that are known: the end of the window before, or in the first
    window what the clip begins with."""

    @property
    def middle(self) -> float:
        """The middle of its new latent frames."""
        return self.start + (self.history + self.length - 1) / 2


def plan_windows(
    space: Space,
    frames: int,
    window: int,
    history: int | None = None,
    start: int = 0,
    context: int | None = None,
) -> list[Window]:
    """Windows of ``window`` frames that cover a clip of ``frames``, from the end of its ``start`` on.
    The last may end behind the clip: what is made there is cut.

    Args:
        history: frames that windows have in common, ``1 + n stride``. Unset: about a third.
        start: frames of the picture or clip with which the clip begins.
        context: those at the start's end that the first window is shown. Unset: as many as a history.
    """
    grid, stride = space.grid, space.stride
    length, tokens = grid.latents(window), (window - 1) // stride
    if history is None:
        history = 1 + min(round(tokens / 3), tokens - 1) * stride
    if context is None:
        context = min(history, grid.whole(start)) if start else 0
    wrong = not 0 < history < window or context > min(start, window - 1) or frames <= start
    message = (
        f"--length {frames}, windows (--frames) of {window}, --history {history}, from a clip of "
        f"{start} with a --context of {context}: a window has at least {1 + stride} frames, history "
        "and context are shorter than it, and the clip is longer than its start."
    )
    refuse_if([(wrong, message)])
    # Enough latents for the last frame: the first holds one, and each other a stride.
    count = 1 + -(-(frames - start + context - 1) // space.codec.strides[0])
    shared, head = grid.latents(history), grid.latents(context) if context else 0
    starts = [0, *range(length - shared, count - shared, length - shared)]
    return [Window(at, length, shared if at else head) for at in starts]


def window_requests(
    template: Request,
    windows: Sequence[Window],
    board: Storyboard | None = None,
    begin: float = 0.0,
) -> list[Request]:
    """The request of every window, still without its history. Its prompt is the one in force in the
    middle of its new frames, if the first window begins at ``begin`` seconds of the storyboard."""
    requests = []
    for number, window in enumerate(windows):
        state = np.random.SeedSequence((template.seed % 2**32, number)).generate_state(1)
        at = begin + window.middle / template.fps
        request = replace(
            template,
            prompt=board.at(at) if board else template.prompt,
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
    at = window.start * stride + np.arange((window.length - 1) * stride + 1)
    return {name: values[np.minimum(at, len(values) - 1)] for name, values in fields.items()}


def make_long(
    generator: Generator,
    params: Params,
    clips: Sequence[Sequence[Request]],
    windows: Sequence[Window],
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
    template, model, history = clips[0][0], generator.model.config, windows[-1].history
    check_request(template, model)
    patch = model.patch
    none = np.zeros((len(clips), 0, *template.size[1:], patch.channels), np.float32)
    out = none if heads is None else np.asarray(heads, np.float32)  # [clips, t, h, w, c]
    for count in (history, out.shape[1]):
        patch.grid(count or 1, patch.h, patch.w)  # a token is known as a whole

    def known(request: Request, past: np.ndarray) -> Request:
        return _known(patch, request, [(slice(len(past)), past)], noise)

    # What later windows look like, so that the first, which lacks a history, has their form.
    blank = np.zeros((history, *out.shape[2:]), np.float32)
    form = [known(template, blank[:n]) for n in (0, history)]
    for number, window in enumerate(windows):
        past = out[:, window.start :]
        requests = [known(clip[number], one) for clip, one in zip(clips, past, strict=True)]
        name = f"window {number + 1} of {len(windows)}" if progress else ""
        latents = np.stack(make_latents(generator, params, requests, mesh, name, form))
        # The past stays as it was, without the noise that the model saw on it.
        out = np.concatenate([out, latents[:, past.shape[1] :]], 1)
    return list(out)


def decode_long(
    codec: Codec,
    latents: np.ndarray,
    frames: int,
    start: np.ndarray | None = None,
    context: int = 0,
) -> Iterator[Clip]:
    """The first ``frames`` frames of latents ``[t, h, w, c]``, decoded as one clip: uint8
    ``[n, h, w, 3]``, some at a time. With a ``start`` that comes before them, and of which they repeat
    the last ``context`` frames: the start, and what is new."""
    if start is not None:
        yield start
    count = 0
    for part in codec.decode_parts(latents):
        if count >= frames:
            return
        new = part[max(context - count, 0) : frames - count]
        if len(new):
            yield to_uint8(new)
        count += len(part)
