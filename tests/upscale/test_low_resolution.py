"""Clips made small and enlarged again: means of cells, and cubic convolution."""

import numpy as np
import pytest

from dit_jax.upscale.resizing import cubic_matrix, enlarge, shrink


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_pixels_of_a_small_clip_are_means_of_cells(factor=3):
    video = noise(2, 6, 12, 3)
    small = shrink(video, factor)
    assert small.dtype == np.uint8 and small.shape == (2, 6 // factor, 12 // factor, 3)
    for y, x in np.ndindex(small.shape[1:3]):
        cell = video[:, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        assert np.array_equal(small[:, y, x], np.rint(cell.mean((1, 2))))


def test_cubic_weights_by_hand():
    """Of twice as many: a pixel lies a quarter and three quarters from its neighbours."""
    a = -0.75
    near = [(a + 2) * x**3 - (a + 3) * x**2 + 1 for x in (0.25, 0.75)]
    far = [a * (x**3 - 5 * x**2 + 8 * x - 4) for x in (1.25, 1.75)]
    expected = [far[0], near[0], near[1], far[1]]
    matrix = cubic_matrix(6, 2)
    np.testing.assert_allclose(matrix[5], [0, *expected, 0], atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    # The first pixel is a quarter before its neighbour's centre: what lies beyond the edge is that too.
    left = [expected[3] + expected[2] + expected[1], expected[0], 0, 0, 0, 0]
    np.testing.assert_allclose(matrix[0], left, atol=1e-12)
    assert np.array_equal(cubic_matrix(5, 1), np.eye(5))
    # It knows no left and right.
    matrix = cubic_matrix(5, 3)
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3])
def test_enlarging_is_pytorchs_bicubic(factor):
    torch = pytest.importorskip("torch")
    video = noise(2, 5, 7, 3)
    frames = torch.tensor(video).movedim(-1, 1).double()
    theirs = torch.nn.functional.interpolate(
        frames, scale_factor=factor, mode="bicubic", align_corners=False
    )
    theirs = theirs.movedim(1, -1).numpy()
    # What lies within 1e-6 of a half may be rounded either way.
    assert np.abs(enlarge(video, factor) - np.clip(theirs, 0, 255)).max() <= 0.5 + 1e-6
