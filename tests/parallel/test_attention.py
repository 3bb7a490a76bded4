"""Attention within segments, against a loop over segments in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.parallel import MeshConfig, choose_attention, choose_dot_general, make_mesh
from dit_jax.parallel.attention import host_attention, xla_attention
from dit_jax.parallel.matmul import flat_dot_general

IMPLEMENTATIONS = [xla_attention, host_attention]
HEADS, DIM = 3, 8
# Segments of different lengths, one token alone, padding at the end; a full row; padding alone.
QUERIES = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0] * 8], np.int32)
# Keys in another order and number; the second row has keys of segments that nobody asks for.
KEYS = np.array([[2, 1, 3, 3, 1, 0], [1, 2, 2, 1, 0, 0], [0] * 6], np.int32)
# Float32 sums of 8 products and of 8 weights.
TOLERANCE = 2e-6


def draw(length, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, length, HEADS, DIM)).astype(dtype)


def in_loops(q, k, v, q_ids, k_ids):
    """The definition, segment by segment, in float64; padding is left out."""
    out = np.full(q.shape, np.nan)
    for b in range(len(q)):
        for segment in set(q_ids[b]) - {0}:
            at, to = q_ids[b] == segment, k_ids[b] == segment
            for head in range(HEADS):
                scores = q[b, at, head].astype(np.float64) @ k[b, to, head].T / np.sqrt(DIM)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                out[b, at, head] = weights @ v[b, to, head]
    return out


@pytest.fixture(scope="module", params=["self", "cross"])
def case(request):
    """(q, k, v, ids of queries, ids of keys)"""
    if request.param == "self":
        return draw(8, 0), draw(8, 1), draw(8, 2), QUERIES, QUERIES
    return draw(8, 0), draw(6, 1), draw(6, 2), QUERIES, KEYS


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_attention_is_its_definition(attend, case):
    out = np.asarray(jax.jit(attend)(*case))
    expected = in_loops(*case)
    assert out.shape == case[0].shape and out.dtype == np.float32
    real = QUERIES != 0
    np.testing.assert_allclose(out[real], expected[real], rtol=0, atol=TOLERANCE)
    assert np.isfinite(out).all()  # at padding, too


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_neighbours_do_not_matter(attend, case):
    """Whatever lies in other segments and in padding, the result has the same bits."""
    q, k, v, q_ids, k_ids = case
    attend = jax.jit(attend)
    before = np.asarray(attend(*case))
    others = np.array(k_ids != 1)[..., None, None]
    changed = attend(q, np.where(others, 7 * k + 1, k), np.where(others, -v, v), q_ids, k_ids)
    np.testing.assert_array_equal(np.asarray(changed)[q_ids == 1], before[q_ids == 1])


@pytest.fixture(scope="module")
def slope(case):
    """A gradient of the output that is zero at padding, as the loss makes it."""
    return np.where((QUERIES != 0)[..., None, None], draw(8, 3), 0).astype(np.float32)


def gradients(attend, case, slope):
    q, k, v, q_ids, k_ids = case

    def value(q, k, v):
        return (attend(q, k, v, q_ids, k_ids) * slope).sum()

    return jax.jit(jax.grad(value, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_definition(attend, case, slope):
    """Against central differences of the loop, in float64, along random directions."""
    found = gradients(attend, case, slope)
    step = 1e-5
    for which, gradient in enumerate(found):
        assert np.isfinite(gradient).all()
        for seed in range(3):
            direction = np.random.default_rng(seed).normal(size=gradient.shape)
            values = []
            for sign in (1, -1):
                moved = [x.astype(np.float64) for x in case[:3]]
                moved[which] = moved[which] + sign * step * direction
                out = in_loops(*moved, *case[3:])
                values.append(np.nansum(out * slope))
            expected = (values[0] - values[1]) / (2 * step)
            # The sum of some hundred float32 terms of order one.
            np.testing.assert_allclose((gradient * direction).sum(), expected, atol=5e-5)


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_padding_gets_no_gradient(attend, case, slope):
    dq, dk, dv = gradients(attend, case, slope)
    q_ids, k_ids = case[3:]
    assert not np.asarray(dq)[q_ids == 0].any()
    assert not np.asarray(dk)[k_ids == 0].any() and not np.asarray(dv)[k_ids == 0].any()
    assert np.abs(np.asarray(dq)[q_ids == 1]).max() > 0.01


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1e-4, 30.0])
def test_large_and_small_scores_are_finite(attend, size):
    """30 makes scores of some thousands, beyond the range of a plain exponential."""
    q, k, v = (size * draw(8, i) for i in range(3))
    slope = np.ones_like(q)
    case = (q, k, v, QUERIES, QUERIES)
    out = np.asarray(jax.jit(attend)(*case))
    # Sharp weights: float32 scores of some thousands are off by some 1e-4, times values of 100.
    atol = 1e-9 if size < 1 else 0.05
    real = QUERIES != 0
    np.testing.assert_allclose(out[real], in_loops(*case)[real], rtol=0, atol=atol)
    assert all(np.isfinite(g).all() for g in gradients(attend, case, slope))


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_bfloat16_keeps_its_type(attend):
    """The softmax is float32; inputs, weights and output are rounded to 8 bits: 2^-8 of order one."""
    q, k, v = (draw(8, i) for i in range(3))
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = jax.jit(attend)(*low, QUERIES, QUERIES)
    assert out.dtype == jnp.bfloat16
    exact = in_loops(*(np.asarray(x, np.float64) for x in low), QUERIES, QUERIES)
    real = QUERIES != 0
    np.testing.assert_allclose(np.asarray(out, np.float64)[real], exact[real], atol=0.03)


@pytest.mark.parametrize("options", [{}, {"preferred_element_type": jnp.float32}])
def test_flat_product_is_the_product(options):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 6)).astype(np.float32)
    for shape in ((5,), (4, 5), (2, 3, 5), (2, 3, 4, 5)):
        x = rng.normal(size=shape).astype(np.float32)
        numbers = (((len(shape) - 1,), (0,)), ((), ()))
        out = flat_dot_general(x, kernel, numbers, **options)
        assert out.shape == (*shape[:-1], 6)
        np.testing.assert_allclose(out, x @ kernel, rtol=0, atol=2e-6)  # five float32 products


def test_other_products_pass_through():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(4, 3, 5)).astype(np.float32) for _ in range(2))
    out = flat_dot_general(a, b, (((2,), (2,)), ((0,), (0,))))
    np.testing.assert_allclose(out, np.einsum("bij,bkj->bik", a, b), rtol=0, atol=2e-6)


def test_choice_on_cpus():
    mesh = make_mesh(MeshConfig())
    assert choose_attention(mesh) is host_attention
    assert choose_dot_general(mesh) is flat_dot_general
    # Rows and tokens on different axes cannot be joined without moving them.
    spread = make_mesh(MeshConfig(1, 4, 2, 1))
    assert choose_dot_general(spread) is jax.lax.dot_general
