"""Clips at low resolution, for super-resolution: made of large ones, and enlarged again.

Both are separable and keep centres: a pixel of the small clip is the mean of the pixels that it covers,
which leaves nothing to alias, and enlarging is cubic convolution (Keys 1981, "Cubic Convolution
Interpolation for Digital Image Processing", a = -0.75 as in OpenCV and PyTorch, which is nearer to
sprites than the -0.5 of Keys and Pillow).
"""

from __future__ import annotations

import functools

import numpy as np

SHARPNESS = -0.75
"""Slope of the cubic kernel at 1, Keys' a."""
REACH = 2
"""Pixels on either side that the kernel sees."""


def shrink(video: np.ndarray, factor: int) -> np.ndarray:
    """A clip uint8 ``[t, h, w, c]`` with ``factor`` times fewer rows and columns, uint8.

    Raises:
        ValueError: where these do not divide by it.
    """
    t, h, w, c = video.shape
    if h % factor or w % factor:
        raise ValueError(
            f"a clip of {h} x {w} pixels does not shrink to one of {factor} times fewer rows and "
            "columns: crop it (data.transform), or choose another factor."
        )
    cells = video.reshape(t, h // factor, factor, w // factor, factor, c)
    return np.rint(cells.mean((2, 4), dtype=np.float64)).astype(np.uint8)


def enlarge(video: np.ndarray, factor: int) -> np.ndarray:
    """A clip uint8 ``[t, h, w, c]`` with ``factor`` times as many rows and columns, uint8: bicubic,
    the pixels at the edge repeated beyond it."""
    made = video.astype(np.float64)
    for axis in (1, 2):
        made = np.moveaxis(
            np.tensordot(cubic_matrix(made.shape[axis], factor), made, (1, axis)), 0, axis
        )
    return np.clip(np.rint(made), 0, 255).astype(np.uint8)


@functools.lru_cache
def cubic_matrix(size: int, factor: int) -> np.ndarray:
    """``[size factor, size]`` float64: the weights of pixels in each of those that lie between them."""
    centres = (np.arange(size * factor) + 0.5) / factor - 0.5
    first = np.floor(centres).astype(int) - REACH + 1
    weights = np.zeros((size * factor, size))
    for tap in range(2 * REACH):
        pixel = first + tap
        np.add.at(
            weights,
            (np.arange(size * factor), np.clip(pixel, 0, size - 1)),
            _cubic(np.abs(centres - pixel)),
        )
    return weights


def _cubic(x: np.ndarray) -> np.ndarray:
    a = SHARPNESS
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < REACH, far, 0.0))
