"""Mean and covariance of features, gathered batch by batch and merged, in float64 on the host.

The update for batches and the merging of parts are those of Chan, Golub & LeVeque (1983, "Algorithms
for computing the sample variance", section 3): deviations are taken from the mean of each part, so
nothing cancels. The order of batches changes the result by rounding alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A set of features as a Gaussian: ``mean [f]`` and ``covariance [f, f]``, both float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    """Of how many samples; None where a file does not say."""

    def __post_init__(self) -> None:
        size = self.mean.size
        if self.mean.shape != (size,) or self.covariance.shape != (size, size):
            raise ValueError(
                f"mean {self.mean.shape} and covariance {self.covariance.shape} are no statistics: "
                "they must have shapes [f] and [f, f]."
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError(
                "the statistics hold NaN or infinite values: compute them again, from finite features."
            )


class Moments:
    """Collects features ``[n, f]`` of any float dtype; holds 8·f² bytes, however many come."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(0)
        self.scatter = np.zeros((0, 0))
        """Sum of (x - mean)(x - mean)ᵀ."""

    def update(self, features: np.ndarray) -> None:
        """Takes a batch ``[n, f]`` in. Raises ``ValueError`` for another shape or width."""
        if features.ndim != 2:
            raise ValueError(f"features have shape {features.shape}: give [n, f].")
        if not len(features):
            return
        wide = features.astype(np.float64)
        part = Moments()
        part.count, part.mean = len(wide), wide.mean(0)
        centred = wide - part.mean
        part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Takes in what another collected, of samples that this one has not seen."""
        if not other.count:
            return
        if not self.count:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter.copy()
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"features of {other.mean.size} numbers cannot be merged with some of "
                f"{self.mean.size}: give those of one network."
            )
        total = self.count + other.count
        apart = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += np.outer(apart, apart) * (self.count * other.count / total)
        self.mean = self.mean + apart * (other.count / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Mean and unbiased covariance (divided by n - 1).

        Raises:
            ValueError: below two samples, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(
                f"{self.count} sample(s) have no covariance: give at least 2, and for a Fréchet "
                "distance that means something more than the features have dimensions."
            )
        return Statistics(self.mean, self.scatter / (self.count - 1), self.count)


def feature_statistics(features: np.ndarray | Iterable[np.ndarray]) -> Statistics:
    """The statistics of features ``[n, f]``, or of batches of them."""
    moments = Moments()
    for batch in [features] if isinstance(features, np.ndarray) else features:
        moments.update(batch)
    return moments.statistics()
