"""Attention on one device: every implementation against a loop over segments in NumPy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.parallel import MeshConfig, choose_attention, choose_dot_general, make_mesh
from dit_jax.parallel.attention import (
    HOST,
    LONG,
    SMALL,
    blockwise_attention,
    flash_kernel,
    host_attention,
    host_product,
    on_one_device,
    xla_attention,
)
from dit_jax.parallel.matmul import flat_dot_general
from dit_jax.types import ATTENTION

JIT = jax.jit  # with all optimisations
HEADS, DIM, LENGTH, KEYS = 2, 8, 40, 24
ONE_QUERY, SEVERAL, WHOLE = 1, 4 * LENGTH * 7, 2**20
"""Bytes of blocks: of one query's scores, of 7 queries' (40 are 6 blocks of them), of all."""
# Float32 sums of 40 products and of 40 weights of order one.
TOLERANCE = 4e-6


def by_blocks(size):
    return on_one_device(HOST._replace(whole=lambda x, window: host_product(x, window, size)))


flash = on_one_device(flash_kernel(interpret=True))
IMPLEMENTATIONS = {
    "xla": xla_attention,
    "host": host_attention,
    "blocks": by_blocks(SEVERAL),
    "flash": flash,
}


def draw(length, seed, scale=1.0, dim=DIM):
    shape = (3, length, HEADS, dim)
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def segments(length):
    """Several segments and padding, one of a single token; a full row; padding alone."""
    ids = np.zeros((3, length), np.int32)
    third = length // 3
    ids[0, :third], ids[0, third], ids[0, third + 1 : length - 3] = 1, 2, 3
    ids[1] = 1
    return ids


IDS = segments(LENGTH)
REAL = IDS != 0
# Keys in another order and number; none of segment 2.
CROSS = np.array([[3] * 10 + [1] * 10 + [4, 0, 0, 0], [1] * 20 + [2] * 4, [0] * KEYS], np.int32)
CASES = {
    "self": (LENGTH, IDS, {}),
    "window": (LENGTH, IDS, {"window": 5}),
    "cross": (KEYS, CROSS, {}),
}


@cache
def case(kind, scale=1.0):
    """(q, k, v, ids of queries, ids of keys or None), what else, and which queries see a key."""
    length, k_ids, options = CASES[kind]
    k_seen = IDS[:, :, None] == k_ids[:, None]
    # An array of its own: a NumPy one becomes a new array wherever it is used.
    given = (draw(LENGTH, 0, scale), draw(length, 1), draw(length, 2), jnp.asarray(IDS))
    return (*given, k_ids if kind == "cross" else None), options, (IDS != 0) & k_seen.any(-1)


def in_loops(q, k, v, q_ids, k_ids, window=None):
    """The definition, query by query, in float64; padding and queries without keys are left out."""
    out = np.full(q.shape, np.nan)
    k_ids = q_ids if k_ids is None else k_ids
    for b, i in np.argwhere(np.asarray(q_ids) != 0):
        to = np.array(k_ids[b] == q_ids[b, i])
        if window is not None:
            to &= np.abs(np.arange(len(to)) - i) <= window
        for head in range(HEADS if to.any() else 0):
            scores = k[b, to, head] @ q[b, i, head].astype(np.float64) / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, i, head] = weights @ v[b, to, head] / weights.sum()
    return out


def value_and_gradients(attend, given, options, slope):
    def value(q, k, v):
        out = attend(q, k, v, *given[3:], **options)
        return (out * slope).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(*given[:3])
    return np.asarray(out), *map(np.asarray, gradients)


@cache
def results(name, kind):
    """(O, dq, dk, dv) for a gradient of O that is zero at padding, as the loss makes it."""
    given, options, seen = case(kind)
    slope = np.where(seen[..., None, None], draw(LENGTH, 3), 0)
    return value_and_gradients(IMPLEMENTATIONS[name], given, options, slope)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", ["xla", "host"])
def test_attention_is_its_definition(name, kind):
    given, options, seen = case(kind)
    out = np.asarray(jax.jit(partial(IMPLEMENTATIONS[name], **options))(*given))
    assert out.shape == given[0].shape and out.dtype == np.float32
    assert np.isfinite(out).all()  # at padding, too
    expected = in_loops(*given, **options)
    np.testing.assert_allclose(out[seen], expected[seen], rtol=0, atol=TOLERANCE)
    # With a gradient, attention may be computed another way.
    np.testing.assert_allclose(results(name, kind)[0][seen], expected[seen], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", CASES)
def test_gradients_are_those_of_the_reference(kind):
    k_ids = IDS if kind != "cross" else CROSS
    found, expected = results("host", kind)[1:], results("xla", kind)[1:]
    for ours, theirs, ids in zip(found, expected, (IDS, k_ids, k_ids), strict=True):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
        assert not ours[ids == 0].any()  # padding gets none


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_neighbours_do_not_matter(name):
    """Whatever lies in other segments and in padding, the result has the same bits."""
    (q, k, v, ids, _), _, _ = case("self")
    attend = jax.jit(lambda q, k, v: IMPLEMENTATIONS[name](q, k, v, ids, None))
    others = np.asarray(IDS != 1)[..., None, None]
    before = np.asarray(attend(q, k, v))
    after = np.asarray(attend(q, np.where(others, 1 - k, k), np.where(others, -v, v)))
    np.testing.assert_array_equal(after[IDS == 1], before[IDS == 1])


@pytest.mark.parametrize(
    ("name", "size"), [("xla", 30.0), ("host", 30.0), ("blocks", 30.0), ("blocks", 1e-4)]
)
def test_large_and_small_scores_are_finite(name, size):
    """30 makes scores of some thousands, beyond the range of a plain exponential."""
    given = (*(size * draw(LENGTH, i) for i in range(3)), IDS, None)
    out, *gradients = value_and_gradients(IMPLEMENTATIONS[name], given, {}, 1.0)
    # Sharp weights: float32 scores of some thousands are off by some 1e-4, times values of 100.
    atol = 1e-9 if size < 1 else 0.05
    np.testing.assert_allclose(out[REAL], in_loops(*given)[REAL], rtol=0, atol=atol)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_keeps_its_type(name):
    """The softmax is float32; inputs, weights and output are rounded to 8 bits: 2^-8 of order one."""
    low = [jnp.asarray(draw(LENGTH, i), jnp.bfloat16) for i in range(3)]
    out = jax.jit(lambda *x: IMPLEMENTATIONS[name](*x, jnp.asarray(IDS), None))(*low)
    assert out.dtype == jnp.bfloat16
    exact = in_loops(*(np.asarray(x, np.float64) for x in low), IDS, None)
    np.testing.assert_allclose(np.asarray(out, float)[REAL], exact[REAL], atol=0.03)


# --- Blocks, for long rows on CPUs ---


@pytest.mark.parametrize(
    ("size", "kind", "scale"),
    [(ONE_QUERY, "self", 1.0), (SEVERAL, "window", 40.0), (WHOLE, "window", 1.0)]
    + [(SEVERAL, "self", 1.0), (4 * KEYS * 9, "cross", 1.0), (4 * KEYS * 9, "cross", 40.0)],
)
def test_blocks_are_the_reference(size, kind, scale):
    """Scores that need their maximum found first, some hundreds, and ones that do not."""
    given, options, seen = case(kind, scale)
    bound = np.linalg.norm(given[0], axis=-1).max() * np.linalg.norm(given[1], axis=-1).max()
    assert (bound / DIM**0.5 > SMALL) == (scale > 1)
    out = np.asarray(jax.jit(partial(by_blocks(size), **options))(*given))
    assert np.isfinite(out).all()
    # Float32 scores of some hundreds are off by some 1e-5.
    atol = TOLERANCE if scale == 1 else 2e-4
    np.testing.assert_allclose(out[seen], in_loops(*given, **options)[seen], rtol=0, atol=atol)


def test_the_largest_small_scores_keep_their_digits():
    """All of a query's scores as low, and all as high, as ``SMALL`` allows."""
    side = np.float32((SMALL * DIM**0.5 / DIM) ** 0.5 * 0.999)
    v, ids = draw(LENGTH, 0), np.ones((3, LENGTH), np.int32)
    q, attend = np.full(v.shape, side), jax.jit(by_blocks(SEVERAL))
    mean = np.broadcast_to(v.astype(float).mean(1, keepdims=True), v.shape)
    for sign in (1, -1):
        np.testing.assert_allclose(attend(q, sign * q, v, ids, None), mean, atol=TOLERANCE)


def test_other_rows_and_heads_do_not_matter():
    """However large their queries and keys are, the result has the same bits."""
    q, k, v, ids = (*(draw(LENGTH, i) for i in range(3)), np.ones((3, LENGTH), np.int32))
    attend = jax.jit(by_blocks(SEVERAL))
    large = np.ones((3, 1, HEADS, 1), np.float32)
    large[1], large[:, :, 1] = 50, 50
    before = np.asarray(attend(q, k, v, ids, None))
    after = np.asarray(attend(q * large, k * large, v * large, ids, None))
    np.testing.assert_array_equal(after[0, :, 0], before[0, :, 0])
    assert (after[1] != before[1]).any() and (after[0, :, 1] != before[0, :, 1]).any()


def test_long_rows_need_no_memory_of_their_square():
    def temporary_bytes(attend, length):
        """What the compiled program needs beside its arguments and results."""
        x = jax.ShapeDtypeStruct((1, length, 1, DIM), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = JIT(lambda *given: attend(*given, None)).lower(x, x, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    length, short = 4096, LONG - 1  # A short row is computed at once.
    assert temporary_bytes(host_attention, length) >= 4 * length**2
    assert temporary_bytes(blockwise_attention, length) < 4 * length**2 / 2
    assert temporary_bytes(blockwise_attention, short) == temporary_bytes(host_attention, short)


# --- Flash attention for GPUs, run by the interpreter, and lowered for a GPU ---


# Less than a block, of no power of two; two blocks, with heads of no power of two (72 is XL's).
@pytest.mark.parametrize(("length", "dim"), [(9, 16), (150, 72)])
def test_kernel_is_the_reference(length, dim):
    ids = segments(length)
    given = (*(draw(length, seed, dim=dim) for seed in range(3)), jnp.asarray(ids), None)
    slope = np.where((ids != 0)[..., None, None], draw(length, 3, dim=dim), 0)
    found, expected = (value_and_gradients(x, given, {}, slope) for x in (flash, xla_attention))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours[ids != 0], theirs[ids != 0], rtol=0, atol=TOLERANCE)


def kernels(function, *given):
    """Names of the Pallas kernels that a function runs, as traced."""
    text, names = str(jax.make_jaxpr(function)(*given)), ("mha_forward", "mha_backward")
    return [name for name in names for _ in range(text.count(f"name={name}"))]


def test_flash_runs_for_self_attention_alone():
    (*given, _), options, _ = case("window")
    assert kernels(partial(flash, **options), *given, None) == []
    assert kernels(flash, *case("cross")[0]) == []
    assert kernels(lambda *x: flash(*x, given[3], None), *given[:3]) == ["mha_forward"]


def test_policy_keeps_the_result():
    """A block that is computed again does not attend again where the policy keeps attention."""
    (q, k, v, ids, _), _, _ = case("self")

    def gradients(policy):
        attend = jax.checkpoint(lambda q, k, v: flash(jnp.sin(q), k, v, ids, None), policy=policy)
        return jax.grad(lambda q: jnp.sin(attend(q, k, v)).sum())

    assert kernels(gradients(None), q) == ["mha_forward", "mha_forward", "mha_backward"]
    keep = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    assert kernels(gradients(keep), q) == ["mha_forward", "mha_backward"]


@pytest.mark.parametrize(("length", "dim"), [(1000, 128), (5, 8)])
def test_lowers_to_triton(length, dim):
    """As far as goes without a GPU: Triton's code for the kernels, forward and backward."""
    x = jax.ShapeDtypeStruct((2, length, HEADS, dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def value(q, k, v, ids):
        return on_one_device(flash_kernel())(q, k, v, ids, None).astype(jnp.float32).sum()

    traced = JIT(jax.grad(value, (0, 1, 2))).trace(x, x, x, ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3
    assert "mha_forward" in text and "mha_backward" in text


# --- What a CPU runs ---


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5)])
def test_flat_product_is_the_product(shape):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=size).astype(np.float32) for size in (shape, (5, 6)))
    numbers = (((len(shape) - 1,), (0,)), ((), ()))
    for options in ({}, {"preferred_element_type": jnp.float32}):
        out = flat_dot_general(x, kernel, numbers, **options)
        np.testing.assert_allclose(out, x @ kernel, rtol=0, atol=2e-6)  # five float32 products


def test_choice_on_cpus():
    mesh, alone = make_mesh(MeshConfig()), make_mesh(MeshConfig(), jax.devices()[:1])
    assert choose_attention(mesh) is host_attention
    assert choose_attention(alone) is blockwise_attention
    assert choose_dot_general(mesh) is flat_dot_general
    # Rows and tokens on different axes cannot be joined without moving them.
    assert choose_dot_general(make_mesh(MeshConfig(1, 4, 2, 1))) is jax.lax.dot_general
