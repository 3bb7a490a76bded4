"""Windows of clips, cut at random: what an autoencoder is trained on.

Rows of a batch have one size. A clip (or image) with fewer frames than a window keeps its own, as many
as make whole latents, and the row is filled up by its last frame: an autoencoder that looks back alone
makes of a clip's first frames the same whatever follows, so that the rest has only to be left out of
the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import struct
from jaxtyping import Array, Int, UInt8

from dit_jax.data import RowStreams
from dit_jax.data.packing import Reader
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


def cut(
    config: CropConfig, time: int, sample: Sample, rng: np.random.Generator, what: str
) -> np.ndarray:
    """A window uint8 ``[t, height, width, 3]`` of 1 + ``time`` n frames, at most ``config.frames``.

    Raises ``ValueError`` if the clip is smaller than a window, or no pixels.
    """
    video, size = sample["video"], (config.height, config.width)
    if video.dtype != np.uint8:
        raise ValueError(f"{what} is {video.dtype}: an autoencoder learns from pixels, uint8.")
    check_window(config, *video.shape[:3], what=what)
    frames = FrameGrid(time).whole(min(len(video), config.frames))
    t, y, x = (
        int(rng.integers(whole - part + 1))
        for whole, part in zip(video.shape[:3], (frames, *size), strict=True)
    )
    window = video[t : t + frames, y : y + size[0], x : x + size[1]]
    return window[:, :, ::-1] if config.flip and rng.random() < 0.5 else window


def check_window(
    config: CropConfig, frames: int, height: int, width: int, what: str = "a clip"
) -> None:
    """Raises ``ValueError`` if a clip of this size is smaller than a window."""
    del frames
    if height < config.height or width < config.width:
        raise ValueError(
            f"{what} is of {height} x {width} pixels, and data.crop takes {config.height} x "
            f"{config.width}: make the windows smaller, or leave such clips out."
        )


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> ClipBatch:
    return ClipBatch(
        video=np.stack([row["video"] for row in rows]),  # pyright: ignore[reportArgumentType]
        num_frames=np.stack([row["num_frames"] for row in rows]),  # pyright: ignore[reportArgumentType]
    )


class CropLoader(RowStreams[ClipBatch]):
    """Batches of windows: this process's rows of the global batches.

    ``time`` is the codec's stride in time. What is drawn depends on the seed and on nothing else.
    """

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
            missing = config.frames - len(frames)
            video = np.concatenate([frames, np.repeat(frames[-1:], missing, 0)])
            return {"video": video, "num_frames": np.array(len(frames), np.int32)}

        super().__init__(source, window, config, seed, rows, _stack)
