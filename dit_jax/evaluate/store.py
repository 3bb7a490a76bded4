"""Samples on their way to a file: finished shards on disk, so that a killed run goes on.

A store is a directory with ``plan.json`` (what is made, and how: another plan is refused), a file for
each finished shard, and in the end ``samples.npz`` in their stead. What a shard holds depends on the
plan and its number alone, so it does not matter which run made it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.evaluate.images import NpzImages, write_npz
from dit_jax.files import InputError, atomic_path, read_json, write_json

PLAN, SHARDS, SAMPLES = "plan.json", "shards", "samples.npz"


class SampleStore:
    """Shards of ``size`` items (the last shorter) that make up ``count`` items."""

    def __init__(self, directory: Path, plan: Mapping[str, Any], count: int, size: int) -> None:
        """Opens a store, or plans it: nothing is written yet (see ``begin``).

        Raises:
            ValueError: where the directory holds the samples of another plan.
        """
        self.directory, self.count, self.size = directory, count, size
        self._plan = json.loads(json.dumps({**plan, "num": count, "shard": size}))
        self._check()

    def _check(self) -> None:
        place = self.directory / PLAN
        if not place.is_file():
            if any((self.directory / name).exists() for name in (SHARDS, SAMPLES)):
                raise ValueError(
                    f"{str(self.directory)!r} holds samples but no {PLAN} that tells what they are: "
                    "give another --output."
                )
            return
        before = read_json(place)
        if not isinstance(before, dict):
            raise InputError(f"{str(place)!r} holds no plan: give another --output.")
        for name in sorted(self._plan | before):
            if self._plan.get(name) != before.get(name):
                raise ValueError(
                    f"{str(self.directory)!r} holds samples made with {name} {before.get(name)!r}, not "
                    f"{self._plan.get(name)!r}: give another --output, or the same settings to go on."
                )

    @property
    def samples(self) -> Path:
        """Where the finished samples lie."""
        return self.directory / SAMPLES

    @property
    def finished(self) -> bool:
        return self.samples.is_file()

    def begin(self) -> None:
        """Makes the directory and writes the plan."""
        (self.directory / SHARDS).mkdir(parents=True, exist_ok=True)
        write_json(self.directory / PLAN, self._plan)

    def shards(self) -> list[range]:
        """The items of every shard, finished or not."""
        starts = range(0, self.count, self.size)
        return [range(first, min(first + self.size, self.count)) for first in starts]

    def has(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return self._path(shard).is_file()

    def put(self, shard: int, items: np.ndarray) -> None:
        """Writes a finished shard, uint8 ``[size, *shape]``; it appears whole or not at all."""
        assert len(items) == len(self.shards()[shard]) and items.dtype == np.uint8
        with atomic_path(self._path(shard)) as scratch:
            np.save(scratch, items)

    def finish(self, labels: np.ndarray | None) -> None:
        """Joins the shards to ``samples.npz`` (labels, if any, as ``arr_1``), and removes them."""
        arrays = {} if labels is None else {"arr_1": labels}
        write_npz(self.samples, arrays, self._items(), self.count)
        for shard in range(len(self.shards())):
            self._path(shard).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Cloud Storage has no folders without files.
            (self.directory / SHARDS).rmdir()

    def open(self) -> NpzImages:
        """The finished samples."""
        return NpzImages(self.samples)

    def _items(self) -> Iterator[np.ndarray]:
        for shard in range(len(self.shards())):
            with self._path(shard).open("rb") as file:
                yield np.lib.format.read_array(file)

    def _path(self, shard: int) -> Path:
        return self.directory / SHARDS / f"{shard:06d}.npy"
