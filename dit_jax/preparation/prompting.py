"""Pictures and clips as prompts: read whole, at a rate, and fitted to a size."""

from __future__ import annotations

import itertools
import os

import numpy as np

from dit_jax.data import centre, resized
from dit_jax.preparation.decoding import DecodingConfig, frames, probe
from dit_jax.preparation.media import Probe
from dit_jax.preparation.refusals import Refused


def probe_prompt(path: str | os.PathLike) -> Probe:
    """What a file is, before it is read.

    Raises:
        ValueError: where it cannot be read, with the reason.
    """
    try:
        return probe(path)
    except (Refused, ImportError) as error:
        raise ValueError(f"{str(path)!r} cannot be used: {error}. Give another file.") from error


def read_prompt(
    path: str | os.PathLike,
    height: int,
    width: int,
    fps: float | None = None,
    count: int | None = None,
    config: DecodingConfig | None = None,
) -> np.ndarray:
    """A file's displayed frames, uint8 ``[t, height, width, 3]``: scaled until they cover that size, in
    their own aspect ratio, and the centre cropped.

    Args:
        fps: frames a second, repeated or left out by their time stamps; the file's own if not given.
        count: the first so many alone; all if not given.

    Raises:
        ValueError: where it cannot be decoded, with the reason.
    """
    found: list[np.ndarray] = []
    try:
        for _, frame in itertools.islice(frames(path, fps, config), count):
            found.append(_fitted(frame, height, width))
    except (Refused, ImportError) as error:
        raise ValueError(f"{str(path)!r} cannot be used: {error}. Give another file.") from error
    if not found:
        raise ValueError(f"{str(path)!r} has no frame that can be decoded: give another file.")
    return np.stack(found)


def _fitted(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    h, w = frame.shape[:2]
    scale = max(height / h, width / w)
    size = max(round(h * scale), height), max(round(w * scale), width)
    return centre(resized(frame[None], *size), height, width)[0]
