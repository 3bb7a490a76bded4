"""What takes less memory: moments in few bits or factored, averages, parameters, the host's memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dit_jax.config import VideoRun
from dit_jax.files import InputError
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.plan.abstract import STEPS
from dit_jax.training import (
    CheckpointConfig,
    Checkpointer,
    OptimizerConfig,
    abstract_state,
    init_state,
    make_optimizer,
    make_step,
)
from dit_jax.training.moments import decode, encode, round_to_bfloat16
from dit_jax.types import Totals
from tests.runs import changed

BASE = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=2, schedule="constant", weight_decay=0.1, accumulate=2
)
SETTINGS = {
    "bfloat16": {"moments": "bfloat16"},
    "int8": {"moments": "int8"},
    "factored": {"moments": "factored"},
    "muon": {"kind": "muon", "moments": "int8"},
    "no average": {"ema": "none"},
    "average": {"ema": "bfloat16"},
    "host": {"offload": True},
    "all": {"moments": "int8", "ema": "none", "param_dtype": "bfloat16", "offload": True},
}
SPREAD = (1, 2, 2, 2)
OUT, RANK = 160, 3


# --- Rounding ---


def mean_of(decoded, count=256):
    return np.mean([np.asarray(decoded(key), np.float64) for key in split(count)], axis=0)


def split(count):
    return jax.random.split(jax.random.key(0), count)


def test_bfloat16_is_one_of_two_neighbours_and_keeps_the_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 64)).astype(np.float32)
    once = np.asarray(round_to_bfloat16(x, jax.random.key(1)), np.float32)
    assert np.all(np.abs(once - x) < 2.0**-7 * np.abs(x)) and np.any(once > x) and np.any(once < x)
    # 256 roundings of a step of up to 2^-7: a sixteenth of half of it, four times over.
    mean = mean_of(jax.jit(functools.partial(round_to_bfloat16, x)))
    assert np.all(np.abs(mean - x) < 4 * 2.0**-8 / 16 * np.abs(x))
    kept = np.array([0.0, -1.5, np.inf, 2.0**-100], np.float32)
    np.testing.assert_array_equal(np.asarray(round_to_bfloat16(kept, jax.random.key(2))), kept)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_keep_the_mean_and_are_near(signed):
    rng = np.random.default_rng(1)
    # Rows and columns of very different size, as gradients have.
    x = rng.normal(size=(3, 64, 48)) * np.exp(rng.normal(size=(3, 64, 1)))
    x = (x if signed else x**2).astype(np.float32)
    x[0, 5] = 0
    rounded = jax.jit(lambda key: decode(*encode(x, key, signed)))
    once, mean, top = np.asarray(rounded(split(1)[0])), mean_of(rounded), 127 if signed else 255
    scale = np.minimum(np.abs(x).max(-1, keepdims=True), np.abs(x).max(-2, keepdims=True))
    # Neighbours of (c / top)^4 are at most 4 / top ((c + 1) / top)^3 apart.
    gap = 4 / top * scale * ((np.abs(x) / np.maximum(scale, 1e-30)) ** 0.25 + 1 / top) ** 3
    assert np.all(np.abs(once - x) <= gap * 1.001)
    assert np.all(np.abs(mean - x) < 4 * gap / 2 / 16 + 1e-12)
    assert not once[0, 5].any()
    code, row, column = encode(x, split(1)[0], signed)
    assert code.dtype == (np.int8 if signed else np.uint8) and code.shape == x.shape
    assert row.shape == (3, 64, 1) and column.shape == (3, 1, 48)
    if not signed:  # Something is divided by its root.
        small = np.full((2, 2), 1e-20, np.float32) + np.eye(2, dtype=np.float32)
        assert np.all(encode(small, split(1)[0], signed)[0] > 0)


# --- Updates ---


def tree(rng, size=1.0):
    shapes = {
        "mlp": {"up": {"kernel": (2, 128, OUT), "bias": (2, OUT)}},
        "out": {"kernel": (OUT, 128)},
    }
    draw = lambda shape: (size * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def moved(settings, gradients, params):
    """How far ``gradients``, one after another, move parameters."""
    optimizer = make_optimizer(dataclasses.replace(BASE, **settings), len(gradients))
    now, state, update = params, optimizer.init(params), jax.jit(optimizer.update)
    for one in gradients:
        updates, state = update(one, state, now)
        now = optax.apply_updates(now, updates)
    return jax.tree.map(lambda a, b: np.asarray(a - b), now, params), state


@pytest.mark.parametrize(
    ("name", "kind", "bound", "share"),
    [
        ("bfloat16", "adamw", 0.01, 0.51),
        ("int8", "adamw", 0.03, 0.29),
        ("factored", "adamw", 0.5, 0.29),
        ("muon", "muon", 0.03, 0.29),
    ],
)
def test_updates_are_nearly_those_in_float32(name, kind, bound, share):
    """Relative to how far 20 noisy gradients move each parameter, one of two layers' ten times
    larger; and the bytes of the state."""
    rng = np.random.default_rng(2)
    params, along = tree(rng), tree(rng)
    gradients = [jax.tree.map(lambda a, b: a + b, along, tree(rng)) for _ in range(20)]
    for one in gradients:
        one["mlp"]["up"]["kernel"][0] *= 10
    expected, full = moved({"kind": kind}, gradients, params)
    found, state = moved(SETTINGS[name], gradients, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) < bound * np.linalg.norm(b)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(one)) for one in (state, full)]
    assert sizes[0] < share * sizes[1]


def test_factored_moments_of_squares_of_rank_one_are_adams():
    """g_ij = r_i c_j n_t, whose squares the means of rows and columns tell; no first moment."""
    rng = np.random.default_rng(3)
    r, c = rng.normal(size=(2, 128, 1)), rng.normal(size=(2, 1, OUT))
    gradients = [{"kernel": (r * c * n).astype(np.float32)} for n in rng.normal(size=6)]
    params = {"kernel": np.ones((2, 128, OUT), np.float32)}
    settings = {"b1": 0.0, "clip_norm": None}
    expected, _ = moved(settings, gradients, params)
    found, state = moved({**settings, "moments": "factored"}, gradients, params)
    # The first moment passes through bfloat16: 2^-9 of each step.
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=2e-2, atol=2e-4)
    assert {x.shape for x in jax.tree.leaves(state) if x.ndim == 2} == {(2, 128), (2, OUT)}


def test_factored_moments_are_adamws():
    with pytest.raises(InputError, match="'factored'"):
        OptimizerConfig(kind="muon", moments="factored")


# --- Steps ---


def init(key):
    """Parameters with logical axes, of a model that is linear in them."""
    box = lambda x, *axes: nn.LogicallyPartitioned(x, axes)  # noqa: E731
    normal = functools.partial(jax.random.normal, key)
    mlp = {"kernel": box(normal((2, 128, OUT)), "layers", "embed", "mlp")}
    mlp["bias"] = box(normal((OUT,)), "mlp")
    return {"mlp": mlp, "out": {"kernel": box(normal((OUT, 128)), "mlp", "embed")}}


def loss(params, frozen, batch, key, step):
    """The products of the parameters with whole numbers, whose sums are exact in any order."""
    del frozen, key, step
    b = len(batch["row"])
    products = [
        jnp.einsum("lio,bi,bo->b", params["mlp"]["kernel"], batch["row"], batch["column"]),
        batch["column"] @ params["mlp"]["bias"],
        jnp.einsum("oi,bi,bo->b", params["out"]["kernel"], batch["row"], batch["column"]),
    ]
    total = sum(products).sum().astype(jnp.float32)
    return total, Totals(total, jnp.float32(b), {})


def batches(count):
    rng = np.random.default_rng(4)
    sizes = {"row": (8, 128), "column": (8, OUT)}
    one = lambda: {k: rng.integers(1, 4, n).astype(np.float32) for k, n in sizes.items()}  # noqa: E731
    return [one() for _ in range(count)]


@functools.cache
def run_on(name, sizes):
    """Shapes, shardings, fresh state and step of a setting on a mesh."""
    config = dataclasses.replace(BASE, clip_norm=None, **SETTINGS[name])
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    optimizer = make_optimizer(config, 10)
    shapes, shardings = abstract_state(init, optimizer, mesh, config=config)
    fresh = functools.partial(
        init_state, init, optimizer, shardings, jax.random.key(5), config=config
    )
    return shapes, shardings, fresh, make_step(loss, optimizer, config, 6, shardings)


def numbers(state):
    """All arrays of a state on the host."""
    return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state))]


def assert_equal(state, other):
    for a, b in zip(numbers(state), numbers(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_runs_are_the_same_to_the_bit(name, tmp_path):
    shapes, shardings, fresh, step = run_on(name, SPREAD)
    state, data = fresh(), batches(4)
    first = numbers(state.params)
    for leaf, shape, of in zip(*map(jax.tree.leaves, (state, shapes, shardings)), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(of, leaf.ndim)
        assert leaf.sharding.memory_kind == (of.memory_kind or "device")
    for batch in data[:2]:
        state, _ = step(state, batch)
    assert all(np.any(a != b) for a, b in zip(numbers(state.params), first, strict=True))

    # A batch that is not finite changes the counters alone.
    before = jax.device_get(state)
    bad = {**data[0], "row": data[0]["row"] * np.nan}
    state, _ = step(state, bad)
    assert int(state.skipped) == 1
    assert_equal(dataclasses.replace(state, step=before.step, skipped=before.skipped), before)

    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(state, {}, {}, 3)
    checkpointer.wait()
    resumed, _ = checkpointer.restore(3, shapes, shardings)
    assert_equal(resumed, state)
    # What sampling reads, in float32 whatever is stored.
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes.params)
    ema = checkpointer.restore_ema(3, wide, shardings.params)
    checkpointer.close()
    assert {x.dtype for x in numbers(ema)} == {np.dtype(np.float32)}
    expected = state.params if "none" in SETTINGS[name].values() else state.ema
    for a, b in zip(numbers(ema), numbers(expected), strict=True):
        np.testing.assert_array_equal(a, b.astype(np.float32))
    for batch in data[2:]:
        (state, _), (resumed, _) = step(state, batch), step(resumed, batch)
    assert_equal(resumed, state)


@pytest.mark.parametrize("name", SETTINGS)
def test_mesh_computes_what_one_device_does(name):
    states = []
    for sizes in (SPREAD, (1, 1, 1, 1)):
        _, _, fresh, step = run_on(name, sizes)
        state = fresh()
        for batch in batches(3):
            state, _ = step(state, batch)
        states.append(jax.device_get((state.params, state.ema)))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        # Float32 in another order may round a few numbers to the other neighbour.
        far = np.abs(a.astype(np.float32) - b.astype(np.float32)) > 1e-5 * (1 + np.abs(b))
        assert np.mean(far) < 1e-3, np.mean(far)


def test_moments_lie_like_their_parameters():
    _, _, fresh, _ = run_on("int8", SPREAD)
    params, state = (fresh().params, fresh().opt_state[1])
    kernel = params["mlp"]["kernel"].sharding
    for moment in (state.codes[0].mu, state.codes[0].nu):
        assert moment["mlp"]["kernel"].sharding.is_equivalent_to(kernel, 3)
        assert moment["mlp"]["kernel"].sharding.shard_shape((2, 128, OUT)) == (2, 32, OUT // 2)
    scales = state.rows[0].nu["mlp"]["kernel"], state.columns[0].nu["mlp"]["kernel"]
    assert [x.addressable_shards[0].data.shape for x in scales] == [(2, 32, 1), (2, 1, OUT // 2)]
    factored = run_on("factored", SPREAD)[2]().opt_state[1][1].ema["mlp"]["kernel"]
    assert factored.sharding.is_equivalent_to(kernel, 3)


@pytest.mark.parametrize(
    ("name", "fewer"),
    # Of the 16 bytes of a parameter, its average and its moments.
    [
        ("bfloat16", 4),
        ("int8", 5.9),
        ("factored", 5.9),
        ("no average", 4),
        ("average", 2),
        ("all", 13.9),
    ],
)
def test_plans_count_fewer_bytes(name, fewer):
    config = changed(VideoRun(), {"data.packing.rows": 8})
    mesh = make_mesh(MeshConfig(1, 8), jax.devices())
    of = [
        STEPS["train"](dataclasses.replace(config, optimizer=one), mesh)
        for one in (config.optimizer, dataclasses.replace(config.optimizer, **SETTINGS[name]))
    ]
    before, after = (sum(step.state.values()) / (step.parameters / 8) for step in of)
    assert 15.9 < before < 17 and fewer * 0.9 < before - after < fewer * 1.1
