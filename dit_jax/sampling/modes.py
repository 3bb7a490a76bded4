"""Every mode of generation: what is given becomes requests, and what is made becomes the clip.

A mode is a function from clips (uint8 ``[t, h, w, 3]``) to an ``Edit``: requests whose latents have
noise ceilings (DESIGN section 3), and what is done with the clips that are made for them. No model,
solver or step knows of any of them. All take ``like``, the request of a plain clip: its prompt, seed,
size, and frames a second. ``docs/modes.md`` has an example of each::

    space = Space(codec, config.model.patch)
    like = Request("a red ball rolls away", frames=9, height=32, width=32, fps=8.0, seed=0)
    edit = image_to_video(space, like, {0: photograph})
    (video,) = make_edits(generator, params, [edit], config.model, mesh, decode=codec.decode)

Frames that are given come out as they were given: they are pasted over what the model (and the codec)
made of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from dit_jax.model import ModelConfig
from dit_jax.sampling.clips import Decode, make_clips
from dit_jax.sampling.condition import Request
from dit_jax.sampling.generate import Generator
from dit_jax.sampling.given import Given
from dit_jax.sampling.space import Space, filled
from dit_jax.types import Params

Clips = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """What is to be made, and how it becomes what was asked for."""

    requests: tuple[Request, ...]
    finish: Callable[[Clips], np.ndarray]
    """From the clips uint8 ``[t, h, w, 3]`` of the requests to the one that was asked for."""


def make_edits(
    generator: Generator,
    params: Params,
    edits: Sequence[Edit],
    model: ModelConfig,
    mesh: Mesh,
    progress: bool = False,
    decode: Decode | None = None,
) -> list[np.ndarray]:
    """The clips of edits of any modes, which share batches; see ``make_clips``."""
    requests = [request for edit in edits for request in edit.requests]
    clips = iter(make_clips(generator, params, requests, model, mesh, progress, decode))
    return [edit.finish([next(clips) for _ in edit.requests]) for edit in edits]


def plain(like: Request) -> Edit:
    """Text to video, or with 1 frame to an image: nothing is given."""
    return Edit((like,), lambda clips: clips[0])


def image_to_video(
    space: Space, like: Request, images: Mapping[int, np.ndarray], noise: float = 0.0
) -> Edit:
    """Some frames are given: ``{0: first, -1: last}``, or key frames anywhere.

    An image that is not the first frame stands still for the frames of its token, for a token is held
    as a whole.

    Args:
        images: uint8 ``[h, w, 3]`` by the number of their frame; from the end, if below 0.
        noise: ceiling of what is given; a little (0.02 to 0.1) frees motion that is frozen.

    Raises:
        ValueError: where a frame does not exist, or two share a token, or nothing is left to be made.
    """
    count, part = space.frames(like.frames), space.patch.t
    clean, ceilings = _nothing(space, like)
    pasted: dict[int, np.ndarray] = {}
    tokens: dict[int, int] = {}
    for asked, image in images.items():
        frame = asked + count if asked < 0 else asked
        if not 0 <= frame < count:
            raise ValueError(f"frame {asked} of a clip of {count}: give one of 0 to {count - 1}.")
        token = math.ceil(frame / space.stride)
        if token in tokens:
            raise ValueError(
                f"frames {tokens[token]} and {frame} share a token of {space.stride} frames: give "
                "frames that are further apart, or leave one out."
            )
        _check_size(space, like, image[None])
        tokens[token] = frame
        held = slice(max(1 + (token - 1) * part, 0), 1 + token * part)
        clean[held] = space.still(image) if token else space.encode(image[None])
        ceilings[held] = noise
        pasted[frame] = image[None]
    if images and (ceilings < 1).all():
        raise ValueError(
            f"all {len(tokens)} tokens along time are given: nothing is to be made. Give fewer "
            "pictures, or ask for more frames."
        )
    return _edit(like, clean, ceilings, pasted)


def restyle(space: Space, like: Request, clip: np.ndarray, strength: float) -> Edit:
    """Video to video: the clip is remade from so much noise (SDEdit, Meng et al. 2021).

    Where the last frames do not fill a token, the model is shown the last one again until they do.

    Args:
        strength: 0 gives the clip back, 1 forgets it.
    """
    _check_size(space, like, clip)
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength}: it is above 0 and at most 1 (0.6 is usual).")
    count = len(clip)
    clean = space.encode(filled(clip, space.stride))
    ceilings = np.full(len(clean), strength, np.float32)
    request = dataclasses.replace(like, frames=len(clean), given=Given(clean, ceilings))
    return Edit((request,), lambda clips: clips[0][:count])


def extend(
    space: Space,
    like: Request,
    clip: np.ndarray,
    forward: int = 0,
    backward: int = 0,
    context: int | None = None,
    noise: float = 0.0,
) -> Edit:
    """New frames behind a clip, before it, or both.

    Args:
        forward: their number, a multiple of ``space.stride``; and ``backward``.
        context: frames of the clip, next to them, that are given, ``1 + n stride``. Unset: what they
            leave of ``like``'s, at least a token.

    Raises:
        ValueError: for other numbers, or a clip that is shorter.
    """
    _check_size(space, like, clip)
    if min(forward, backward) < 0 or not forward + backward:
        raise ValueError(
            f"{forward} frames forward, {backward} backward: at least 0, and not both 0."
        )
    requests, held = [], {}
    for name, new in (("forward", forward), ("backward", backward)):
        if new % space.stride:
            raise ValueError(f"{new} frames {name}: give a multiple of {space.stride}.")
        if new:
            held[name] = _context(space, like, len(clip), new, context)
            last, first = clip[-held[name] :], clip[: held[name]]
            parts = (last, None) if name == "forward" else (None, first)
            requests.append(_between(space, like, *parts, new, noise))

    def finish(clips: Clips) -> np.ndarray:
        made = dict(zip(held, clips, strict=True))
        before = made["backward"][:backward] if backward else clip[:0]
        after = made["forward"][held["forward"] :] if forward else clip[:0]
        return np.concatenate([before, clip, after])

    return Edit(tuple(requests), finish)


def connect(
    space: Space,
    like: Request,
    first: np.ndarray,
    second: np.ndarray,
    gap: int,
    context: int | None = None,
    noise: float = 0.0,
) -> Edit:
    """One clip, ``gap`` frames that lead from it to the other, and the other.

    Args:
        gap: ``n stride - 1`` frames.
        context: frames of each clip that are given, ``1 + n stride``.

    Raises:
        ValueError: for other numbers, or a clip that is shorter.
    """
    request, start = _gap(space, like, first, second, gap, context, noise)

    def finish(clips: Clips) -> np.ndarray:
        return np.concatenate([first, clips[0][start : start + gap], second])

    return Edit((request,), finish)


def loop_clip(
    space: Space,
    like: Request,
    clip: np.ndarray,
    gap: int,
    context: int | None = None,
    noise: float = 0.0,
) -> Edit:
    """The clip, and ``gap`` frames that lead from its end back to its beginning; see ``connect``."""
    request, start = _gap(space, like, clip, clip, gap, context, noise)

    def finish(clips: Clips) -> np.ndarray:
        return np.concatenate([clip, clips[0][start : start + gap]])

    return Edit((request,), finish)


def loop_text(space: Space, like: Request) -> Edit:
    """A loop of text alone: time is a circle, which every step cuts elsewhere.

    Of ``1 + n`` frames the last is left out where frames share tokens: the first follows it.
    """
    if space.stride == 1:
        # All frames are alike, and the clock begins at 0 as always.
        return plain(dataclasses.replace(like, loop=True, times=np.arange(like.frames)))
    if like.frames < 2:
        raise ValueError("a loop of 1 frame: give more.")
    return plain(dataclasses.replace(like, loop=True, frames=like.frames - 1))


def blend(
    space: Space,
    like: Request,
    first: np.ndarray,
    second: np.ndarray,
    overlap: int,
    strength: float = 0.9,
) -> Edit:
    """One clip turns into the other while both go on: their latents are mixed over ``overlap`` frames,
    and remade from noise that is most (``strength``) in the middle and none at both ends.

    Raises:
        ValueError: where ``overlap`` is not ``1 + n stride``, or longer than a clip.
    """
    for clip in (first, second):
        _check_size(space, like, clip)
        _check_length(len(clip), overlap, "the overlap")
    count = space.latents(overlap)
    if count < 2 + space.patch.t:
        raise ValueError(f"an overlap of {overlap} frames has no middle: give more.")
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength}: it is above 0 and at most 1 (0.9 is usual).")
    share = np.linspace(0, 1, 1 + (count - 1) // space.patch.t)
    share = np.repeat(share, [1] + [space.patch.t] * (len(share) - 1)).astype(np.float32)
    weight = share[:, None, None, None]
    ends = space.encode(first[-overlap:]), space.encode(second[:overlap])
    clean = (1 - weight) * ends[0] + weight * ends[1]
    ceilings = strength * np.sin(np.pi * share) * (share < 1)
    like = dataclasses.replace(like, frames=count)
    given = {0: first[-overlap:][:1], overlap - space.stride: second[:overlap][-space.stride :]}
    made = _edit(like, clean, ceilings, given)

    def finish(clips: Clips) -> np.ndarray:
        return np.concatenate([first[:-overlap], made.finish(clips), second[overlap:]])

    return Edit(made.requests, finish)


def interpolate(
    space: Space, like: Request, clip: np.ndarray, factor: int, strength: float | None = None
) -> Edit:
    """``factor`` times the frames: every ``factor``-th is given, ``like.fps`` being that of the clip.

    Args:
        strength: the others are remade from so much noise on a blend of their neighbours. Unset: 1, and
            0.4 where frames share tokens.

    Raises:
        ValueError: where the factor is below 2, or the clip has one frame.
    """
    _check_size(space, like, clip)
    if factor < 2 or len(clip) < 2:
        raise ValueError(f"{len(clip)} frames, {factor} times: give at least 2 of both.")
    strength = (1.0 if space.stride == 1 else 0.4) if strength is None else strength
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength}: it is above 0 and at most 1.")
    count = 1 + (len(clip) - 1) * factor
    fitting = 1 + -(-(count - 1) // space.stride) * space.stride
    guess = _blended(clip, factor, fitting)
    clean = space.encode(guess)
    ceilings = np.full(len(clean), strength, np.float32)
    known = slice(0, count, factor) if space.codec.strides[0] == 1 else slice(0, 1)
    ceilings[known] = 0
    request = dataclasses.replace(
        like, frames=len(clean), fps=like.fps * factor, given=Given(clean, ceilings)
    )

    def finish(clips: Clips) -> np.ndarray:
        made = clips[0][:count].copy()
        made[::factor] = clip
        return made

    return Edit((request,), finish)


def _blended(clip: np.ndarray, factor: int, count: int) -> np.ndarray:
    """``count`` frames, ``factor`` to each step, linear between frames; the last one stays."""
    at = np.minimum(np.arange(count) / factor, len(clip) - 1)
    low = np.minimum(at.astype(int), len(clip) - 2)
    part = (at - low)[:, None, None, None]
    return np.rint((1 - part) * clip[low] + part * clip[low + 1]).astype(np.uint8)


def _nothing(space: Space, like: Request) -> tuple[np.ndarray, np.ndarray]:
    shape = (*like.size, space.patch.channels)
    return np.zeros(shape, np.float32), np.ones(like.frames, np.float32)


def _edit(
    like: Request, clean: np.ndarray, ceilings: np.ndarray, pasted: Mapping[int, np.ndarray]
) -> Edit:
    def finish(clips: Clips) -> np.ndarray:
        made = clips[0].copy()
        for start, frames in pasted.items():
            made[start : start + len(frames)] = frames
        return made

    return Edit((dataclasses.replace(like, given=Given(clean, ceilings)),), finish)


def _gap(
    space: Space,
    like: Request,
    first: np.ndarray,
    second: np.ndarray,
    gap: int,
    context: int | None,
    noise: float,
) -> tuple[Request, int]:
    """The request that leads from one clip to another, and its first new frame."""
    for clip in (first, second):
        _check_size(space, like, clip)
    if gap < 1 or (gap + 1) % space.stride:
        raise ValueError(f"a gap of {gap} frames: give {space.stride}n - 1, at least 1.")
    shorter = min(len(first), len(second))
    # Half of what is left for each.
    held = _context(space, like, shorter, gap + 1, context, parts=2)
    return _between(space, like, first[-held:], second[:held], gap + 1, noise), held


def _context(
    space: Space, like: Request, length: int, new: int, context: int | None, parts: int = 1
) -> int:
    """How many frames of a clip are given beside ``new`` ones."""
    if context is None:
        left = (space.frames(like.frames) - 1 - new) // parts // space.stride
        context = 1 + min(max(left, 1), (length - 1) // space.stride) * space.stride
    space.latents(context)
    _check_length(length, context, "the context")
    return context


def _between(
    space: Space,
    like: Request,
    before: np.ndarray | None,
    after: np.ndarray | None,
    new: int,
    noise: float,
) -> Request:
    """``new`` frames (the last of which ``after`` may begin with) that are free between given ones."""
    start = space.encode(before) if before is not None else None
    end = space.at_end(after) if after is not None else None
    held = sum(len(part) - 1 for part in (before, after) if part is not None)
    if after is not None and space.stands_still(after):
        held += space.stride  # Behind the new frames, the last of which is the picture itself.
    like = dataclasses.replace(like, frames=space.latents(1 + new + held))
    clean, ceilings = _nothing(space, like)
    if start is not None:
        clean[: len(start)], ceilings[: len(start)] = start, noise
    if end is not None:
        clean[-len(end) :], ceilings[-len(end) :] = end, noise
    # What shares a token with what is free is put back at that token's own noise level.
    tokens = ceilings[1:].reshape(-1, space.patch.t)
    tokens[(tokens < 1) & (tokens.max(1, keepdims=True) == 1)] = 0
    return dataclasses.replace(like, given=Given(clean, ceilings))


def _check_size(space: Space, like: Request, clip: np.ndarray) -> None:
    _, h, w = space.codec.strides
    wanted = like.height * h, like.width * w
    if clip.ndim != 4 or clip.shape[1:] != (*wanted, 3) or not len(clip):
        raise ValueError(
            f"a clip of shape {clip.shape} for one of {wanted[0]} x {wanted[1]}: give [t, h, w, 3] of "
            "that size, or ask for another."
        )


def _check_length(length: int, wanted: int, name: str) -> None:
    if wanted > length:
        raise ValueError(f"{name} has {wanted} frames, and a clip {length}: give less, or more.")
