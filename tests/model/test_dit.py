"""The transformer as a whole: zero at initialisation, its parameters, and how it is executed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.config import check_types
from dit_jax.model import PRESETS, DiT, DiTConfig, TextToVideo
from dit_jax.parallel import xla_attention
from dit_jax.parallel.attention import host_attention
from dit_jax.parallel.matmul import flat_dot_general
from dit_jax.parallel.mesh import ACTIVATION_RULES, PARAMETER_RULES
from dit_jax.types import Runtime
from tests.denoiser import assert_same, struct


def leaves_with_names(boxed):
    """(path, boxed parameter) of every leaf."""
    return jax.tree_util.tree_flatten_with_path(
        boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )[0]


# --- initialisation and parameters ---


def test_fresh_branches_are_zero_and_nothing_else_is(forward, fresh, inputs):
    out = forward(fresh, **inputs)
    assert out.shape == inputs["tokens"].shape and not out.any()
    zero = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(fresh["params"])[0]:
        names = [key.key for key in path]
        if names[-1] == "kernel" and not np.asarray(leaf).any():
            zero.add("/".join(names[:-1]))
    assert zero == {
        "dit/blocks/modulation/linear",
        "dit/blocks/cross_attention/out",
        "dit/final_modulation/linear",
        "dit/final",
    }


def test_layers_are_drawn_apart(fresh):
    kernel = np.asarray(fresh["params"]["dit"]["blocks"]["mlp"]["up"]["kernel"])
    assert kernel.shape == (2, 32, 128) and not np.array_equal(kernel[0], kernel[1])
    # Xavier's bound for each layer: sqrt(6 / (in + out)), not that of the stacked array.
    bound = np.sqrt(6 / (32 + 128))
    assert 0.95 * bound < np.abs(kernel).max() <= bound


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"), [("S", 384, 12, 6), ("XL", 1152, 28, 16)]
)
def test_presets_have_the_parameters_that_their_shapes_say(name, width, depth, heads):
    d, e, p = width, 128, 16
    self_attention = (d * 3 * d + 3 * d) + (d * d + d) + 2 * d // heads
    cross_attention = (d * d + d) + (e * 2 * d + 2 * d) + (d * d + d) + 2 * d // heads
    mlp = (d * 4 * d + 4 * d) + (4 * d * d + d)
    block = (d * 6 * d + 6 * d) + self_attention + cross_attention + mlp
    time = (256 * d + d) + (d * d + d)
    ends = (p * d + d) + (d * 2 * d + 2 * d) + (d * p + p)

    model = DiT(PRESETS[name], p, Runtime(xla_attention))
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(
        lambda key, x, text: model.init(
            key,
            struct(
                tokens=x,
                positions=x[..., :3],
                segment_ids=ids,
                group_ids=ids,
                group_t=x[..., 0],
                text=text,
                text_segment_ids=ids,
            ),
        ),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 1, p), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, e), jnp.float32),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == depth * block + time + ends


def test_other_ways_have_parameters_of_their_own(tiny, boxed, other_ways):
    def count(**changes):
        return sum(leaf.size for leaf in jax.tree.leaves(boxed(tiny(**changes))["params"]["dit"]))

    d, e, heads, depth = 32, 16, 2, 2
    cross_attention = (d * d + d) + (e * 2 * d + 2 * d) + (d * d + d) + 2 * d // heads
    plain = count()
    assert count(absolute_positions="thw") == plain
    assert count(pooled_text=True) == plain + e * d + d
    assert count(cross_attention=False) == plain - depth * cross_attention


def test_text_may_be_absent_where_none_is_used(model):
    config = dataclasses.replace(model.config.dit, cross_attention=False)
    network = DiT(config, 12, Runtime(xla_attention))
    ids = jnp.zeros((1, 4), jnp.int32)

    def run(key, x):
        fields = {"tokens": x, "positions": x[..., :3], "group_t": x[:, :1, 0]}
        return network.init_with_output(key, struct(fields, segment_ids=ids, group_ids=ids))[0]

    out = jax.eval_shape(run, jax.random.key(0), jax.ShapeDtypeStruct((1, 4, 12), jnp.float32))
    assert out.shape == (1, 4, 12)


def test_every_parameter_has_axes_that_the_rules_know(tiny, boxed, other_ways):
    leaves = leaves_with_names(boxed(tiny()))
    assert len(leaves) == 30 + 14  # the transformer's and the text encoder's
    for path, leaf in leaves + leaves_with_names(boxed(tiny(**other_ways))):
        where = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.LogicallyPartitioned), where
        assert len(leaf.names) == leaf.value.ndim, where
        assert {name for name in leaf.names if name} <= set(PARAMETER_RULES), where
        assert (leaf.names[0] == "layers") == ("blocks" in where), where


def test_activations_are_laid_out_by_axes_that_the_rules_know(model, params, inputs):
    seen = set()

    def constrain(x, *axes):
        assert len(axes) == x.ndim
        seen.update(axes)
        return x

    jax.eval_shape(
        TextToVideo(model.config, Runtime(xla_attention, constrain)).apply, params, struct(inputs)
    )
    assert seen - {None} == set(ACTIVATION_RULES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "dit.width is 0"),
        ({"depth": 0}, "dit.depth is 0"),
        ({"heads": 0}, "dit.heads is 0"),
        ({"width": 100, "heads": 3}, "dit.width is 100.*heads 3, as 99"),
        ({"width": 2, "heads": 4}, "dit.width is 2.*heads 4, as 4"),
        ({"width": 32, "heads": 8}, "dit.width is 32.*even number of dimensions"),
        ({"mlp_dim": 0}, "dit.mlp_dim is 0"),
    ],
)
def test_nonsense_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_types(DiTConfig(**fields), "dit")


# --- execution: other ways to compute the same ---


@pytest.fixture(scope="module")
def scanned(tiny, params, loss_and_gradients):
    return loss_and_gradients(tiny(scan=True), params)


def test_scanned_equals_unrolled(scanned, loss_and_gradients, forward, tiny, params, inputs, jit):
    assert_same(scanned, loss_and_gradients(tiny(scan=False), params))
    out = jit(tiny(scan=True).apply)(params, struct(inputs))
    # As above; outputs reach 10.
    np.testing.assert_allclose(out, forward(params, **inputs), rtol=1e-5, atol=1e-5)


def test_kernels_of_cpus_change_nothing(scanned, loss_and_gradients, tiny, params):
    model = tiny(scan=True, attention=host_attention, dot_general=flat_dot_general)
    assert_same(loss_and_gradients(model, params), scanned)


def test_unset_scan_unrolls_on_a_cpu(tiny, params, inputs):
    programs = {
        scan: str(jax.make_jaxpr(tiny(scan=scan).apply)(params, struct(inputs)))
        for scan in (None, False, True)
    }
    assert "unroll=2" in programs[False] and "unroll=1" in programs[True]
    assert programs[None].count("unroll=2") == programs[False].count("unroll=2")


# --- precision ---


def test_bfloat16_is_close_to_float32(tiny, forward, params, inputs, jit):
    out = jit(tiny(dtype="bfloat16").apply)(params, struct(inputs))
    exact = forward(params, **inputs)
    assert out.dtype == jnp.float32
    real = inputs["segment_ids"] > 0
    error = np.sqrt(np.square(np.asarray(out) - exact)[real].mean() / np.square(exact)[real].mean())
    # Roundings of 2^-9 in some twenty places one after another, added at random: about 1%; and
    # above what float32 could leave.
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_float32_and_no_dtype_is_promoted_silently(tiny, boxed, inputs, dtype):
    model = tiny(dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        shapes = nn.unbox(boxed(model))
        out = jax.eval_shape(model.apply, shapes, struct(inputs))
    assert {x.dtype for x in [out, *jax.tree.leaves(shapes)]} == {jnp.dtype("float32")}


def test_replace_keeps_the_parameters(tiny, boxed):
    """Execution is no part of the parameters: every way takes those of every other."""
    plain = jax.tree.structure(nn.unbox(boxed(tiny())))
    for changes in ({"scan": True}, {"remat": "full"}, {"scan": True, "remat": "dots"}):
        assert jax.tree.structure(nn.unbox(boxed(tiny(**changes)))) == plain
    assert (
        dataclasses.replace(PRESETS["S"], mlp_dim=100).hidden == 100 and PRESETS["S"].hidden == 1536
    )
