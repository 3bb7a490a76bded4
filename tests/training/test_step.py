"""The step: one compilation, donated memory, accumulation, bad batches, averages, randomness."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.training import OptimizerConfig, TrainState, make_step
from dit_jax.types import Totals


@pytest.fixture
def one(rig):
    return rig(1, 2, 2, 2)


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def changing(state):
    return state.params, state.ema, state.opt_state


def test_step_compiles_once_and_reuses_memory(one, batches):
    state = one.state()
    for i in range(3):
        before = state
        state, metrics = one.step(state, one.put(batches[i]))
        assert np.isfinite(float(metrics["loss"]))
        # (The first state is NumPy's memory.)
        assert i == 0 or all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert int(state.step) == 3 and one.step._cache_size() == 1


def test_accumulation_changes_nothing_on_another_mesh(rig, one, batches):
    """Parts of unequal weight, for their rows hold different numbers of tokens."""
    parts, counts = 4, batches[0].num_tokens.sum(1)
    assert len({counts[i::parts].sum() for i in range(parts)}) > 1
    other = rig(2, 1, 2, 2, accumulate=parts)
    (a, said), (b, expected) = (r.step(r.state(), r.put(batches[0])) for r in (other, one))
    for name, value in expected.items():
        np.testing.assert_allclose(said[name], value, rtol=2e-6, err_msg=name)
    for x, y in zip(jax.tree.leaves(changing(a)), jax.tree.leaves(changing(b)), strict=True):
        # Float32 sums in another order (see test_sharded); parameters are of order one.
        scale = max(float(np.abs(y).max()), 1e-12)
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * scale)


def spoiled(batch, value):
    tokens = batch.tokens.copy()
    tokens[3, :, 5] = value  # the free ones, which alone have a loss, among them
    assert batch.segment_ids[3, 1] > 0
    return dataclasses.replace(batch, tokens=tokens)


@pytest.mark.parametrize("value", [np.nan, 1e30], ids=str)
def test_bad_batch_changes_only_the_counters(one, batches, value):
    """1e30 is finite, and its square is not."""
    state, _ = one.step(one.state(), one.put(batches[0]))
    before = jax.device_get(state)
    state, metrics = one.step(state, one.put(spoiled(batches[1], value)))
    assert not np.isfinite(metrics["loss"])
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (2, 1, 1)
    assert_equal(changing(state), changing(before))

    # Training goes on as it does from a state that never saw the batch.
    after, metrics = one.step(state, one.put(batches[2]))
    again = dataclasses.replace(before, step=np.int32(2), skipped=np.int32(1))
    expected, said = one.step(jax.device_put(again, one.shardings), one.put(batches[2]))
    assert float(metrics["loss"]) == float(said["loss"]) and np.isfinite(metrics["loss"])
    assert_equal(after, expected)
    assert (int(after.step), int(after.skipped)) == (3, 1)
    assert np.abs(jax.tree.leaves(after.params)[0] - jax.tree.leaves(before.params)[0]).max() > 0


def test_batch_of_padding_has_no_loss(one, batches):
    empty = jax.tree.map(np.zeros_like, batches[0])
    before = jax.device_get(one.state())
    state, metrics = one.step(one.state(), one.put(empty))
    assert float(metrics["loss"]) == float(metrics["gradient_norm"]) == 0
    assert int(state.skipped) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    # Only the decay of matrices is left: lr 5e-4 (of the warm-up) times 0.1.
    up, now = (x.params["params"]["dit"]["blocks"]["mlp"]["up"] for x in (before, state))
    np.testing.assert_allclose(now["kernel"], up["kernel"] * (1 - 5e-5), rtol=2e-7)
    np.testing.assert_array_equal(now["bias"], up["bias"])


@pytest.mark.parametrize(
    ("decay", "step", "rate"),
    [(0.999, 0, 0.1), (0.999, 8, 0.5), (0.5, 100, 0.5), (0.999, 10**6, 0.999), (0.0, 5, 0)],
)
def test_the_average_decays_by_the_steps_taken(decay, step, rate):
    """Of a parameter that is 1 and does not move, with an average of 0; two steps were skipped."""

    def loss(params, frozen, batch, key, step):
        del frozen, batch, key, step
        return params["w"], Totals(params["w"], jnp.float32(1), {})

    update = make_step(loss, optax.set_to_zero(), OptimizerConfig(ema_decay=decay), 0, None)
    one, zero = ({"w": jnp.float32(value)} for value in (1, 0))
    state = TrainState(jnp.int32(step + 2), jnp.int32(2), one, zero, optax.EmptyState())
    np.testing.assert_allclose(1 - update(state, {})[0].ema["w"], rate, rtol=1e-6, atol=1e-7)


def test_randomness_is_that_of_the_step(one, batches):
    """The same state and batch give the same bits; another step number other noise."""
    start, batch = jax.device_get(one.state()), one.put(batches[0])
    outcomes = []
    for number in (0, 0, 1):
        state = jax.device_put(dataclasses.replace(start, step=np.int32(number)), one.shardings)
        outcomes.append(jax.device_get(one.step(state, batch)))
    assert_equal(outcomes[0], outcomes[1])
    assert abs(outcomes[0][1]["loss"] - outcomes[2][1]["loss"]) > 1e-3
