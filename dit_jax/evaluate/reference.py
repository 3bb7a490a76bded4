"""What made samples are compared with: stored statistics, or images to take them from.

Layouts that are read, all .npz:

    mu, sigma                        pytorch-fid and others: Inception's pooled features
    mu, sigma, mu_s, sigma_s, arr_0  OpenAI's evaluation suite (``VIRTUAL_imagenet256_labeled.npz``):
                                     also the spatial features, and 10,000 images for precision
    arr_0                            images or clips: statistics are computed
    mu_v, sigma_v                    I3D's logits, as ``save_statistics`` writes them

and folders of images or clips. Statistics that a file has are taken as they are, never recomputed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dit_jax.evaluate.images import (
    ITEMS,
    ImageSet,
    NpzImages,
    npz_keys,
    open_images,
    read_arrays,
    write_npz,
)
from dit_jax.evaluate.moments import Statistics
from dit_jax.files import check_exists

KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "video": ("mu_v", "sigma_v")}
"""Keys of an .npz for the mean and covariance of each kind of feature."""
WIDTHS = {"pool": 2048, "spatial": 2023, "video": 400}
COUNT = "count"
LIMIT = 2**27
"""Bytes of all statistics of a file: two covariances of 2,048 numbers in float64 are half of it."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """The truth: statistics by kind (``pool``, ``spatial``, ``video``), and images where there are."""

    path: str
    statistics: Mapping[str, Statistics]
    items: ImageSet | None


def open_reference(path: str) -> Reference:
    """Reads the statistics and opens the images; raises ``ValueError`` where there are neither."""
    if not path.endswith(".npz"):
        return Reference(path, {}, open_images(path))
    place = check_exists(path, "--reference")
    names = npz_keys(place)
    items = NpzImages(place) if ITEMS in names else None
    found: dict[str, Statistics] = {}
    arrays = read_arrays(place, {COUNT, *itertools.chain(*KEYS.values())} & names, LIMIT)
    count = _count(arrays[COUNT], path) if COUNT in arrays else None
    for kind, (mean, covariance) in KEYS.items():
        if mean not in arrays or covariance not in arrays:
            continue
        try:
            found[kind] = Statistics(
                arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64), count
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{mean!r} and {covariance!r} in {path!r}: {error}") from error
        if found[kind].mean.size != WIDTHS[kind]:
            raise ValueError(
                f"{mean!r} in {path!r} has {found[kind].mean.size} numbers, but those features "
                f"{WIDTHS[kind]}: the file is of another network."
            )
    if not found and items is None:
        raise ValueError(
            f"{path!r} holds {', '.join(sorted(names)) or 'nothing'}: a reference holds statistics "
            f"(mu and sigma; mu_s and sigma_s; mu_v and sigma_v) or images ({ITEMS})."
        )
    return Reference(path, found, items)


def _count(stored: np.ndarray, path: str) -> int:
    whole = stored.size == 1 and np.issubdtype(stored.dtype, np.integer)
    if not whole or stored.item() < 1:
        raise ValueError(
            f"{COUNT!r} in {path!r} is {stored.dtype} of shape {stored.shape}: it is one whole number "
            "of at least 1, how many items the statistics are of. Leave it out, or make the file again."
        )
    return int(stored.item())


def save_statistics(
    path: Path, statistics: Mapping[str, Statistics], items: ImageSet | None = None
) -> None:
    """Writes statistics in the layout above, with the images if given (for precision and recall)."""
    arrays: dict[str, np.ndarray] = {}
    for kind, found in statistics.items():
        mean, covariance = KEYS[kind]
        arrays |= {mean: found.mean, covariance: found.covariance}
        if found.count is not None:
            arrays[COUNT] = np.array(found.count)
    batches = items.batches(0, items.count, 256) if items else ()
    write_npz(path, arrays, batches, items.count if items else 0)
