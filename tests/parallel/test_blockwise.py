"""Attention of long rows in blocks, against the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.parallel import MeshConfig, attention, choose_attention, make_mesh
from dit_jax.parallel.attention import (
    HOST,
    LONG,
    SMALL,
    Operands,
    Window,
    blockwise_attention,
    host_attention,
    host_product,
    on_one_device,
    xla_attention,
)

ROWS, HEADS, DIM = 2, 3, 8
# Float32 sums of 40 products and of 40 weights of order one.
TOLERANCE = 2e-6
ONE_QUERY, SEVERAL, WHOLE = 1, 4 * 40 * 7, 2**20
"""Sizes of blocks, in bytes: 40 keys of one query, of 7 (40 are 6 blocks of them), of all."""


def by_blocks(size):
    """``types.Attention`` in blocks of that size."""

    def whole(x, window):
        return host_product(x, window, size)

    return on_one_device(HOST._replace(whole=whole))


def draw(length, seed, scale=1.0):
    shape = (ROWS, length, HEADS, DIM)
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def ids_of(length):
    """Three segments, one of a single token, and padding; a full row."""
    ids = np.ones((ROWS, length), np.int32)
    ids[0] = np.repeat([1, 2, 3, 0], [length // 2, 1, length - length // 2 - 5, 4])
    return ids


@pytest.mark.parametrize(
    ("size", "window", "scale"),
    [(ONE_QUERY, None, 1), (SEVERAL, 5, 1), (SEVERAL, None, 40), (ONE_QUERY, 5, 40), (WHOLE, 5, 1)],
)
def test_blocks_are_the_reference(size, window, scale):
    """Scores that need their maximum found first, some hundreds, and ones that do not."""
    q, k, v = draw(40, 0, scale), draw(40, 1), draw(40, 2)
    bound = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / DIM**0.5
    assert (bound > SMALL) == (scale > 1)
    ids = ids_of(40)
    out = jax.jit(partial(by_blocks(size), window=window))(q, k, v, ids, None)
    expected = xla_attention(q, k, v, ids, None, window=window)
    assert out.shape == q.shape and out.dtype == np.float32 and np.isfinite(out).all()
    # Float32 scores of some hundreds are off by some 1e-5.
    atol = TOLERANCE if scale == 1 else 2e-4
    np.testing.assert_allclose(np.asarray(out)[ids != 0], expected[ids != 0], rtol=0, atol=atol)


def test_the_largest_small_scores_keep_their_digits():
    """All of a query's scores as low, and all as high, as ``SMALL`` allows."""
    side = np.float32((SMALL * DIM**0.5 / DIM) ** 0.5 * 0.999)
    v = draw(40, 0)
    for sign in (1, -1):
        q = np.full(v.shape, side)
        out = jax.jit(by_blocks(SEVERAL))(q, sign * q, v, np.ones((ROWS, 40), np.int32), None)
        mean = np.broadcast_to(v.astype(float).mean(1, keepdims=True), v.shape)
        np.testing.assert_allclose(out, mean, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("scale", [1.0, 40.0], ids=["small", "large"])
def test_keys_of_another_number_and_queries_that_see_none(scale):
    q, k, v = draw(40, 0, scale), draw(23, 1), draw(23, 2)
    q_ids, k_ids = ids_of(40), np.ones((ROWS, 23), np.int32)
    k_ids[0, 11:] = 3
    out = jax.jit(by_blocks(4 * 23 * 9))(q, k, v, q_ids, k_ids)
    expected, seen = xla_attention(q, k, v, q_ids, k_ids), np.isin(q_ids, (1, 3))
    assert np.isfinite(out).all() and not seen.all()
    atol = TOLERANCE if scale == 1 else 2e-4
    np.testing.assert_allclose(np.asarray(out)[seen], expected[seen], rtol=0, atol=atol)
    # Nothing is what small scores make of no key; large ones the mean of all values.
    assert np.asarray(out)[~seen].any() == (scale > 1)


@pytest.mark.parametrize("window", [None, 5])
def test_long_rows_are_computed_in_blocks(monkeypatch, window):
    """Rows of 40 tokens, being long, by ``blockwise_attention``: to themselves and to other keys."""
    monkeypatch.setattr(attention, "LONG", 23)
    monkeypatch.setattr(attention, "BLOCK_BYTES", SEVERAL)
    q, k, v, ids = draw(40, 0), draw(40, 1), draw(40, 2), ids_of(40)
    other = k[:, :23], v[:, :23], ids, np.ones((ROWS, 23), np.int32)
    for given in ((q, k, v, ids, None), (q, *other)):
        attend = partial(blockwise_attention, window=window)
        assert "scan" in str(jax.make_jaxpr(attend)(*given))
        out, expected = attend(*given), xla_attention(*given, window=window)
        seen = ids != 0 if given[4] is None else (ids == 1) & (np.arange(40) < 23)
        np.testing.assert_allclose(np.asarray(out)[seen], expected[seen], rtol=0, atol=TOLERANCE)


def test_other_rows_and_heads_do_not_matter():
    """However large their queries and keys are, the result has the same bits."""
    q, k, v, ids = draw(40, 0), draw(40, 1), draw(40, 2), np.ones((ROWS, 40), np.int32)
    attend = jax.jit(by_blocks(SEVERAL))
    before = np.asarray(attend(q, k, v, ids, None))
    large = np.ones((ROWS, 1, HEADS, 1), np.float32)
    large[1], large[:, :, 1] = 50, 50
    after = np.asarray(attend(q * large, k * large, v * large, ids, None))
    np.testing.assert_array_equal(after[0, :, ::2], before[0, :, ::2])
    assert (after[1] != before[1]).any() and (after[0, :, 1] != before[0, :, 1]).any()


def test_a_part_of_the_queries_has_the_band_of_its_place():
    """As a ring asks for it: the first query is 8 tokens after the first key."""
    q, k, v = (x.swapaxes(1, 2) for x in (draw(40, 0), draw(40, 1), draw(40, 2)))
    ids = ids_of(40)
    every = host_product(Operands(q, k, v, ids, ids), Window(3), WHOLE)
    part_operands = Operands(q[:, :, 8:], k, v, ids[:, 8:], ids)
    part = host_product(part_operands, Window(3, 8), SEVERAL)
    np.testing.assert_allclose(part, every[:, :, 8:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 5])
def test_gradients_are_those_of_the_reference(window):
    q, k, v, slope = (draw(40, seed) for seed in range(4))
    ids = jnp.asarray(ids_of(40))
    slope = np.where((ids != 0)[..., None, None], slope, 0)

    def gradients(attend, *given):
        def value(q, k, v):
            return (attend(q, k, v, ids, None, window=window) * slope).sum()

        return jax.jit(jax.value_and_grad(jax.checkpoint(value), (0, 1, 2)))(*given)

    attend = by_blocks(SEVERAL)
    (value, found), (wanted, expected) = (
        gradients(attend, q, k, v),
        gradients(xla_attention, q, k, v),
    )
    np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-4)
    low = gradients(attend, *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))[1]
    assert {x.dtype for x in low} == {jnp.dtype(jnp.bfloat16)}
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 0.5
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


def test_bfloat16_keeps_its_type():
    q, k, v = (jnp.asarray(draw(40, seed), jnp.bfloat16) for seed in range(3))
    ids = ids_of(40)
    out = jax.jit(by_blocks(SEVERAL))(q, k, v, ids, None)
    assert out.dtype == jnp.bfloat16
    exact = xla_attention(*(x.astype(jnp.float32) for x in (q, k, v)), ids, None)
    np.testing.assert_allclose(np.asarray(out, float)[ids != 0], exact[ids != 0], atol=0.03)


def temporary_bytes(attend, length):
    """What the compiled program needs beside its arguments and results."""
    x = jax.ShapeDtypeStruct((1, length, 1, DIM), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    given = (x, x, x, ids)
    compiled = jax.jit(lambda *given: attend(*given, None)).lower(*given).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_long_rows_need_no_memory_of_their_square():
    length = 4096
    assert temporary_bytes(host_attention, length) >= 4 * length**2
    assert temporary_bytes(blockwise_attention, length) < 4 * length**2 / 2


def test_rows_that_are_short_are_computed_at_once():
    length = LONG - 1
    assert temporary_bytes(blockwise_attention, length) == temporary_bytes(host_attention, length)


def test_it_is_what_one_cpu_runs():
    one = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    assert choose_attention(one) is blockwise_attention
