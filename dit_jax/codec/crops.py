"""Windows of clips, cut at random: what an autoencoder is trained on.

Rows of a batch have one size. A clip (or image) with fewer frames than a window keeps its own, as many
as make whole latents, and the row is filled up by its last frame: an autoencoder that looks back alone
makes of a clip's first frames the same whatever follows, so that the rest is only left out of the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Array, Int, UInt8

from dit_jax.data import RowStreams
from dit_jax.data.packing import Reader
from dit_jax.files import refuse_if
from dit_jax.types import FrameGrid, NonNegativeInt, PositiveInt, Sample, Source


@struct.dataclass
class ClipBatch:
    """Windows of clips, for an autoencoder; only the first ``num_frames`` of a row count."""

    video: UInt8[Array, "b t h w 3"]
    num_frames: Int[Array, "b"]


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """Size of the windows, and how many are a batch."""

    rows: PositiveInt = 8
    """Windows of the global batch, over all devices."""
    frames: PositiveInt = 5
    height: PositiveInt = 64
    width: PositiveInt = 64
    flip: bool = True
    """Mirror every second window, left to right."""
    threads: NonNegativeInt = 0
    """Threads that read ahead for each row."""


def check_window(
    config: CropConfig, frames: int, height: int, width: int, what: str = "a clip"
) -> None:
    """Refuses a clip of this size if it is smaller than a window; any number of frames fits."""
    message = (
        f"{what} is of {height} x {width} pixels, and data.crop takes {config.height} x "
        f"{config.width}: make the windows smaller, or leave such clips out."
    )
    refuse_if([(height < config.height or width < config.width, message)])


def cut(
    config: CropConfig, time: int, sample: Sample, rng: np.random.Generator, what: str
) -> np.ndarray:
    """A window uint8 ``[t, height, width, 3]`` of 1 + ``time`` n frames, at most ``config.frames``."""
    video, size = sample["video"], (config.height, config.width)
    message = f"{what} is {video.dtype}: an autoencoder learns from pixels, uint8."
    refuse_if([(video.dtype != np.uint8, message)])
    check_window(config, *video.shape[:3], what=what)
    frames = FrameGrid(time).whole(min(len(video), config.frames))
    t, y, x = (
        int(rng.integers(whole - part + 1))
        for whole, part in zip(video.shape[:3], (frames, *size), strict=True)
    )
    window = video[t : t + frames, y : y + size[0], x : x + size[1]]
    return window[:, :, ::-1] if config.flip and rng.random() < 0.5 else window


class CropLoader(RowStreams[ClipBatch]):
    """Batches of windows: this process's rows of the global batches. ``time`` is the codec's stride in
    time. The seed decides what is cut, and nothing else."""

    def __init__(
        self,
        source: Source | Reader,
        config: CropConfig,
        time: int,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> None:
        def window(sample: Sample, name: str, place: int) -> dict[str, np.ndarray]:
            frames = cut(config, time, sample, np.random.default_rng((seed, place)), name)
            fill = np.repeat(frames[-1:], config.frames - len(frames), 0)
            video = np.concatenate([frames, fill])
            return {"video": video, "num_frames": np.array(len(frames), np.int32)}

        def stack(rows: Sequence[dict[str, np.ndarray]]) -> ClipBatch:
            fields: Any = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            return ClipBatch(**fields)

        super().__init__(source, window, config, seed, rows, stack)
