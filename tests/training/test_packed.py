"""A sample's loss does not depend on who shares its row: packed equals unpacked."""

import dataclasses

import jax
import numpy as np
import pytest

from dit_jax.data import PackingConfig
from tests.packed import pack_rows

ROWS = 6
PACKING = PackingConfig(rows=ROWS, row_tokens=24, row_text=48, row_segments=6)


@pytest.fixture(scope="module")
def clips(random_clips):
    """Six clips and images, of 24 tokens together."""
    return random_clips(6, seed=11)


@pytest.fixture(scope="module")
def loss(rig, clips):
    """``loss(rows, ids) -> (sum, weight, gradients of the sum)`` of clips by number, row by row.

    ``pack_rows`` counts samples; here they get the identities that they have elsewhere.
    """
    one = rig(1, 1, 1, 1)
    params = one.state().params
    key = jax.random.fold_in(jax.random.key(3), 5)
    compiled = jax.jit(jax.value_and_grad(one.loss, has_aux=True))

    def run(*rows, ids=None):
        padded = [*rows, *[[]] * (ROWS - len(rows))]
        batch = pack_rows([[clips[i] for i in row] for row in padded], PACKING)
        sample_ids = np.zeros_like(batch.sample_ids)
        sample_ids[batch.num_tokens > 0] = sum(rows, []) if ids is None else ids
        batch = dataclasses.replace(batch, sample_ids=sample_ids)
        (total, totals), gradients = compiled(params, {}, one.put(batch), key, 0)
        return float(total), float(totals.weight), jax.device_get(gradients)

    return run


@pytest.fixture(scope="module")
def packed(loss):
    """Three samples in each of two rows; the other rows are padding."""
    return loss([0, 1, 2], [3, 4, 5])


def test_gradients_reach_every_parameter(packed):
    _, weight, gradients = packed
    assert 12 < weight <= 24
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        assert np.abs(leaf).max() > 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "batches",
    [
        [[[0], [1], [2], [3], [4], [5]]],
        [[[4], [0, 3], [1], [5, 2]]],  # other neighbours, in another order
        [[[0, 1, 2, 3, 4, 5]]],
        [[[i]] for i in range(6)],  # batches of one sample, whose losses add up
    ],
)
def test_packed_is_unpacked(loss, packed, batches):
    parts = [loss(*rows) for rows in batches]
    assert sum(part[1] for part in parts) == packed[1]
    # Sums of some dozens of float32 terms of order one, in another order.
    np.testing.assert_allclose(sum(part[0] for part in parts), packed[0], rtol=2e-6)
    gradients = jax.tree.map(lambda *leaves: sum(leaves), *(part[2] for part in parts))
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(packed[2]), strict=True
    ):
        # Relative to a parameter's largest gradient, as in test_sharded.
        atol = 2e-5 * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
    # Samples differ, so that a mix-up would show.
    assert len({round(part[0] / max(part[1], 1), 3) for part in parts}) == len(parts)


def test_identity_decides_the_noise(loss, packed):
    other = loss([0, 1, 2], [3, 4, 5], ids=range(1, 7))
    assert abs(other[0] / other[1] - packed[0] / packed[1]) > 1e-2
