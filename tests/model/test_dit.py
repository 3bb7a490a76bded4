"""The transformer as a whole: zero at initialisation, its parameters, and how it is executed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.config import check_types
from dit_jax.model import DiTConfig, TextToVideo
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


def test_other_ways_have_parameters_of_their_own(tiny, boxed, other_ways):
    plain, other = (
        sum(leaf.size for leaf in jax.tree.leaves(boxed(tiny(**changes))["params"]["dit"]))
        for changes in ({}, other_ways)
    )
    d, e, heads, depth = 32, 16, 2, 2
    cross_attention = (d * d + d) + (e * 2 * d + 2 * d) + (d * d + d) + 2 * d // heads
    pooled = e * d + d
    assert other == plain + pooled - depth * cross_attention


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
        ({"heads": 0}, "dit.heads is 0"),
        ({"width": 100, "heads": 3}, "dit.width is 100.*heads 3, as 99"),
        ({"width": 2, "heads": 4}, "dit.width is 2.*heads 4, as 4"),
        ({"width": 32, "heads": 8}, "dit.width is 32.*even number of dimensions"),
    ],
)
def test_nonsense_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_types(DiTConfig(**fields), "dit")


# --- execution: other ways to compute the same ---


def test_scanned_equals_unrolled(loss_and_gradients, tiny, params):
    scanned, unrolled = (loss_and_gradients(tiny(scan=scan), params) for scan in (True, False))
    assert_same(scanned, unrolled)


def test_kernels_of_cpus_change_nothing(apply, forward, tiny, params, inputs):
    model = tiny(attention=host_attention, dot_general=flat_dot_general)
    expected = forward(params, **inputs)
    # Float32 sums in another order.
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(apply(model, params, **inputs), expected, rtol=1e-4, atol=atol)


def test_unset_scan_unrolls_on_a_cpu(tiny, params, inputs):
    unset, scanned = (
        str(jax.make_jaxpr(tiny(scan=scan).apply)(params, struct(inputs))) for scan in (None, True)
    )
    assert "unroll=2" in unset and "unroll=2" not in scanned and "unroll=1" in scanned


# --- precision ---


def test_bfloat16_is_close_to_float32(tiny, apply, forward, params, inputs):
    out = apply(tiny(dtype="bfloat16"), params, **inputs)
    exact = forward(params, **inputs)
    assert out.dtype == jnp.float32
    real = inputs["segment_ids"] > 0
    error = np.sqrt(np.square(out - exact)[real].mean() / np.square(exact)[real].mean())
    # Roundings of 2^-9 in some twenty places one after another, added at random: about 1%; and
    # above what float32 could leave.
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_float32_and_no_dtype_is_promoted_silently(tiny, inputs, dtype):
    model = tiny(dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        init = functools.partial(model.init_with_output, jax.random.key(0))
        out = nn.unbox(jax.eval_shape(init, struct(inputs)))
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}
