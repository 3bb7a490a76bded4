"""Products in 8 bits: close to full precision forward and backward, really in 8 bits, and training."""

import builtins
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

from dit_jax.data import PackingConfig
from dit_jax.diffusion import DiffusionConfig
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.parallel import MeshConfig, choose_dot_general, global_batch, make_mesh
from dit_jax.training import OptimizerConfig, abstract_state, init_state, make_optimizer, make_step
from dit_jax.training.video_task import batch_loss, init_params, make_model, tokenize
from tests.packed import pack_rows
from tests.training.conftest import QUICK

needs_qwix = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="needs qwix: pip install 'dit-jax[quant]'"
)
KINDS = ["int8", "fp8"]
TRAINED = ["int8", pytest.param("fp8", marks=pytest.mark.slow)]
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


@needs_qwix
@pytest.mark.parametrize("kind", KINDS)
def test_product_is_close_for_every_token(kind):
    """Scales are per token and per column: small ones are as exact as large ones."""
    x, kernel, slope = case()
    out = product_and_gradients(
        choose_dot_general(make_mesh(MeshConfig()), kind), x, kernel, slope
    )[0]
    columns = jnp.abs(kernel).max(0)
    expected, out = (x @ kernel) / columns, out / columns
    error = jnp.linalg.norm(out - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    assert 0.001 < error.min() and error.max() < FORWARD[kind]


@needs_qwix
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_point_the_same_way(kind):
    given = case()
    _, dx, d_kernel = product_and_gradients(
        choose_dot_general(make_mesh(MeshConfig()), kind), *given
    )
    _, expected_x, expected_kernel = product_and_gradients(jax.lax.dot_general, *given)
    assert cosine(dx, expected_x, -1).min() > 0.99  # of every token
    assert cosine(d_kernel, expected_kernel, 0).min() > 0.99  # of every column
    if kind == "int8":  # The kernel's gradient is not rounded; sums in another order.
        np.testing.assert_allclose(d_kernel, expected_kernel, rtol=1e-4, atol=1e-3)


@needs_qwix
@pytest.mark.parametrize("kind", KINDS)
def test_types_and_zeros(kind):
    """Results have the operands' type; tokens of zeros (padding) stay zeros."""
    x, kernel, slope = case(jnp.bfloat16)
    x, slope = x.at[0, 3].set(0), slope.at[1].set(0)
    out, dx, d_kernel = product_and_gradients(
        choose_dot_general(make_mesh(MeshConfig()), kind), x, kernel, slope
    )
    assert out.dtype == dx.dtype == d_kernel.dtype == jnp.bfloat16
    assert not out[0, 3].any() and not dx[1].any() and dx[0].any()
    assert all(jnp.isfinite(y).all() for y in (out, dx, d_kernel))


def dots(function, *given):
    """How often products of which types are in a function as it is lowered."""
    text = jax.jit(function).lower(*given).as_text()
    found = re.findall(r"stablehlo\.dot_general.* : \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    return collections.Counter(tuple(of.split("x")[-1] for of in pair) for pair in found)


LINEAR = 7
"""Linear layers of a block: qkv and out; q, kv and out; up and down."""
EIGHT = {
    # Forward, again in the backward pass, and the gradients of what goes in.
    "int8": {("i8", "i8"): 3 * LINEAR},
    # The kernels' gradients too.
    "fp8": {
        ("f8E4M3FN", "f8E4M3FN"): 2 * LINEAR,
        ("f8E5M2", "f8E4M3FN"): LINEAR,
        ("f8E4M3FN", "f8E5M2"): LINEAR,
    },
}


MODEL = ModelConfig(
    dit=DiTConfig(width=64, depth=2, heads=4, scan=True, remat="full", absolute_positions="thw"),
    patch=PatchConfig(t=1, h=2, w=2, channels=3, reference_fps=8.0),
    text=ByteEncoderConfig(width=16, depth=0, heads=4, max_bytes=7),
)
PACKING = PackingConfig(rows=4, row_tokens=16, row_text=16, row_segments=2)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
STEPS = 40


def batch():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(PACKING.rows):
        clips = []
        for frames in (1, 3):
            # Plain colours: something to learn in a few steps.
            pixels = np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (frames, 4, 4, 3))
            clips.append(tokenize(MODEL, {"video": pixels, "caption": "abc", "fps": 8.0}))
        rows.append(clips)
    return pack_rows(rows, PACKING)


@pytest.fixture
def quick_compilation(monkeypatch):
    """What is compared is what is learned, not how fast."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))


def build(matmul, *sizes):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    model = make_model(dataclasses.replace(MODEL, matmul=matmul), mesh)
    init = functools.partial(init_params, model)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    return mesh, model, init, optimizer, abstract_state(init, optimizer, mesh)[1]


@functools.cache
def start():
    """A fresh state, on the host."""
    _, _, init, optimizer, shardings = build("full", 1, 1, 1, 1)
    return jax.device_get(init_state(init, optimizer, shardings, jax.random.key(1)))


@functools.cache
def losses(matmul, *sizes):
    """Of a short run on one batch."""
    mesh, model, _, optimizer, shardings = build(matmul, *sizes)
    state = jax.device_put(start(), shardings)
    loss = functools.partial(batch_loss, model, DiffusionConfig())
    step = make_step(loss, optimizer, OPTIMIZER, 3, shardings)
    placed = global_batch(mesh, batch(), tuple(range(PACKING.rows)), PACKING.rows)
    found = []
    for _ in range(STEPS):
        state, metrics = step(state, placed)
        found.append(float(metrics["loss"]))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    return np.array(found)


# Of a step's loss; 0.013 and 0.046 were seen.
TRAINING = {"int8": 0.03, "fp8": 0.1}


@needs_qwix
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.usefixtures("quick_compilation")
def test_training_falls_as_in_full_precision(kind):
    full, low = losses("full", 1, 1, 1, 1), losses(kind, 1, 1, 1, 1)
    assert full[-10:].mean() < 0.6 * full[:5].mean()
    # Rounding turns the steps a little; the noise of every step is the same.
    np.testing.assert_allclose(low, full, rtol=TRAINING[kind])
    assert abs(low[-10:].mean() / full[-10:].mean() - 1) < TRAINING[kind] / 2


@needs_qwix
@pytest.mark.parametrize("kind", KINDS)
def test_only_blocks_multiply_in_8_bits(kind):
    """Under scan and rematerialisation; text, patches and what comes of noise levels do not."""
    mesh, given = make_mesh(MeshConfig(1, 2, 2, 2)), jax.tree.map(jnp.asarray, batch())

    def gradients(matmul):
        model = make_model(dataclasses.replace(MODEL, matmul=matmul), mesh)
        params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))

        def value(params):
            return batch_loss(model, DiffusionConfig(), params, {}, given, jax.random.key(0))[0]

        return dots(jax.grad(value), nn.unbox(params))

    full, low = gradients("full"), gradients(kind)
    eight = {types: count for types, count in low.items() if "8" in "".join(types)}
    assert eight == EIGHT[kind]
    assert sum(full.values()) == sum(low.values())


@needs_qwix
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.usefixtures("quick_compilation")
def test_mesh_trains_as_one_device(kind):
    """Scales are taken over a whole token or column, wherever its parts lie."""
    spread, alone = losses(kind, 1, 2, 2, 2), losses(kind, 1, 1, 1, 1)
    # Sums in another order, of which some then round to another of 256 numbers.
    np.testing.assert_allclose(spread[:5], alone[:5], rtol=1e-3)
    np.testing.assert_allclose(spread, alone, rtol=0.1)


def test_without_qwix_it_is_refused(monkeypatch):
    """Before anything is made."""
    real, mesh = builtins.__import__, make_mesh(MeshConfig())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "qwix" else real)
    with pytest.raises(
        ValueError, match=r"model.matmul is 'int8', .* pip install 'dit-jax\[quant\]'"
    ):
        make_model(dataclasses.replace(MODEL, matmul="int8"), mesh)
    assert choose_dot_general(mesh, "full") is choose_dot_general(mesh)
