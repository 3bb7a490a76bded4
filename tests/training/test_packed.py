"""A sample's loss does not depend on who shares its row: packed equals unpacked."""

import dataclasses

import jax
import numpy as np
import pytest

from dit_jax.data import PackingConfig
from tests.packed import pack_rows

ROWS = PackingConfig(rows=6, row_tokens=16, row_text=24, row_segments=3)
LONG = PackingConfig(rows=1, row_tokens=32, row_text=48, row_segments=7)


@pytest.fixture(scope="module")
def clips(random_clips):
    """Six clips and images, of 24 tokens together."""
    return random_clips(6, seed=11)


@pytest.fixture(scope="module")
def loss(rig):
    """``loss(batch) -> (sum, weight, gradients of the sum)``, with the step's random key."""
    one = rig(1, 1, 1, 1)
    params = one.state().params
    key = jax.random.fold_in(jax.random.key(3), 5)
    compiled = jax.jit(jax.value_and_grad(one.loss, has_aux=True))

    def run(batch):
        (total, totals), gradients = compiled(params, {}, one.put(batch), key, 0)
        return float(total), float(totals.weight), jax.device_get(gradients)

    return run


def with_ids(batch, ids):
    """``pack_rows`` counts samples; here they get the identities that they have elsewhere."""
    sample_ids = np.zeros_like(batch.sample_ids)
    sample_ids[batch.num_tokens > 0] = ids
    return dataclasses.replace(batch, sample_ids=sample_ids)


@pytest.fixture(scope="module")
def packed(clips, loss):
    """Three samples in each of two rows; the other rows are padding."""
    return loss(pack_rows([clips[:3], clips[3:], [], [], [], []], ROWS))


def assert_same(found, expected):
    (total, weight, gradients), (total_, weight_, gradients_) = found, expected
    assert weight == weight_
    # Sums of some dozens of float32 terms of order one, in another order.
    np.testing.assert_allclose(total, total_, rtol=2e-6)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(gradients_), strict=True
    ):
        # Relative to a parameter's largest gradient, as in test_sharded.
        atol = 2e-5 * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_gradients_reach_every_parameter(packed):
    _, weight, gradients = packed
    assert 12 < weight <= 24
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        assert np.abs(leaf).max() > 1e-4, jax.tree_util.keystr(path)


def test_one_sample_a_row(clips, loss, packed):
    assert_same(loss(pack_rows([[clip] for clip in clips], ROWS)), packed)


def test_other_neighbours_and_another_order(clips, loss, packed):
    order = [4, 0, 3, 1, 5, 2]
    rows = [[clips[4]], [], [clips[0], clips[3]], [clips[1]], [], [clips[5], clips[2]]]
    assert_same(loss(with_ids(pack_rows(rows, ROWS), order)), packed)


def test_one_row_holds_all(clips, loss, packed):
    assert_same(loss(pack_rows([clips], LONG)), packed)


def test_batches_of_one_sample_add_up(clips, loss, packed):
    parts = [loss(with_ids(pack_rows([[clip]], LONG), [i])) for i, clip in enumerate(clips)]
    total, weight = (sum(part[i] for part in parts) for i in (0, 1))
    gradients = jax.tree.map(lambda *leaves: sum(leaves), *(part[2] for part in parts))
    assert_same((total, weight, gradients), packed)
    # Samples differ, so that a mix-up would show.
    assert len({round(part[0] / max(part[1], 1), 3) for part in parts}) == len(clips)


def test_identity_decides_the_noise(clips, loss, packed):
    other = loss(with_ids(pack_rows([clips[:3], clips[3:], [], [], [], []], ROWS), range(1, 7)))
    assert abs(other[0] / other[1] - packed[0] / packed[1]) > 1e-2
