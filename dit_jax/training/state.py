"""The state of a run, and how it is initialised sharded.

A task's parameters are one tree. A filter over paths splits it into what is trained and what is frozen
(a teacher, the VGG of a perceptual loss, the base under an adapter). The state, and so the optimizer,
the averaged parameters and the checkpoints, holds the trainable ones alone; the frozen ones are sharded
by the same rules and go into the compiled step as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.parallel import parameter_shardings, state_shardings
from dit_jax.types import Params


@struct.dataclass
class TrainState:
    """Everything that a step changes; all that a checkpoint must hold besides the data's state."""

    step: jax.Array
    """Batches seen; also what the randomness of the next step is made of."""
    skipped: jax.Array
    """Steps whose gradients were not finite, and which changed nothing else."""
    params: Params
    """The trainable ones."""
    ema: Params
    opt_state: Any


InitParams = Callable[[jax.Array], Params]
"""``init(key) -> params`` whose leaves still carry their logical axes."""
Filter = Callable[[str], bool]
"""Whether the parameter at a path ("params/dit/final/kernel") is trained."""


def everything(path: str) -> bool:
    """The filter of a task that trains all of its parameters."""
    del path
    return True


def split(params: Params, trainable: Filter) -> tuple[Params, Params]:
    """The trainable and the frozen leaves of a tree, each as a tree of its own."""
    if trainable is everything:
        return params, {}
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        parts[not trainable("/".join(path))][path] = leaf
    trained, frozen = (traverse_util.unflatten_dict(part) for part in parts)
    return trained, frozen


def abstract_params(
    init: InitParams, mesh: Mesh, over_context: bool = True
) -> tuple[Params, Params]:
    """Shapes of the parameters and the sharding of each, without allocating any."""
    boxed = jax.eval_shape(init, jax.random.key(0))
    return nn.unbox(boxed), parameter_shardings(mesh, boxed, over_context)


def abstract_state(
    init: InitParams,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trainable: Filter = everything,
) -> tuple[TrainState, TrainState]:
    """Shapes of a run's state and the shardings of each of its arrays, without allocating any.

    Optimizer moments and averaged parameters are laid out like the parameters they belong to.
    """
    params, of_params = (split(one, trainable)[0] for one in abstract_params(init, mesh))
    opt_state = jax.eval_shape(optimizer.init, params)
    whole: Any = NamedSharding(mesh, PartitionSpec())
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(scalar, scalar, params, params, opt_state)
    of_opt = state_shardings(mesh, opt_state, of_params)
    return shapes, TrainState(whole, whole, of_params, of_params, of_opt)


def make_init(
    init: InitParams,
    optimizer: optax.GradientTransformation,
    shardings: Any,
    trainable: Filter = everything,
) -> Callable[[jax.Array], TrainState]:
    """The jitted function ``key -> state`` of fresh, sharded states."""

    def fresh(key: jax.Array) -> TrainState:
        params, _ = split(nn.unbox(init(key)), trainable)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            zero, zero, params, jax.tree.map(jnp.copy, params), optimizer.init(params)
        )

    return jax.jit(fresh, out_shardings=shardings)


def init_state(
    init: InitParams,
    optimizer: optax.GradientTransformation,
    shardings: Any,
    key: jax.Array,
    trainable: Filter = everything,
) -> TrainState:
    """A fresh state. Each device initialises its own part: none ever holds the whole model."""
    return make_init(init, optimizer, shardings, trainable)(key)


LoadFrozen = Callable[[Params, Params], Params]
"""``load(shapes, shardings) -> params``: the frozen parameters, from wherever they are kept."""


def init_frozen(
    init: InitParams,
    mesh: Mesh,
    key: jax.Array,
    trainable: Filter = everything,
    load: LoadFrozen | None = None,
) -> Params:
    """The frozen parameters, sharded: loaded, or those that ``init`` draws; {} if all are trained."""
    shapes, shardings = (split(one, trainable)[1] for one in abstract_params(init, mesh))
    if not shapes:
        return {}
    if load is not None:
        return load(shapes, shardings)
    return jax.jit(lambda k: split(nn.unbox(init(k)), trainable)[1], out_shardings=shardings)(key)


def place(params: Params, shardings: Params) -> Params:
    """Arrays of the host, the same on every process, laid out over a mesh."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]),
        params,
        shardings,
    )
