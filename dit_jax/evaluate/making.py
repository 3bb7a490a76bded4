"""Making the samples that are measured: which are asked for, and shard after shard until all are there.

Sample number i has the noise of seed + i, and label or prompt number i: what it shows depends on these
and, by rounding, on what shares its batch, which is the same in every run of a plan. So a run that was
killed and goes on makes what an uninterrupted one makes, bit by bit, on the same mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dit_jax.evaluate.images import ImageSet
from dit_jax.evaluate.store import SampleStore
from dit_jax.sampling import Request

ClassDraw = Literal["balanced", "uniform"]


def class_labels(how: ClassDraw, classes: int, num: int, seed: int) -> np.ndarray:
    """The classes int64 ``[num]`` of samples.

    ``balanced``: 0, 1, 2, ... over and over, so that numbers differ by one at most; ``uniform``: each
    drawn alone, as OpenAI's sampler and DiT's do.
    """
    if how == "balanced":
        return np.arange(num, dtype=np.int64) % classes
    # Apart from the noise of sample 0, whose key the seed is.
    key = jax.random.fold_in(jax.random.key(seed % 2**32), num)
    return np.asarray(jax.random.randint(key, (num,), 0, classes)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked for, sample by sample."""

    size: tuple[int, int, int]
    """Frames, rows and columns of one: of latents, where the model makes those."""
    fps: float
    seed: int
    labels: np.ndarray | None = None
    """``[num]``, for a model of classes."""
    prompts: Sequence[str] = ()
    """Taken in turn, for a model that reads text."""

    def request(self, i: int) -> Request:
        """Sample number i."""
        prompt = self.prompts[i % len(self.prompts)] if self.prompts else ""
        fields = {} if self.labels is None else {"label": int(self.labels[i])}
        return Request(prompt, *self.size, self.fps, self.seed + i, segment_fields=fields)


def fill(
    store: SampleStore,
    wanted: Wanted,
    make: Callable[[list[Request]], Sequence[np.ndarray]],
) -> ImageSet:
    """Makes the shards that are missing, joins them, and opens the samples.

    ``make`` gives a clip uint8 ``[t, h, w, 3]`` for each request, the same on every process; clips of a
    single frame are stored as images. Process 0 alone writes, and says which shards there are.
    """
    first = jax.process_index() == 0
    if first and not store.finished:
        store.begin()
    shards = store.shards()
    there = np.array([store.finished or store.has(i) for i in range(len(shards))])
    if jax.process_count() > 1:
        there = np.asarray(multihost_utils.broadcast_one_to_all(there))
    done = sum(len(shard) for shard, found in zip(shards, there, strict=True) if found)
    with tqdm(
        total=store.count,
        initial=done,
        desc="sampling",
        unit="sample",
        disable=not first,
        dynamic_ncols=True,
    ) as bar:
        for number, shard in enumerate(shards):
            if there[number]:
                continue
            clips = np.stack(make([wanted.request(i) for i in shard]))
            if first:
                store.put(number, clips[:, 0] if clips.shape[1] == 1 else clips)
            bar.update(len(shard))
    if first and not store.finished:
        store.finish(wanted.labels)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("samples are written")
    return store.open()
