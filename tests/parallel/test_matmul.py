"""Products in 8 bits: close to full precision forward and backward, and really in 8 bits."""

import collections
import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.data import PackingConfig
from dit_jax.diffusion import DiffusionConfig
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.parallel import MeshConfig, choose_dot_general, make_mesh
from dit_jax.training.video_task import batch_loss, init_params, make_model, tokenize
from tests.packed import pack_rows

needs_qwix = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="needs qwix: pip install 'dit-jax[quant]'"
)
quantized = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_qwix) for kind in ("int8", "fp8")]
)
NUMBERS = (((2,), (0,)), ((), ()))


def case(dtype=np.float32):
    """Tokens of sizes from 0.01 to 100, a kernel whose columns differ as much, and a slope."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 32, 128)) * 10 ** rng.uniform(-2, 2, (4, 32, 1))
    kernel = rng.normal(size=(128, 96)) / 11 * 10 ** rng.uniform(-2, 2, 96)
    slope = rng.normal(size=(4, 32, 96)) * 10 ** rng.uniform(-2, 2, (4, 32, 1))
    return tuple(jnp.asarray(y, dtype) for y in (x, kernel, slope))


def product_and_gradients(multiply, x, kernel, slope):
    def value(x, kernel):
        out = multiply(x, kernel, NUMBERS, precision=None)
        return (out.astype(jnp.float32) * slope).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(x, kernel)
    return out, *gradients


def cosine(a, b, axis=None):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


# Of a token's norm. Rounding to n bits after the point (int8: 127 steps to the largest of 128
# numbers, some three times the others; e4m3: 3 bits) leaves errors of a third of a step.
FORWARD = {"int8": 0.015, "fp8": 0.05}


@quantized
def test_product_and_gradients_are_close(kind):
    """Scales are per token and per column: small ones are as exact as large ones."""
    x, kernel, slope = case()
    multiply = choose_dot_general(make_mesh(MeshConfig()), kind)
    out, dx, d_kernel = product_and_gradients(multiply, x, kernel, slope)
    exact, exact_x, exact_kernel = product_and_gradients(jax.lax.dot_general, x, kernel, slope)
    columns = jnp.abs(kernel).max(0)
    error = jnp.linalg.norm((out - exact) / columns, axis=-1)
    error = error / jnp.linalg.norm(exact / columns, axis=-1)
    assert 0.001 < error.min() and error.max() < FORWARD[kind]
    assert cosine(dx, exact_x, -1).min() > 0.99  # of every token
    assert cosine(d_kernel, exact_kernel, 0).min() > 0.99  # of every column
    if kind == "int8":  # The kernel's gradient is not rounded; sums in another order.
        np.testing.assert_allclose(d_kernel, exact_kernel, rtol=1e-4, atol=1e-3)

    # On a mesh scales are taken over a whole token or column, wherever its parts lie.
    mesh = make_mesh(MeshConfig(1, 2, 2, 2))
    tokens, of_kernel = (NamedSharding(mesh, P("fsdp", axis)) for axis in ("context", "tensor"))
    placed = jax.device_put((x, kernel, slope), (tokens, of_kernel, tokens))
    found = product_and_gradients(choose_dot_general(mesh, kind), *placed)
    for ours, alone in zip(found, (out, dx, d_kernel), strict=True):
        # Sums in another order, after which a few numbers round to the next of 256.
        same = np.isclose(ours, alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())
        assert same.mean() > 0.9 and cosine(ours, alone) > 0.9999


@quantized
def test_types_and_zeros(kind):
    """Results have the operands' type; tokens of zeros (padding) stay zeros."""
    x, kernel, slope = case(jnp.bfloat16)
    x, slope = x.at[0, 3].set(0), slope.at[1].set(0)
    multiply = choose_dot_general(make_mesh(MeshConfig()), kind)
    out, dx, d_kernel = product_and_gradients(multiply, x, kernel, slope)
    assert out.dtype == dx.dtype == d_kernel.dtype == jnp.bfloat16
    assert not out[0, 3].any() and not dx[1].any() and dx[0].any()
    assert all(jnp.isfinite(y).all() for y in (out, dx, d_kernel))


LINEAR, E4, E5 = 7, "f8E4M3FN", "f8E5M2"
"""Linear layers of a block: qkv and out; q, kv and out; up and down."""
EIGHT = {
    # Forward, again in the backward pass, and the gradients of what goes in.
    "int8": {("i8", "i8"): 3 * LINEAR},
    # The kernels' gradients too.
    "fp8": {(E4, E4): 2 * LINEAR, (E5, E4): LINEAR, (E4, E5): LINEAR},
}
MODEL = ModelConfig(
    dit=DiTConfig(width=64, depth=2, heads=4, scan=True, remat="full", absolute_positions="thw"),
    patch=PatchConfig(t=1, h=2, w=2, channels=3, reference_fps=8.0),
    text=ByteEncoderConfig(width=16, depth=0, heads=4, max_bytes=7),
)
PACKING = PackingConfig(rows=4, row_tokens=16, row_text=16, row_segments=2)


@functools.cache
def dots_of_gradients(matmul):
    """How often products of which types are in the gradients as they are lowered."""
    model = make_model(
        dataclasses.replace(MODEL, matmul=matmul), make_mesh(MeshConfig(), jax.devices()[:1])
    )
    clips = [
        tokenize(MODEL, {"video": np.zeros((n, 4, 4, 3), np.uint8), "caption": "abc", "fps": 8.0})
        for n in (1, 3)
    ]
    batch = jax.tree.map(jnp.asarray, pack_rows([clips] * PACKING.rows, PACKING))

    def value(params):
        return batch_loss(model, DiffusionConfig(), params, {}, batch, jax.random.key(0))[0]

    params = nn.unbox(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))
    text = jax.jit(jax.grad(value)).lower(params).as_text()
    found = re.findall(r"stablehlo\.dot_general.* : \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    return collections.Counter(tuple(of.split("x")[-1] for of in pair) for pair in found)


@needs_qwix
@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_only_blocks_multiply_in_8_bits(kind):
    """Under scan and rematerialisation; text, patches and what comes of noise levels do not."""
    full, low = dots_of_gradients("full"), dots_of_gradients(kind)
    assert {types: n for types, n in low.items() if "8" in "".join(types)} == EIGHT[kind]
    assert sum(full.values()) == sum(low.values())


def test_without_qwix_it_is_refused(monkeypatch):
    """Before anything is made."""
    mesh = make_mesh(MeshConfig())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model.matmul is 'int8', .*'dit-jax\[quant\]'"):
        make_model(dataclasses.replace(MODEL, matmul="int8"), mesh)
    assert choose_dot_general(mesh, "full") is choose_dot_general(mesh)
