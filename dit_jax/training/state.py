"""The state of a run, and how it is made sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.parallel import check_rules, like_parameters, parameter_shardings
from dit_jax.types import Params


@struct.dataclass
class TrainState:
    """Everything that a step changes; all that a checkpoint must hold besides the data's state."""

    step: jax.Array
    """Batches seen; also what the randomness of the next step is made of."""
    skipped: jax.Array
    """Steps whose gradients were not finite, and which changed nothing else."""
    params: Params
    ema: Params
    opt_state: Any


InitParams = Callable[[jax.Array], Params]
"""``init(key) -> params`` whose leaves still carry their logical axes."""


def abstract_params(
    init: InitParams, mesh: Mesh, over_context: bool = True
) -> tuple[Params, Params]:
    """Shapes of the parameters and the sharding of each, without making any."""
    boxed = jax.eval_shape(init, jax.random.key(0))
    check_rules(boxed)
    return nn.unbox(boxed), parameter_shardings(mesh, boxed, over_context)


def abstract_state(
    init: InitParams, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Shapes of a run's state and the shardings of each of its arrays, without making any.

    Optimizer moments and averaged parameters are laid out like the parameters they belong to.
    """
    params, of_params = abstract_params(init, mesh)
    opt_state = jax.eval_shape(optimizer.init, params)
    whole: Any = NamedSharding(mesh, PartitionSpec())
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(scalar, scalar, params, params, opt_state)
    of_opt = like_parameters(mesh, opt_state, of_params)
    return shapes, TrainState(whole, whole, of_params, of_params, of_opt)


def make_init(
    init: InitParams, optimizer: optax.GradientTransformation, shardings: Any
) -> Callable[[jax.Array], TrainState]:
    """The jitted function ``key -> state`` of fresh, sharded states."""

    def make(key: jax.Array) -> TrainState:
        params = nn.unbox(init(key))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            zero, zero, params, jax.tree.map(jnp.copy, params), optimizer.init(params)
        )

    return jax.jit(make, out_shardings=shardings)


def init_state(
    init: InitParams, optimizer: optax.GradientTransformation, shardings: Any, key: jax.Array
) -> TrainState:
    """A fresh state. Each device makes its own part: none ever holds the whole model."""
    return make_init(init, optimizer, shardings)(key)
