"""What a command line asks for of long clips: how long, in which windows, with which prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from dit_jax.config import VideoRun
from dit_jax.sampling import (
    Request,
    Space,
    Storyboard,
    Window,
    default_history,
    plan_windows,
    read_storyboard,
    window_requests,
)
from dit_jax.sampling.long import NOISE
from dit_jax.sampling.options import parse_length
from dit_jax.sampling.requested import ModeArguments


@dataclasses.dataclass(frozen=True)
class LongArguments:
    """Clips of any length, in windows of --frames (docs/long.md)."""

    long: str | None = None
    """Length of the clip, made in windows of --frames: 60s, or a number of frames. It begins with
    --image or --extend, where these are given."""
    storyboard: str | None = None
    """A file of lines "time: prompt", in place of --prompt: which one is in force when."""
    history: str | None = None
    """Length of what each window is given of the one before. Unset: about a third."""
    history_noise: float | None = None
    """Noise on it, against drift and frozen motion (0.02 to 0.1). Unset: 0.05."""

    def check(self, mode: ModeArguments, texts: int, upsample: bool) -> None:
        """Raises ``ValueError`` where options contradict each other; ``texts`` prompts and classes are
        given otherwise."""
        if self.long is None:
            for name in ("storyboard", "history", "history_noise"):
                if getattr(self, name) is not None:
                    option = name.replace("_", "-")
                    raise ValueError(
                        f"--{option} says something of --long: give that, or leave it."
                    )
            return
        parse_length(self.long, "--long")
        if self.history is not None:
            parse_length(self.history, "--history")
        self._check_mode(mode)
        if mode.duration is not None:
            raise ValueError(
                f"--long {self.long} and --duration {mode.duration} both say how long: give "
                "--long, and --frames for its windows."
            )
        if self.storyboard is not None and (texts or upsample):
            raise ValueError(
                "--storyboard has the prompts, as they are: leave out --prompt, --prompts-file, "
                "--label and --upsample."
            )
        if not 0 <= self.noise <= 1:
            raise ValueError(
                f"--history-noise {self.history_noise}: it is in [0, 1] (0.05 is usual)."
            )

    def _check_mode(self, mode: ModeArguments) -> None:
        if mode.loop or mode.source not in (None, "image", "extend"):
            found = "loop" if mode.loop else mode.source
            raise ValueError(
                f"--long and --{found}: a long clip is made of text, and begins with --image or "
                "--extend if you like. Give one of them."
            )
        if mode.last_image or mode.keyframe:
            raise ValueError(
                "--long and pictures that are not the first: the windows are made one after another. "
                "Give --image alone."
            )
        for name, instead in (
            ("forward", f"--long {self.long} says how long all of it is"),
            ("backward", "a long clip goes on forward"),
            ("given_noise", "--history-noise is that of what windows are given"),
        ):
            if getattr(mode, name):
                option = name.replace("_", "-")
                raise ValueError(f"--long and --{option}: {instead}. Leave the other out.")

    @property
    def noise(self) -> float:
        return NOISE if self.history_noise is None else self.history_noise

    def board(self) -> Storyboard | None:
        """What the file says; None without one. Raises ``ValueError`` where it is none."""
        return None if self.storyboard is None else read_storyboard(self.storyboard)


@dataclasses.dataclass(frozen=True, eq=False)
class LongPlan:
    """A long clip's length and windows, and what it begins with."""

    frames: int
    """Of pixels, as asked for."""
    windows: tuple[Window, ...]
    begun: np.ndarray | None = None
    """uint8 ``[t, h, w, 3]``: the picture or clip that is gone on with."""
    context: int = 0
    """Frames at its end that the first window is given."""
    head: int = 0
    """These in latent frames."""

    @property
    def before(self) -> int:
        """Frames before the first window."""
        return 0 if self.begun is None else len(self.begun) - self.context

    def requests(
        self, likes: Sequence[Request], board: Storyboard | None, fps: float
    ) -> list[list[Request]]:
        """For each clip the requests of its windows; a clip without a storyboard keeps its prompt.

        Args:
            fps: frames (of pixels) a second, by which the storyboard's times begin with the clip.

        Raises:
            ValueError: where a prompt of the storyboard is in force in no window.
        """
        start, head = self.before / fps, self.head
        if board is not None:
            middles = [start + w.middle(head) / likes[0].fps for w in self.windows]
            self._check_used(board, middles, (self.before + self.context) / fps)
        own = [board or Storyboard((0.0,), (like.prompt,)) for like in likes]
        return [
            window_requests(like, self.windows, one, start, head)
            for like, one in zip(likes, own, strict=True)
        ]

    def heads(self, space: Space, count: int) -> list[np.ndarray] | None:
        """The latents that each of so many clips begins with; None where they begin with nothing."""
        return None if self.begun is None else [space.encode(self.begun[-self.context :])] * count

    @property
    def decoded(self) -> int:
        """Frames to decode, from the first window's first on."""
        return self.frames - self.before

    def whole(self, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The clip, some frames at a time, of what is decoded; it begins with what was given."""
        left = self.context
        if self.begun is not None:
            yield self.begun
        for part in parts:
            if len(part) > left:
                yield part[left:]
            left = max(left - len(part), 0)

    def _check_used(self, board: Storyboard, middles: Sequence[float], given: float) -> None:
        """Each prompt is in force in some window, or over before what was ``given`` ends (in s)."""
        for time, until in zip(board.times, [*board.times[1:], math.inf], strict=True):
            if until > given and not any(time <= middle < until for middle in middles):
                near = sorted(middles, key=lambda middle: abs(middle - time))[:3]
                told = ", ".join(f"{middle:.2f}" for middle in sorted(near))
                raise ValueError(
                    f"the storyboard's prompt at {time:g} s is in force in no window. A window has the "
                    f"prompt of the middle of its new frames; the nearest of these are at {told} s. "
                    "Change its time, give a longer --long or --history, or shorter windows (--frames)."
                )


def make_long_plan(
    given: LongArguments,
    config: VideoRun,
    space: Space,
    fps: float,
    begun: np.ndarray | None = None,
    context: int | None = None,
) -> LongPlan:
    """Windows as long as ``sampling.frames``.

    Args:
        fps: frames a second.
        begun: what the clip begins with, uint8 ``[t, h, w, 3]``.
        context: frames at its end that the first window is given. Unset: as many as a window's history
            has, or there are.

    Raises:
        ValueError: where windows have no room for a history and new frames, or nothing is to be made.
    """
    window = config.sampling.frames

    def frames(length: str) -> int:
        number, seconds = parse_length(length, "")
        return max(round(number * fps if seconds else number), 1)

    assert given.long is not None
    asked, length = frames(given.long), space.latents(window)
    if length < 1 + space.patch.t:
        raise ValueError(
            f"windows of {window} frames have no room for a history and new frames: give --frames of "
            f"at least {1 + space.stride}."
        )
    history = default_history(length, space.patch)
    if given.history is not None:
        history = space.latents(space.whole(frames(given.history) / fps, fps))
    if history >= length:
        raise ValueError(
            f"--history {given.history} is {space.frames(history)} frames of windows of {window}: "
            "give less, or longer windows (--frames)."
        )
    if begun is not None:
        fitting = 1 + (len(begun) - 1) // space.stride * space.stride
        context = min(space.frames(history), fitting) if context is None else context
        _check_begun(given.long, asked, len(begun), context, window)
    head = space.latents(context) if context else 0
    plan = LongPlan(asked, (), begun, context or 0, head)
    # Enough latents for the last frame: the first holds one, and each other a stride.
    latents = 1 + -(-(plan.decoded - 1) // space.codec.strides[0])
    return dataclasses.replace(plan, windows=tuple(plan_windows(latents, length, history)))


def _check_begun(long: str, asked: int, count: int, context: int, window: int) -> None:
    if asked <= count:
        raise ValueError(
            f"--long {long} is {asked} frames, and the clip that it begins with has {count}: nothing "
            "is to be made. Give more."
        )
    if context > count:
        raise ValueError(f"--context is {context} frames, and the clip has {count}: give less.")
    if context >= window:
        raise ValueError(
            f"--context is {context} frames of windows of {window}: give less, or longer windows "
            "(--frames)."
        )
