"""Shared modulation, windows, rematerialisation and groups: the layers' other ways, by their values."""

import collections
import functools

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


@pytest.fixture(scope="module")
def shared(tiny, params_of):
    model = tiny(modulation="shared", scan=True)
    return model, params_of(model)


def test_shared_modulation_is_that_of_layers_with_one_matrix(
    shared, tiny, params, loss_and_gradients
):
    """The same numbers and gradients as layers with equal matrices and biases of their own."""
    model, ours = shared

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


@pytest.fixture(scope="module")
def wide(tiny, params_of, loss_and_gradients):
    """Parameters of four layers and what they give with a window that reaches over the whole row."""
    params = regrouped(params_of(tiny(depth=4)), 2)
    return params, loss_and_gradients(tiny(depth=4, window=31, scan=True), params)


def test_a_band_as_wide_as_the_row_is_dense(tiny, params_of, wide, loss_and_gradients):
    dense = tiny(depth=4, scan=True)
    loss, gradients = loss_and_gradients(dense, params_of(dense))
    assert_same(wide[1], (loss, regrouped(gradients, 2)))


def test_windowed_layers_are_the_same_scanned_and_rematerialised(tiny, wide, loss_and_gradients):
    params, (loss, _) = wide
    unrolled = loss_and_gradients(tiny(depth=4, window=3), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(unrolled))
    scanned = tiny(depth=4, window=3, scan=True, remat="projections")
    assert_same(loss_and_gradients(scanned, params), unrolled)
    # And the window is there.
    assert abs(loss - unrolled[0]) > 1e-3 * abs(loss)


@pytest.fixture(scope="module")
def reach(segment, packed, jit):
    """``reach(model, params, silent)``: which tokens of a row of one segment of 24 tokens and padding
    see a change of token 2, where the layers named in ``silent`` attend to no token but their own."""
    row = packed([[segment(1, (4, 4, 6), levels=(0.5, 0.5), caption="x")]])
    other = {**row, "tokens": row["tokens"].copy()}
    other["tokens"][0, 2] += 1.0

    @functools.cache
    def compiled(model):
        return jit(model.apply)

    def see(model, params, silent):
        def silence(dit):
            for name in silent:
                out = dit["blocks"][name]["self_attention"]["out"]
                out.update(jax.tree.map(np.zeros_like, dict(out)))

        params = changed(params, silence)
        apply = compiled(model)
        differ = np.asarray(apply(params, struct(row))) != np.asarray(apply(params, struct(other)))
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
def test_bands_that_do_not_fit_are_refused(fields):
    assert (
        DiTConfig(window=None, global_every=5).depth == 12
    )  # Without a window it need not divide.
    with pytest.raises(ValueError, match=r"dit.(window|global_every) is 0|dit.depth is 12.* 5"):
        check_types(DiTConfig(**{"window": 8, **fields}), "dit")


# --- what the backward pass keeps ---


@pytest.fixture(scope="module")
def ring():
    """Attention that names its results, as the kernels of accelerators do."""
    mesh = make_mesh(MeshConfig(1, 1, 2, 1), jax.devices()[:2])
    return choose_attention(mesh, AttentionConfig(kernel="host", ulysses=1))


@pytest.fixture(scope="module")
def kept(tiny, params, ring, loss_and_gradients):
    return loss_and_gradients(tiny(ring, scan=True), params)


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(p, marks=pytest.mark.slow) for p in list(REMAT_POLICIES)[1:])]
)
def test_every_policy_gives_the_same(tiny, params, ring, kept, loss_and_gradients, remat):
    assert_same(loss_and_gradients(tiny(ring, scan=True, remat=remat), params), kept)


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


@pytest.fixture(scope="module")
def recomputed(tiny, params, inputs, ring):
    """``recomputed(policy)``: products in the gradient's program that "none" does not have."""

    @functools.cache
    def program(remat):
        model = tiny(ring, scan=True, remat=remat)
        gradient = jax.grad(lambda params, inputs: model.apply(params, struct(inputs)).sum())
        return products(jax.make_jaxpr(gradient)(params, inputs).jaxpr)

    def more(remat):
        assert not program("none") - program(remat)
        return program(remat) - program("none")

    return more


def test_policies_compute_again_what_they_do_not_keep(recomputed):
    # Rows 2, tokens 32, width 32, text 24 tokens; a device has 16 tokens of 2 heads of 16.
    qkv, hidden, part = (2, 32, 3 * WIDTH), (2, 32, 4 * WIDTH), (2, 2, 16, 16)
    again = {policy: recomputed(policy) for policy in REMAT_POLICIES}
    # A ring of two: once in the loop and once after it, scores and their product with the values.
    # The cross-attention's values are multiplied again by every policy (and are of this shape).
    assert {policy: found[part] for policy, found in again.items()} == {
        "full": 5,
        **dict.fromkeys(["attention", "projections", "dots", "offload"], 1),
    }
    assert {policy: found[qkv] for policy, found in again.items()} == {
        **{"full": 1, "attention": 1},
        **{"projections": 0, "dots": 0, "offload": 0},
    }
    assert {policy: found[hidden] for policy, found in again.items()} == {
        **{"full": 1, "attention": 1, "projections": 1, "offload": 1},
        "dots": 0,
    }


# --- groups to tokens ---


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_groups_are_gathered_alike_in_both_ways(groups, monkeypatch, jit):
    rng = np.random.default_rng(groups)
    values = rng.normal(size=(2, groups, 12)).astype(np.float32)
    slopes = rng.normal(size=(2, 9, 12)).astype(np.float32)
    ids = rng.integers(0, groups, (2, 9)).astype(np.int32)

    def gather(values, ids, few):
        with monkeypatch.context() as patch:
            patch.setattr(layers, "FEW_GROUPS", few)
            whole = jnp.broadcast_to(gather_groups(values, ids)[0], slopes.shape)
            parts = [jnp.broadcast_to(x, (2, 9, 4)) for x in gather_groups(values, ids, 3)]
        return (whole * slopes).sum() + (jnp.concatenate(parts, -1) * slopes).sum(), (whole, parts)

    both = jit(
        lambda values, ids: [
            jax.value_and_grad(gather, has_aux=True)(values, ids, few) for few in (groups, 0)
        ]
    )(values, ids)
    expected = np.take_along_axis(values, ids[..., None], 1)
    slope = np.zeros_like(values)
    for b, l in np.ndindex(ids.shape):
        slope[b, ids[b, l]] += 2 * slopes[b, l]
    for (_, (whole, parts)), found in both:
        # Bit for bit: what is not chosen is multiplied by zero, or not at all.
        assert np.array_equal(whole, expected)
        assert np.array_equal(np.concatenate(parts, -1), expected)
        # float32 sums of at most 18 terms in another order.
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("few", [0, 8])
def test_ids_that_no_group_has_disturb_no_other_token(few, monkeypatch):
    monkeypatch.setattr(layers, "FEW_GROUPS", few)
    values = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    ids = np.array([[2, 3, 1, 99, -1, 0]], np.int32)
    real = (ids >= 0) & (ids < 3)

    def gather(values):
        out = gather_groups(values, jnp.asarray(ids))[0]
        return jnp.where(real[..., None], out, 0).sum(), out

    slope, out = jax.grad(gather, has_aux=True)(values)
    assert np.array_equal(out[0, [0, 2, 5]], values[0, [2, 1, 0]]) and np.isfinite(out).all()
    # Each group has one token, and those without a group add nothing.
    assert np.array_equal(slope, np.ones_like(values))
