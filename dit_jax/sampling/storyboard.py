"""Which prompt is in force when: a file of ``time: prompt`` lines.

    0s: a red ball rolls to the left
    3.5s: the ball stops
    1:05: night falls

A time is seconds (``3.5s`` or ``3.5``), minutes and seconds (``1:05``, ``1:05.5``) or hours, minutes
and seconds (``0:01:05``), and lines come in their order. Empty lines and lines that begin with # are
left out.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from dit_jax.files import InputError, MiB, read_bytes

TIME = r"(?:(?:(\d+):(?=\d+:\d))?(\d+):(?=\d))?(\d+(?:\.\d+)?)"
LIMIT = MiB
"""Bytes of a file."""
LINE = re.compile(rf"{TIME}\s*s?\s*:\s*(\S.*)")


@dataclasses.dataclass(frozen=True)
class Storyboard:
    """Prompts, each from its time (in seconds) to the next one's.

    Raises:
        ValueError: where there is none, the first is not at 0, or times do not rise.
    """

    times: tuple[float, ...]
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.times or len(self.times) != len(self.prompts):
            raise ValueError(
                f"a storyboard of {len(self.times)} times and {len(self.prompts)} prompts: give at "
                'least one line such as "0s: a red ball", and a prompt for each time.'
            )
        if self.times[0] != 0:
            raise ValueError(
                f"a storyboard that begins at {self.times[0]:g} s: its first line is at 0s."
            )
        for before, after in zip(self.times, self.times[1:], strict=False):
            if not after > before:
                raise ValueError(
                    f"a storyboard with {after:g} s behind {before:g} s: times rise from line to line."
                )

    def at(self, seconds: float) -> str:
        """The prompt in force then; the first before 0."""
        past = [
            prompt
            for time, prompt in zip(self.times, self.prompts, strict=True)
            if time <= max(seconds, 0)
        ]
        return past[-1]


def read_storyboard(path: str | Path) -> Storyboard:
    """Reads a file.

    Raises:
        ValueError: where it cannot be read, or a line is not ``time: prompt``, with its number.
    """
    try:
        lines = read_bytes(path, LIMIT, "the storyboard").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"the storyboard {str(path)!r} is not UTF-8 text ({error}): save it as that."
        ) from error
    times, prompts = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = LINE.fullmatch(line.strip())
        if found is None:
            raise ValueError(
                f'{path}:{number}: {line.strip()[:60]!r} is not "time: prompt", such as "3.5s: a red '
                'ball" or "1:05: a red ball".'
            )
        hours, minutes, seconds, prompt = found.groups()
        if minutes and float(seconds) >= 60:
            raise ValueError(
                f"{path}:{number}: {minutes}:{seconds} has {seconds} seconds: behind minutes, they "
                "are below 60."
            )
        if hours and int(minutes) >= 60:
            raise ValueError(
                f"{path}:{number}: {hours}:{minutes}:{seconds} has {minutes} minutes: behind hours, "
                "they are below 60."
            )
        times.append(3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds))
        prompts.append(prompt)
    return Storyboard(tuple(times), tuple(prompts))
