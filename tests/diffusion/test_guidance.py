"""Classifier-free guidance."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dit_jax.diffusion import classifier_free


def test_guidance_extrapolates_from_the_unconditional():
    with_text, without = jnp.array([[[3.0, -1.0]]]), jnp.array([[[1.0, 1.0]]])
    for scale, expected in ((0.0, [1, 1]), (1.0, [3, -1]), (0.5, [2, 0]), (4.0, [9, -7])):
        assert classifier_free(with_text, without, scale)[0, 0].tolist() == expected


def test_scale_one_is_unguided_and_zero_is_without_text():
    with_text, without = (
        np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32) for seed in (0, 1)
    )
    arrays = jnp.asarray(with_text), jnp.asarray(without)
    # u + 1 (c - u) is c but for float32.
    np.testing.assert_allclose(classifier_free(*arrays, 1.0), with_text, atol=1e-6)
    assert np.array_equal(classifier_free(*arrays, 0.0), without)
    # Where text makes no difference, no scale does.
    assert np.array_equal(classifier_free(arrays[0], arrays[0], 7.5), with_text)


def test_a_wrong_shape_is_caught():
    with pytest.raises(TypeCheckError, match="parameter 'unconditional'"):
        classifier_free(jnp.zeros((2, 3, 4)), jnp.zeros((1, 3, 4)), 2.0)
