"""Pallas kernels in traced programs: products and blocks moved, by closed forms; nothing is run."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from dit_jax.plan.analysis import analyse
from dit_jax.plan.kernels import find_kernels, traced_flops

B, HEADS, LENGTH, DIM, BLOCK = 2, 4, 2048, 128, 512
PRODUCT = 2 * B * HEADS * LENGTH * LENGTH * DIM
"""Flops of one product of attention, q k^T say."""
ROWS = B * HEADS * LENGTH * DIM * 2
"""Bytes of all queries."""


def attention(fused, q, k, v, ids, mask=None):
    mask = masks.FullMask((LENGTH, LENGTH)) if mask is None else mask
    sizes = {name: BLOCK for name in ("block_q", "block_kv", "block_kv_compute")}
    sizes |= {name: BLOCK for name in ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")}
    backward = None if fused else BLOCK
    blocks = splash.BlockSizes(
        **sizes, block_q_dq=backward, block_kv_dq=backward, use_fused_bwd_kernel=fused
    )
    mask = masks.MultiHeadMask([mask] * HEADS)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)
    return jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids, ids))


def trace(fused, gradients=True, mask=None):
    def loss(q, k, v, ids):
        # As a model does it: in a loop over layers that are computed again.
        def layer(x, _):
            return jax.checkpoint(partial(attention, fused, mask=mask))(x, k, v, ids), None

        if mask is None:
            return attention(fused, q, k, v, ids).astype(jnp.float32).sum()
        return jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32).sum()

    heads = jax.ShapeDtypeStruct((B, HEADS, LENGTH, DIM), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((B, LENGTH), jnp.int32)
    function = jax.grad(loss, argnums=(0, 1, 2)) if gradients else partial(attention, fused)
    return jax.make_jaxpr(function)(heads, heads, heads, ids)


@pytest.mark.parametrize("fused, products", [(True, [2, 5]), (False, [2, 4, 3])])
def test_products_of_splash_attention(fused, products):
    """Forward q k^T and p v; backward for k and v recomputes q k^T and takes dp, dv, dk, with dq fused
    in; dq alone recomputes q k^T and dp."""
    traced = trace(fused)
    assert [kernel.flops for kernel in find_kernels(traced)] == [n * PRODUCT for n in products]
    # Besides, the row sums of o do, a product with a vector.
    total = traced_flops(traced)
    assert sum(products) * PRODUCT <= total < 1.001 * sum(products) * PRODUCT


def test_keys_stream_once_for_each_block_of_queries():
    (forward,) = find_kernels(trace(True, gradients=False))
    # Two prefetched masks, then q, k, v, the ids of queries and keys.
    q, k, v = forward.block_bytes[2:5]
    assert (q, k, v) == (ROWS, ROWS * LENGTH / BLOCK, ROWS * LENGTH / BLOCK)


@pytest.mark.parametrize("fused", [True, False])
def test_blocks_that_a_band_hides_count_nothing(fused):
    # 4 x 4 blocks, of which a band of a block's width on either side leaves 3 diagonals: 10 blocks.
    band = masks.LocalMask((LENGTH, LENGTH), (BLOCK, BLOCK), 0)
    for kernel in find_kernels(trace(fused, mask=band)):
        products = 2 if "fwd" in kernel.name else 3 if "dq" in kernel.name else 5 if fused else 4
        assert kernel.flops == pytest.approx(products * PRODUCT * 10 / 16, rel=1e-12)
        if "fwd" in kernel.name:
            assert kernel.block_bytes[3] == pytest.approx(4 * ROWS * 10 / 16, rel=1e-12)


def test_a_compiled_call_is_recognised(program, chips):
    kernels = find_kernels(trace(True))
    tally = analyse(program("splash"), kernels, *chips("v5e:2x4"))
    assert not any(key[0] == "warnings" for key in tally)
    lines = {name: sums for (name,), sums in tally.lines("kernels").items()}
    assert {name: sums["flops"] / PRODUCT for name, sums in lines.items()} == {
        "splash_mha_fwd_segmented_residuals": 2,
        "splash_mha_dkv_segmented_no_residuals": 5,
    }
    assert tally["kernel_flops"] == 7 * PRODUCT
    forward = lines["splash_mha_fwd_segmented_residuals"]
    # Its results and the ids were placed on the chip; q, k, v come from HBM, and three buffers of
    # statistics, one [512, 128] block of float32 a row of the batch, go there.
    assert forward["hbm_bytes"] == ROWS + 2 * ROWS * LENGTH / BLOCK + 3 * B * 512 * 128 * 4
    # Calls that differ in their masks alone cost the mean.
    half = [
        k._replace(flops=k.flops / 2, block_bytes=tuple(b / 2 for b in k.block_bytes))
        for k in kernels
    ]
    tally = analyse(program("splash"), kernels + half, *chips("v5e:2x4"))
    assert tally["kernel_flops"] == 7 * PRODUCT * 3 / 4
    # Those that are not known are told.
    tally = analyse(program("splash"), [], *chips("v5e:2x4"))
    warnings = [key[1] for key in tally if key[0] == "warnings"]
    assert tally["kernel_flops"] == 0 and len(warnings) == 2
    assert all("kernel splash_mha" in warning for warning in warnings)


def test_loops_and_branches_of_a_trace():
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def scanned(w):
        return jax.lax.scan(lambda x, _: (x @ w, None), w, None, length=5)[0]

    def branched(w):
        return jax.lax.cond(w[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, w)

    def twice(w):
        return jax.checkpoint(jax.jit(lambda x: x @ x))(w) @ w

    one = 2 * 64**3
    counts = [traced_flops(jax.make_jaxpr(f)(w)) / one for f in (scanned, branched, twice)]
    assert counts == [5, 2, 2]


def test_convolutions_of_a_trace():
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    w = jax.ShapeDtypeStruct((3, 3, 3, 16), jnp.float32)
    names = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", **names)
    assert traced_flops(jax.make_jaxpr(convolve)(x, w)) == 2 * 8 * 8 * 16 * 3 * 3 * 3
