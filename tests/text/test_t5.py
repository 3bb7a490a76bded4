"""T5's buckets in closed form, sizes and axes; parity is in test_folders.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.text.t5 import (
    T5_PRESETS,
    T5Encoder,
    T5EncoderConfig,
    relative_buckets,
)

TINY = T5EncoderConfig(
    vocabulary=20, width=8, depth=2, heads=2, head_dim=4, hidden=12, bias="layers"
)


def test_buckets_are_single_steps_then_a_logarithm():
    found = relative_buckets(300, 32, 128)
    assert found.shape == (300, 300) and (np.diag(found) == 0).all()
    # Before the query: 0 to 7 one each; then 8 buckets, of ratio 2^(1/2), up to 128.
    before = found[299, ::-1]
    np.testing.assert_array_equal(before[:8], np.arange(8))
    firsts = [int(np.argmax(before == bucket)) for bucket in range(8, 16)]
    edges = [8 * 2 ** (i / 2) for i in range(8)]
    assert firsts == [int(np.ceil(edge)) for edge in edges]
    assert (before[91:] == 15).all()
    # After it: the same, in the other half.
    np.testing.assert_array_equal(found[0, 1:], before[1:] + 16)


GIVEN = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)


# 21 width + 2 (4 width inner + 3 width hidden + 2 width) + tables of 32 buckets for 2 heads
@pytest.mark.parametrize(("bias", "size"), [("shared", 1352), ("layers", 1416)])
def test_parameters_are_counted_and_carry_axes(bias, size):
    config = dataclasses.replace(TINY, bias=bias)
    boxed = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), *GIVEN)
    leaves = jax.tree.leaves(nn.unbox(boxed))
    assert sum(leaf.size for leaf in leaves) == size
    kernel = boxed["params"]["blocks"]["down"]["kernel"]
    assert kernel.names == ("layers", "mlp", "embed") and kernel.value.shape == (2, 12, 8)
    table = boxed["params"] if bias == "shared" else boxed["params"]["blocks"]
    assert table["relative_bias"]["table"].names[-2:] == (None, "heads")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("t5-v1.1-small", 0.035), ("t5-v1.1-xl", 1.22), ("t5-v1.1-xxl", 4.76), ("umt5-xxl", 5.68)],
)
def test_presets_have_the_published_sizes(name, billions):
    params = jax.eval_shape(T5Encoder(T5_PRESETS[name]).init, jax.random.key(0), *GIVEN)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert size / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("fields", [{"depth": 0}, {"buckets": 6}, {"max_distance": 8}])
def test_odd_sizes_are_refused(fields):
    (name, value), *_ = fields.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        T5EncoderConfig(**fields)
