"""Several sets of records as one stream, by weight: images and clips, captioned and not.

Make-A-Video (Singer et al. 2022, section 3) learns what things look like and are called from images
with captions, and how they move from video without any. Here a clip without a caption trains as one
whose caption was dropped for guidance.

Which set fills a place of the stream follows from the seed and the place alone: Grain interleaves the
sets in their proportions, and the places are shuffled within windows, so that no row of a batch always
gets the same set. Each set runs through its own epochs, shuffled anew in each.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import grain
import numpy as np

from dit_jax.data.records import RecordsConfig, RecordsSource
from dit_jax.files import refuse_if
from dit_jax.types import PositiveFloat, Sample, Source

# Places of the stream that are shuffled together: in each whole window the proportions are kept.
WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class MixedSetConfig(RecordsConfig):
    """One set of a mixture: records, and how often they are chosen."""

    weight: PositiveFloat = 1.0
    """A sample is of this set with this probability, over the sum of all weights."""


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Several sets, mixed sample by sample."""

    sets: tuple[MixedSetConfig, ...]
    shown: int | None = None
    """Which set, from 0, a run's pictures and reports are about: its captions are the prompts, and
    splits (``data.eval_split``) are its own. Unset: the first that is captioned."""

    def __post_init__(self) -> None:
        message = f"shown={self.shown} of {len(self.sets)} sets: give sets, and the number of one"
        refuse_if([((self.shown or 0) not in range(len(self.sets)), message)])

    @property
    def shown_set(self) -> MixedSetConfig:
        """The set that pictures and reports are about."""
        captioned = (i for i, one in enumerate(self.sets) if one.captioned)
        return self.sets[next(captioned, 0) if self.shown is None else self.shown]

    @property
    def record_sets(self) -> tuple[RecordsConfig, ...]:
        """The configs of all sets of records."""
        return self.sets

    def open(self) -> MixedSource:
        """Opens all sets. Raises ``InputError`` if one model cannot learn from all of them."""
        parts = [RecordsSource(one) for one in self.sets]
        for kinds in zip(*map(_kind, parts), strict=True):
            paths = {kind: one.path for kind, one in zip(kinds, self.sets, strict=True) if kind}
            has = " and ".join(f"{path!r} has {kind}" for kind, path in paths.items())
            message = f"data.source.sets: {has}: prepare them alike (docs/prepare.md)"
            refuse_if([(len(paths) > 1, message)])
        return MixedSource(parts, [one.weight for one in self.sets])


def _kind(part: RecordsSource) -> tuple[str | None, ...]:
    """What the sets of a mixture must have in common, beside their codec and text encoder, which a run
    compares with its own; None agrees with everything."""
    config, feature = part.config, part.features[part.config.video_key]
    latents = np.dtype(getattr(feature, "np_dtype", np.uint8)).kind in "fV"  # V is bfloat16.
    labels = "labels" if config.label_key else "no labels"
    video = f"latents of {feature.shape[-1]} channels" if latents else "pixels"
    return video, labels if config.captioned else None


class MixedSource:
    """Random access to the samples of all sets, one set behind another; ``order`` mixes them.

    A sample is as its set yields it, with ``part``, the number of its set.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self.parts, self.weights = tuple(parts), tuple(float(weight) for weight in weights)
        *self._starts, self._count = itertools.accumulate(map(len, self.parts), initial=0)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        part, inside = self._locate(index)
        return {**self.parts[part][inside], "part": part}

    def _locate(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        part = bisect.bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def name(self, index: int) -> str:
        """How messages name a sample: as its set does."""
        part, inside = self._locate(index)
        return sample_name(self.parts[part], inside)

    @property
    def sizes(self) -> np.ndarray:
        """See ``RecordsSource.sizes``; zeros for sets that do not say."""
        pairs = [(getattr(part, "sizes", None), len(part)) for part in self.parts]
        return np.concatenate([np.zeros((n, 3), int) if s is None else s for s, n in pairs])

    def order(self, seed: int) -> grain.MapDataset:
        """The endless mixed order of indices. Proportions are Grain's: the weights, to within 1 %."""
        # A seed for each set's own order, and one for the windows.
        *seeds, last = np.random.SeedSequence(seed).generate_state(len(self.parts) + 1).tolist()
        orders = [
            grain.MapDataset.range(start, start + len(part)).seed(own).shuffle().repeat()
            for start, part, own in zip(self._starts, self.parts, seeds, strict=True)
        ]
        mixed = grain.MapDataset.mix(orders, self.weights)
        # A window adds its number to the seed, which must not overflow by that.
        return grain.experimental.WindowShuffleMapDataset(mixed, window_size=WINDOW, seed=last // 2)


def sample_order(source: Source, seed: int) -> grain.MapDataset:
    """The indices of a source's samples in the endless order that training takes them in."""
    order: Callable[[int], grain.MapDataset] | None = getattr(source, "order", None)
    if callable(order):
        return order(seed)
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()


def sample_name(source: Source, index: int) -> str:
    """How messages name a sample of a source."""
    name: Callable[[int], str] | None = getattr(source, "name", None)
    return name(index) if callable(name) else f"sample {index}"
