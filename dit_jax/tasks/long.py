"""What a command line asks for of long clips: how long, in which windows, with which prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dit_jax.config import Config
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
from dit_jax.tasks.options import parse_length
from dit_jax.tasks.requested import ModeArguments


@dataclasses.dataclass(frozen=True)
class LongArguments:
    """Clips of any length, in windows of --frames (docs/long.md)."""

    long: str | None = None
    """Length of the clip, made in windows of --frames: 60s, or a number of frames."""
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
        if mode.source is not None or mode.loop:
            found = "loop" if mode.loop else mode.source
            raise ValueError(f"--long and --{found}: a long clip is made of text alone. Give one.")
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

    @property
    def noise(self) -> float:
        return NOISE if self.history_noise is None else self.history_noise

    def board(self) -> Storyboard | None:
        """What the file says; None without one. Raises ``ValueError`` where it is none."""
        return None if self.storyboard is None else read_storyboard(self.storyboard)


@dataclasses.dataclass(frozen=True)
class LongPlan:
    """A long clip's length and windows."""

    frames: int
    """Of pixels, as asked for."""
    windows: tuple[Window, ...]

    def requests(self, likes: Sequence[Request], board: Storyboard | None) -> list[list[Request]]:
        """For each clip the requests of its windows; a clip without a storyboard keeps its prompt.

        Raises:
            ValueError: where a prompt of the storyboard is in force in no window.
        """
        if board is not None:
            self._check_used(board, likes[0].fps)
        return [
            window_requests(like, self.windows, board or Storyboard((0.0,), (like.prompt,)))
            for like in likes
        ]

    def _check_used(self, board: Storyboard, fps: float) -> None:
        middles = [window.middle() / fps for window in self.windows]
        for time, until in zip(board.times, [*board.times[1:], math.inf], strict=True):
            if not any(time <= middle < until for middle in middles):
                near = sorted(middles, key=lambda middle: abs(middle - time))[:3]
                told = ", ".join(f"{middle:.2f}" for middle in sorted(near))
                raise ValueError(
                    f"the storyboard's prompt at {time:g} s is in force in no window. A window has the "
                    f"prompt of the middle of its new frames; the nearest of these are at {told} s. "
                    "Change its time, give a longer --long or --history, or shorter windows (--frames)."
                )


def make_long_plan(given: LongArguments, config: Config, space: Space) -> LongPlan:
    """Windows as long as ``sampling.frames``.

    Raises:
        ValueError: where they have no room for a history and new frames.
    """
    made = config.sampling

    def frames(length: str) -> int:
        number, seconds = parse_length(length, "")
        return max(round(number * made.fps if seconds else number), 1)

    assert given.long is not None
    asked, length = frames(given.long), space.latents(made.frames)
    history = default_history(length, space.patch)
    if given.history is not None:
        history = space.latents(space.whole(frames(given.history) / made.fps, made.fps))
    if history >= length:
        raise ValueError(
            f"--history {given.history} is {space.frames(history)} frames of windows of {made.frames}: "
            "give less, or longer windows (--frames)."
        )
    # Enough latents for the last frame: the first holds one, and each other a stride.
    latents = 1 + -(-(asked - 1) // space.codec.strides[0])
    return LongPlan(asked, tuple(plan_windows(latents, length, history)))
