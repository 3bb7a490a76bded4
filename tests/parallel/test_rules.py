"""The rules: what lies where, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.parallel import (
    MeshConfig,
    batch_sharding,
    like_parameters,
    make_constrain,
    make_mesh,
    parameter_shardings,
)
from dit_jax.parallel.rules import ACTIVATION_RULES, PARAMETER_RULES, ROWS


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 2, 2, 2))


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def spec(mesh, shape, *names):
    return parameter_shardings(mesh, {"w": boxed(shape, *names)})["w"].spec


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((8, 16), ("embed", "mlp"), P("fsdp", "tensor")),
        ((16, 8), ("mlp", "embed"), P("tensor", "fsdp")),
        ((4, 8, 24), ("layers", "embed", "heads"), P(None, "fsdp", "tensor")),
        ((4, 24), ("layers", "heads"), P(None, "tensor")),
        ((258, 8), ("vocab", "embed"), P(None, "fsdp")),
        ((8, 6), ("embed", "patch"), P("fsdp", None)),
        ((6,), (None,), P(None)),
        # What an axis does not divide stays whole, dimension by dimension.
        ((7, 16), ("embed", "mlp"), P(None, "tensor")),
        ((8, 15), ("embed", "mlp"), P("fsdp", None)),
        ((1, 1), ("embed", "mlp"), P(None, None)),
    ],
)
def test_parameters_lie_by_their_logical_axes(mesh, shape, names, expected):
    assert spec(mesh, shape, *names) == expected


def test_mesh_of_one_device_takes_everything():
    alone = make_mesh(MeshConfig(), jax.devices()[:1])
    sharding = parameter_shardings(alone, boxed((7, 3), "embed", "mlp"))
    assert sharding.is_fully_replicated and sharding.shard_shape((7, 3)) == (7, 3)


def test_parameters_without_axes_are_whole(mesh):
    found = parameter_shardings(mesh, {"a": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
    assert found["a"] == NamedSharding(mesh, P())


@pytest.mark.parametrize("names", [("heads", "mlp"), ("embed", "embed"), ("modulation", "heads")])
def test_two_dimensions_on_one_axis_are_refused(mesh, names):
    with pytest.raises(ValueError, match=r"use mesh axis '(tensor|fsdp)' twice"):
        spec(mesh, (8, 8), *names)


def test_unknown_axis_is_refused(mesh):
    with pytest.raises(
        ValueError, match=r"'embedd' is in no rule; known are .*'embed'.* Add it to"
    ):
        spec(mesh, (8, 8), "embedd", "mlp")
    with pytest.raises(ValueError, match=r"'token' is in no rule; known are .*'tokens'"):
        make_constrain(mesh)(jnp.ones((2, 2)), "batch", "token")


def test_axes_for_another_number_of_dimensions_are_refused(mesh):
    with pytest.raises(
        ValueError, match=r"\('embed',\) do not name the dimensions of shape \(8, 8\)"
    ):
        spec(mesh, (8, 8), "embed")
    with pytest.raises(ValueError, match="do not name the dimensions"):
        make_constrain(mesh)(jnp.ones((2, 2)), "batch")


def test_rules_name_axes_of_the_mesh_only(mesh):
    for rules in (PARAMETER_RULES, ACTIVATION_RULES):
        for target in rules.values():
            names = (target,) if isinstance(target, str) else (target or ())
            assert set(names) <= set(mesh.axis_names)


def test_constrain_lays_activations_out(mesh):
    constrain = make_constrain(mesh)
    x = np.arange(4 * 6 * 4 * 3, dtype=np.float32).reshape(4, 6, 4, 3)
    y = jax.jit(lambda x: constrain(x, "batch", "tokens", "heads", None))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(ROWS, "context", "tensor")), 4)
    np.testing.assert_array_equal(y, x)
    # Five tokens do not divide over two devices: they stay whole, the rest is laid out.
    z = jax.jit(lambda x: constrain(x, "batch", "tokens", "width"))(x[:, :5, 0])
    assert z.sharding.shard_shape(z.shape) == (2, 5, 3)


def test_moments_lie_like_their_parameters(mesh):
    shapes = {
        "a": {"kernel": boxed((8, 16), "embed", "mlp"), "bias": boxed((16,), "mlp")},
        "b": {"kernel": boxed((8, 4), "embed", "patch")},
    }
    shardings = parameter_shardings(mesh, shapes)
    params = nn.unbox(shapes)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimizer.init, params)
    found = like_parameters(mesh, state, shardings)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    adam = found[1][0]
    assert adam.mu == shardings and adam.nu == shardings
    assert adam.count == NamedSharding(mesh, P())
    assert adam.mu["a"]["kernel"].spec == P("fsdp", "tensor")
    assert adam.mu["b"]["kernel"].spec == P("fsdp", None)


def test_what_is_smaller_than_its_parameter_is_whole(mesh):
    """Factored moments (as Adafactor's) have the path of a parameter, and not its dimensions."""
    shardings = {"kernel": NamedSharding(mesh, P("fsdp", "tensor"))}
    vector = jax.ShapeDtypeStruct((16,), jnp.float32)
    found = like_parameters(mesh, {"v_row": {"kernel": vector}}, shardings)
    assert found["v_row"]["kernel"] == NamedSharding(mesh, P())


@pytest.mark.parametrize(
    ("ndim", "tokens", "expected"),
    [
        (1, True, P(ROWS)),
        (2, True, P(ROWS, "context")),
        (3, True, P(ROWS, "context")),
        (3, False, P(ROWS)),
    ],
)
def test_batches_lie_over_rows_and_tokens(mesh, ndim, tokens, expected):
    assert batch_sharding(mesh, ndim, tokens) == NamedSharding(mesh, expected)
