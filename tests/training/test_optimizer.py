"""The optimizer against its formulas, written again in NumPy."""

import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

from dit_jax.training import OptimizerConfig, learning_rate, make_optimizer
from dit_jax.training.step import decayed

STEPS = 12
# Learning rates and moments are float32 there and float64 here.
TOLERANCE = 2e-6


def rates(config: OptimizerConfig, steps: int = STEPS) -> list[float]:
    schedule = learning_rate(config, steps)
    return [float(schedule(np.int32(i))) for i in range(steps + 2)]


COSINE = [0.2 + 1.8 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)]


@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        # The warm-up, the cosine down to a tenth, and what is left of it.
        ({"warmup_steps": 4, "final_fraction": 0.1}, 12, [0.5, 1, 1.5, 2, *COSINE, 0.2]),
        ({"schedule": "constant", "warmup_steps": 3}, 12, [2 / 3, 4 / 3, *[2.0] * 12]),
        ({"warmup_steps": 0}, 3, [2.0, 1.5, 0.5, 0, 0]),
        ({"warmup_steps": 1}, 3, [2.0, 2.0, 1.0, 0, 0]),
        # A warm-up as long as the run leaves its last step to the schedule.
        ({"warmup_steps": 100}, 3, [1.0, 2.0, 2.0, 0, 0]),
        ({"warmup_steps": 100}, 1, [2.0, 0, 0]),
    ],
)
def test_learning_rates(config: dict[str, Any], steps: int, expected: list[float]):
    found = rates(OptimizerConfig(learning_rate=2.0, **config), steps)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=2e-7)


SHAPES: dict[str, Any] = {
    "dense": {"kernel": (3, 4), "bias": (4,)},
    # Two scanned layers: their vectors are matrices, and still no matrices.
    "blocks": {"mlp": {"kernel": (2, 4, 5), "bias": (2, 5)}, "q_norm": {"scale": (2, 4)}},
    "bytes": {"embedding": (6, 3)},
}
DECAYED = {"dense/kernel", "blocks/mlp/kernel", "bytes/embedding"}


def draw(rng: np.random.Generator, size: float) -> Any:
    return jax.tree.map(
        lambda shape: (size * rng.normal(size=shape)).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(k.key) for k in path): np.asarray(leaf) for path, leaf in leaves}


def test_decay_is_for_kernels_and_embeddings_alone(rig):
    mask = flat(decayed(draw(np.random.default_rng(0), 1.0)))
    assert {name for name, on in mask.items() if on} == DECAYED
    kinds = {"kernel": True, "embedding": True, "bias": False, "scale": False}
    of_model = flat(decayed(rig(1, 1, 1, 1).shapes.params))
    assert {name.split("/")[-1] for name in of_model} == kinds.keys()
    assert all(bool(on) == kinds[name.split("/")[-1]] for name, on in of_model.items())


def test_steps_are_those_of_adamw():
    config = OptimizerConfig(
        learning_rate=0.01, warmup_steps=2, b1=0.8, b2=0.95, weight_decay=0.3, clip_norm=2.0
    )
    rng = np.random.default_rng(1)
    params = draw(rng, 1.0)
    optimizer = make_optimizer(config, STEPS)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    x = {name: leaf.astype(np.float64) for name, leaf in flat(params).items()}
    m, v = ({name: np.zeros_like(leaf) for name, leaf in x.items()} for _ in range(2))
    lrs = rates(config)
    norms = []
    for step in range(6):
        # The norm is about 8 times the size: some steps are clipped, some are not.
        gradients = draw(rng, 0.05 if step % 2 else 1.5)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        g = {name: leaf.astype(np.float64) for name, leaf in flat(gradients).items()}
        norms.append(math.sqrt(sum((leaf**2).sum() for leaf in g.values())))
        for name, leaf in flat(params).items():
            clipped = g[name] * min(1, config.clip_norm / norms[-1])
            m[name] = config.b1 * m[name] + (1 - config.b1) * clipped
            v[name] = config.b2 * v[name] + (1 - config.b2) * clipped**2
            mhat = m[name] / (1 - config.b1 ** (step + 1))
            vhat = v[name] / (1 - config.b2 ** (step + 1))
            decay = config.weight_decay * x[name] if name in DECAYED else 0
            x[name] = x[name] - lrs[step] * (mhat / (np.sqrt(vhat) + 1e-8) + decay)
            np.testing.assert_allclose(leaf, x[name], rtol=0, atol=TOLERANCE, err_msg=name)
    assert min(norms) < config.clip_norm < max(norms)
