"""Generated samples, shard by shard on disk, so that a run that was killed goes on.

Sample number i has the noise of seed + i, and label or prompt number i: what it shows depends on these
and, by rounding, on what shares its batch, which is the same in every run of a plan. So a run that goes
on ends with the bytes of one that was never interrupted, on the same mesh.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dit_jax.evaluate.images import ImageSet, open_images, write_npz
from dit_jax.files import atomic_path, read_json, refuse_if, write_json

ClassOrder = Literal["balanced", "uniform"]


def class_labels(order: ClassOrder, classes: int, num: int, seed: int) -> np.ndarray:
    """The classes int64 ``[num]`` of samples: 0, 1, 2, ... over and over, or each drawn alone, as
    OpenAI's sampler and DiT's do."""
    if order == "balanced":
        return np.arange(num, dtype=np.int64) % classes
    # Apart from the noise of sample 0, whose key the seed is.
    key = jax.random.fold_in(jax.random.key(seed % 2**32), num)
    return np.asarray(jax.random.randint(key, (num,), 0, classes)).astype(np.int64)


class SampleStore:
    """A directory with ``plan.json`` (what is sampled, and how: another plan is refused), a file for
    each finished shard, and in the end ``samples.npz`` in their stead."""

    def __init__(self, directory: Path, plan: Mapping[str, Any], count: int, shard: int) -> None:
        """Checks the directory; nothing is written yet. ``shard`` samples are lost at most."""
        self.directory, self.count, self.path = directory, count, directory / "samples.npz"
        self.plan = json.loads(json.dumps({**plan, "num": count, "shard": shard}))
        # The numbers of each shard's samples, by its file.
        self.shards = {
            directory / "shards" / f"{i:06d}.npy": range(first, min(first + shard, count))
            for i, first in enumerate(range(0, count, shard))
        }
        place, name = directory / "plan.json", repr(str(directory))
        planned = place.is_file()
        bare = not planned and (self.path.exists() or (directory / "shards").exists())
        stored = read_json(place) if planned else self.plan
        remedy = "give another --output, or the same settings to go on."
        odd = f"{name} has samples and no plan.json that tells their settings: {remedy}"
        refuse_if([(bare or not isinstance(stored, dict), odd)])
        message = f"{name} holds samples made with {{}} {{!r}}, not {{!r}}: {remedy}"
        pairs = {key: (stored.get(key), self.plan.get(key)) for key in sorted(stored | self.plan)}
        refuse_if((a != b, message.format(key, a, b)) for key, (a, b) in pairs.items())

    def fill(
        self, sample: Callable[[range], Sequence[np.ndarray]], labels: np.ndarray | None = None
    ) -> ImageSet:
        """Samples the shards that are missing, joins all (with labels as ``arr_1``), and opens them.

        ``sample`` returns clips uint8 ``[t, h, w, 3]`` by their numbers, the same on every process;
        clips of a single frame are stored as images. Process 0 alone writes, and says what is missing.
        """
        first, finished = jax.process_index() == 0, self.path.is_file()
        if first and not finished:
            write_json(self.directory / "plan.json", self.plan)
        done = np.array([finished or path.is_file() for path in self.shards])
        if jax.process_count() > 1:
            done = np.asarray(multihost_utils.broadcast_one_to_all(done))
        left = [path for path, there in zip(self.shards, done, strict=True) if not there]
        for path in tqdm(left, "sampling", disable=not first, unit="shard"):
            clips = np.stack(sample(self.shards[path]))
            if first:
                with atomic_path(path) as fresh:
                    np.save(fresh, clips[:, 0] if clips.shape[1] == 1 else clips)
        if first and not finished:
            arrays = {} if labels is None else {"arr_1": labels}
            write_npz(self.path, arrays, map(_read, self.shards), self.count)
            for path in self.shards:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # Cloud Storage has no folders without files.
                (self.directory / "shards").rmdir()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("samples are written")
        return open_images(str(self.path))


def _read(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.lib.format.read_array(file)
