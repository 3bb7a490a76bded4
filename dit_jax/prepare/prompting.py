"""Pictures and clips as prompts: read whole, at a rate, and fitted to a size."""

from __future__ import annotations

import os
import sys

import numpy as np

from dit_jax.data import centre, resized
from dit_jax.prepare.decoding import DecodingConfig, Losses, probe, sampled
from dit_jax.prepare.media import Probe
from dit_jax.prepare.refusals import Refused


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

    A picture stays until the next one comes, however long that is. Where damage cost frames, that is
    said on stderr.

    Args:
        fps: frames a second, repeated or left out by their time stamps; the file's own if not given.
        count: the first so many alone; all if not given.

    Raises:
        ValueError: where it cannot be decoded, with the reason.
    """
    found: list[np.ndarray] = []
    losses, latest = Losses(), None
    try:
        for k, picture in sampled(path, fps, config, losses):
            if count is not None and k >= count:
                break
            found += found[-1:] * (k - len(found))
            again = picture is latest
            found.append(found[-1] if again else _fitted(picture.pixels(), height, width))
            latest = picture
    except (Refused, ImportError) as error:
        raise ValueError(f"{str(path)!r} cannot be used: {error}. Give another file.") from error
    if not found:
        raise ValueError(f"{str(path)!r} has no frame that can be decoded: give another file.")
    for note in losses.notes():
        print(f"warning: {str(path)!r}: {note}", file=sys.stderr, flush=True)
    return np.stack(found)


def _fitted(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    h, w = frame.shape[:2]
    scale = max(height / h, width / w)
    size = max(round(h * scale), height), max(round(w * scale), width)
    return centre(resized(frame[None], *size), height, width)[0]
