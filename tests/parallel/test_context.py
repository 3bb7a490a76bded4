"""Attention among tokens spread over emulated devices, against one device and plain products."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.parallel import (
    AttentionConfig,
    MeshConfig,
    attention,
    choose_attention,
    make_mesh,
    token_multiple,
    xla_attention,
)
from dit_jax.parallel.attention import SplashConfig, _fit
from dit_jax.parallel.context import ulysses_size

SMALL = SplashConfig(*[128] * 6)
ROW, HEADS, DIM, TEXT = 2, 4, 8, 24
# Float32 sums of at most 256 products of numbers about 1, in another order.
TOLERANCE = 3e-5
slow = pytest.mark.slow


@cache
def case(length, heads=HEADS, text=None, real=0.95):
    """(q, k, v, ids of queries, ids of keys or None): segments of all sizes and padding."""
    rng = np.random.default_rng(0)
    cuts = np.array([0.11, 0.5, 0.52, 0.9]) * length
    ids = 1 + np.searchsorted(cuts, np.arange(length), side="right")
    ids = np.stack([ids, np.where(np.arange(length) < 0.7 * length, 1, 2)]).astype(np.int32)
    ids[: 1 if real == 0.95 else 2, int(real * length) :] = 0
    # Every segment has text, be it the beginning alone; its order differs from the segments'.
    of_text = np.stack([rng.permutation(np.arange(text) % 6) for _ in ids]) if text else None
    shapes = [(ROW, n, heads, DIM) for n in (length, text or length, text or length)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v, ids, of_text


def value_and_gradients(attend, given, window):
    q, k, v, ids, of_text = given
    slope = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)
    slope *= (ids != 0)[..., None, None]

    def value(q, k, v):
        out = attend(q, k, v, ids, of_text, window=window)
        return (out * slope).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(q, k, v)
    return np.asarray(out)[ids != 0], *map(np.asarray, gradients)


@cache
def expected(window, *what):
    return value_and_gradients(xla_attention, case(*what), window)


def compare(what, mesh, config, window=None, tolerance=TOLERANCE):
    found = value_and_gradients(choose_attention(mesh, config), case(*what), window)
    for name, ours, theirs in zip("o q k v".split(), found, expected(window, *what), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)


def mesh_of(sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


@pytest.mark.parametrize(
    ("sizes", "way", "window", "what"),
    [
        # (data, fsdp, context, tensor): each axis alone, and mixed; ways: Ulysses, a ring, both.
        ((2, 1, 4, 1), 4, None, (64,)),
        ((1, 2, 2, 2), 1, None, (64,)),
        ((1, 1, 8, 1), 2, None, (64,)),
        pytest.param((1, 1, 4, 2), 2, None, (64,), marks=slow),
        pytest.param((1, 1, 8, 1), 1, None, (64,), marks=slow),
        # A window within a neighbour's part, and one over several.
        ((1, 1, 4, 1), 1, 5, (64,)),
        pytest.param((1, 1, 8, 1), 1, 40, (64,), marks=slow),
        pytest.param((1, 2, 2, 2), 2, 5, (64,), marks=slow),
        # Text is attended to from every device.
        ((1, 2, 2, 2), None, None, (64, HEADS, TEXT)),
        # Parts of a ring that are padding alone, and heads that do not divide: all in the ring.
        ((1, 1, 4, 1), 1, 40, (64, HEADS, None, 0.3)),
        ((1, 1, 4, 1), None, None, (64, 3)),
        pytest.param((1, 1, 4, 1), None, None, (64, 6), marks=slow),
        # A length that does not divide stays whole.
        ((1, 1, 4, 1), None, None, (63,)),
    ],
    ids=str,
)
def test_products_on_every_mesh_equal_one_device(sizes, way, window, what):
    compare(what, mesh_of(sizes), AttentionConfig(kernel="host", ulysses=way), window)


@pytest.mark.parametrize(
    ("sizes", "way", "window", "what"),
    [
        ((2, 1, 1, 1), None, 20, (90,)),  # rows of any length
        ((1, 1, 2, 1), None, None, (256,)),  # Ulysses
        ((1, 1, 2, 1), 1, 60, (256,)),  # a ring
        ((1, 1, 2, 1), None, None, (256, HEADS, TEXT)),
        pytest.param((1, 1, 1, 1), None, 60, (256,), marks=slow),
        pytest.param((2, 1, 2, 2), None, None, (256,), marks=slow),
        pytest.param((1, 1, 2, 2), 2, 60, (256,), marks=slow),
        pytest.param((1, 1, 4, 1), 2, None, (512,), marks=slow),  # both
        # A window over parts that are not neighbours.
        pytest.param((1, 1, 4, 1), 1, 200, (512,), marks=slow),
    ],
    ids=str,
)
def test_splash_on_every_way_equals_one_device(sizes, way, window, what):
    config = AttentionConfig(kernel="splash", ulysses=way, splash=SMALL)
    compare(what, mesh_of(sizes), config, window, tolerance=1e-4)


@pytest.mark.parametrize(
    ("sizes", "way"),
    [((1, 1, 2, 1), 1), pytest.param((2, 1, 1, 2), None, marks=slow)],
    ids=str,
)
def test_gpu_kernel_on_a_mesh_equals_one_device(sizes, way):
    config = AttentionConfig(kernel="flash", ulysses=way)
    compare((128,), mesh_of(sizes), config, tolerance=1e-4)


@pytest.mark.parametrize("way", [1, pytest.param(2, marks=slow)], ids=["ring", "ulysses"])
def test_many_blocks_of_keys_are_the_same(way, monkeypatch):
    """More blocks than the fused backward pass may copy for: in portions, or unfused."""
    monkeypatch.setattr(attention, "PARTS", 1)
    config = AttentionConfig(kernel="splash", ulysses=way, splash=SMALL)
    compare((512,), mesh_of((1, 1, 2, 1)), config, tolerance=1e-4)


def test_unfused_backward_is_the_same():
    config = AttentionConfig(kernel="splash", splash=SplashConfig(fused_backward=False))
    compare((128,), mesh_of((1, 1, 1, 1)), config, tolerance=1e-4)


def collectives(sizes, way, window=None):
    """What a device sends in one forward pass: {kind: how often}, scans counted by their length."""
    attend = choose_attention(mesh_of(sizes), AttentionConfig(kernel="host", ulysses=way))
    jaxpr = jax.make_jaxpr(lambda *x: attend(*x, None, window=window))(*case(64)[:4])
    found: dict[str, int] = {}

    def visit(inner, times):
        for equation in inner.eqns:
            name, params = equation.primitive.name, equation.params
            if name in ("all_to_all", "ppermute", "all_gather", "psum"):
                found[name] = found.get(name, 0) + times
            for value in params.values():
                nested = getattr(value, "jaxpr", value)
                if hasattr(nested, "eqns"):
                    visit(nested, times * (params["length"] if name == "scan" else 1))

    visit(jaxpr.jaxpr, 1)
    return found


@pytest.mark.parametrize(
    ("devices", "way", "window", "sent"),
    [
        # Ulysses: q, k, v there and the result back.
        (4, 4, None, {"all_to_all": 4}),
        # A ring of four: keys and values, three times.
        (4, 1, None, {"ppermute": 6}),
        # Four heads and eight devices: fours exchange, two groups turn once.
        (8, None, None, {"all_to_all": 4, "ppermute": 2}),
        # A window of five reaches the neighbours on both sides alone.
        (8, 1, 5, {"ppermute": 4}),
    ],
)
def test_what_is_sent(devices, way, window, sent):
    assert collectives((1, 1, devices, 1), way, window) == sent


def test_ulysses_that_does_not_divide_is_refused_and_by_itself_divides():
    assert ulysses_size(AttentionConfig(), 4, 3) == 1  # nothing to exchange, all in the ring
    assert ulysses_size(AttentionConfig(), 4, 6) == 2  # two exchange, two groups form the ring
    for ulysses in (0, 3, 8):
        with pytest.raises(ValueError, match=f"ulysses {ulysses} .* take 4"):
            ulysses_size(AttentionConfig(ulysses=ulysses), 4, 8)


def test_blocks_are_multiples_of_128_that_divide():
    sizes = [_fit(1280, size) for size in (1, 100, 128, 400, 640, 9999)]
    assert sizes == [128, 128, 128, 256, 640, 1280]


def test_parts_of_a_splash_ring_are_whole_blocks():
    splash = AttentionConfig(kernel="splash")
    assert token_multiple(mesh_of((1, 1, 2, 1)), splash) == 256
    assert token_multiple(mesh_of((2, 1, 1, 1)), splash) == 1


def test_bfloat16_stays_close():
    """Rounded inputs: no more than their rounding times the number of devices apart."""
    given = case(64)
    rounded = tuple(jnp.asarray(x, jnp.bfloat16) for x in given[:3])
    attend = choose_attention(mesh_of((1, 1, 4, 1)), AttentionConfig(kernel="host", ulysses=1))
    out = jax.jit(lambda *x: attend(*x, given[3], None))(*rounded)
    assert out.dtype == jnp.bfloat16
    exact = xla_attention(*rounded, given[3], None)
    real = given[3] != 0
    difference = np.abs(np.asarray(out, np.float32) - np.asarray(exact, np.float32))
    assert difference[real].max() < 0.04
