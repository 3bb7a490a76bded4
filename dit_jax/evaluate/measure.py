"""Metrics of a set of samples against a reference: what each needs, and how it is computed.

Every process of a run reads its own part of the images, in order, and computes its features on its own
devices; all then hold the whole result.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from scipy.special import softmax
from tqdm import tqdm

from dit_jax.evaluate import distances
from dit_jax.evaluate.distances import Moments, Statistics
from dit_jax.evaluate.images import ImageSet, Reference
from dit_jax.files import refuse_if

Metric = Literal["fid", "sfid", "is", "precision", "recall", "fvd"]
# Metrics that are Fréchet distances, and of which features.
FRECHET: Mapping[str, str] = {"fid": "pool", "sfid": "spatial", "fvd": "video"}
MANIFOLDS = ("precision", "recall")
READ = 64  # Items read from disk at once.

Features = Callable[[np.ndarray], Any]
T = TypeVar("T")


def check_metrics(
    metrics: Sequence[Metric],
    items: ImageSet,
    what: str,
    reference: Reference | None,
    frames: int,
) -> None:
    """Refuses metrics that are not of such samples, which ``what`` names, or have no such reference;
    fvd looks at ``frames`` of each clip."""
    choices = "fvd" if items.kind == "clips" else "fid sfid is precision recall"
    message = f"is not a metric of {items.kind}, and {what} are {items.kind}: choose {choices}."
    for name in metrics:
        refuse_if([(name not in choices.split(), f"{name} {message}")])
        check_items(name, items, what, frames)
        if name != "is":
            check_reference(name, items.kind, reference, frames)


def check_reference(name: str, kind: str, reference: Reference | None, frames: int) -> None:
    """Refuses a reference without the statistics of a metric, or images or clips to take them from."""
    refuse_if([(reference is None, f"{name} compares with a reference: give --reference PATH.")])
    assert reference is not None
    path, items, stored = repr(reference.path), reference.items, reference.statistics
    if FRECHET.get(name) in stored:
        return
    lacks = f"{name} needs more than the statistics ({', '.join(stored)}) in {path}: give {kind}."
    refuse_if([(items is None, lacks)])
    assert items is not None
    other = f"{path} holds {items.kind}, and {name} is of {kind} here: give a reference of {kind}."
    refuse_if([(items.kind != kind, other)])
    check_items(name, items, path, frames)


def check_items(name: str, items: ImageSet, what: str, frames: int) -> None:
    """Refuses items that are too few for a metric (or for statistics), or clips that are too short."""
    least = 1 if name == "is" else distances.NEIGHBOURS + 1 if name in MANIFOLDS else 2
    least = max(least, jax.process_count())
    few = f"{name} takes at least {least} items here, and {what} are {items.count}: give more."
    short = f"the clips of {what} have {items.shape[0]} frames, fewer than --fvd-frames {frames}."
    is_short = items.kind == "clips" and items.shape[0] < frames
    refuse_if([(items.count < least, few), (is_short, short)])


def collect(
    items: ImageSet,
    features: Features,
    kinds: Collection[str],
    kept: Collection[str] = (),
    title: str = "samples",
    frames: int | None = None,
) -> tuple[dict[str, Statistics], dict[str, np.ndarray]]:
    """Statistics of some kinds of features of a whole set, and all values ``[n, f]`` of others; clips
    are cut to ``frames``."""
    process, processes = jax.process_index(), jax.process_count()
    start, stop = (items.count * i // processes for i in (process, process + 1))
    moments = {kind: Moments() for kind in sorted(kinds)}
    parts: dict[str, list[np.ndarray]] = {kind: [] for kind in sorted(kept)}
    batches = items.batches(start, stop, READ)
    for batch in tqdm(batches, title, -((start - stop) // READ), disable=process != 0):
        values = features(batch[:, :frames] if items.kind == "clips" else batch)
        for kind, one in moments.items():
            one.update(values[kind])
        for kind, part in parts.items():
            part.append(values[kind])
    statistics: dict[str, Statistics] = {}
    for kind, one in moments.items():
        whole = Moments()
        for part in _gather(one):
            whole.merge(part)
        statistics[kind] = whole.statistics()
    return statistics, {k: np.concatenate(_gather(np.concatenate(v))) for k, v in parts.items()}


def _gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    # As bytes: JAX would make doubles single, and shapes differ. Those behind a pickle are ignored.
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    size = np.max(multihost_utils.process_allgather(np.array(len(data))))
    rows = multihost_utils.process_allgather(np.pad(data, (0, size - len(data))))
    return [pickle.loads(np.asarray(row).tobytes()) for row in rows]


def complete(
    reference: Reference,
    features: Features,
    kinds: Collection[str],
    kept: Collection[str] = (),
    frames: int | None = None,
) -> tuple[Reference, dict[str, np.ndarray]]:
    """The reference with statistics of some kinds, computed if it has none stored, and the values of
    others."""
    missing = set(kinds) - set(reference.statistics)
    if not missing and not kept:
        return reference, {}
    assert reference.items is not None
    statistics, values = collect(reference.items, features, missing, kept, "reference", frames)
    return reference._replace(statistics={**reference.statistics, **statistics}), values


def measure(
    metrics: Sequence[Metric],
    samples: ImageSet,
    reference: Reference | None,
    features: Features,
    frames: int | None = None,
) -> tuple[dict[str, float], list[str]]:
    """Metrics of samples, which ``check_metrics`` has let pass, and notes that warn of them.

    ``features`` returns features by kind: "pool", "spatial" and "logits" of images, "video" of clips.
    """
    kinds = {FRECHET[name] for name in metrics if name in FRECHET}
    pool = ["pool"] if set(MANIFOLDS) & set(metrics) else []
    kept = [*pool, "logits"] if "is" in metrics else pool
    statistics, values = collect(samples, features, kinds, kept, "samples", frames)
    out: dict[str, float] = {}
    notes: list[str] = []
    if reference is not None:
        ours, items = samples.shape[-3:-1], reference.items
        if items is not None and items.shape[-3:-1] != ours:
            sizes = "samples are {} x {} and references {} x {}".format(*ours, *items.shape[-3:-1])
            notes.append(f"{sizes}: part of the distance is that of their sizes.")
        reference, true = complete(reference, features, kinds, pool, frames)
        for name in (name for name in metrics if name in FRECHET):
            pair = statistics[FRECHET[name]], reference.statistics[FRECHET[name]]
            out[name] = distances.frechet_distance(*pair)
            for one, what in zip(pair, ("samples", "reference items"), strict=True):
                note = distances.small_sample_note(one, what)
                notes += [f"{name}: {note}"] if note else []
        if pool:
            shares = distances.precision_recall(values["pool"], true["pool"])
            out |= {k: v for k, v in zip(MANIFOLDS, shares, strict=True) if k in metrics}
    if "is" in metrics:
        probabilities = softmax(values["logits"].astype(np.float64), axis=1)
        out["is"], out["is_std"] = distances.inception_score(probabilities)
    return out, notes
