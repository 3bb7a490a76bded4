"""VGG's sizes, LPIPS' equation beside plain NumPy, and gradients; parity is in interop/test_vgg.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.codec.vgg import VGG, PerceptualNetwork, VGGConfig, perceptual_distance
from tests.codecs import normal_params

SMALL = VGGConfig(widths=(4, 6, 8), layers=(1, 2, 1))


def frames(*shape, seed=0):
    drawn = np.random.default_rng(seed).uniform(-1, 1, (*shape, 3))
    return jnp.asarray(drawn, jnp.float32)


@pytest.fixture(scope="module")
def params():
    return normal_params(VGG(SMALL), jnp.zeros((1, 8, 8, 3)))


def test_vgg_16_has_its_parameters_and_maps():
    boxed = jax.eval_shape(VGG().init, jax.random.key(0), jnp.zeros((1, 32, 48, 3)))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
    # torchvision's 138,357,544 less the 123,642,856 of its classifier.
    assert sum(leaf.size for leaf in jax.tree.leaves(boxed)) == 14_714_688
    maps = jax.eval_shape(VGG().apply, nn.unbox(boxed), jnp.zeros((2, 35, 48, 3)))
    assert [leaf.shape for leaf in maps] == [
        (2, 35, 48, 64),
        (2, 17, 24, 128),
        (2, 8, 12, 256),
        (2, 4, 6, 512),
        (2, 2, 3, 512),
    ]


def test_the_distance_is_equation_1():
    rng = np.random.default_rng(0)
    shapes = [(2, 4, 5, 3), (2, 2, 2, 6)]
    a, b = ([jnp.asarray(rng.normal(size=shape), "f4") for shape in shapes] for _ in range(2))
    weights = [jnp.asarray(rng.uniform(size=shape[-1]), "f4") for shape in shapes]

    def stated(weights):
        total = np.zeros(2)
        for x, y, w in zip(a, b, weights, strict=True):
            x, y, w = (np.asarray(array) for array in (x, y, w))
            n, h, width, _ = x.shape
            for i, j, k in np.ndindex(n, h, width):
                u, v = x[i, j, k], y[i, j, k]
                difference = u / np.linalg.norm(u) - v / np.linalg.norm(v)
                total[i] += (w * difference**2).sum() / (h * width)
        return total

    ones = [jnp.ones_like(weight) for weight in weights]
    np.testing.assert_allclose(perceptual_distance(a, b, weights), stated(weights), rtol=1e-5)
    np.testing.assert_allclose(perceptual_distance(a, b), stated(ones), rtol=1e-5)
    doubled = [3 * x for x in a]
    np.testing.assert_allclose(perceptual_distance(doubled, a), 0, atol=1e-9)


@pytest.mark.slow
def test_frames_of_clips_are_compared_one_by_one(params):
    network = PerceptualNetwork(params, None, SMALL)
    a, b = frames(2, 3, 9, 8), frames(2, 3, 9, 8, seed=1)
    found = jax.jit(lambda network, a, b: network(a, b))(network, a, b)
    assert found.shape == (2, 3) and (found > 0).all()
    alone = network(a[1, 2], b[1, 2])
    assert alone.shape == ()
    np.testing.assert_allclose(found[1, 2], alone, rtol=1e-5)
    np.testing.assert_array_equal(network(a, a), 0)


@pytest.mark.slow
def test_gradients_are_finite_also_where_nothing_is_active(params):
    network = PerceptualNetwork(params, None, SMALL)
    a, b = frames(2, 8, 8), frames(2, 8, 8, seed=1)
    gradient = jax.grad(lambda b: network(a, b).sum())(b)
    assert np.isfinite(gradient).all() and (np.abs(gradient).sum((1, 2, 3)) > 0).all()
    dead = jax.tree.map(lambda leaf: leaf - 1000 if leaf.ndim == 1 else leaf, params)
    gradient = jax.grad(lambda b: PerceptualNetwork(dead, None, SMALL)(a, b).sum())(b)
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_is_near(params):
    a, b = frames(2, 8, 8), frames(2, 8, 8, seed=1)
    fine = PerceptualNetwork(params, None, SMALL)(a, b)
    coarse = PerceptualNetwork(params, None, SMALL, jnp.bfloat16)(a, b)
    assert coarse.dtype == jnp.float32
    np.testing.assert_allclose(coarse, fine, rtol=0.05)  # eight bits, through four layers
