"""Clips that show the same as another: perceptual hashes, and which are near.

A hash is 64 bits of a frame's lowest frequencies (pHash, Zauner 2010). Of a clip, frames at fixed
parts of its length are hashed, so that neither size, compression nor frame rate matters; clips cut at
other times, mirrored or cropped copies are not found. Two clips are near if their hashes differ by
at most so many bits on average.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import cv2
import numpy as np

from dit_jax.files import refuse_if

K = TypeVar("K", bound=Hashable)
FRAMES = 4  # Hashes of a clip; an image has one.
_BITS = 16  # Of a part of a hash by which it is looked up.


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits of uint8 [h, w]: which of the lowest 8 x 8 frequencies are above their median."""
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:8, :8].ravel()
    low[0] = 0.0  # The mean says nothing of the shape.
    ranked = np.sort(low)  # Half of the 64 are above the median.
    return int.from_bytes(np.packbits(low > (ranked[31] + ranked[32]) / 2).tobytes(), "big")


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
    """
    message = f"distance is {distance} bits: it is at least 0 and below 8"
    refuse_if([(not 0 <= distance < 8, message)])
    groups: dict[int, tuple[list[K], array]] = {}
    for key, hashes in clips:
        keys, bits = groups.setdefault(len(hashes), ([], array("Q")))
        keys.append(key)
        bits.extend(hashes)
    return {
        keys[i]: (keys[earlier], apart)
        for count, (keys, bits) in groups.items()
        for i, earlier, apart in _near(np.frombuffer(bits, np.uint64).reshape(-1, count), distance)
    }


def _near(rows: np.ndarray, distance: float) -> Iterator[tuple[int, int, float]]:
    """(row, earlier row, bits apart) of uint64 [clips, hashes].

    Looked up by parts (multi-index hashing, Norouzi et al. 2012): of two hashes at most 7 bits apart,
    one of the four parts of 16 bits differs by at most one, so 17 entries a part are read instead
    of all clips; and of clips that are near on average, at least one pair of hashes is. The tables are
    sorted arrays: about 100 bytes a clip.
    """
    # Equal rows share an answer: many thousands of them would be looked at in every lookup.
    _, firsts, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    places = np.sort(firsts)
    unlike, which = rows[places], np.searchsorted(places, firsts[which.reshape(-1)])
    # [clips, tables]: a table for each of the four parts of each hash.
    shifts = np.arange(0, 64, _BITS, dtype=np.uint64)
    parts = (unlike[:, :, None] >> shifts & np.uint64((1 << _BITS) - 1)).reshape(len(unlike), -1)
    parts = parts.astype(np.uint16)
    orders = np.argsort(parts.T, kind="stable").astype(np.int32)
    edges = np.arange((1 << _BITS) + 1)
    start = np.stack(
        [np.searchsorted(p[o], edges) for p, o in zip(parts.T, orders, strict=True)]
    ).astype(np.int32)
    order, table = orders.ravel(), np.arange(len(orders))[:, None]
    flips = np.array([0, *(1 << bit for bit in range(_BITS))], np.uint16)
    earlier = np.full(len(unlike), -1, np.int32)
    apart = np.zeros(len(unlike), np.float32)
    for i in range(1, len(unlike)):
        around = parts[i][:, None] ^ flips  # [tables, 17]
        begin, end = start[table, around].ravel(), start[table, around.astype(int) + 1].ravel()
        sizes = end - begin
        offset = np.repeat(table * len(unlike), len(flips)) + begin - np.cumsum(sizes) + sizes
        near = order[np.repeat(offset, sizes) + np.arange(sizes.sum())]
        near = near[(near < i) & (earlier[near] < 0)]
        bits = np.bitwise_count(unlike[near] ^ unlike[i]).mean(1)
        near, bits = near[bits <= distance], bits[bits <= distance]
        if len(near):
            first = near.argmin()
            earlier[i], apart[i] = near[first], bits[first]
    for i, one in enumerate(which):
        if earlier[one] >= 0:
            yield i, int(places[earlier[one]]), float(apart[one])
        elif places[one] != i:
            yield i, int(places[one]), 0.0
