"""How well an autoencoder gives clips back: PSNR, SSIM, temporal flicker, and a picture of both.

Clips are uint8 ``[t, h, w, 3]``, an image is a clip of one frame; what is computed is float64.

The yardstick is what resizing alone reaches with as few values: a clip is shrunk along time, height and
width, and enlarged again, by Lanczos' kernel with three lobes. Of area means, triangle, Keys' cubic and
Lanczos that had the highest PSNR on moving shapes, sprites and filmed clips, at ratios from 8 to 48.
There, shrinking all of time alike was better than keeping the first frame apart (by up to 0.7 dB; in
one case of twelve 0.06 dB worse), and better than shrinking height and width only by one to three.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from scipy import ndimage

from dit_jax.sampling.media import contact_sheet, mean_psnr, write_png

WINDOW, SIGMA = 11, 1.5
"""Pixels of SSIM's Gaussian window, and its standard deviation."""
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
GREY = 128
"""Levels of no difference, and of what lies between pictures."""


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two clips: 1 for equal ones, about 0 for unrelated ones.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity",
    equation 13: window 11 x 11 of sigma 1.5, K1 0.01, K2 0.03, peak 255; of each frame and each of the
    channels red, green and blue by itself, then the mean. Only windows that lie inside the frame count.

    Raises:
        ValueError: for clips that are not alike in shape, not uint8, or smaller than the window.
    """
    _check_pair(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(
            f"SSIM looks at windows of {WINDOW} x {WINDOW} pixels, and the frames are {a.shape[1]} x "
            f"{a.shape[2]}: give larger ones."
        )
    return float(np.mean([_frame_ssim(x, y) for x, y in zip(a, b, strict=True)]))


def _frame_ssim(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x**2
    variance_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    spreads = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return float(np.mean(means * spreads))


def _windowed(image: np.ndarray) -> np.ndarray:
    """Gaussian means ``[h - 10, w - 10, c]`` around every pixel whose window is inside."""
    half = WINDOW // 2
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        image = ndimage.correlate1d(image, weights, axis)
    return image[half:-half, half:-half]


def flicker(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """The mean of ``|(r[t+1] - r[t]) - (o[t+1] - o[t])|`` over pixels, channels and pairs of frames, in
    levels of 8 bits: 0 is best.

    It is how much the error ``r - o`` changes from one frame to the next. An error that stays (a shift
    of colour, the same blur in every frame) does not count, and PSNR has it already; changes that the
    original does not have (a seam where one latent ends and the next begins, noise that is drawn anew)
    do, as does motion that is lost. Of a still original it is the mean step of the reconstruction.

    Raises:
        ValueError: for clips that are not alike in shape, not uint8, or of one frame.
    """
    _check_pair(original, reconstruction)
    if len(original) < 2:
        raise ValueError("flicker is between frames, and the clip has one: give two or more.")
    errors = (r.astype(np.int16) - o for o, r in zip(original, reconstruction, strict=True))
    return float(np.mean([np.abs(b - a).mean() for a, b in itertools.pairwise(errors)]))


def reconstruction_report(
    originals: Sequence[np.ndarray], reconstructions: Sequence[np.ndarray]
) -> dict[str, float]:
    """Means over clips of ``psnr`` (dB, of a clip's frames together), ``ssim`` and ``flicker``, and how
    many they are, ``count``.

    Flicker is over the clips of two frames or more, and left out where there is none.

    Raises:
        ValueError: where there is no clip, or as ``ssim`` does.
    """
    _check_number(originals, reconstructions)
    pairs = list(zip(originals, reconstructions, strict=True))
    for pair in pairs:
        _check_pair(*pair)
    report = {
        "psnr": mean_psnr(reconstructions, originals),
        "ssim": float(np.mean([ssim(*pair) for pair in pairs])),
    }
    if flickers := [flicker(*pair) for pair in pairs if len(pair[0]) > 1]:
        report["flicker"] = float(np.mean(flickers))
    return report | {"count": float(len(pairs))}


def side_by_side(
    originals: Sequence[np.ndarray],
    reconstructions: Sequence[np.ndarray],
    path: str | os.PathLike,
    frames: int = 6,
    gain: float = 4.0,
    scale: int = 1,
) -> Path:
    """Writes a PNG with three rows for each clip: the input, what came back, and ``gain`` times the
    difference (what came back is brighter where it is above grey).

    ``frames`` are shown of each clip, evenly spaced, each enlarged ``scale`` times.

    Raises:
        ValueError: where there is no clip, clips are not alike, or the file cannot be written.
    """
    _check_number(originals, reconstructions)
    rows: list[np.ndarray] = []
    for original, back in zip(originals, reconstructions, strict=True):
        _check_pair(original, back)
        difference = back.astype(np.float64) - original
        amplified = np.clip(np.rint(GREY + gain * difference), 0, 255).astype(np.uint8)
        rows += [original, back, amplified]
    return write_png(path, contact_sheet(rows, frames, scale))


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
    small = jax.image.resize(
        video.astype(np.float32), (*shrunk_size((t, h, w), ratio), 3), "lanczos3"
    )
    back = np.asarray(jax.image.resize(small, video.shape, "lanczos3"))
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


def _check_number(originals: Sequence[np.ndarray], reconstructions: Sequence[np.ndarray]) -> None:
    if not originals or len(originals) != len(reconstructions):
        raise ValueError(
            f"{len(originals)} originals and {len(reconstructions)} reconstructions: give one "
            "reconstruction of each, and at least one."
        )


def _check_pair(a: np.ndarray, b: np.ndarray) -> None:
    fits = a.shape == b.shape and a.ndim == 4 and a.shape[-1] == 3 and a.size
    if not fits or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(
            f"clips {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)} cannot be compared: both "
            "are uint8 [t, h, w, 3] of one size."
        )
