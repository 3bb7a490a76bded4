"""Flash attention for GPUs, run by the interpreter, against the reference; and lowered for a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.parallel.attention import Operands, on_one_device, xla_attention
from dit_jax.parallel.pallas import flash_kernel
from dit_jax.types import ATTENTION

flash = on_one_device(flash_kernel(interpret=True))
HEADS = 2
# Float32 sums of a hundred products and weights of order one, block by block.
TOLERANCE = 4e-6


def draw(length, dim, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(3, length, HEADS, dim)).astype(dtype)


def segments(length):
    """Several segments and padding, one of a single token; a full row; padding alone."""
    ids = np.zeros((3, length), np.int32)
    third = length // 3
    ids[0, :third], ids[0, third], ids[0, third + 1 : length - 3] = 1, 2, 3
    ids[1] = 1
    return ids


def value_and_gradients(attend, q, k, v, ids, slope, **given):
    def value(q, k, v):
        out = attend(q, k, v, ids, None, **given)
        return (out * slope).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


# Less than a block, of no power of two; two blocks; heads smaller than Triton's least, of no power
# of two (72 is XL's), and the usual.
@pytest.mark.parametrize(("length", "dim"), [(40, 8), (9, 16), (150, 64), (40, 72)])
def test_kernel_is_the_reference(length, dim):
    q, k, v, slope = (draw(length, dim, seed) for seed in range(4))
    ids = segments(length)
    real = ids != 0
    slope = np.where(real[..., None, None], slope, 0)  # as the loss has it
    # An array of its own, for a NumPy one becomes a new array wherever it is used.
    given = (q, k, v, jnp.asarray(ids), slope)
    out, gradients = value_and_gradients(flash, *given)
    expected, wanted = value_and_gradients(xla_attention, *given)
    assert out.shape == q.shape and out.dtype == np.float32
    assert np.isfinite(out).all()  # at padding, too
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], rtol=0, atol=TOLERANCE)
    for found, want in zip(gradients, wanted, strict=True):
        assert np.abs(want).max() > 0.5
        np.testing.assert_allclose(found, want, rtol=0, atol=TOLERANCE)
        assert not np.asarray(found)[~real].any()


def test_neighbours_do_not_matter():
    """Whatever lies in other segments and in padding, the result has the same bits."""
    q, k, v = (draw(40, 16, seed) for seed in range(3))
    ids = jnp.asarray(segments(40))
    attend = jax.jit(lambda q, k, v: flash(q, k, v, ids, None))
    others = np.asarray(ids != 1)[..., None, None]
    before, after = (
        attend(q, k, v),
        attend(q, np.where(others, 7 * k + 1, k), np.where(others, -v, v)),
    )
    mine = np.asarray(ids == 1)
    np.testing.assert_array_equal(np.asarray(after)[mine], np.asarray(before)[mine])


def test_bfloat16_keeps_its_type():
    """Weights and results are rounded to 8 bits: some 2^-8 of order one."""
    q, k, v = (jnp.asarray(draw(40, 16, seed), jnp.bfloat16) for seed in range(3))
    ids = jnp.asarray(segments(40))
    out, exact = (
        flash(q, k, v, ids, None),
        xla_attention(*(x.astype(float) for x in (q, k, v)), ids, None),
    )
    assert out.dtype == jnp.bfloat16
    real = np.asarray(ids != 0)
    np.testing.assert_allclose(out.astype(float)[real], exact[real], rtol=0, atol=0.03)


def kernels(function, *given):
    """Names of the Pallas kernels that a function runs, as traced."""
    text = str(jax.make_jaxpr(function)(*given))
    return [
        name for name in ("mha_forward", "mha_backward") for _ in range(text.count(f"name={name}"))
    ]


def test_cross_attention_and_bands_are_plain_products():
    q, slope = draw(40, 16, 0), draw(40, 16, 3)
    ids = jnp.asarray(segments(40))
    keys, values, key_ids = draw(24, 16, 1), draw(24, 16, 2), jnp.asarray(segments(24))
    for k, v, k_ids, window in [(keys, values, key_ids, None), (q + 1, slope, None, 5)]:
        run = partial(flash, k_segment_ids=k_ids, q_segment_ids=ids, window=window)
        assert kernels(run, q, k, v) == []
        real = np.isin(ids, [1, 3]) & (np.arange(3) < 2)[:, None]
        np.testing.assert_allclose(
            np.asarray(run(q, k, v))[real],
            xla_attention(q, k, v, ids, k_ids, window=window)[real],
            rtol=0,
            atol=TOLERANCE,
        )


def test_policy_keeps_the_result():
    """A block that is computed again does not attend again where the policy keeps attention."""
    q, k, v = (draw(40, 16, seed) for seed in range(3))
    ids = jnp.asarray(segments(40))

    def gradients(policy):
        attend = jax.checkpoint(lambda q, k, v: flash(jnp.sin(q), k, v, ids, None), policy=policy)
        return jax.grad(lambda q: jnp.sin(attend(q, k, v)).sum())

    assert kernels(gradients(None), q) == ["mha_forward", "mha_forward", "mha_backward"]
    keep = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    assert kernels(gradients(keep), q) == ["mha_forward", "mha_backward"]


def test_blocks_take_heads_first_and_scaled_queries():
    q, k, v = (draw(40, 16, seed) for seed in range(3))
    ids = jnp.asarray(segments(40))
    heads_first = [x.swapaxes(1, 2) for x in (q / 4, k, v)]
    out = flash_kernel(interpret=True).whole(Operands(*heads_first, ids, ids), None)
    np.testing.assert_array_equal(out.swapaxes(1, 2), flash(q, k, v, ids, None))


@pytest.mark.parametrize(("length", "dim"), [(1000, 128), (40, 72), (5, 8)])
def test_lowers_to_triton(length, dim):
    """As far as goes without a GPU: Triton's code for the kernels, forward and backward."""
    x = jax.ShapeDtypeStruct((2, length, HEADS, dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def value(q, k, v, ids):
        return on_one_device(flash_kernel())(q, k, v, ids, None).astype(jnp.float32).sum()

    lowered = (
        jax.jit(jax.grad(value, (0, 1, 2))).trace(x, x, x, ids).lower(lowering_platforms=("cuda",))
    )
    text = lowered.as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3
    assert "mha_forward" in text and "mha_backward" in text
