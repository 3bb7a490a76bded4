"""How far made samples are from true ones, in the space of some network's features.

- Fréchet distance between Gaussians: FID with Inception's pooled features (Heusel et al. 2017, "GANs
  trained by a two time-scale update rule", eq. 6), sFID with spatial ones (Nash et al. 2021,
  "Generating images with sparse representations", section 4), FVD with I3D's logits (Unterthiner et
  al. 2018, "Towards accurate generative models of video").
- Inception Score (Salimans et al. 2016, "Improved techniques for training GANs", section 4).
- Improved precision and recall (Kynkäänniemi et al. 2019, section 3).

Everything is NumPy in float64 on the host and knows no network: any features will do.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

from dit_jax.evaluate.moments import Statistics

NEIGHBOURS = 3
"""k of precision and recall, as in the paper and in OpenAI's evaluation suite."""
SPLIT = 5000
"""Samples in a split of the Inception Score: ten splits of the usual 50,000."""
ROUNDING = 16 * np.finfo(np.float64).eps
"""Variance, of the largest feature's, below which a feature's rest is taken for none."""
BLOCK = 2**25
"""Entries of a block of distances: 256 MiB."""


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """``|mean_a - mean_b|² + tr(A + B - 2 (A B)^½)`` of covariances A and B; 0 for equal ones.

    With roots A = R Rᵀ and B = Q Qᵀ the trace of (A B)^½ is the sum of the singular values of Rᵀ Q.
    That is real and not negative however singular the covariances are, needs no offset on their
    diagonals, and squares nothing: its error is a rounding of the result, not of its square.

    Raises:
        ValueError: for statistics of different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {a.mean.size} and {b.mean.size} features cannot be compared: both must "
            "come from one network and one of its layers."
        )
    cross = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R ``[f, rank]`` with R Rᵀ = covariance: Cholesky with pivots, which stops where nothing but
    rounding is left, so that few samples make little work."""
    symmetric = (covariance + covariance.T).astype(np.float64) / 2
    rounding = ROUNDING * float(np.diag(symmetric).max())
    if rounding <= 0:
        return np.zeros((len(symmetric), 0))
    pivoted = lapack.dpstrf  # pyright: ignore[reportAttributeAccessIssue]
    lower, pivots, rank, _ = pivoted(symmetric, lower=1, tol=rounding)
    root = np.empty((len(symmetric), rank))
    root[pivots - 1] = np.tril(lower)[:, :rank]  # Fortran counts from 1
    return root


def small_sample_note(statistics: Statistics, what: str) -> str | None:
    """A warning where samples are too few for a Fréchet distance to be trusted, else None.

    The covariance of n <= f samples is singular, and the distance is biased upwards by about f / n.
    """
    count, size = statistics.count, statistics.mean.size
    if count is None or count > size:
        return None
    return (
        f"{count} {what} for {size} features: their covariance is singular and the distance far too "
        f"large. Take more than {size}; published figures use 50000."
    )


def inception_score(probabilities: np.ndarray, split: int = SPLIT) -> tuple[float, float]:
    """``exp E_x KL(p(y|x) || p(y))``, in 1..classes: mean and deviation over splits of the samples.

    ``probabilities [n, classes]`` have rows that sum to 1. Splits hold ``split`` samples in order, the
    last what is left.
    """
    if probabilities.ndim != 2 or not probabilities.size or split < 1:
        raise ValueError(
            f"probabilities have shape {probabilities.shape} and splits {split} samples: give "
            "[n, classes] with n >= 1, and splits of at least 1."
        )
    scores = []
    for first in range(0, len(probabilities), split):
        part = probabilities[first : first + split].astype(np.float64)
        ratio = np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(part.mean(0), 1e-300))
        scores.append(np.exp((part * ratio).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    made: np.ndarray, true: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Shares, in [0, 1], of made samples among the true ones, and of true among the made.

    A set's manifold is the union of balls around its samples that reach to their ``neighbours``-th
    nearest other sample. made ``[n, f]``, true ``[m, f]``; distances are made block by block.

    Raises:
        ValueError: for features of different widths, or not more samples than neighbours.
    """
    if made.ndim != 2 or true.ndim != 2 or made.shape[1] != true.shape[1]:
        raise ValueError(
            f"features of shapes {made.shape} and {true.shape}: give [n, f] and [m, f]."
        )
    if neighbours < 1 or min(len(made), len(true)) <= neighbours:
        raise ValueError(
            f"precision and recall take the {neighbours} nearest neighbours in each set, of which one "
            f"has {len(made)} samples and the other {len(true)}: give more than {neighbours} of each."
        )
    made, true = made.astype(np.float64), true.astype(np.float64)
    precision = _share_within(made, true, _radii(true, neighbours))
    return precision, _share_within(true, made, _radii(made, neighbours))


def _radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distance ``[n]`` of each sample to its so-manieth nearest other one."""
    radii = np.empty(len(features))
    for rows in _blocks(len(features), len(features)):
        distances = _squared_distances(features[rows], features)
        # A sample is its own nearest; duplicates of it are others.
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = 0
        radii[rows] = np.partition(distances, neighbours, axis=1)[:, neighbours]
    return radii


def _share_within(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    """The share of points that lie in at least one ball; radii are squared."""
    found = 0
    for rows in _blocks(len(points), len(centres)):
        found += int((_squared_distances(points[rows], centres) <= radii).any(1).sum())
    return found / len(points)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = a @ b.T
    return np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * products, 0)


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(BLOCK // columns, 1)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
