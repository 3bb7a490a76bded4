"""How far generated samples are from real ones, in the features of some network.

Of features with means m and covariances A and B, classes y, and balls around the samples of a set that
reach to the third neighbour::

    Fréchet distance = |m_a - m_b|² + tr(A + B - 2 (A B)^½)                                       (1)
    Inception Score = exp E_x KL(p(y|x) || p(y))                                                  (2)
    precision = share of generated samples in a ball of a real one; recall: the reverse           (3)

(1) is FID with Inception's pooled features (Heusel et al. 2017), sFID with spatial ones (Nash et al.
2021) and FVD with I3D's logits (Unterthiner et al. 2018); (2) is of Salimans et al. 2016, (3) of
Kynkäänniemi et al. 2019. All is NumPy in float64 on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from dit_jax.files import refuse_if

NEIGHBOURS = 3  # As in the paper and in OpenAI's evaluation suite.
SPLIT = 5000  # Samples in a split of the Inception Score: ten splits of the usual 50,000.
# Variance, of the largest feature's, below which a feature's rest is taken for none.
ROUNDING = 16 * np.finfo(np.float64).eps
BLOCK = 2**25  # Entries of a block of distances: 256 MiB.


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A set of features as a Gaussian: ``mean [f]`` and ``covariance [f, f]``, both float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None  # Of how many samples; None if a file does not say.

    def __post_init__(self) -> None:
        mean, covariance, size = self.mean, self.covariance, np.size(self.mean)
        shapes = f"mean {mean.shape} and covariance {covariance.shape}"
        finite = np.isfinite(mean).all() and np.isfinite(covariance).all()
        faults = (
            (mean.shape + covariance.shape != (size,) * 3, f"{shapes}: give [f] and [f, f]."),
            (not finite, "statistics with NaN or infinite values: compute them again."),
        )
        refuse_if(faults)


@dataclasses.dataclass
class Moments:
    """Features ``[n, f]`` summed up batch by batch, in 8 f² bytes however many come.

    Deviations are taken from the mean of each part, so that nothing cancels (Chan, Golub & LeVeque
    1983, "Algorithms for computing the sample variance", section 3).
    """

    count: int = 0
    mean: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    scatter: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    """Sum of (x - mean)(x - mean)ᵀ."""

    def update(self, features: np.ndarray) -> None:
        """Takes in a batch ``[n, f]``."""
        refuse_if([(features.ndim != 2, f"features have shape {features.shape}: give [n, f].")])
        if len(features):
            wide = features.astype(np.float64)
            mean = wide.mean(0)
            centred = wide - mean
            self.merge(Moments(len(wide), mean, centred.T @ centred))

    def merge(self, other: Moments) -> None:
        """Takes in the moments of other samples."""
        if not self.count or not other.count:
            one = self if self.count else other
            self.count, self.mean, self.scatter = one.count, one.mean, one.scatter
            return
        sizes = self.mean.size, other.mean.size
        refuse_if(
            [(sizes[0] != sizes[1], f"features of {sizes} numbers: give those of one layer.")]
        )
        total, apart = self.count + other.count, other.mean - self.mean
        between = np.outer(apart, apart) * (self.count * other.count / total)
        self.scatter = self.scatter + other.scatter + between
        self.mean = self.mean + apart * (other.count / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Mean and unbiased covariance (divided by n - 1)."""
        few = f"{self.count} sample(s) have no covariance: give at least 2."
        refuse_if([(self.count < 2, few)])
        return Statistics(self.mean, self.scatter / (self.count - 1), self.count)


def feature_statistics(features: np.ndarray) -> Statistics:
    """The statistics of features ``[n, f]``."""
    moments = Moments()
    moments.update(features)
    return moments.statistics()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Equation (1); 0 for equal statistics.

    With roots A = R Rᵀ and B = Q Qᵀ the trace of (A B)^½ is the sum of the singular values of Rᵀ Q.
    That is real and not negative however singular the covariances are, needs no offset on their
    diagonals, and squares nothing: its error is a rounding of the result, not of its square.
    """
    other = f"statistics of {a.mean.size} and {b.mean.size} features: give those of one layer."
    refuse_if([(a.mean.shape != b.mean.shape, other)])
    cross = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R ``[f, rank]`` with R Rᵀ = covariance: Cholesky with pivots, which stops at rounding errors,
    so that few samples make little work."""
    symmetric = (covariance + covariance.T).astype(np.float64) / 2
    rounding = ROUNDING * float(np.diag(symmetric).max())
    if rounding <= 0:
        return np.zeros((len(symmetric), 0))
    from scipy.linalg import lapack  # Not for who only samples from a run with this evaluator.

    pivoted = lapack.dpstrf  # pyright: ignore[reportAttributeAccessIssue]
    lower, pivots, rank, _ = pivoted(symmetric, lower=1, tol=rounding)
    root = np.empty((len(symmetric), rank))
    root[pivots - 1] = np.tril(lower)[:, :rank]  # Fortran counts from 1.
    return root


def small_sample_note(statistics: Statistics, what: str) -> str | None:
    """A warning of n <= f samples: their covariance is singular, and biases it by about f / n."""
    count, size = statistics.count, statistics.mean.size
    if count is None or count > size:
        return None
    return f"{count} {what} for {size} features: the distance is far too large. 50000 are usual."


def inception_score(probabilities: np.ndarray, split: int = SPLIT) -> tuple[float, float]:
    """Equation (2), in 1..classes, of ``[n, classes]``: mean and deviation over splits in order."""
    scores = []
    for first in range(0, len(probabilities), split):
        part = probabilities[first : first + split].astype(np.float64)
        ratio = np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(part.mean(0), 1e-300))
        scores.append(np.exp((part * ratio).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    out: np.ndarray, true: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Equation (3) of features ``[n, f]`` of generated samples and ``[m, f]`` of real ones."""
    few = min(len(out), len(true)) <= neighbours
    message = f"{len(out)} and {len(true)} samples: give more than {neighbours} neighbours of each."
    refuse_if([(few, message)])
    out, true = out.astype(np.float64), true.astype(np.float64)
    precision = _share_within(out, true, _radii(true, neighbours))
    return precision, _share_within(true, out, _radii(out, neighbours))


def _radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distance ``[n]`` of each sample to its ``neighbours``-th nearest other one."""
    radii = np.empty(len(features))
    for rows, distances in _squared_distances(features, features):
        # A sample is its own nearest; duplicates of it are others.
        distances[np.arange(len(distances)), np.arange(len(features))[rows]] = 0
        radii[rows] = np.partition(distances, neighbours, axis=1)[:, neighbours]
    return radii


def _share_within(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    """The share of points that lie in at least one ball; radii are squared."""
    blocks = _squared_distances(points, centres)
    return sum(int((block <= radii).any(1).sum()) for _, block in blocks) / len(points)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of ``a`` and their distances ``[rows, len(b)]``, in blocks that fit the memory."""
    step = max(BLOCK // len(b), 1)
    for first in range(0, len(a), step):
        rows = slice(first, first + step)
        norms = np.square(a[rows]).sum(1)[:, None] + np.square(b).sum(1)
        yield rows, np.maximum(norms - 2 * (a[rows] @ b.T), 0)
