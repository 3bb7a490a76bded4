"""The layers of the transformer: identity at initialisation, modulation by group, norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jaxtyping import TypeCheckError

from dit_jax.model.dit import DiTBlock, DiTConfig
from dit_jax.model.layers import gelu, layer_norm
from dit_jax.model.patches import frequencies
from dit_jax.parallel import xla_attention
from dit_jax.types import Runtime


def no_attention(q, k, v, q_segment_ids, k_segment_ids, *, window=None):
    """Attention that mixes nothing: tokens go their way alone."""
    return jnp.zeros_like(q)


def block_inputs(inputs, seed=0):
    """Random arguments of a block for the test rows, by name."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    b, l = inputs["segment_ids"].shape
    angles = inputs["positions"] @ frequencies(16, 1e4)
    return {
        "x": normal(b, l, 32),
        "condition": normal(b, inputs["group_t"].shape[1], 32),
        "group_ids": inputs["group_ids"],
        "segment_ids": inputs["segment_ids"],
        "rotary": (np.cos(angles), np.sin(angles)),
        "text": normal(*inputs["text"].shape, 16),
        "text_segment_ids": inputs["text_segment_ids"],
    }


@functools.partial(jax.jit, static_argnums=0)
def apply(attention, params, given):
    """The first layer of the transformer."""
    layer = DiTBlock(DiTConfig(32, heads=2, mlp_dim=128), Runtime(attention))
    first = jax.tree.map(lambda leaf: leaf[0], params["params"]["dit"]["blocks"])
    return layer.apply({"params": first}, **given)[0]


def test_a_fresh_block_is_the_identity(fresh, inputs):
    given = block_inputs(inputs)
    # Bit for bit: every branch is an exact zero.
    assert np.array_equal(apply(xla_attention, fresh, given), given["x"])


def test_a_group_modulates_its_own_tokens_alone(params, inputs):
    given = block_inputs(inputs)
    base = np.asarray(apply(no_attention, params, given))
    for group in range(6):
        condition = given["condition"].copy()
        condition[:, group] += 1.0
        out = np.asarray(apply(no_attention, params, {**given, "condition": condition}))
        # Bit for bit: with attention silent nothing joins one token to another.
        assert np.array_equal((out != base).any(-1), given["group_ids"] == group)
    # Both groups of a segment are there.
    assert {0, 1} == set(inputs["group_ids"][0][inputs["segment_ids"][0] == 1].tolist())


def plain_layer_norm(x):
    x = x.astype(jnp.float32)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("ours", "plain"), [(layer_norm, plain_layer_norm), (gelu, nn.gelu)], ids=["norm", "gelu"]
)
def test_written_out_gradients_are_those_of_the_formula(ours, plain, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 2, (4, 64)).astype(dtype)
    weights = rng.normal(size=(4, 64)).astype(np.float32)

    def both(function, x):
        return jax.value_and_grad(lambda x: (function(x) * weights).sum())(x)

    (value, slope), (expected, expected_slope) = jax.jit(lambda x: (both(ours, x), both(plain, x)))(
        x
    )
    assert slope.dtype == dtype
    # float32 in another order; or a few roundings of bfloat16 (2^-9 each) of values up to 6, one
    # with another over 256 terms.
    rtol, atol = (1e-5, 2e-5) if dtype == jnp.float32 else (2e-2, 3e-2)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=256**0.5 * atol)
    slope, expected_slope = (np.asarray(g, np.float32) for g in (slope, expected_slope))
    np.testing.assert_allclose(slope, expected_slope, rtol=rtol, atol=atol)


def test_norms_of_low_precision_are_computed_in_float32():
    # 1000 + small: the mean of squares in bfloat16 would lose the spread altogether.
    x = (1000 + 8 * np.arange(8)).astype(jnp.bfloat16)
    y = jax.jit(layer_norm)(x)
    assert y.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-6)
    np.testing.assert_allclose(y, exact, rtol=1e-5)  # float32


@pytest.mark.usefixtures("checked")
def test_a_wrong_shape_is_caught(inputs):
    layer = DiTBlock(DiTConfig(32, heads=2, mlp_dim=128), Runtime(xla_attention))
    given = block_inputs(inputs)

    def trace(**changes):
        jax.eval_shape(lambda x: layer.init(jax.random.key(0), **x), {**given, **changes})

    trace()
    for name, shape in (("condition", (2, 31)), ("segment_ids", (2, 31)), ("text", (2, 3))):
        with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):
            trace(**{name: jax.ShapeDtypeStruct(shape, given[name].dtype)})
