"""Distances in closed form, and against slower statements of the same formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import linalg

from dit_jax.evaluate import (
    Moments,
    Statistics,
    feature_statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from dit_jax.evaluate import distances as module
from dit_jax.evaluate.distances import small_sample_note

ROUNDING = 1e-10
"""Relative, of float64 sums and eigenvalues of some hundred numbers."""


def gaussian(rng: np.random.Generator, size: int) -> Statistics:
    root = rng.normal(size=(size, size))
    return Statistics(rng.normal(size=size), root @ root.T / size)


def test_frechet_of_shifted_and_scaled_gaussians():
    rng = np.random.default_rng(1)
    one = gaussian(rng, 30)
    shift = rng.normal(size=30)
    moved = Statistics(one.mean + shift, one.covariance)
    np.testing.assert_allclose(frechet_distance(one, moved), np.square(shift).sum(), rtol=ROUNDING)
    # tr(A + c²A - 2cA) = (1 - c)² tr A
    scaled = Statistics(one.mean, 9 * one.covariance)
    expected = 4 * np.trace(one.covariance)
    np.testing.assert_allclose(frechet_distance(one, scaled), expected, rtol=ROUNDING)
    still = Statistics(np.zeros(4), np.zeros((4, 4)))
    other = Statistics(np.full(4, 2.0), np.diag([1.0, 4, 0, 0]))
    assert frechet_distance(still, still) == 0
    assert frechet_distance(still, other) == pytest.approx(16 + 5)


def test_frechet_is_that_of_the_matrix_root():
    rng = np.random.default_rng(3)
    a, b = gaussian(rng, 50), gaussian(rng, 50)
    root = linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.square(a.mean - b.mean).sum()
    expected += np.trace(a.covariance + b.covariance - 2 * root.real)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-8)  # sqrtm's error
    np.testing.assert_allclose(frechet_distance(b, a), frechet_distance(a, b), rtol=ROUNDING)


def test_frechet_of_fewer_samples_than_features():
    rng = np.random.default_rng(4)
    made, true = rng.normal(size=(2, 10, 40))
    one, other = feature_statistics(made), feature_statistics(true)
    assert frechet_distance(one, one) < ROUNDING
    # Through the samples: tr (AB)^½ is the sum of the singular values of Xᵀ Y / (n - 1).
    x, y = made - made.mean(0), true - true.mean(0)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum() / 9
    spread = np.square(x).sum() / 9 + np.square(y).sum() / 9 - 2 * cross
    expected = np.square(made.mean(0) - true.mean(0)).sum() + spread
    np.testing.assert_allclose(frechet_distance(one, other), expected, rtol=1e-7)  # √ of eigh's
    assert "10 samples for 40 features" in (small_sample_note(one, "samples") or "")
    assert small_sample_note(feature_statistics(rng.normal(size=(41, 40))), "samples") is None
    assert small_sample_note(Statistics(np.zeros(2), np.eye(2)), "samples") is None


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Statistics(np.zeros(3), np.eye(2)), r"mean \(3,\) and covariance \(2, 2\)"),
        (lambda: Statistics(np.full(2, np.nan), np.eye(2)), "NaN"),
        (lambda: feature_statistics(np.zeros((1, 4))), r"1 sample\(s\)"),
        (lambda: feature_statistics(np.zeros(4)), r"shape \(4,\)"),
        (
            lambda: frechet_distance(*(Statistics(np.zeros(n), np.eye(n)) for n in (3, 2))),
            "3 and 2",
        ),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), "3 and 9 samples"),
    ],
)
def test_bad_statistics_are_refused(make: Callable[[], object], words: str):
    with pytest.raises(ValueError, match=words):
        make()


def test_streamed_moments_are_those_of_the_whole():
    rng = np.random.default_rng(5)
    # Far from 0, where sums of squares would cancel.
    whole = (1e4 + rng.normal(size=(501, 12)) @ rng.normal(size=(12, 12))).astype(np.float32)
    first, second = Moments(), Moments()
    for batch in np.split(whole[:200], [7, 8, 64]):
        first.update(batch)
    for batch in (whole[200:], whole[:0]):
        second.update(batch)
    second.merge(Moments())
    first.merge(second)
    found, wide = first.statistics(), whole.astype(np.float64)
    assert found.count == 501
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(wide, rowvar=False), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"\(12, 3\)"):
        first.update(np.zeros((2, 3)))


def test_inception_score_in_closed_form():
    assert inception_score(np.full((30, 10), 0.1), split=7)[0] == pytest.approx(1)
    one_hot = np.eye(10)[np.arange(40) % 10]
    mean, deviation = inception_score(one_hot, split=20)
    assert mean == pytest.approx(10) and deviation == pytest.approx(0)
    # Half the samples certain of one class, half of another, in a split each: nothing varies there.
    assert inception_score(np.eye(10)[np.arange(40) // 20], split=20)[0] == pytest.approx(1)
    mixed = np.concatenate([one_hot[:20], np.full((20, 10), 0.1)])
    assert inception_score(mixed, split=20) == (pytest.approx(5.5), pytest.approx(4.5))


def test_precision_and_recall_of_constructed_sets():
    line = np.arange(10.0)[:, None] * [[1, 0]]
    assert precision_recall(line, line) == (1, 1)
    assert precision_recall(line, line + 100) == (0, 0)
    # Three of ten made samples lie far off; a ball of theirs reaches 60 and covers no true sample.
    strays = np.concatenate([line[:7], line[7:] + [[0, 1000]]])
    assert precision_recall(strays, line, neighbours=1)[0] == pytest.approx(0.7)
    # Ten true samples, made ones cover the first five alone: dropped modes.
    two = np.concatenate([line[:5], line[:5] + [[0, 500]]])
    assert precision_recall(line[:5], two) == (1, 0.5)
    # Radii are the distance to the k-th other sample, borders included: 3 for k = 3 at the end.
    ends = np.array([[-3.0, 0], [-3.1, 0]])
    both = np.concatenate([ends, ends, ends])
    assert precision_recall(both, line)[0] == 0.5


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(6)
    made, true = rng.normal(size=(70, 5)) * 1.2 + 0.3, rng.normal(size=(45, 5))
    whole = precision_recall(made, true)
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1
    monkeypatch.setattr(module, "BLOCK", 200)
    assert precision_recall(made, true) == whole

    def radius(points: np.ndarray) -> np.ndarray:
        return np.sort(np.linalg.norm(points[:, None] - points, axis=-1))[:, 3]

    apart = np.linalg.norm(made[:, None] - true, axis=-1)
    slow = (apart <= radius(true)).any(1).mean(), (apart.T <= radius(made)).any(1).mean()
    assert whole == slow
