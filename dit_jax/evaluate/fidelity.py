"""How close made clips are to true ones, pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def psnr(made: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 clips of the same shape (peak 255)."""
    if made.shape != true.shape:
        raise ValueError(f"clips of shapes {made.shape} and {true.shape} cannot be compared.")
    error = np.mean(np.square(made.astype(np.float64) - true.astype(np.float64)))
    return float(10 * np.log10(255.0**2 / max(error, 1e-10)))


def mean_psnr(made: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> float:
    """The mean over clips of each clip's PSNR in dB."""
    return float(np.mean([psnr(a, b) for a, b in zip(made, true, strict=True)]))
