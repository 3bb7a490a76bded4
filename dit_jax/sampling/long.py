"""Clips of any length: windows that slide over the latents, each with the end of the last as history.

The first window is a plain clip. Every other is given ``history`` latents of the one before, at a small
noise ceiling: against drift, for what is given is then not taken for flawless, and against freezing
(DESIGN section 3, last row). What a window is given it does not replace. Latents pass from window to
window as they are, and are decoded once, as one clip, when all are there; one compiled step serves all.

The coordinates of every window begin at 0, as they did in training: rotary positions know differences
alone, and absolute ones are then never beyond those that were learned. With a causal codec the first
latent of a clip holds one frame. A later window's first does not: it is history, which the model reads
and does not make, and to the decoder only the long clip's first is a first one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dit_jax.codec.codec import Codec
from dit_jax.files import InputError, atomic_path, explain
from dit_jax.model import ModelConfig, PatchConfig, unpatchify
from dit_jax.sampling.clips import clips_at_once, make_rows
from dit_jax.sampling.condition import Request, check_request
from dit_jax.sampling.generate import Generator
from dit_jax.sampling.given import Given
from dit_jax.sampling.media import to_uint8
from dit_jax.sampling.storyboard import Storyboard
from dit_jax.types import Params

NOISE = 0.05
"""Ceiling of the history, unless said."""


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
        """Of its new latent frames, which in a clip's first window begin behind its head."""
        return (self.start + (self.history or head) + self.stop - 1) / 2


def plan_windows(frames: int, length: int, history: int) -> list[Window]:
    """Windows of one length that cover so many latent frames, with so many in common.

    The last may end behind the clip: what is made there is left out.

    Raises:
        ValueError: where the history is not shorter than the window, or a number is too small.
    """
    if frames < 1 or not 1 <= history < length:
        raise ValueError(
            f"{frames} latent frames in windows of {length} with a history of {history}: there is at "
            "least 1 frame, and the history is at least 1 and shorter than the window."
        )
    windows = [Window(0, length, 0)]
    while windows[-1].stop < frames:
        windows.append(Window(windows[-1].stop - history, length, history))
    return windows


def default_history(length: int, patch: PatchConfig) -> int:
    """About a third of a window of so many latent frames, in whole tokens.

    Raises:
        ValueError: where the window has no token behind its first.
    """
    tokens = patch.grid(length, patch.h, patch.w)[0] - 1
    if tokens < 1:
        raise ValueError(
            f"windows of {length} latent frames: one token alone has no room for a history and new "
            f"frames. Give at least {1 + patch.t}."
        )
    return 1 + min(round(tokens / 3), tokens - 1) * patch.t


def window_requests(
    like: Request,
    windows: Sequence[Window],
    storyboard: Storyboard,
    start: float = 0.0,
    head: int = 0,
) -> list[Request]:
    """The request of every window, of ``like``'s size but for its frames, and without its history.

    A window's prompt is the one in force in the middle of its new frames. The noise of the first is
    that of ``like``'s seed, so that it is the clip which ``like`` alone makes.

    Args:
        start: when the first window begins, in seconds of the storyboard.
        head: latent frames that the first window is given.
    """
    requests = []
    for number, window in enumerate(windows):
        state = np.random.SeedSequence((like.seed % 2**32, number)).generate_state(1)
        requests.append(
            dataclasses.replace(
                like,
                prompt=storyboard.at(start + window.middle(head) / like.fps),
                frames=window.length,
                seed=int(state[0]) if number else like.seed,
                frame_fields=_sliced(like.frame_fields, window, like.time_stride),
                pixel_fields=_sliced(like.pixel_fields, window, 1),
            )
        )
    return requests


def _sliced(fields: Mapping[str, np.ndarray], window: Window, stride: int) -> dict[str, np.ndarray]:
    """A window's part of fields whose frames are ``stride`` to a latent frame.

    Its first latent frame counts as a clip's first, which holds one frame: the last of those that it
    stands for in the long clip. A last window that ends behind the clip repeats the clip's end.
    """
    at = np.arange(window.start * stride, (window.stop - 1) * stride + 1)
    return {name: values[np.minimum(at, len(values) - 1)] for name, values in fields.items()}


def make_long(
    generator: Generator,
    params: Params,
    clips: Sequence[Sequence[Request]],
    windows: Sequence[Window],
    model: ModelConfig,
    mesh: Mesh,
    noise: float = NOISE,
    heads: Sequence[np.ndarray] | None = None,
    kept: Path | None = None,
    progress: bool = False,
    weights: str = "",
) -> list[np.ndarray]:
    """The latents ``[t, h, w, c]`` of long clips of one size, to the end of the last window.

    Args:
        clips: of each clip the requests of all windows (see ``window_requests``).
        noise: ceiling of the history: 0 holds it, 0.02 to 0.1 is usual.
        heads: latents with which the clips begin, in place of the history that the first window lacks.
        kept: a file that gets what there is after every window, and from which the same call goes on
            (by one process). Whoever has used the outcome removes it.
        weights: what the parameters are (a run and its step), that those of others do not go on there.

    Raises:
        ValueError: where clips, windows and heads do not fit together, or ``kept`` is of others.
    """
    _check(clips, windows, model.patch, noise, heads)
    firsts = _firsts(clips, windows[0], heads, noise, model.patch)
    # What later windows look like, so that the first, which lacks a history, has their form.
    form = [_given(clips[0][0], w, None, noise, model.patch) for w in windows[:2]]
    plan = _told(clips, windows, noise, heads, f"{weights} {generator.config}")
    store = _Store(kept if jax.process_count() == 1 else None, plan)
    made = store.read()
    batches = -(-len(clips) // clips_at_once(generator, len(clips), mesh))
    with _bar(len(windows), len(made), batches * generator.config.steps, progress) as bar:
        for number in range(len(made), len(windows)):
            window = windows[number]
            requests = (
                firsts
                if number == 0
                else [
                    _given(clip[number], window, past[-window.history :], noise, model.patch)
                    for clip, past in zip(clips, made[-1], strict=True)
                ]
            )
            rows = make_rows(generator, params, requests, model, mesh, bar.update, form)
            latents = np.stack(
                [_latents(*pair, model.patch) for pair in zip(requests, rows, strict=True)]
            )
            # What was given stays what it was.
            if number:
                latents[:, : window.history] = made[-1][:, -window.history :]
            elif heads is not None:
                latents[:, : len(heads[0])] = np.stack(heads)
            made.append(latents)
            store.write(made)
    new = [part[:, w.history :] for part, w in zip(made, windows, strict=True)]
    return list(np.concatenate(new, 1))


def _bar(windows: int, made: int, steps: int, shown: bool) -> tqdm:
    return tqdm(
        total=windows * steps,
        initial=made * steps,
        unit="step",
        desc=f"{windows} windows",
        disable=not shown or jax.process_index() != 0,
        dynamic_ncols=True,
    )


def _firsts(
    clips: Sequence[Sequence[Request]],
    window: Window,
    heads: Sequence[np.ndarray] | None,
    noise: float,
    patch: PatchConfig,
) -> list[Request]:
    held = dataclasses.replace(window, history=0 if heads is None else len(heads[0]))
    return [
        _given(clip[0], held, head, noise, patch)
        for clip, head in zip(clips, [None] * len(clips) if heads is None else heads, strict=True)
    ]


def _latents(request: Request, row: np.ndarray, patch: PatchConfig) -> np.ndarray:
    return unpatchify(patch, row[: request.num_tokens(patch)], *request.size)


def _check(
    clips: Sequence[Sequence[Request]],
    windows: Sequence[Window],
    patch: PatchConfig,
    noise: float,
    heads: Sequence[np.ndarray] | None,
) -> None:
    if not 0 <= noise <= 1:
        raise ValueError(f"a history with ceiling {noise}: it is in [0, 1] (0.05 is usual).")
    if not clips or any(len(clip) != len(windows) for clip in clips):
        raise ValueError(
            f"{[len(clip) for clip in clips]} requests of clips for {len(windows)} windows: give at "
            "least one clip, and a request for each of its windows."
        )
    sizes = {request.size for clip in clips for request in clip}
    if sizes != {(windows[0].length, *clips[0][0].size[1:])}:
        raise ValueError(f"windows of sizes {sorted(sizes)}: all have one size.")
    check_request(clips[0][0], patch)
    history = windows[-1].history or 1
    given = history if heads is None else len(heads[0])
    for count in (history, given):
        patch.grid(count, patch.h, patch.w)  # a token is given as a whole
    if heads is not None:
        wanted = (given, *clips[0][0].size[1:], patch.channels)
        if len(heads) != len(clips) or any(h.shape != wanted for h in heads):
            raise ValueError(
                f"heads of shapes {[h.shape for h in heads]}: give each of the {len(clips)} clips one "
                f"of {wanted}."
            )


def _given(
    request: Request, window: Window, past: np.ndarray | None, noise: float, patch: PatchConfig
) -> Request:
    """A window's request, with its history where it has one."""
    clean = np.zeros((*request.size, patch.channels), np.float32)
    ceilings = np.ones(window.length, np.float32)
    ceilings[: window.history] = noise
    if past is not None:
        clean[: len(past)] = past
    return dataclasses.replace(request, given=Given(clean, ceilings))


def _told(
    clips: Sequence[Sequence[Request]],
    windows: Sequence[Window],
    noise: float,
    heads: Sequence[np.ndarray] | None,
    made_by: str,
) -> str:
    """A hash of all that decides what comes out."""
    told = [[(r.prompt, r.negative, r.size, r.fps, r.seed) for r in clip] for clip in clips]
    plan = [told, [dataclasses.astuple(window) for window in windows], noise, made_by]
    found = hashlib.sha256(json.dumps(plan).encode())
    every = [r for clip in clips for r in clip]
    arrays = [*(heads or ())]
    arrays += [s for r in every for s in (r.text_states, r.negative_states) if s is not None]
    arrays += [
        np.asarray(fields[name])
        for r in every
        for fields in (r.segment_fields, r.frame_fields, r.pixel_fields)
        for name in sorted(fields)
    ]
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


class _Store:
    """What the windows so far have made, in a file; of the same plan, or it is refused."""

    def __init__(self, path: Path | None, plan: str) -> None:
        self._path, self._plan = path, plan

    def read(self) -> list[np.ndarray]:
        """Latents ``[clips, t, h, w, c]`` of each window that is there."""
        if self._path is None or not self._path.exists():
            return []
        try:
            with self._path.open("rb") as opened, np.load(opened) as file:
                plan, latents = str(file["plan"]), list(file["latents"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{str(self._path)!r} holds no windows of a clip ({error}): remove it."
            ) from error
        if plan != self._plan:
            raise InputError(
                f"{str(self._path)!r} holds windows of another clip that was not finished: remove "
                "it, or name another output."
            )
        return latents

    def write(self, made: Sequence[np.ndarray]) -> None:
        """Replaces the file, whole or not at all. If storage fails, that is told: windows go on."""
        if self._path is None:
            return
        try:
            with atomic_path(self._path) as scratch, scratch.open("wb") as file:
                np.savez(file, plan=self._plan, latents=np.stack(made))
        except OSError as error:
            print(
                f"warning: what windows have made is not kept in {str(self._path)!r} "
                f"({explain(error)}); the clip is made all the same",
                file=sys.stderr,
            )
            self._path = None


def decode_long(codec: Codec, latents: np.ndarray, frames: int) -> Iterator[np.ndarray]:
    """The first ``frames`` frames of latents ``[t, h, w, c]``, decoded as one clip: uint8
    ``[n, h, w, 3]``, some at a time."""
    left = frames
    for part in codec.decode_parts(latents):
        if left <= 0:
            return
        yield to_uint8(part[:left])
        left -= len(part)
