"""What resizing alone reaches: the yardstick for an autoencoder that stores as few values.

A clip is shrunk along time, height and width to as many values as its latents have, and enlarged again.
Both steps are separable: a matrix for each axis, of Lanczos' kernel with three lobes, widened for
shrinking so that nothing aliases. Of area means, triangle, Keys' cubic and Lanczos that pair had the
highest PSNR on moving shapes, sprites and filmed clips, at ratios from 8 to 48. There, shrinking all of
time alike was better than keeping the first frame apart (by up to 0.7 dB; in one case of twelve 0.06 dB
worse), and better than shrinking height and width only by one to three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dit_jax.evaluate.fidelity import mean_psnr

LOBES = 3


def resampling_matrix(size: int, wanted: int) -> np.ndarray:
    """``[wanted, size]`` float64: the weights of old samples in each new one, which sum to 1.

    Samples are the centres of equal cells of one interval. Beyond the ends there is nothing: what is
    cut off there goes to the rest.
    """
    widening = max(1.0, size / wanted)
    centres = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    x = (centres[:, None] - np.arange(size)) / widening
    weights = np.where(np.abs(x) < LOBES, np.sinc(x) * np.sinc(x / LOBES), 0)
    return weights / weights.sum(1, keepdims=True)


def resize(video: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A clip ``[t, h, w, c]`` of any numbers at another size ``(t, h, w)``; float64, not clipped."""
    made = np.asarray(video, np.float64)
    for axis, wanted in enumerate(size):
        if wanted != made.shape[axis]:
            matrix = resampling_matrix(made.shape[axis], wanted)
            made = np.moveaxis(np.tensordot(matrix, made, (1, axis)), 0, axis)
    return made


def shrunk_size(size: tuple[int, int, int], ratio: float) -> tuple[int, int, int]:
    """The size ``(t, h, w)`` that holds about 1/``ratio`` of the pixels: every axis shrinks alike as
    far as whole numbers let it; height and width make up for the rounding of time.

    Raises:
        ValueError: for a ratio below 1.
    """
    if not ratio >= 1:
        raise ValueError(f"a ratio of {ratio}: a clip shrinks to 1/ratio, so it is at least 1.")
    t, h, w = size
    pixels = t * h * w / ratio
    axes = sum(n > 1 for n in size)
    frames = max(1, round(t / ratio ** (1 / max(axes, 1))))
    rows = min(h, max(1, round(h * math.sqrt(pixels / (frames * h * w)))))
    columns = min(w, max(1, round(pixels / (frames * rows))))
    return frames, rows, columns


def resize_clip(video: np.ndarray, ratio: float) -> np.ndarray:
    """A clip uint8 ``[t, h, w, 3]`` shrunk to ``shrunk_size`` and enlarged again: what is left of it.

    The small clip is kept in full precision, as latents are. Raises ``ValueError`` as ``shrunk_size``.
    """
    t, h, w, _ = video.shape
    back = resize(resize(video, shrunk_size((t, h, w), ratio)), (t, h, w))
    return np.clip(np.rint(back), 0, 255).astype(np.uint8)


def compression(shape: Sequence[int], strides: tuple[int, int, int], channels: int) -> float:
    """Values of a clip of ``shape`` ``[t, h, w, c]`` for each value of its latents.

    ``strides`` are a causal codec's: the first frame has a moment of its own, every next one holds
    ``strides[0]`` frames; what does not fill a latent takes one all the same.
    """
    t, h, w, c = shape
    moments = 1 + -(-(t - 1) // strides[0])
    places = -(-h // strides[1]) * -(-w // strides[2])
    return t * h * w * c / (moments * places * channels)


def resize_baseline(
    clips: Sequence[np.ndarray], strides: tuple[int, int, int], channels: int
) -> float:
    """The mean PSNR in dB of clips (uint8 ``[t, h, w, 3]``) that are resized to as many values as they
    have latents, and back: what a codec of these strides and channels must surpass.

    Raises:
        ValueError: where latents have more values than the clips.
    """
    ratios = [compression(clip.shape, strides, channels) for clip in clips]
    return mean_psnr([resize_clip(*pair) for pair in zip(clips, ratios, strict=True)], clips)
