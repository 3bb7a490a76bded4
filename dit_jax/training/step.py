"""The state of a run, its optimizer, and the compiled step.

A filter over the paths of a task's parameters splits them into trainable and frozen ones (a teacher,
the VGG of a perceptual loss, the base under an adapter). The state, and so the optimizer, the EMA and
the checkpoints, holds the trainable ones alone; the frozen ones are sharded by the same rules and are
arguments of the compiled step. With gradients g of the mean loss::

    (1)  g = sum over parts of the batch of d(sum of losses) / sum of their weights
    (2)  params += update(clip(g))                         AdamW or Muon
    (3)  ema = r ema + (1 - r) params,                     r = min(decay, (1 + step) / (10 + step))

A step whose loss or gradients are not finite changes only the counters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import linen as nn
from flax import struct, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.files import refuse_if
from dit_jax.parallel import parameter_shardings, state_shardings
from dit_jax.training.moments import compressed, round_to_bfloat16
from dit_jax.types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Params,
    PositiveFloat,
    PositiveInt,
    Totals,
)

# init(key) -> params, whose leaves still carry their logical axes.
InitParams = Callable[[jax.Array], Params]
# Whether the parameter at a path ("params/dit/final/kernel") is trained.
Filter = Callable[[str], bool]
# load(shapes, shardings) -> params: the frozen parameters, from wherever they are kept.
LoadFrozen = Callable[[Params, Params], Params]
# loss(trainable, frozen, batch, key, step) -> (sum, totals). The loss of a batch is the sum over
# totals.weight; if the batch is split, sums and weights of the parts are added first.
LossFn = Callable[[Params, Params, Any, jax.Array, jax.Array], tuple[jax.Array, Totals]]
Metrics = dict[str, jax.Array]


# ---------------------------------------------------------------------------------------------------
# The optimizer
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2017), or Muon for the matrices of the blocks (Jordan 2024) and AdamW
    with Nesterov momentum for the rest, both at one learning rate (Liu et al. 2025)."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 1e-4  # Peak, reached after the warm-up.
    # After the warm-up: constant, or down to `final_fraction` of the peak along half a cosine.
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 100
    final_fraction: Fraction = 0.0
    b1: Fraction = 0.9
    b2: Fraction = 0.99
    weight_decay: NonNegativeFloat = 0.0  # Of matrices and embeddings, not of biases and scales.
    clip_norm: PositiveFloat | None = 1.0  # Gradients are scaled down to this global norm.
    ema_decay: Fraction = 0.999  # Of the weights that sampling uses; lower at the start of a run.
    accumulate: PositiveInt = 1  # Parts that the rows of a batch are split in, one after another.
    # What takes memory (docs/memory.md says how much, and what it costs). Moments: int8 are of
    # ``training.moments``; factored are Adafactor's second (Shazeer & Stern 2018) and a first of
    # normalised gradients in bfloat16 (Zhai et al. 2022).
    moments: Literal["float32", "bfloat16", "int8", "factored"] = "float32"
    ema: Literal["float32", "bfloat16", "none"] = "float32"  # None: sampling takes the parameters.
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # Of the trainable matrices.
    offload: bool = False  # Moments wait in the host's memory.

    def __post_init__(self) -> None:
        factored = self.kind == "muon" and self.moments == "factored"
        text = (
            "optimizer.moments is 'factored': it is of optimizer.kind adamw, and of muon int8 is."
        )
        refuse_if([(factored, text)])


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each of ``steps`` steps: a linear warm-up, then the schedule."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, max(steps - 1, 0))
    after = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final_fraction)
    if warmup == 0:
        return after
    # The first step already moves: its rate is one part of the warm-up, not zero.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def decayed(params: Params) -> Params:
    """Which parameters decay: matrices and embeddings."""
    # By name and not by rank, since a scan over the layers stacks their vectors too.
    names = ("kernel", "embedding")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


MUON_LAYERS = {"self_attention", "cross_attention", "mlp"}
MUON_RMS = 0.2  # Size of updates, matched to AdamW's (Liu et al. 2025, section 2.2).


def muon_axes(params: Params) -> Params:
    """The input and output axes of the parameters that Muon orthogonalises; None for the others."""

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        if names[-1] == "kernel" and leaf.ndim == 5:  # A convolution's: [t, h, w, in, out].
            return optax.contrib.MuonDimensionNumbers((0, 1, 2, 3), 4)
        if names[-1] != "kernel" or MUON_LAYERS.isdisjoint(names):
            return None
        # The last two axes, whether or not a scan has stacked the layers.
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def second_decay(step: Any, b2: Any) -> Any:
    """The decay that makes a moment which begins with zeros Adam's unbiased one."""
    return b2 * (1 - b2**step) / (1 - b2 ** (step + 1.0))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update (2) for a run of ``steps`` steps."""
    rate, decay = learning_rate(config, steps), config.weight_decay
    if config.kind == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=decay,
            weight_decay_mask=decayed,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=decay,
            muon_weight_dimension_numbers=muon_axes,
            consistent_rms=MUON_RMS,
        )
    elif config.moments == "factored":
        update = optax.chain(
            optax.scale_by_factored_rms(decay_rate=config.b2, decay_rate_fn=second_decay),
            optax.ema(config.b1, accumulator_dtype=jnp.bfloat16),
            optax.add_decayed_weights(decay, decayed),
            optax.scale_by_learning_rate(rate),
        )
    else:
        update = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=decay, mask=decayed)
    if config.moments in ("bfloat16", "int8"):
        update = compressed(update, config.moments)
    limit = config.clip_norm
    clip = optax.identity() if limit is None else optax.clip_by_global_norm(limit)
    return optax.chain(clip, update)


# ---------------------------------------------------------------------------------------------------
# The state: no device ever holds the whole model
# ---------------------------------------------------------------------------------------------------


@struct.dataclass
class TrainState:
    """Everything that a step changes; all that a checkpoint must hold besides the data's state."""

    step: jax.Array  # Batches seen; also what the randomness of the next step is made of.
    skipped: jax.Array  # Steps whose gradients were not finite, and which changed nothing else.
    params: Params  # The trainable ones.
    ema: Params  # {} without averages.
    opt_state: Any


def everything(path: str) -> bool:
    """The filter of a task that trains all of its parameters."""
    return True


def split(params: Params, trainable: Filter) -> tuple[Params, Params]:
    """The trainable and the frozen leaves of a tree, each as a tree of its own."""
    if trainable is everything:
        return params, {}
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        parts[not trainable("/".join(path))][path] = leaf
    trained, frozen = map(traverse_util.unflatten_dict, parts)
    return trained, frozen


def abstract_params(
    init: InitParams, mesh: Mesh, over_context: bool = True
) -> tuple[Params, Params]:
    """Shapes of the parameters and the sharding of each, without allocating any."""
    boxed = jax.eval_shape(lambda: init(jax.random.key(0)))
    return nn.unbox(boxed), parameter_shardings(mesh, boxed, over_context)


def abstract_state(
    init: InitParams,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trainable: Filter = everything,
    config: OptimizerConfig = OptimizerConfig(),
) -> tuple[TrainState, TrainState]:
    """Shapes of a run's state and the shardings of each of its arrays, without allocating any."""
    params, of_params = (split(one, trainable)[0] for one in abstract_params(init, mesh))
    shapes = jax.eval_shape(partial(begin_state, optimizer, config), params)
    whole: Any = NamedSharding(mesh, PartitionSpec())
    # Moments and averages lie like the parameters they belong to.
    of_ema = of_params if shapes.ema else {}
    of_opt = state_shardings(mesh, shapes.opt_state, of_params)
    if config.offload:
        # But for counters, of which XLA wants none there.
        of_opt = jax.tree.map(
            lambda x, s: s.with_memory_kind("pinned_host") if x.ndim else s,
            shapes.opt_state,
            of_opt,
        )
    return shapes, TrainState(whole, whole, of_params, of_ema, of_opt)


def begin_ema(params: Params, config: OptimizerConfig) -> Params:
    """The averages that a run begins with, in memory of their own."""
    if config.ema == "none":
        return {}
    return jax.tree.map(lambda x: jnp.copy(x).astype(config.ema), params)


def begin_state(
    optimizer: optax.GradientTransformation, config: OptimizerConfig, params: Params
) -> TrainState:
    """The state that a run begins with."""
    zero, ema = jnp.zeros((), jnp.int32), begin_ema(params, config)
    opt_state = optimizer.init(optax.tree.cast(params, jnp.float32))
    params = jax.tree.map(lambda x: x.astype(config.param_dtype) if x.ndim > 1 else x, params)
    return TrainState(zero, zero, params, ema, opt_state)


def init_state(
    init: InitParams,
    optimizer: optax.GradientTransformation,
    shardings: Any,
    key: jax.Array,
    trainable: Filter = everything,
    config: OptimizerConfig = OptimizerConfig(),
) -> TrainState:
    """A fresh state; each device initialises its own part."""

    def fresh(key: jax.Array) -> TrainState:
        return begin_state(optimizer, config, split(nn.unbox(init(key)), trainable)[0])

    return jax.jit(fresh, out_shardings=shardings)(key)


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


# ---------------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------------


def loss_and_gradients(
    loss_fn: LossFn,
    params: Params,
    frozen: Params,
    batch: Any,
    key: jax.Array,
    step: jax.Array,
    accumulate: int,
) -> tuple[Totals, Params]:
    """The mean loss of a batch and its terms, and the gradients (1)."""

    def part(rows: Any) -> tuple[Totals, Params]:
        (_, totals), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            params, frozen, rows, key, step
        )
        return totals, optax.tree.cast(gradients, jnp.float32)

    def add(carry: Any, rows: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, part(rows)), None

    if accumulate == 1:
        totals, gradients = part(batch)
    else:
        # Each part takes every n-th row, so that each device has rows of every part.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )  # [accumulate, b / accumulate, ...]
        shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (totals, gradients), _ = jax.lax.scan(add, zeros, parts)
    weight = jnp.maximum(totals.weight, 1.0)  # A batch of padding weighs nothing.
    terms = {name: x / weight for name, x in totals.parts.items()}
    mean = Totals(totals.loss / weight, weight, terms)
    return mean, jax.tree.map(lambda g: g / weight, gradients)


def round_like(tree: Params, like: Params, key: jax.Array) -> Params:
    """A float32 tree in the dtypes of another: to bfloat16 at random, so that small changes count."""

    def one(x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        return x if x.dtype == y.dtype else round_to_bfloat16(x, key)

    return jax.tree.map(one, tree, like, optax.tree.split_key_like(key, tree))


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    seed: int,
    shardings: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compiles ``step(state, batch, frozen) -> (state, metrics)``; the old state's memory is reused."""

    def step(state: TrainState, batch: Any, frozen: Params = None) -> tuple[TrainState, Metrics]:
        # All of a step's randomness: a resumed run draws what the run would have drawn.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mean, gradients = loss_and_gradients(
            loss_fn, state.params, frozen, batch, key, state.step, config.accumulate
        )
        loss, norm = mean.loss, optax.tree.norm(gradients)
        # Of a NaN anywhere the norm is NaN: one flag on the device, and no wait for it on the host.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        before = state.opt_state
        if config.offload:
            # Fetched when the gradients are there: else XLA fetches beside the activations.
            gradients, before = jax.lax.optimization_barrier((gradients, before))
            before = jax.device_put(before, jax.memory.Space.Device)
        full = optax.tree.cast(state.params, jnp.float32)
        updates, opt_state = optimizer.update(gradients, before, full)
        full = optax.apply_updates(full, updates)
        params = round_like(full, state.params, key)
        taken = state.step - state.skipped
        # (3): the average of a short run forgets the initialisation.
        rate = jnp.minimum(config.ema_decay, (1.0 + taken) / (10.0 + taken))
        ema = state.ema
        if ema:
            average = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, full)
            ema = round_like(average, ema, key)

        new, old = (params, ema, opt_state), (state.params, state.ema, before)
        params, ema, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        metrics = {"loss": loss, **mean.parts, "gradient_norm": norm, "skipped": skipped}
        return TrainState(state.step + 1, skipped, params, ema, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
