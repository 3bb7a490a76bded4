"""Every mode of generation, as known latents with noise caps.

A mode is a function from clips (uint8 ``[t, h, w, 3]``) to a ``Generation``: requests whose latents
have noise caps (0 is kept, 1 is generated, between them a latent is remade from that much noise), and
what turns the sampled clips into the one that was asked for. No model, solver or step knows of modes.
All take ``template``, the request of a plain clip: its prompt, seed, size, and frames a second::

    space = Space(codec, config.model.patch)
    template = Request("a red ball rolls away", frames=9, height=32, width=32, fps=8.0, seed=0)
    generation = image_to_video(space, template, {0: photograph})
    (video,) = make_generations(generator, params, [generation], config.model, mesh)

Frames that are known come out as they went in: they are pasted over what the model and codec made of
them. docs/modes.md has an example of each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from dit_jax.files import InputError
from dit_jax.model import ModelConfig
from dit_jax.sampling.request import KnownLatents, Request, Space, filled
from dit_jax.sampling.sampler import Decode, Generator, make_clips
from dit_jax.types import Params

Clips = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """Requests to sample, and how their clips become the one that was asked for."""

    requests: tuple[Request, ...]
    finish: Callable[[Clips], np.ndarray]
    """From the clips uint8 ``[t, h, w, 3]`` of the requests to the result."""


def make_generations(
    generator: Generator,
    params: Params,
    generations: Sequence[Generation],
    model: ModelConfig,
    mesh: Mesh,
    progress: bool = False,
    decode: Decode | None = None,
) -> list[np.ndarray]:
    """The clips of generations of any modes, which share batches; see ``make_clips``."""
    requests = [request for one in generations for request in one.requests]
    clips = iter(make_clips(generator, params, requests, model, mesh, progress, decode))
    return [one.finish([next(clips) for _ in one.requests]) for one in generations]


def plain(template: Request) -> Generation:
    """Text to video, or with one frame to an image."""
    return Generation((template,), lambda clips: clips[0])


def image_to_video(
    space: Space, template: Request, images: Mapping[int, np.ndarray], noise: float = 0.0
) -> Generation:
    """Some frames are known: ``{0: first, -1: last}``, or key frames anywhere.

    An image that is not the first frame stands still for the frames of its token, because a token is
    kept as a whole.

    Args:
        images: uint8 ``[h, w, 3]`` by the number of their frame; from the end, if below 0.
        noise: cap of known tokens; a little (0.02 to 0.1) frees motion that is frozen.
    """
    count, part = space.grid.frames(template.frames), space.patch.t
    clean, caps = _all_generated(space, template)
    frames = {number + count if number < 0 else number: image for number, image in images.items()}
    tokens = [math.ceil(frame / space.stride) for frame in frames]
    assert all(0 <= frame < count for frame in frames), (list(frames), count)
    for token, image in zip(tokens, frames.values(), strict=True):
        known = slice(max(1 + (token - 1) * part, 0), 1 + token * part)
        clean[known] = space.still(image) if token else space.encode(image[None])
        caps[known] = noise
    if len(set(tokens)) < len(tokens) or frames and (caps < 1).all():
        raise InputError(
            f"frames {', '.join(map(str, sorted(frames)))} are known of a clip of {count}, of which "
            f"each token holds {space.stride}: give at most one for a token, and leave a token to "
            "generate (more --frames). (To remake a picture, use the mode video with --strength.)"
        )
    return _pasting(template, clean, caps, {at: image[None] for at, image in frames.items()})


def restyle(space: Space, template: Request, clip: np.ndarray, strength: float) -> Generation:
    """Video to video: the clip is remade from noise of ``strength`` (SDEdit, Meng et al. 2021), where 0
    gives the clip back and 1 forgets it.

    If the last frames do not fill a token, the last one stands still until they do, and is cut again.
    """
    assert 0 < strength <= 1, strength
    clean = space.encode(filled(clip, space.stride))
    caps = np.full(len(clean), strength, np.float32)
    request = dataclasses.replace(template, frames=len(clean), known=KnownLatents(clean, caps))
    return Generation((request,), lambda clips: clips[0][: len(clip)])


def extend(
    space: Space,
    template: Request,
    clip: np.ndarray,
    forward: int = 0,
    backward: int = 0,
    context: int | None = None,
    noise: float = 0.0,
) -> Generation:
    """New frames behind a clip, before it, or both.

    Args:
        forward: their number, a multiple of ``space.stride``; and ``backward``.
        context: frames of the clip, next to the new ones, that the model sees, ``1 + n stride``. Unset:
            what the new ones leave of the template's, at least a token.
    """
    assert forward + backward > 0 and not (forward % space.stride or backward % space.stride)
    requests, contexts = [], {}
    for name, new in (("forward", forward), ("backward", backward)):
        if new:
            count = contexts[name] = _context(space, template, len(clip), new, context)
            ends = (clip[-count:], None) if name == "forward" else (None, clip[:count])
            requests.append(_between(space, template, *ends, new, noise))

    def finish(clips: Clips) -> np.ndarray:
        out = dict(zip(contexts, clips, strict=True))
        before = out["backward"][:backward] if backward else clip[:0]
        after = out["forward"][contexts["forward"] :] if forward else clip[:0]
        return np.concatenate([before, clip, after])

    return Generation(tuple(requests), finish)


def connect(
    space: Space,
    template: Request,
    first: np.ndarray,
    second: np.ndarray,
    gap: int,
    context: int | None = None,
    noise: float = 0.0,
) -> Generation:
    """One clip, ``gap`` (``n stride - 1``) frames that lead from it to the other, and the other.

    ``context`` frames (``1 + n stride``) of each clip are seen by the model.
    """
    assert gap >= 1 and not (gap + 1) % space.stride, gap
    shorter = min(len(first), len(second))
    # Each clip gets half of what the gap leaves.
    start = _context(space, template, shorter, gap + 1, context, parts=2)
    request = _between(space, template, first[-start:], second[:start], gap + 1, noise)
    return Generation(
        (request,), lambda clips: np.concatenate([first, clips[0][start : start + gap], second])
    )


def loop_clip(
    space: Space,
    template: Request,
    clip: np.ndarray,
    gap: int,
    context: int | None = None,
    noise: float = 0.0,
) -> Generation:
    """The clip, and ``gap`` frames that lead from its end back to its beginning; see ``connect``."""
    twice = connect(space, template, clip, clip, gap, context, noise)
    return Generation(twice.requests, lambda clips: twice.finish(clips)[: -len(clip)])


def loop_text(space: Space, template: Request) -> Generation:
    """A seamless loop from text alone: time is a circle, which every step cuts elsewhere.

    Of ``1 + n`` frames the last is left out if frames share tokens: the first follows it.
    """
    if space.stride == 1:
        # All frames are alike, and the first is at time 0 as always.
        times = np.arange(template.frames)
        return plain(dataclasses.replace(template, loop=True, times=times))
    return plain(dataclasses.replace(template, loop=True, frames=template.frames - 1))


def blend(
    space: Space,
    template: Request,
    first: np.ndarray,
    second: np.ndarray,
    overlap: int,
    strength: float = 0.9,
) -> Generation:
    """One clip turns into the other while both go on: their latents are mixed over ``overlap`` frames
    (``1 + n stride``), and remade from noise that is ``strength`` in the middle and 0 at both ends."""
    assert 0 < strength <= 1, strength
    count, shorter = space.grid.latents(overlap), min(len(first), len(second))
    if overlap > shorter or count < 2 + space.patch.t:
        raise InputError(
            f"an overlap of {overlap} frames of clips of at least {shorter}: it is not longer than the "
            f"clips, and has at least {1 + 2 * space.stride} frames, or it has no middle."
        )
    share = np.linspace(0, 1, 1 + (count - 1) // space.patch.t)  # by token, then by latent
    share = np.repeat(share, [1] + [space.patch.t] * (len(share) - 1)).astype(np.float32)
    weight = share[:, None, None, None]
    tail, head = first[-overlap:], second[:overlap]
    clean = (1 - weight) * space.encode(tail) + weight * space.encode(head)
    caps = strength * np.sin(np.pi * share) * (share < 1)
    ends = {0: tail[:1], overlap - space.stride: head[-space.stride :]}
    middle = _pasting(dataclasses.replace(template, frames=count), clean, caps, ends)

    def finish(clips: Clips) -> np.ndarray:
        return np.concatenate([first[:-overlap], middle.finish(clips), second[overlap:]])

    return Generation(middle.requests, finish)


def interpolate(
    space: Space, template: Request, clip: np.ndarray, factor: int, strength: float | None = None
) -> Generation:
    """``factor`` times the frames: every ``factor``-th is known, ``template.fps`` being the clip's.

    The others are remade from noise of ``strength`` on a blend of their neighbours. Unset: 1, and 0.4
    if frames share tokens.
    """
    if factor < 2 or len(clip) < 2:
        raise InputError(f"{len(clip)} frames, {factor} times: give at least 2 of both.")
    strength = (1.0 if space.stride == 1 else 0.4) if strength is None else strength
    assert 0 < strength <= 1, strength
    count = 1 + (len(clip) - 1) * factor
    whole = 1 + -(-(count - 1) // space.stride) * space.stride  # fills the last token
    clean = space.encode(_linear(clip, factor, whole))
    caps = np.full(len(clean), strength, np.float32)
    # Latents of several frames cannot be taken apart: of a causal codec the first alone is known.
    caps[slice(0, count, factor) if space.codec.strides[0] == 1 else slice(0, 1)] = 0
    request = dataclasses.replace(
        template, frames=len(clean), fps=template.fps * factor, known=KnownLatents(clean, caps)
    )

    def finish(clips: Clips) -> np.ndarray:
        out = clips[0][:count].copy()
        out[::factor] = clip
        return out

    return Generation((request,), finish)


def _linear(clip: np.ndarray, factor: int, count: int) -> np.ndarray:
    """``count`` frames, ``factor`` to each step, linear between frames; the last one stays."""
    at = np.minimum(np.arange(count) / factor, len(clip) - 1)
    low = np.minimum(at.astype(int), len(clip) - 2)
    part = (at - low)[:, None, None, None]
    return np.rint((1 - part) * clip[low] + part * clip[low + 1]).astype(np.uint8)


def _all_generated(space: Space, template: Request) -> tuple[np.ndarray, np.ndarray]:
    shape = (*template.size, space.patch.channels)
    return np.zeros(shape, np.float32), np.ones(template.frames, np.float32)


def _pasting(
    template: Request, clean: np.ndarray, caps: np.ndarray, pasted: Mapping[int, np.ndarray]
) -> Generation:
    """A request with known latents, over whose clip frames are pasted by the number of their first."""

    def finish(clips: Clips) -> np.ndarray:
        out = clips[0].copy()
        for start, frames in pasted.items():
            out[start : start + len(frames)] = frames
        return out

    return Generation((dataclasses.replace(template, known=KnownLatents(clean, caps)),), finish)


def _context(
    space: Space, template: Request, length: int, new: int, context: int | None, parts: int = 1
) -> int:
    """How many frames of a clip the model sees beside ``new`` ones."""
    if context is None:
        left = (space.grid.frames(template.frames) - 1 - new) // parts // space.stride
        context = 1 + min(max(left, 1), (length - 1) // space.stride) * space.stride
    if context > length:
        raise InputError(
            f"--context is {context} frames, of clips of at least {length}: give less."
        )
    return context


def _between(
    space: Space,
    template: Request,
    before: np.ndarray | None,
    after: np.ndarray | None,
    new: int,
    noise: float,
) -> Request:
    """``new`` generated frames (the last of which ``after`` may begin with) between known ones."""
    start = space.encode(before) if before is not None else None
    end = space.at_end(after) if after is not None else None
    known = sum(len(part) - 1 for part in (before, after) if part is not None)
    if after is not None and space.stands_still(after):
        known += space.stride  # behind the new frames, the last of which is the picture itself
    template = dataclasses.replace(template, frames=space.grid.latents(1 + new + known))
    clean, caps = _all_generated(space, template)
    if start is not None:
        clean[: len(start)], caps[: len(start)] = start, noise
    if end is not None:
        clean[-len(end) :], caps[-len(end) :] = end, noise
    # What shares a token with generated latents is put back at that token's own noise level.
    tokens = caps[1:].reshape(-1, space.patch.t)
    tokens[(tokens < 1) & (tokens.max(1, keepdims=True) == 1)] = 0
    return dataclasses.replace(template, known=KnownLatents(clean, caps))
