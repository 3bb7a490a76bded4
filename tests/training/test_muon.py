"""Muon: which parameters it takes, and that what it does to them is what was meant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.training import OptimizerConfig, make_optimizer
from dit_jax.training.step import MUON_RMS, muon_axes

RATE = 1e-2
SETTINGS = {"learning_rate": RATE, "schedule": "constant", "warmup_steps": 0, "clip_norm": 1e9}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    layer = {"kernel": normal(3, 8, 24), "bias": normal(3, 24)}
    return {
        "params": {
            "dit": {
                "blocks": {
                    "mlp": {"up": layer},
                    "modulation": {"linear": {"kernel": normal(3, 8, 6)}},
                },
                "final": {"kernel": normal(8, 5)},
            },
            "text": {
                "block_0": {"self_attention": {"out": {"kernel": normal(8, 8)}}},
                "bytes": {"embedding": normal(9, 8)},
            },
        }
    }


def first_update(kind, params, gradients):
    optimizer = make_optimizer(OptimizerConfig(kind=kind, **SETTINGS), 10)
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]


def test_takes_the_matrices_of_the_layers_alone(params):
    axes = muon_axes(params)["params"]
    up = axes["dit"]["blocks"]["mlp"]["up"]
    assert up["kernel"] == optax.contrib.MuonDimensionNumbers(1, 2)
    assert axes["text"]["block_0"]["self_attention"]["out"]["kernel"] == (0, 1)
    others = [
        up["bias"],
        axes["dit"]["blocks"]["modulation"]["linear"]["kernel"],
        axes["dit"]["final"]["kernel"],
        axes["text"]["bytes"]["embedding"],
    ]
    assert others == [None] * 4


def test_orthogonalises_each_layer_of_a_stack_apart(params):
    gradients = jax.tree.map(lambda x: x**3, params)
    update = first_update("muon", params, gradients)["params"]["dit"]["blocks"]["mlp"]["up"][
        "kernel"
    ]
    gradient = np.asarray(gradients["params"]["dit"]["blocks"]["mlp"]["up"]["kernel"])
    for layer, raw in zip(np.asarray(update), gradient, strict=True):
        u, _, v = np.linalg.svd(raw, full_matrices=False)
        singular = np.linalg.svd(layer, compute_uv=False) / (RATE * MUON_RMS * np.sqrt(24))
        # Five Newton-Schulz steps bring singular values to about one (0.7 to 1.2), by design.
        assert np.all((singular > 0.6) & (singular < 1.3)), singular
        along = -np.sum(layer * (u @ v)) / np.linalg.norm(layer) / np.linalg.norm(u @ v)
        assert along > 0.95


def test_the_rest_is_nesterov_adamw(params):
    gradients = jax.tree.map(jnp.sin, params)
    config = OptimizerConfig(kind="muon", **SETTINGS)
    update = first_update("muon", params, gradients)["params"]
    reference = optax.nadamw(RATE, b1=config.b1, b2=config.b2, weight_decay=0.0)
    expected = reference.update(gradients, reference.init(params), params)[0]["params"]
    for path in (
        ("dit", "final", "kernel"),
        ("text", "bytes", "embedding"),
        ("dit", "blocks", "mlp", "up", "bias"),
    ):
        one, other = update, expected
        for name in path:
            one, other = one[name], other[name]
        np.testing.assert_allclose(one, other, rtol=1e-5)  # float32 rounding, order of products


def test_takes_convolutions_over_time_as_matrices():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 4, 6)), jnp.float32)
    params = {"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(6)}}}
    update = first_update("muon", params, params)["params"]["conv"]["kernel"]
    singular = np.linalg.svd(np.asarray(update).reshape(48, 6), compute_uv=False)
    singular /= RATE * MUON_RMS * np.sqrt(48)
    assert np.all((singular > 0.6) & (singular < 1.3)), singular
