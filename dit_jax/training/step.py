"""The train step: one compiled, sharded, donated function of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dit_jax.training.optimizer import OptimizerConfig, ema_rate
from dit_jax.training.state import TrainState
from dit_jax.types import Params

LossFn = Callable[[Params, Any, jax.Array], tuple[jax.Array, jax.Array]]
"""``loss(params, batch, key) -> (sum, weight)``: the batch's loss is the quotient of the two, and
of several parts of a batch the quotient of their totals."""

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def _parts(batch: Any, count: int) -> Any:
    """Splits every field's rows ``[b, ...]`` into ``[count, b / count, ...]``.

    A part takes every so-many-th row, so that each device has rows of every part.
    """
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch
    )


def loss_and_gradients(
    loss_fn: LossFn, params: Params, batch: Any, key: jax.Array, accumulate: int
) -> tuple[jax.Array, Params]:
    """The loss of a batch and its gradients, the rows in ``accumulate`` parts one by one."""

    def part(params: Params, rows: Any) -> tuple[tuple[jax.Array, jax.Array], Params]:
        return jax.value_and_grad(lambda p: loss_fn(p, rows, key), has_aux=True)(params)

    if accumulate == 1:
        (total, weight), gradients = part(params, batch)
    else:
        zeros = jax.tree.map(jnp.zeros_like, params)

        def add(carry: Any, rows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, part(params, rows)), None

        start = ((jnp.zeros(()), jnp.zeros(())), zeros)
        ((total, weight), gradients), _ = jax.lax.scan(add, start, _parts(batch, accumulate))
    weight = jnp.maximum(weight, 1.0)
    return total / weight, jax.tree.map(lambda g: g / weight, gradients)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    seed: int,
    shardings: Any,
) -> StepFn:
    """Compiles ``step(state, batch) -> (state, metrics)``; the old state's memory is reused.

    A step whose loss or gradients are not finite changes only the counters. The randomness of
    step i is ``fold_in(key(seed), i)``.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, gradients = loss_and_gradients(loss_fn, state.params, batch, key, config.accumulate)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = ema_rate(config.ema_decay, state.step - state.skipped)
        ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, state.ema, params)

        new = (params, ema, opt_state)
        old = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        metrics = {"loss": loss, "gradient_norm": norm, "skipped": skipped}
        return TrainState(state.step + 1, skipped, params, ema, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
