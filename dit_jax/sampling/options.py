"""Words of a command line, before anything is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence


def gathered(arguments: Sequence[str], several: Sequence[str]) -> list[str]:
    """A command line in which each of some options stands once: the values of one that is given again
    (``--keyframe A --keyframe B``) follow the first one's."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    rest: list[list[str]] = [values]
    for one in arguments:
        name, sign, value = one.partition("=")
        option = name.removeprefix("--").replace("_", "-")
        if name.startswith("--") and option in several:
            if option not in found:
                found[option] = [f"--{option}"]
                rest.append(found[option])
            values = found[option]
            values += [value] * bool(sign)
        elif one.startswith("--"):
            values = [one]
            rest.append(values)
        else:
            values.append(one)
    return [one for part in rest for one in part]


def parse_length(text: str, name: str, least: float = 1e-9) -> tuple[float, bool]:
    """(number, whether of seconds) of ``2s``, ``1.5s`` or ``16``; ``ValueError`` for anything else."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)s|([0-9]+)", text)
    number = float(found[1] or found[2]) if found else -1
    if number < least:
        raise ValueError(f"{name} {text}: give seconds, as 2s, or a number of frames, as 16.")
    assert found
    return number, found[1] is not None
