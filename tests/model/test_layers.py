"""Shared modulation, windows, rematerialisation and groups: the layers' other ways, by their values."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from dit_jax.config import check_types
from dit_jax.model import DiTConfig, layers
from dit_jax.model.dit import REMAT_POLICIES
from dit_jax.model.layers import gather_groups
from dit_jax.parallel import AttentionConfig, MeshConfig, choose_attention, make_mesh
from tests.denoiser import assert_same, struct

WIDTH = 32
"""Of the tiny model; its rows have 32 tokens."""


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def changed(params, change):
    """A copy of the parameters whose transformer ``change`` has been at."""
    copy = jax.tree.map(lambda leaf: leaf, params)
    change(copy["params"]["dit"])
    return copy


# --- one modulation for all layers ---


def test_shared_modulation_saves_a_matrix_a_layer(tiny, boxed):
    d, depth = WIDTH, 5
    layer, shared = (count(boxed(tiny(modulation=way, depth=depth))) for way in ("layer", "shared"))
    # One matrix and bias [d, 6 d] instead of one for every layer, and a table [6 d] for each.
    assert layer - shared == (depth - 1) * (6 * d * d + 6 * d) - depth * 6 * d


def test_shared_modulation_is_that_of_layers_with_one_matrix(
    tiny, params_of, params, loss_and_gradients
):
    """The same numbers and gradients as layers with equal matrices and biases of their own."""
    model = tiny(modulation="shared", scan=True)
    ours = params_of(model)

    def unshare(dit):
        linear = dit.pop("modulation")["linear"]
        table = dit["blocks"].pop("modulation_table")
        assert table.shape == (2, 6 * WIDTH)
        dit["blocks"]["modulation"] = {
            "linear": {"kernel": np.stack([linear["kernel"]] * 2), "bias": linear["bias"] + table}
        }

    theirs = changed(ours, unshare)
    assert jax.tree.structure(theirs) == jax.tree.structure(params)
    loss, gradients = loss_and_gradients(tiny(scan=True), theirs)

    def share(dit):
        linear = dit["blocks"].pop("modulation")["linear"]
        # What one matrix and bias serve adds up; a layer's table is a bias of its own.
        dit["modulation"] = {"linear": {name: linear[name].sum(0) for name in ("kernel", "bias")}}
        dit["blocks"]["modulation_table"] = linear["bias"]

    assert_same(loss_and_gradients(model, ours), (loss, changed(gradients, share)))


# --- windows ---


def regrouped(params, every):
    """Stacked layers as groups of ``every`` layers stacked: layer j every + i is group j's layer_i."""

    def group(dit):
        stacked = dit["blocks"]
        dit["blocks"] = {
            f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i::every], stacked)
            for i in range(every)
        }

    return changed(params, group)


def test_windows_are_the_same_scanned_and_wide_ones_are_dense(tiny, params_of, apply, inputs):
    stacked = params_of(tiny(depth=4))
    params, real = regrouped(stacked, 2), inputs["segment_ids"] > 0
    dense, wide, scanned, unrolled = (
        apply(tiny(depth=4, **changes), given, **inputs)[real]
        for changes, given in (
            ({"scan": True}, stacked),
            ({"scan": True, "window": 31}, params),
            ({"scan": True, "window": 3}, params),
            ({"window": 3}, params),
        )
    )
    # Float32 sums in another order.
    scale = np.abs(dense).max()
    np.testing.assert_allclose(wide, dense, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-5 * scale)
    # And the window is there.
    assert np.abs(wide - scanned).max() > 1e-3 * scale


@pytest.fixture(scope="module")
def reach(segment, packed, apply):
    """``reach(model, params, silent)``: which tokens of a row of one segment of 24 tokens and padding
    see a change of token 2, if the layers named in ``silent`` attend to no token but their own."""
    row = packed([[segment(1, (4, 4, 6), levels=(0.5, 0.5), caption="x")]])
    other = {**row, "tokens": row["tokens"].copy()}
    other["tokens"][0, 2] += 1.0

    def see(model, params, silent):
        def silence(dit):
            for name in silent:
                out = dit["blocks"][name]["self_attention"]["out"]
                out.update(jax.tree.map(np.zeros_like, dict(out)))

        params = changed(params, silence)
        differ = apply(model, params, **row) != apply(model, params, **other)
        return np.flatnonzero(differ[0].any(-1)).tolist()

    return see


def test_layers_see_as_far_as_their_window(tiny, params_of, reach):
    model = tiny(depth=3, window=4, global_every=3)
    params = params_of(model)
    # Bit for bit: what a layer does not see does not enter its sums. Only layer_1: 4 tokens away.
    assert reach(model, params, ["layer_0", "layer_2"]) == list(range(7))
    # One after another, two windowed layers see twice as far, ...
    assert reach(model, params, ["layer_2"]) == list(range(11))
    # ... and the last of the three the whole segment (and no padding).
    assert reach(model, params, ["layer_0", "layer_1"]) == list(range(24))
    assert reach(model, params, ["layer_0", "layer_1", "layer_2"]) == [2]


@pytest.mark.parametrize("fields", [{"window": 0}, {"global_every": 0}, {"global_every": 5}])
def test_windows_that_do_not_fit_are_refused(fields):
    assert DiTConfig(global_every=5).depth == 12  # Without a window it need not divide.
    with pytest.raises(ValueError, match=r"dit.(window|global_every) is 0|dit.depth is 12.* 5"):
        check_types(DiTConfig(**{"window": 8, **fields}), "dit")


# --- what the backward pass keeps ---


@pytest.fixture(scope="module")
def ring():
    """Attention that names its results, as the kernels of accelerators do."""
    mesh = make_mesh(MeshConfig(1, 1, 2, 1), jax.devices()[:2])
    return choose_attention(mesh, AttentionConfig(kernel="host", ulysses=1))


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(p, marks=pytest.mark.slow) for p in list(REMAT_POLICIES)[1:])]
)
def test_every_policy_gives_the_same(tiny, params, ring, loss_and_gradients, remat):
    # All but "full" keep the results of attention, which only such a kernel names.
    attention = {} if remat == "full" else {"attention": ring}
    one, other = (tiny(scan=True, **attention, remat=policy) for policy in (remat, "none"))
    assert_same(loss_and_gradients(one, params), loss_and_gradients(other, params))


def products(jaxpr):
    """How many matrix products of each result's shape a program has, inner programs included."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found[equation.outvars[0].aval.shape] += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, (ClosedJaxpr, Jaxpr)):
                    found += products(getattr(inner, "jaxpr", inner))
    return found


def test_policies_compute_again_what_they_do_not_keep(tiny, params, inputs, ring):
    def program(remat):
        model = tiny(ring, scan=True, remat=remat)
        gradient = jax.grad(lambda params, inputs: model.apply(params, inputs).sum())
        return products(jax.make_jaxpr(gradient)(params, struct(inputs)).jaxpr)

    kept, again = program("none"), {}
    for policy in REMAT_POLICIES:
        found = program(policy)
        assert not kept - found
        again[policy] = found - kept
    # Rows 2, tokens 32, width 32, text 24 tokens; a device has 16 tokens of 2 heads of 16.
    qkv, hidden, part = (2, 32, 3 * WIDTH), (2, 32, 4 * WIDTH), (2, 2, 16, 16)
    # A ring of two: once in the loop and once after it, scores and their product with the values.
    # The cross-attention's values are multiplied again by every policy (and are of this shape).
    assert {policy: [found[x] for x in (part, qkv, hidden)] for policy, found in again.items()} == {
        "full": [5, 1, 1],
        "attention": [1, 1, 1],
        "projections": [1, 0, 1],
        "dots": [1, 0, 0],
        "offload": [1, 0, 1],
    }


# --- groups to tokens ---


@pytest.mark.parametrize("few", [0, 8])
def test_groups_are_gathered_alike_in_both_ways(few, monkeypatch):
    monkeypatch.setattr(layers, "FEW_GROUPS", few)
    rng = np.random.default_rng(3)
    values = rng.normal(size=(2, 6, 12)).astype(np.float32)
    slopes = rng.normal(size=(2, 9, 12)).astype(np.float32)
    ids = rng.integers(0, 6, (2, 9)).astype(np.int32)
    ids[0, 3:5] = 99, -1  # Ids that no group has disturb no other token.
    real = (ids >= 0) & (ids < 6)

    def gather(values, ids):
        whole = jnp.broadcast_to(gather_groups(values, ids)[0], slopes.shape)
        parts = [jnp.broadcast_to(x, (2, 9, 4)) for x in gather_groups(values, ids, 3)]
        both = jnp.stack([whole, jnp.concatenate(parts, -1)])
        return jnp.where(real[..., None], both * slopes, 0).sum(), both

    (_, both), found = jax.jit(jax.value_and_grad(gather, has_aux=True))(values, ids)
    slope = np.zeros_like(values)
    for b, l in np.argwhere(real):
        # Bit for bit: what is not chosen is multiplied by zero, or not at all.
        assert np.array_equal(both[:, b, l], [values[b, ids[b, l]]] * 2)
        slope[b, ids[b, l]] += 2 * slopes[b, l]
    assert np.isfinite(both).all()
    # float32 sums of at most 18 terms in another order.
    np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-5)
