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
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from scipy import ndimage

from dit_jax.sampling.media import contact_sheet, mean_psnr, write_png

WINDOW = 11
"""Pixels of each side of the window that SSIM looks at: smaller frames have none."""
Clips = Sequence[np.ndarray]


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two clips: 1 for equal ones, about 0 for unrelated ones.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity",
    equation 13: window 11 x 11 of sigma 1.5, K1 0.01, K2 0.03, peak 255; of each frame and each of the
    channels red, green and blue by itself, then the mean. Only windows that lie inside the frame count.
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def windowed(image: np.ndarray) -> np.ndarray:
        half = WINDOW // 2
        blurred = ndimage.gaussian_filter(image, 1.5, radius=half, axes=(0, 1))
        return blurred[half:-half, half:-half]

    def of_frames(pair: tuple[np.ndarray, np.ndarray]) -> float:
        x, y = (one.astype(np.float64) for one in pair)
        mean_x, mean_y = windowed(x), windowed(y)
        variance_x = windowed(x * x) - mean_x**2
        variance_y = windowed(y * y) - mean_y**2
        covariance = windowed(x * y) - mean_x * mean_y
        means = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        spreads = (2 * covariance + c2) / (variance_x + variance_y + c2)
        return float(np.mean(means * spreads))

    return float(np.mean([of_frames(pair) for pair in zip(a, b, strict=True)]))


def flicker(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """The mean of ``|(r[t+1] - r[t]) - (o[t+1] - o[t])|`` over pixels, channels and pairs of frames, in
    levels of 8 bits: 0 is best.

    It is how much the error ``r - o`` changes from one frame to the next. An error that stays (a shift
    of colour, the same blur in every frame) does not count, and PSNR has it already; changes that the
    original does not have (a seam where one latent ends and the next begins) do, as does motion that is
    lost. Of a still original it is the mean step of the reconstruction.
    """
    errors = (r.astype(np.int16) - o for o, r in zip(original, reconstruction, strict=True))
    return float(np.mean([np.abs(b - a).mean() for a, b in itertools.pairwise(errors)]))


def reconstruction_report(originals: Clips, reconstructions: Clips) -> dict[str, float]:
    """Means over clips of ``psnr`` (dB, of a clip's frames together), ``ssim`` and, of those of two
    frames or more, ``flicker``, and how many clips they are, ``count``."""
    pairs = list(zip(originals, reconstructions, strict=True))
    report = {
        "psnr": mean_psnr(reconstructions, originals),
        "ssim": float(np.mean([ssim(*pair) for pair in pairs])),
    }
    if flickers := [flicker(*pair) for pair in pairs if len(pair[0]) > 1]:
        report["flicker"] = float(np.mean(flickers))
    return report | {"count": float(len(pairs))}


def side_by_side(
    originals: Clips, reconstructions: Clips, path: Path, frames: int = 6, scale: int = 1
) -> Path:
    """Writes a PNG with three rows for each clip: the input, what came back, and four times the
    difference, around grey; ``frames`` of each, evenly spaced, each enlarged ``scale`` times."""
    rows: list[np.ndarray] = []
    for original, back in zip(originals, reconstructions, strict=True):
        difference = np.rint(128 + 4.0 * (back.astype(np.float64) - original))
        rows += [original, back, np.clip(difference, 0, 255).astype(np.uint8)]
    return write_png(path, contact_sheet(rows, frames, scale))


def shrunk_size(size: tuple[int, int, int], ratio: float) -> tuple[int, int, int]:
    """The size ``(t, h, w)`` that holds about 1/``ratio`` of the pixels: every axis shrinks alike as
    far as whole numbers let it; height and width make up for the rounding of time."""
    t, h, w = size
    pixels = t * h * w / ratio
    axes = sum(n > 1 for n in size)
    frames = max(1, round(t / ratio ** (1 / max(axes, 1))))
    rows = min(h, max(1, round(h * math.sqrt(pixels / (frames * h * w)))))
    columns = min(w, max(1, round(pixels / (frames * rows))))
    return frames, rows, columns


def resize_clip(video: np.ndarray, ratio: float) -> np.ndarray:
    """A clip shrunk to ``shrunk_size`` and enlarged again. The small clip is kept in full precision, as
    latents are."""
    t, h, w, _ = video.shape
    small = (*shrunk_size((t, h, w), ratio), 3)
    shrunk = jax.image.resize(video.astype(np.float32), small, "lanczos3")
    back = np.asarray(jax.image.resize(shrunk, video.shape, "lanczos3"))
    return np.clip(np.rint(back), 0, 255).astype(np.uint8)


def resize_baseline(clips: Clips, latents: Sequence[np.ndarray]) -> float:
    """The mean PSNR in dB of clips that are resized to as many values as their latents have, and back:
    what a codec must surpass."""
    ratios = [max(clip.size / z.size, 1) for clip, z in zip(clips, latents, strict=True)]
    return mean_psnr([resize_clip(*pair) for pair in zip(clips, ratios, strict=True)], clips)
