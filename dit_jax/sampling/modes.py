"""Every mode of generation, as known latents with noise caps.

A mode is a function from clips (uint8 ``[t, h, w, 3]``) to a ``Generation``: requests whose latents
have noise caps (0 is kept, 1 is generated, between them a latent is remade from that much noise), and
what turns the sampled clips into the one that was asked for. No model, solver or step knows of modes.
All take ``template``, the request of a plain clip: its prompt, seed, size, and frames a second.

Frames that are known come out as they went in: they are pasted over what the model and codec made of
them. docs/modes.md has an example of each mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dit_jax.files import refuse_if
from dit_jax.sampling.request import KnownLatents, Request, Space, filled
from dit_jax.sampling.sampler import Generator, make_clips
from dit_jax.types import Params

Clip = np.ndarray
"""uint8 ``[t, h, w, 3]``."""


class Generation(NamedTuple):
    """Requests to sample, and how their clips become the one that was asked for."""

    requests: tuple[Request, ...]
    finish: Callable[[Sequence[Clip]], Clip]


def make_generations(
    generator: Generator, params: Params, generations: Sequence[Generation], *rest: Any, **more: Any
) -> list[Clip]:
    """The clips of generations of any modes, which share batches; the rest is as of ``make_clips``."""
    requests = [request for one in generations for request in one.requests]
    clips = iter(make_clips(generator, params, requests, *rest, **more))
    return [one.finish([next(clips) for _ in one.requests]) for one in generations]


def plain(template: Request) -> Generation:
    """Text to video, or with one frame to an image."""
    return Generation((template,), lambda clips: clips[0])


def image_to_video(
    space: Space, template: Request, images: Mapping[int, np.ndarray], noise: float = 0.0
) -> Generation:
    """Some frames are known: ``{0: first, -1: last}`` or others, as uint8 ``[h, w, 3]``.

    An image that is not the first frame stands still for the frames of its token, because a token is
    kept as a whole. A little ``noise`` (0.02 to 0.1) frees motion that is frozen.
    """
    numbers, part = range(space.grid.frames(template.frames)), space.patch.t
    frames = {numbers[number]: image for number, image in images.items()}
    # Token 0 holds frame 0 alone, and token j the frames up to j stride.
    tokens = {-(-frame // space.stride): image for frame, image in frames.items()}
    full = len(tokens) < len(frames) or len(tokens) > (len(numbers) - 1) // space.stride
    message = (
        f"frames {', '.join(map(str, sorted(frames)))} are known of a clip of {len(numbers)}, of which "
        f"each token holds {space.stride}: give at most one for a token, and leave a token to generate "
        "(more --frames; to remake a picture, use the mode video with --strength)."
    )
    refuse_if([(full, message)])
    parts = [
        (slice(1 + (token - 1) * part, 1 + token * part), space.still(image))
        if token
        else (slice(1), space.encode(image[None]))
        for token, image in tokens.items()
    ]
    request = _known(space, template, parts, noise)
    return _pasting(request, {at: image[None] for at, image in frames.items()})


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
    requests = []
    if forward:
        seen = _context(space, template, len(clip), forward, context)
        requests.append(_between(space, template, clip[-seen:], clip[:0], forward, noise))
    if backward:
        seen = _context(space, template, len(clip), backward, context)
        requests.append(_between(space, template, clip[:0], clip[:seen], backward, noise))

    def finish(clips: Sequence[Clip]) -> Clip:
        after = clips[0][-forward:] if forward else clip[:0]
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
    shorter = min(len(first), len(second))
    # The last of gap + 1 new frames is the second clip's first.
    seen = _context(space, template, shorter, gap + 1, context, parts=2)
    request = _between(space, template, first[-seen:], second[:seen], gap + 1, noise)
    return Generation(
        (request,), lambda clips: np.concatenate([first, clips[0][seen : seen + gap], second])
    )


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
    message = (
        f"an overlap of {overlap} frames of clips of at least {shorter}: it is not longer than the "
        f"clips, and has at least {1 + 2 * space.stride} frames, or it has no middle."
    )
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
    return Generation(
        requests, lambda clips: np.concatenate([first[:-overlap], middle(clips), second[overlap:]])
    )


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


def _context(
    space: Space, template: Request, length: int, new: int, context: int | None, parts: int = 1
) -> int:
    """How many frames of a clip the model sees beside ``new`` ones."""
    if context is None:
        left = (space.grid.frames(template.frames) - 1 - new) // parts // space.stride
        context = 1 + min(max(left, 1), (length - 1) // space.stride) * space.stride
    message = f"--context is {context} frames, of clips of at least {length}: give less."
    refuse_if([(context > length, message)])
    return context


def _between(
    space: Space, template: Request, before: Clip, after: Clip, new: int, noise: float
) -> Request:
    """``new`` generated frames (the last of which ``after`` may begin with) between known ones."""
    parts, known = [], sum(max(len(clip) - 1, 0) for clip in (before, after))
    if len(before):
        start = space.encode(before)
        parts.append((slice(len(start)), start))
    if len(after):
        end = space.at_end(after)
        parts.append((slice(-len(end), None), end))
        if space.stands_still(after):
            known += space.stride  # behind the new frames, the last of which is the picture itself
    template = replace(template, frames=space.grid.latents(1 + new + known))
    return _known(space, template, parts, noise)


def _known(
    space: Space, template: Request, parts: Sequence[tuple[slice, np.ndarray]], noise: float
) -> Request:
    """The template with known latents in some places, at the cap ``noise``."""
    clean = np.zeros((*template.size, space.patch.channels), np.float32)
    caps = np.ones(template.frames, np.float32)
    for where, latents in parts:
        clean[where], caps[where] = latents, noise
    # What shares a token with generated latents is put back at that token's own noise level.
    tokens = caps[1:].reshape(-1, space.patch.t)
    tokens[(tokens < 1) & (tokens.max(1, keepdims=True) == 1)] = 0
    return replace(template, known=KnownLatents(clean, caps))
