"""Clips at low resolution, for super-resolution: made of large ones, and enlarged again.

Both are separable and keep centres: a pixel of the small clip is the mean of the pixels that it covers,
which leaves nothing to alias, and enlarging is cubic convolution (Keys 1981, "Cubic Convolution
Interpolation for Digital Image Processing") with the kernel ::

    k(x) = (a + 2) x^3 - (a + 3) x^2 + 1      for x < 1,                                       (1)
           a (x^3 - 5 x^2 + 8 x - 4)          for 1 <= x < 2

and a = -0.75 as in OpenCV and PyTorch, which is nearer to sprites than the -0.5 of Keys and Pillow.
"""

from __future__ import annotations

import functools

import numpy as np

from dit_jax.files import InputError

A = -0.75


def shrink(video: np.ndarray, factor: int) -> np.ndarray:
    """A clip uint8 ``[t, h, w, c]`` with ``factor`` times fewer rows and columns, uint8."""
    t, h, w, c = video.shape
    if h % factor or w % factor:
        raise InputError(
            f"a clip of {h} x {w} pixels does not shrink to {factor} times fewer rows and columns: "
            "crop it (data.transform), or choose another factor."
        )
    cells = video.reshape(t, h // factor, factor, w // factor, factor, c)
    return np.rint(cells.mean((2, 4), dtype=np.float64)).astype(np.uint8)


def enlarge(video: np.ndarray, factor: int) -> np.ndarray:
    """A clip uint8 ``[t, h, w, c]`` with ``factor`` times as many rows and columns, uint8."""
    out = video.astype(np.float64)
    for axis in (1, 2):
        out = np.tensordot(cubic_matrix(out.shape[axis], factor), out, (1, axis))
        out = np.moveaxis(out, 0, axis)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


@functools.lru_cache
def cubic_matrix(size: int, factor: int) -> np.ndarray:
    """``[size factor, size]`` float64: the weights of pixels in each of those that lie between them;
    pixels at the edge are repeated beyond it."""
    centres = ((np.arange(size * factor) + 0.5) / factor - 0.5)[:, None]
    taps = np.floor(centres).astype(int) + np.arange(-1, 3)  # [size factor, 4]
    x = np.abs(centres - taps)
    near = (A + 2) * x**3 - (A + 3) * x**2 + 1
    far = A * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.zeros((size * factor, size))
    at = np.arange(size * factor)[:, None], np.clip(taps, 0, size - 1)
    np.add.at(weights, at, np.where(x < 1, near, np.where(x < 2, far, 0.0)))  # (1)
    return weights
