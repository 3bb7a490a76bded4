"""Metrics of a set of samples against a reference: which features each needs, and how they meet.

Every process of a run reads its own part of the images, in order, and computes its features on its own
devices; all then hold the whole result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from scipy.special import softmax
from tqdm import tqdm

from dit_jax.evaluate.distances import (
    NEIGHBOURS,
    frechet_distance,
    inception_score,
    precision_recall,
    small_sample_note,
)
from dit_jax.evaluate.features import FeatureFunction, named_features
from dit_jax.evaluate.i3d import I3D_MIN_FRAMES
from dit_jax.evaluate.images import ImageSet, is_clips
from dit_jax.evaluate.moments import Moments, Statistics
from dit_jax.evaluate.reference import Reference

Metric = Literal["fid", "sfid", "is", "precision", "recall", "fvd"]
FRECHET: Mapping[str, str] = {"fid": "pool", "sfid": "spatial", "fvd": "video"}
"""Metrics that are Fréchet distances, and of which features."""
OF_CLIPS = frozenset({"fvd"})
NEIGHBOURLY = frozenset({"precision", "recall"})
READ = 64
"""Items read from disk at once."""


@dataclasses.dataclass(frozen=True)
class Collected:
    """Features of a whole set: statistics of some kinds, all values ``[n, f]`` of others."""

    count: int
    statistics: Mapping[str, Statistics]
    values: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Metrics by name, and what must be said of them."""

    metrics: Mapping[str, float]
    notes: Sequence[str]


def check_metrics(
    metrics: Sequence[Metric],
    clips: bool,
    reference: Reference | None,
    what: str,
    count: int,
    frames: int,
) -> None:
    """Raises ``ValueError`` where a metric is not of such samples, or the reference does not do.

    ``what`` names the samples, of which there are (or will be) ``count``; ``frames`` are those that
    fvd looks at.
    """
    for name in metrics:
        if (name in OF_CLIPS) != clips:
            kind, others = ("clips", "fvd") if clips else ("images", "fid sfid is precision recall")
            raise ValueError(
                f"{name} is not a metric of {kind}, and {what} are {kind}: choose --metrics {others}."
            )
        if name != "is":
            _check_reference(name, clips, reference, what, frames)
        check_count(name, count, what)


def _check_reference(
    name: str, clips: bool, reference: Reference | None, what: str, frames: int
) -> None:
    if reference is None:
        raise ValueError(f"{name} compares with a reference: give --reference PATH.")
    if name in FRECHET and FRECHET[name] in reference.statistics:
        return
    if reference.items is None:
        held = ", ".join(sorted(reference.statistics))
        raise ValueError(
            f"{name} needs more than the statistics ({held}) in {reference.path!r}: give a "
            "reference with images, a folder or an .npz that has arr_0."
        )
    if is_clips(reference.items) != clips:
        raise ValueError(
            f"{reference.path!r} holds {'images' if clips else 'clips'}, but {what} are "
            f"{'clips' if clips else 'images'}: give a reference of the same kind."
        )
    check_count(name, reference.items.count, repr(reference.path))
    if clips:
        check_frames(reference.items.shape, frames, f"of {reference.path!r} ")


def check_count(name: str, count: int, what: str) -> None:
    """Raises ``ValueError`` where there are too few items for a metric (or for statistics)."""
    least = 1 if name == "is" else NEIGHBOURS + 1 if name in NEIGHBOURLY else 2
    least = max(least, jax.process_count())
    if count < least:
        raise ValueError(
            f"{name} takes at least {least} items here, and {what} are {count}: give more."
        )


def check_frames(shape: Sequence[int], frames: int, of: str = "") -> None:
    """Raises ``ValueError`` where clips of that shape are shorter than what is looked at."""
    if shape[0] < frames:
        raise ValueError(
            f"the clips {of}have {shape[0]} frames, fewer than the {frames} that fvd looks at: give "
            f"longer ones, or --fvd-frames of at least {I3D_MIN_FRAMES} (published figures: 16)."
        )


def collect(
    items: ImageSet,
    function: FeatureFunction,
    moments: frozenset[str],
    keep: frozenset[str],
    name: str = "pool",
    progress: str | None = None,
    frames: int | None = None,
) -> Collected:
    """Runs a feature function over a set.

    ``moments`` are the kinds of features of which statistics are made, ``keep`` those whose values are
    kept; a function that gives a single array gives the kind ``name``. ``progress`` titles a bar;
    ``frames`` is how many of each clip are looked at.
    """
    process, processes = jax.process_index(), jax.process_count()
    if items.count < processes:
        raise ValueError(
            f"{items.count} item(s) for {processes} processes: evaluate fewer with one process."
        )
    start, stop = (items.count * i // processes for i in (process, process + 1))
    sums = {kind: Moments() for kind in sorted(moments)}
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in sorted(keep)}
    with tqdm(
        total=stop - start,
        desc=progress,
        unit="clip" if is_clips(items) else "image",
        disable=progress is None or process != 0,
        dynamic_ncols=True,
    ) as bar:
        for batch in items.batches(start, stop, READ):
            looked_at = batch if frames is None else batch[:, :frames]
            features = named_features(function(looked_at), name)
            for kind, one in sums.items():
                one.update(features[kind])
            for kind, values in kept.items():
                values.append(features[kind])
            bar.update(len(batch))
    statistics = {kind: _merged(one).statistics() for kind, one in sums.items()}
    values = {kind: _concatenated(np.concatenate(parts)) for kind, parts in kept.items()}
    return Collected(items.count, statistics, values)


def _gather(array: np.ndarray) -> list[np.ndarray]:
    """An array of the same shape from each process, bit by bit: JAX would make doubles single."""
    if jax.process_count() == 1:
        return [array]
    whole = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
    return [np.frombuffer(row.tobytes(), array.dtype).reshape(array.shape) for row in whole]


def _merged(mine: Moments) -> Moments:
    """The moments of all processes, merged in their order."""
    if jax.process_count() == 1:
        return mine
    whole = Moments()
    gathered = zip(
        _gather(np.array(mine.count)), _gather(mine.mean), _gather(mine.scatter), strict=True
    )
    for count, mean, scatter in gathered:
        part = Moments()
        part.count, part.mean, part.scatter = int(count), mean, scatter
        whole.merge(part)
    return whole


def _concatenated(mine: np.ndarray) -> np.ndarray:
    """The values of all processes, one after the other."""
    sizes = [int(size) for size in _gather(np.array(len(mine)))]
    padded = np.concatenate([mine, np.zeros((max(sizes) - len(mine), *mine.shape[1:]), mine.dtype)])
    return np.concatenate([part[:n] for n, part in zip(sizes, _gather(padded), strict=True)])


def complete(
    reference: Reference,
    function: FeatureFunction,
    kinds: frozenset[str],
    keep: frozenset[str] = frozenset(),
    frames: int | None = None,
) -> tuple[Reference, Mapping[str, np.ndarray]]:
    """The reference with statistics of some kinds, which are computed where it has none stored, and the
    features of its items that are to be kept."""
    missing = kinds - set(reference.statistics)
    if not missing and not keep:
        return reference, {}
    assert reference.items is not None
    name = "video" if is_clips(reference.items) else "pool"
    found = collect(reference.items, function, missing, keep, name, "reference", frames)
    statistics = {**reference.statistics, **found.statistics}
    return dataclasses.replace(reference, statistics=statistics), found.values


def _size_note(samples: ImageSet, reference: Reference) -> list[str]:
    """A warning where samples and reference have different sizes, which the networks would hide."""
    if reference.items is None or reference.items.shape[-3:] == samples.shape[-3:]:
        return []
    (h, w), (true_h, true_w) = samples.shape[-3:-1], reference.items.shape[-3:-1]
    return [
        f"samples are {h} x {w} and references {true_h} x {true_w}: part of the distance is that of "
        "their sizes. Bring both to one."
    ]


def measure(
    metrics: Sequence[Metric],
    samples: ImageSet,
    reference: Reference | None,
    function: FeatureFunction,
    frames: int | None = None,
) -> Measured:
    """Computes metrics of samples; ``check_metrics`` has let them pass.

    ``function`` gives the features: those of Inception for images, of I3D for clips, of which
    ``frames`` frames are looked at.
    """
    pool = frozenset({"pool"} if NEIGHBOURLY & set(metrics) else ())
    keep = pool | frozenset({"logits"} if "is" in metrics else ())
    kinds = frozenset(FRECHET[name] for name in metrics if name in FRECHET)
    name = "video" if is_clips(samples) else "pool"
    made = collect(samples, function, kinds, keep, name, "samples", frames)
    found: dict[str, float] = {}
    notes: list[str] = []
    true: Mapping[str, np.ndarray] = {}
    if reference is not None:
        notes += _size_note(samples, reference)
        reference, true = complete(reference, function, kinds, pool, frames)
        for metric in (metric for metric in metrics if metric in FRECHET):
            ours, theirs = (side.statistics[FRECHET[metric]] for side in (made, reference))
            found[metric] = frechet_distance(ours, theirs)
            for side, what in ((ours, "samples"), (theirs, "reference items")):
                note = small_sample_note(side, what)
                notes += [f"{metric}: {note}"] if note else []
    if "is" in metrics:
        probabilities = softmax(made.values["logits"].astype(np.float64), axis=1)
        found["is"], found["is_std"] = inception_score(probabilities)
    if pool:
        shares = precision_recall(made.values["pool"], true["pool"])
        both = dict(zip(("precision", "recall"), shares, strict=True))
        found |= {name: share for name, share in both.items() if name in metrics}
    return Measured(found, notes)
