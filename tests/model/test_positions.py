"""Rotary positions: queries and keys meet through differences of coordinates, axis by axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.model.patches import absolute_features, frequencies, rotary_angles, rotate

THETA = 1e4


@jax.jit
def turn(x: jax.Array, places: jax.Array) -> jax.Array:
    return rotate(x, *rotary_angles(places, x.shape[-1], THETA))


def turned(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Heads ``[l, d]`` at coordinates ``[l, 3]``, as one row of one head."""
    return np.asarray(turn(x[None, :, None], places.astype(np.float32)[None]))[0, :, 0]


def vectors(count: int, head_dim: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, head_dim)).astype(np.float32)


@pytest.mark.parametrize(
    ("head_dim", "dims"),
    [
        (128, (44, 42, 42)),
        (72, (24, 24, 24)),
        (64, (24, 20, 20)),
        (32, (12, 10, 10)),
        (8, (4, 2, 2)),
        (6, (2, 2, 2)),
    ],
)
def test_dimensions_are_shared_out_evenly(head_dim, dims):
    rows = frequencies(head_dim, THETA)
    assert rows.shape == (3, head_dim // 2) and rows.dtype == np.float32
    # Every pair belongs to one axis, and each axis to its share of pairs.
    assert ((rows > 0).sum(0) == 1).all()
    assert tuple(2 * (rows > 0).sum(1)) == dims


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scores_depend_on_differences_alone(axis):
    q, k = vectors(2, 64)
    places = np.random.default_rng(1).integers(0, 16, (2, 3)).astype(float)
    scores = []
    for shift in (0.0, 1.0, 37.5, -11.0):
        moved = places + shift * np.eye(3)[axis]
        a, b = turned(np.stack([q, k]), moved)
        scores.append(a @ b)
    # Angles of up to 53 radians in float32 (2^-19 each) in a sum of 64 products of size 1.
    np.testing.assert_allclose(scores, scores[0], atol=1e-4)
    # A difference that changes does change the score.
    a, b = turned(np.stack([q, k]), places + [[0, 0, 0], np.eye(3)[axis]])
    assert abs(a @ b - scores[0]) > 0.01


def test_absolute_features_are_sines_and_cosines():
    places = np.random.default_rng(1).uniform(0, 20, (1, 4, 3)).astype(np.float32)
    features = np.asarray(absolute_features("thw", jnp.asarray(places), 20, THETA))
    assert features.shape == (1, 4, 20) and features.dtype == np.float32
    rates = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    angles = np.array([[[x * rate for x in token for rate in rates] for token in places[0]]])
    # Angles reach 20 in float32.
    np.testing.assert_allclose(features[..., :9], np.sin(angles), atol=5e-6)
    np.testing.assert_allclose(features[..., 9:18], np.cos(angles), atol=5e-6)
    # 20 is 3 x 6 and 2 more.
    assert not features[..., 18:].any()


def test_low_precision_heads_are_turned_in_float32():
    x = vectors(4, 16).astype(jnp.bfloat16)[None, :, None]
    places = np.random.default_rng(1).uniform(0, 9, (1, 4, 3)).astype(np.float32)
    low, exact = np.asarray(turn(x, places)), np.asarray(turn(x.astype(np.float32), places))
    assert low.dtype == jnp.bfloat16
    assert np.array_equal(low, exact.astype(jnp.bfloat16))


def test_angles_are_made_once_for_all_layers():
    """Not again wherever they are used, as XLA for CPUs likes to."""

    def layers(x: jax.Array, places: jax.Array) -> jax.Array:
        rotary = rotary_angles(places, x.shape[-1], THETA)
        for _ in range(3):
            x = jnp.einsum("blad,de->blae", rotate(x, *rotary), jnp.full((16, 16), 0.1))
        return x

    given = jnp.ones((2, 64, 4, 16)), jnp.ones((2, 64, 3))
    program = jax.jit(layers).lower(*given).compile().as_text()
    assert program is not None
    assert program.count(" cosine(") == program.count(" sine(") == 1
