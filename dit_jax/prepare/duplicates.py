"""Clips that show the same as another: perceptual hashes, and which are near.

A hash is 64 bits of a frame's lowest frequencies (pHash, Zauner 2010). Of a clip, frames at fixed
parts of its length are hashed, so that neither size, compression nor frame rate matters; clips cut at
other times, mirrored or cropped copies are not found. Two clips are near if their hashes differ by
at most so many bits on average.
"""

from __future__ import annotations

import collections
from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import cv2
import numpy as np

from dit_jax.files import refuse_if

K = TypeVar("K", bound=Hashable)
FRAMES = 4  # Hashes of a clip; an image has one.
_FLIPS = np.array([0, *(1 << bit for bit in range(16))])  # No bit of 16 is changed, or one.


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits of uint8 [h, w]: which of the lowest 8 x 8 frequencies are above their median."""
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:8, :8].ravel()
    low[0] = 0.0  # The mean says nothing of the shape.
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def hashed_frames(count: int) -> list[int]:
    """Which of a clip's frames are hashed: the middles of `FRAMES` equal parts, or the only one."""
    return [0] if count == 1 else [count * (2 * i + 1) // (2 * FRAMES) for i in range(FRAMES)]


def near_duplicates(
    clips: Iterable[tuple[K, Sequence[int]]], distance: float = 4.0
) -> dict[K, tuple[K, float]]:
    """Of (key, hashes) in order: key -> (key of the first clip before it that is near, and is none
    itself, their distance in bits). Clips of other numbers of hashes are not compared.

    `distance`: bits of 64, on average over a clip's hashes, below 8. Copies that were shrunk and
    compressed anew are about 2 apart, two takes of one person before one wall from 5.5 on.

    Looked up by parts (multi-index hashing, Norouzi et al. 2012): of two hashes at most 7 bits apart,
    one of the four parts of 16 bits differs by at most one, so 17 entries a part are read instead
    of all clips; and of clips that are near on average, at least one pair of hashes is. Memory: some
    200 bytes a clip, and up to 300 MB for the million lists of a large table.
    """
    message = f"distance is {distance} bits: it is at least 0 and below 8"
    refuse_if([(not 0 <= distance < 8, message)])
    groups: dict[int, tuple[list[K], array]] = {}
    for key, hashes in clips:
        keys, bits = groups.setdefault(len(hashes), ([], array("Q")))
        keys.append(key)
        bits.extend(hashes)
    found: dict[K, tuple[K, float]] = {}
    for count, (keys, bits) in groups.items():
        rows = np.frombuffer(bits, np.uint64).reshape(-1, count)
        tables = np.arange(4 * count)[:, None] << 16  # One for each of the four parts of each hash.
        entries = collections.defaultdict[int, list[int]](list)
        for i, row in enumerate(rows):
            around = (tables | row.view(np.uint16)[:, None]) ^ _FLIPS  # [tables, 17]
            listed = [one for entry in around.ravel().tolist() for one in entries.get(entry, ())]
            near = np.unique(np.array(listed, np.int64))
            apart = np.bitwise_count(rows[near] ^ row).mean(1)
            near, apart = near[apart <= distance], apart[apart <= distance]
            if len(near):
                found[keys[i]] = keys[near[0]], float(apart[0])
            else:
                for entry in around[:, 0].tolist():
                    entries[entry].append(i)
    return found
