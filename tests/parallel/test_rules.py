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
    make_constrain,
    make_mesh,
    parameter_shardings,
    state_shardings,
)
from dit_jax.parallel.mesh import ACTIVATION_RULES, LARGE, PARAMETER_RULES, ROWS

EMBED = ("fsdp", "context")


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
        ((8, 16), ("embed", "mlp"), P(EMBED, "tensor")),
        ((16, 8), ("mlp", "embed"), P("tensor", EMBED)),
        ((4, 8, 24), ("layers", "embed", "heads"), P(None, EMBED, "tensor")),
        ((4, 24), ("layers", "heads"), P(None, "tensor")),
        ((258, 8), ("vocab", "embed"), P(None, EMBED)),
        ((8, 6), ("embed", "patch"), P(EMBED, None)),
        ((6,), (None,), P(None)),
        # What an axis does not divide stays whole, dimension by dimension.
        ((7, 16), ("embed", "mlp"), P(None, "tensor")),
        ((8, 15), ("embed", "mlp"), P(EMBED, None)),
        ((1, 1), ("embed", "mlp"), P(None, None)),
    ],
)
def test_parameters_lie_by_their_logical_axes(mesh, shape, names, expected):
    assert spec(mesh, shape, *names) == expected


def test_parameters_of_sampling_are_whole_along_context(mesh):
    shapes = {"a": boxed((8, 16), "embed", "mlp"), "b": boxed((4, 8), "layers", "embed")}
    found = parameter_shardings(mesh, shapes, over_context=False)
    assert found["a"].spec == P("fsdp", "tensor") and found["b"].spec == P(None, "fsdp")


def test_what_context_does_not_divide_lies_over_fsdp_alone(mesh):
    assert spec(mesh, (6, 16), "embed", "mlp") == P("fsdp", "tensor")


def test_mesh_of_one_device_takes_everything():
    alone = make_mesh(MeshConfig(), jax.devices()[:1])
    sharding = parameter_shardings(alone, boxed((7, 3), "embed", "mlp"))
    assert sharding.is_fully_replicated and sharding.shard_shape((7, 3)) == (7, 3)


def test_parameters_without_axes_are_whole(mesh):
    found = parameter_shardings(mesh, {"a": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
    assert found["a"] == NamedSharding(mesh, P())


@pytest.mark.parametrize("names", [("heads", "mlp"), ("embed", "embed"), ("modulation", "heads")])
def test_two_dimensions_on_one_axis_are_refused(mesh, names):
    with pytest.raises(AssertionError, match=r"use a mesh axis of .*(tensor|fsdp).* twice"):
        spec(mesh, (8, 8), *names)


def test_unknown_axis_is_refused(mesh):
    with pytest.raises(AssertionError, match=r"'embedd' is in no rule"):
        spec(mesh, (8, 8), "embedd", "mlp")
    with pytest.raises(AssertionError, match=r"'token' is in no rule"):
        make_constrain(mesh)(jnp.ones((2, 2)), "batch", "token")


def test_axes_for_another_number_of_dimensions_are_refused(mesh):
    with pytest.raises(AssertionError, match=r"'embed',\) do not name the dimensions of \(8, 8\)"):
        spec(mesh, (8, 8), "embed")
    with pytest.raises(AssertionError, match="do not name the dimensions"):
        make_constrain(mesh)(jnp.ones((2, 2)), "batch")


def test_rules_name_axes_of_the_mesh_only(mesh):
    for table in (PARAMETER_RULES, ACTIVATION_RULES):
        for target in table.values():
            names = (target,) if isinstance(target, str) else (target or ())
            assert set(names) <= set(mesh.axis_names)


# The kernel of the issue: 30 layers of 4096 x 1536.
BIG = 30 * 4096 * 1536


@pytest.mark.parametrize(
    ("sizes", "shape", "names", "message"),
    [
        (
            (1, 7, 1, 1),
            (30, 4096, 1536),
            ("layers", "embed", "embed_out"),
            "dimension 'embed' of 4096 does not divide over mesh.fsdp 7, so that each device would "
            f"hold {BIG:,} elements. Make the dimension a multiple of 7, or the mesh axis a divisor of "
            "4096, such as 1.",
        ),
        # Split over fsdp, and what is left is large still.
        (
            (1, 1, 1, 6),
            (30, 4096, 1536 + 2),
            ("layers", "embed", "mlp"),
            "dimension 'mlp' of 1538 does not divide over mesh.tensor 6",
        ),
        (
            (1, 2, 1, 3),
            (2**13, 2**10),
            ("embed", "mlp"),
            "each device would hold 4,194,304 elements",
        ),
        ((1, 1, 1, 6), (2**10, 2**12), ("embed", "mlp"), "a divisor of 4096, such as 2."),
        # Over fsdp it would divide, and over both it does not.
        (
            (1, 2, 4, 1),
            (1022, 2**13),
            ("embed", "mlp"),
            "does not divide over mesh.fsdp x mesh.context 8, so that each device would hold 4,186,112",
        ),
    ],
)
def test_large_parameter_that_stays_whole_is_refused(sizes, shape, names, message):
    few = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    with pytest.raises(ValueError) as error:
        parameter_shardings(few, {"mlp": {"kernel": boxed(shape, *names)}})
    text = str(error.value)
    assert text.startswith(f"parameter ['mlp']['kernel'] {list(shape)}: its dimension")
    assert message in text


@pytest.mark.parametrize(
    ("sizes", "shape", "names", "expected"),
    [
        # Small ones, and what is small once another axis has split it.
        ((1, 7, 1, 1), (1024, 1024), ("embed", "mlp"), P(None, "tensor")),
        ((1, 2, 1, 3), (2**11, 2**10), ("embed", "mlp"), P(EMBED, None)),
        # Whole by its rule, and not for a size: the table means it so.
        ((1, 2, 1, 3), (2**12, 2**10), ("vocab", "patch"), P(None, None)),
        # An axis of one device divides everything.
        ((7, 1, 1, 1), (30, 4096, 1536), ("layers", "embed", "mlp"), P(None, EMBED, "tensor")),
    ],
)
def test_what_is_small_or_meant_whole_is_not_refused(sizes, shape, names, expected):
    few = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    assert spec(few, shape, *names) == expected


def test_large_parameter_without_axes_is_refused(mesh):
    wide = {"w": jax.ShapeDtypeStruct((LARGE + 1,), jnp.float32)}
    with pytest.raises(AssertionError, match=r"\['w'\] carries no logical axes"):
        parameter_shardings(mesh, wide)
    # Nothing would be split anyway.
    assert parameter_shardings(make_mesh(MeshConfig()), wide)["w"].is_fully_replicated


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
    found = state_shardings(mesh, state, shardings)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    adam = found[1][0]
    assert adam.mu == shardings and adam.nu == shardings
    assert adam.count == NamedSharding(mesh, P())
    assert adam.mu["a"]["kernel"].spec == P(EMBED, "tensor")
    assert adam.mu["b"]["kernel"].spec == P(EMBED, None)


def test_what_is_smaller_than_its_parameter_is_whole(mesh):
    """Factored moments (as Adafactor's) have the path of a parameter, and not its dimensions."""
    shardings = {"kernel": NamedSharding(mesh, P(EMBED, "tensor"))}
    vector = jax.ShapeDtypeStruct((16,), jnp.float32)
    found = state_shardings(mesh, {"v_row": {"kernel": vector}}, shardings)
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
