"""Attention among tokens spread over emulated devices, against one device and plain products."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.parallel import (
    AttentionConfig,
    MeshConfig,
    choose_attention,
    make_mesh,
    pallas,
    token_multiple,
    xla_attention,
)
from dit_jax.parallel.context import ulysses_size
from dit_jax.parallel.mesh import ROWS
from dit_jax.parallel.pallas import SplashConfig, _fit

SMALL = SplashConfig(
    block_q=128,
    block_kv=128,
    block_kv_compute=128,
    block_q_backward=128,
    block_kv_backward=128,
    block_kv_backward_compute=128,
)
ROW, HEADS, DIM, TEXT = 2, 4, 8, 24
# Float32 sums of at most 256 products of numbers about 1, in another order.
TOLERANCE = 3e-5
slow = pytest.mark.slow


def case(length, heads=HEADS, text=None, seed=0):
    """(q, k, v, ids of queries, ids of keys or None): segments of all sizes and padding."""
    rng = np.random.default_rng(seed)
    cuts = np.array([0.11, 0.5, 0.52, 0.9]) * length
    ids = 1 + np.searchsorted(cuts, np.arange(length), side="right")
    ids[int(0.95 * length) :] = 0
    ids = np.stack([ids, np.where(np.arange(length) < 0.7 * length, 1, 2)]).astype(np.int32)
    # Every segment has text, be it the beginning alone; its order differs from the segments'.
    of_text = np.stack([rng.permutation(np.arange(text) % 6) for _ in ids]) if text else None
    shapes = [(ROW, n, heads, DIM) for n in (length, text or length, text or length)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v, ids, of_text


def value_and_gradients(attend, given, window=None):
    q, k, v, ids, of_text = given
    slope = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)
    slope *= (ids != 0)[..., None, None]

    def value(q, k, v):
        out = attend(q, k, v, ids, of_text, window=window)
        return (out * slope).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(q, k, v)
    return np.asarray(out)[ids != 0], *map(np.asarray, gradients)


def compare(given, mesh, config, window=None, tolerance=TOLERANCE):
    expected = value_and_gradients(xla_attention, given, window)
    found = value_and_gradients(choose_attention(mesh, config), given, window)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)


def mesh_of(sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


@pytest.mark.parametrize(
    ("sizes", "way", "window"),
    [
        # (data, fsdp, context, tensor): each axis alone, and mixed; ways: Ulysses, a ring, both.
        ((2, 1, 4, 1), 4, None),
        ((1, 2, 2, 2), 1, None),
        ((1, 1, 8, 1), 2, None),
        ((1, 1, 1, 4), None, None),
        ((2, 1, 1, 1), None, 5),
        pytest.param((1, 1, 4, 2), 2, None, marks=slow),
        pytest.param((1, 1, 8, 1), 1, None, marks=slow),
        # A window within a neighbour's part, and one over several.
        ((1, 1, 8, 1), 1, 5),
        ((1, 1, 8, 1), 2, 40),
        pytest.param((1, 1, 8, 1), 1, 40, marks=slow),
        pytest.param((1, 2, 2, 2), 2, 5, marks=slow),
    ],
    ids=str,
)
def test_products_on_every_mesh_equal_one_device(sizes, way, window):
    config = AttentionConfig(kernel="host", ulysses=way)
    compare(case(64), mesh_of(sizes), config, window)


@pytest.mark.parametrize("sizes", [(2, 1, 4, 1), (1, 2, 2, 2)], ids=str)
def test_text_is_attended_to_from_every_device(sizes):
    compare(case(64, text=TEXT), mesh_of(sizes), AttentionConfig(kernel="host"))


@pytest.mark.parametrize(
    ("sizes", "way", "window", "length"),
    [
        pytest.param((1, 1, 1, 1), None, None, 256, marks=slow),
        ((1, 1, 1, 1), None, 60, 256),
        pytest.param((2, 1, 2, 2), None, None, 256, marks=slow),
        ((1, 1, 2, 1), None, None, 256),  # Ulysses
        ((1, 1, 2, 1), 1, None, 256),  # a ring
        pytest.param((1, 1, 2, 1), 1, 60, 256, marks=slow),
        pytest.param((1, 1, 2, 2), 2, 60, 256, marks=slow),
        pytest.param((1, 1, 4, 1), 2, None, 512, marks=slow),  # both
        ((1, 1, 4, 1), 1, 200, 512),  # a window over parts that are not neighbours
    ],
    ids=str,
)
def test_splash_on_every_way_equals_one_device(sizes, way, window, length):
    config = AttentionConfig(kernel="splash", ulysses=way, splash=SMALL)
    compare(case(length), mesh_of(sizes), config, window, tolerance=1e-4)


@pytest.mark.parametrize(("sizes", "way"), [((2, 1, 1, 2), None), ((1, 1, 2, 1), 1)], ids=str)
def test_gpu_kernel_on_a_mesh_equals_one_device(sizes, way):
    compare(case(128), mesh_of(sizes), AttentionConfig(kernel="flash", ulysses=way), tolerance=1e-4)


def test_splash_attends_to_text():
    config = AttentionConfig(kernel="splash", splash=SMALL)
    compare(case(256, text=TEXT), mesh_of((1, 1, 2, 1)), config, tolerance=1e-4)


def test_splash_takes_rows_of_any_length():
    config = AttentionConfig(kernel="splash", splash=SMALL)
    compare(case(90), mesh_of((2, 1, 1, 1)), config, 20, tolerance=1e-4)


def test_parts_of_a_ring_may_be_padding_alone():
    q, k, v, ids, _ = case(64)
    ids = np.where(np.arange(64) < 20, ids, 0)
    config = AttentionConfig(kernel="host", ulysses=1)
    for window in (None, 16):
        compare((q, k, v, ids, None), mesh_of((1, 1, 4, 1)), config, window)


@pytest.mark.parametrize("way", [1, pytest.param(2, marks=slow)], ids=["ring", "ulysses"])
def test_many_blocks_of_keys_are_the_same(way, monkeypatch):
    """More blocks than the fused backward pass may copy for: in portions, or unfused."""
    monkeypatch.setattr(pallas, "PARTS", 1)
    config = AttentionConfig(kernel="splash", ulysses=way, splash=SMALL)
    compare(case(512), mesh_of((1, 1, 2, 1)), config, tolerance=1e-4)


def test_unfused_backward_is_the_same():
    config = AttentionConfig(kernel="splash", splash=SplashConfig(fused_backward=False))
    compare(case(128), mesh_of((1, 1, 1, 1)), config, tolerance=1e-4)


def test_heads_need_not_divide():
    """Three heads over four devices: nothing to exchange, all in the ring."""
    assert ulysses_size(AttentionConfig(), 4, 3) == 1
    compare(case(64, heads=3), mesh_of((1, 1, 4, 1)), AttentionConfig(kernel="host"))
    # Six over four: two exchange, and two groups form the ring.
    assert ulysses_size(AttentionConfig(), 4, 6) == 2
    compare(case(64, heads=6), mesh_of((1, 1, 4, 1)), AttentionConfig(kernel="host"))


def test_a_length_that_does_not_divide_stays_whole():
    compare(case(63), mesh_of((1, 1, 4, 1)), AttentionConfig(kernel="host"))


def collectives(sizes, way, window=None):
    """What a device sends in one forward pass: {kind: how often}, scans counted by their length."""
    mesh = mesh_of(sizes)
    spread = NamedSharding(mesh, PartitionSpec(ROWS, "context"))
    whole = NamedSharding(mesh, PartitionSpec(ROWS))
    q, k, v, ids, _ = case(64)
    attend = choose_attention(mesh, AttentionConfig(kernel="host", ulysses=way))
    given = (*(jax.device_put(x, spread) for x in (q, k, v)), jax.device_put(ids, whole))
    jaxpr = jax.make_jaxpr(lambda q, k, v, ids: attend(q, k, v, ids, None, window=window))(*given)
    found: dict[str, int] = {}

    def visit(inner, times):
        for equation in inner.eqns:
            name = equation.primitive.name
            if name in ("all_to_all", "ppermute", "all_gather", "psum"):
                found[name] = found.get(name, 0) + times
            again = times * equation.params.get("length", 1) if name == "scan" else times
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                nested = getattr(value, "jaxpr", value)
                if hasattr(nested, "eqns"):
                    visit(nested, again)

    visit(jaxpr.jaxpr, 1)
    return found


def test_what_is_sent():
    # Ulysses: q, k, v there and the result back.
    assert collectives((1, 1, 4, 1), 4) == {"all_to_all": 4}
    # A ring of four: keys and values, three times.
    assert collectives((1, 1, 4, 1), 1) == {"ppermute": 6}
    # Four heads and eight devices: fours exchange, two groups turn once.
    assert collectives((1, 1, 8, 1), None) == {"all_to_all": 4, "ppermute": 2}
    # A window of five reaches the neighbours on both sides alone.
    assert collectives((1, 1, 8, 1), 1, window=5) == {"ppermute": 4}


@pytest.mark.parametrize("ulysses", [0, 3, 8])
def test_ulysses_that_does_not_divide_is_refused(ulysses):
    with pytest.raises(ValueError, match=f"ulysses {ulysses} .*context 4 .* 8 heads .* take 4"):
        ulysses_size(AttentionConfig(ulysses=ulysses), 4, 8)


def test_blocks_are_multiples_of_128_that_divide():
    assert [_fit(1280, size) for size in (1, 100, 128, 400, 640, 9999)] == [128] * 3 + [
        256,
        640,
        1280,
    ]


def test_parts_of_a_splash_ring_are_whole_blocks():
    splash = AttentionConfig(kernel="splash")
    assert token_multiple(mesh_of((1, 1, 2, 1)), splash) == 256
    assert token_multiple(mesh_of((2, 1, 1, 1)), splash) == 1


def test_band_is_its_definition():
    """The windowed reference itself: weights only where |i - j| <= 5, by a loop."""
    q, k, v, ids, _ = case(16)
    out = np.asarray(xla_attention(q, k, v, ids, None, window=5))
    for b, i in itertools.product(range(ROW), range(16)):
        seen = [j for j in range(16) if abs(i - j) <= 5 and ids[b, i] == ids[b, j]]
        for a in range(HEADS):
            scores = k[b, seen, a] @ q[b, i, a] / np.sqrt(DIM)
            weights = np.exp(scores - scores.max())
            expected = weights @ v[b, seen, a] / weights.sum()
            np.testing.assert_allclose(out[b, i, a], expected, rtol=0, atol=2e-6)


def test_bfloat16_stays_close():
    """Rounded inputs: no more than their rounding times the number of devices apart."""
    given = case(64)
    rounded = tuple(jnp.asarray(x, jnp.bfloat16) for x in given[:3])
    attend = choose_attention(mesh_of((1, 1, 4, 1)), AttentionConfig(kernel="host", ulysses=1))
    out = attend(*rounded, given[3], None)
    assert out.dtype == jnp.bfloat16
    expected = xla_attention(*rounded, given[3], None)
    real = given[3] != 0
    difference = np.abs(np.asarray(out, np.float32) - np.asarray(expected, np.float32))
    assert difference[real].max() < 0.04
