"""Clips that show the same as another: perceptual hashes, and a table to look near ones up in.

A hash is 64 bits of a frame's lowest frequencies (pHash, Zauner 2010). Of a clip, frames at fixed
parts of its length are hashed, so that neither size, compression nor frame rate matters; clips cut at
other times, mirrored or cropped copies are not found. Two clips are near if their hashes differ by
at most so many bits on average.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from dit_jax.preparation.refusals import extra

FRAMES = 4
"""Hashes of a clip; an image has one."""
_BANDS, _BITS = 4, 16


def hash_square(grey: np.ndarray) -> np.ndarray:
    """What is hashed of uint8 [h, w]: uint8 [32, 32]."""
    cv2 = extra("cv2")
    return cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA)


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits of uint8 [h, w]: which of the lowest 8 x 8 frequencies are above their median."""
    small = grey if grey.shape == (32, 32) else hash_square(grey)
    low = extra("cv2").dct(small.astype(np.float32))[:8, :8].ravel()
    low[0] = 0.0  # The mean says nothing of the shape.
    middle = np.partition(low, 32)[31:33]  # Half of the 64 are above.
    return int.from_bytes(np.packbits(low > middle.mean()).tobytes(), "big")


def hashed_frames(count: int) -> list[int]:
    """Which of a clip's frames are hashed: the middles of `FRAMES` equal parts, or the only one."""
    if count == 1:
        return [0]
    return [count * (2 * i + 1) // (2 * FRAMES) for i in range(FRAMES)]


class NearDuplicates:
    """Finds, for clip after clip, the first one before it that is near.

    Looked up by parts (multi-index hashing, Norouzi et al. 2012): of two hashes at most 7 bits apart,
    one of the four parts of 16 bits differs by at most one, so 17 entries a part are read instead
    of all clips; and of clips that are near on average, at least one pair of hashes is.
    """

    def __init__(self, distance: float = 4.0):
        """`distance`: bits of 64, on average over a clip's hashes, below 8. Copies that were shrunk and
        compressed anew are about 2 apart, two takes of one person before one wall from 5.5 on."""
        if not 0 <= distance < 8:
            raise ValueError(f"distance is {distance} bits: it is at least 0 and below 8")
        self.distance = distance
        self._keys: list[Hashable] = []
        self._hashes: list[np.ndarray] = []
        self._table: dict[tuple[int, int, int, int], list[int]] = collections.defaultdict(list)

    def add(self, key: Hashable, hashes: Sequence[int]) -> tuple[Hashable, float] | None:
        """The key of the first clip near this one, and their distance; None, and it is added."""
        mine = np.array(hashes, np.uint64)
        near = sorted(
            {i for place in self._places(hashes, True) for i in self._table.get(place, ())}
        )
        for i in near:
            apart = float(np.bitwise_count(self._hashes[i] ^ mine).mean())
            if apart <= self.distance:
                return self._keys[i], apart
        for place in self._places(hashes, False):
            self._table[place].append(len(self._keys))
        self._keys.append(key)
        self._hashes.append(mine)
        return None

    @staticmethod
    def _places(hashes: Sequence[int], around: bool) -> Iterable[tuple[int, int, int, int]]:
        """Where hashes stand in the table: (number of hashes, which, band, bits), or also around."""
        flips = [0, *(1 << bit for bit in range(_BITS))] if around else [0]
        for (i, value), band in itertools.product(enumerate(hashes), range(_BANDS)):
            bits = value >> (band * _BITS) & ((1 << _BITS) - 1)
            yield from ((len(hashes), i, band, bits ^ flip) for flip in flips)


def near_duplicates(
    clips: Iterable[tuple[Hashable, Sequence[int]]], distance: float = 4.0
) -> dict[Hashable, tuple[Hashable, float]]:
    """Of (key, hashes) in order: key -> (key of the clip that is kept, distance in bits)."""
    found = NearDuplicates(distance)
    return {key: near for key, hashes in clips if (near := found.add(key, hashes))}
