"""Muon: which parameters it takes, and that what it does to them is what was meant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.training import OptimizerConfig, make_optimizer
from dit_jax.training.step import MUON_RMS, muon_axes

RATE = 1e-2
UP = "params/dit/blocks/mlp/up/kernel"
OUT = "params/text/block_0/self_attention/out/kernel"
CONV = "params/conv/kernel"
MATRICES = {UP: (3, 8, 24), OUT: (8, 8), CONV: (3, 2, 2, 4, 6)}
OTHERS = {
    "params/dit/blocks/mlp/up/bias": (3, 24),
    "params/dit/blocks/modulation/linear/kernel": (3, 8, 6),
    "params/dit/final/kernel": (8, 5),
    "params/text/bytes/embedding": (9, 8),
}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = MATRICES | OTHERS
    flat = {name: jnp.asarray(rng.normal(size=of), jnp.float32) for name, of in shapes.items()}
    return unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def update(params):
    """The first update for gradients that are the cubes of the parameters, by their paths."""
    settings = {"learning_rate": RATE, "schedule": "constant", "warmup_steps": 0, "clip_norm": 1e9}
    optimizer = make_optimizer(OptimizerConfig(kind="muon", **settings), 10)
    gradients = jax.tree.map(lambda x: x**3, params)
    update = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]
    return flatten_dict(update, sep="/")


def test_takes_the_matrices_of_the_layers_alone(params):
    axes = flatten_dict(muon_axes(params), sep="/")
    assert axes[UP] == (1, 2) and axes[OUT] == (0, 1) and axes[CONV] == ((0, 1, 2, 3), 4)
    assert [axes[name] for name in OTHERS] == [None] * len(OTHERS)


def test_orthogonalises_each_layer_of_a_stack_apart_and_convolutions_as_matrices(params, update):
    flat = flatten_dict(params, sep="/")
    layers = [(update[UP][i], flat[UP][i]) for i in range(3)]
    for out, raw in [*layers, (update[CONV].reshape(48, 6), flat[CONV].reshape(48, 6))]:
        out = np.asarray(out) / (RATE * MUON_RMS * np.sqrt(max(out.shape)))
        singular = np.linalg.svd(out, compute_uv=False)
        # Five Newton-Schulz steps bring singular values to about one (0.7 to 1.2), by design.
        assert np.all((singular > 0.6) & (singular < 1.3)), singular
        u, _, v = np.linalg.svd(raw**3, full_matrices=False)
        along = -np.sum(out * (u @ v)) / np.linalg.norm(out) / np.linalg.norm(u @ v)
        assert along > 0.95


def test_the_rest_is_nesterov_adamw(params, update):
    reference = optax.nadamw(RATE, b1=0.9, b2=0.99, weight_decay=0.0)
    flat = flatten_dict(params, sep="/")
    others = {name: flat[name] for name in OTHERS}
    gradients = {name: x**3 for name, x in others.items()}
    expected = reference.update(gradients, reference.init(others), others)[0]
    for name in OTHERS:  # Float32 rounding, order of products.
        np.testing.assert_allclose(update[name], expected[name], rtol=1e-5, err_msg=name)
