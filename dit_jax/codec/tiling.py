"""A function of images applied tile by tile: bounded memory, overlaps blended.

Tiles of one size (one compilation) cover the image, neighbours sharing an overlap over which one fades
into the other linearly. The last tile of a row ends where the row does. A place whose result depends
on more than a tile sees (global attention, group norms) comes out a little different from the whole.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side: neighbours overlap by at least ``overlap``."""
    if size <= tile:
        return [0]
    starts = list(range(0, size - tile, tile - overlap))
    return [*starts, size - tile]


def ramp(starts: list[int], at: int, tile: int, scale: float) -> np.ndarray:
    """Weights along one side of the tile that is number ``at``, at its output's resolution.

    They rise over the overlap with the tile before and fall over that with the tile after; the weights
    of all tiles at a place sum to 1 where at most two overlap.
    """
    n = round(tile * scale)
    weights = np.ones(n, np.float32)
    for other, side in ((at - 1, slice(None)), (at + 1, slice(None, None, -1))):
        if 0 <= other < len(starts):
            shared = round((tile - abs(starts[at] - starts[other])) * scale)
            rise = (np.arange(shared, dtype=np.float32) + 0.5) / shared
            turned = weights[side]
            turned[:shared] *= rise
    return weights


def tiled(
    function: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    tile: int,
    overlap: int,
    unit: int = 1,
) -> np.ndarray:
    """``function`` of images ``[b, h, w, c]``, of tiles ``[b, tile, tile, c]`` at a time.

    Args:
        function: Maps ``[b, h, w, c]`` to ``[b, h s, w s, c']`` for a fixed s.
        images: What to map.
        tile: Rows and columns of a tile at most; a side that is shorter is taken whole.
        overlap: Rows and columns that neighbours share at least.
        unit: Tiles begin at multiples of this (the pixels of a latent, where it encodes).

    Returns:
        The whole, float32, on the host; what is computed at a time is one tile.

    Raises:
        ValueError: where the numbers make no tiling.
    """
    if tile % unit or overlap % unit or not 0 <= overlap <= tile // 2:
        raise ValueError(
            f"tiles of {tile} with an overlap of {overlap} are not multiples of {unit}, or overlap by "
            "more than half: give an overlap between 0 and half a tile."
        )
    height, width = images.shape[1:3]
    if height % unit or width % unit:
        raise ValueError(f"{height} x {width} is not a multiple of {unit} both ways.")
    rows, columns = (tile_starts(size, tile, overlap) for size in (height, width))
    tall, wide = min(tile, height), min(tile, width)
    total = weight = np.zeros(0)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            part = np.asarray(function(images[:, top : top + tall, left : left + wide]))
            scale = part.shape[1] / tall
            if not total.size:
                shape = (round(height * scale), round(width * scale))
                total = np.zeros((len(part), *shape, part.shape[-1]), np.float32)
                weight = np.zeros((*shape, 1), np.float32)
            down = ramp(rows, i, tall, scale)[:, None]
            faded = (down * ramp(columns, j, wide, scale))[..., None]
            y, x = round(top * scale), round(left * scale)
            place = (slice(y, y + part.shape[1]), slice(x, x + part.shape[2]))
            total[:, *place] += part * faded
            weight[place] += faded
    return total / weight
