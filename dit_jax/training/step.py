"""The train step: one compiled, sharded, donated function of (state, batch, frozen parameters)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dit_jax.training.optimizer import OptimizerConfig, ema_rate
from dit_jax.training.state import TrainState
from dit_jax.types import Params, Totals

LossFn = Callable[[Params, Params, Any, jax.Array, jax.Array], tuple[jax.Array, Totals]]
"""``loss(trainable, frozen, batch, key, step) -> (sum, totals)``: the batch's loss is the quotient of
the sum and the totals' weight, and of several parts of a batch the quotient of what these add up to."""

Metrics = dict[str, jax.Array]
StepFn = Callable[..., tuple[TrainState, Metrics]]
"""``step(state, batch, frozen) -> (state, metrics)``; without ``frozen`` there are none."""


def _parts(batch: Any, count: int) -> Any:
    """Splits every field's rows ``[b, ...]`` into ``[count, b / count, ...]``.

    A part takes every ``count``-th row, so that each device has rows of every part.
    """
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch
    )


def loss_and_gradients(
    loss_fn: LossFn,
    params: Params,
    frozen: Params,
    batch: Any,
    key: jax.Array,
    step: jax.Array,
    accumulate: int,
) -> tuple[Totals, Params]:
    """The mean loss of a batch and its terms, and the gradients; the rows in ``accumulate`` parts."""

    def part(params: Params, rows: Any) -> tuple[Totals, Params]:
        def loss(p: Params) -> tuple[jax.Array, Totals]:
            return loss_fn(p, frozen, rows, key, step)

        (_, totals), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return totals, gradients

    if accumulate == 1:
        totals, gradients = part(params, batch)
    else:
        parts = _parts(batch, accumulate)
        one = jax.eval_shape(lambda rows: part(params, rows), jax.tree.map(lambda x: x[0], parts))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)

        def add(carry: Any, rows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, part(params, rows)), None

        (totals, gradients), _ = jax.lax.scan(add, start, parts)
    weight = jnp.maximum(totals.weight, 1.0)
    mean = Totals(
        totals.loss / weight, weight, {name: x / weight for name, x in totals.parts.items()}
    )
    return mean, jax.tree.map(lambda g: g / weight, gradients)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    seed: int,
    shardings: Any,
) -> StepFn:
    """Compiles ``step(state, batch, frozen)``; the old state's memory is reused.

    A step whose loss or gradients are not finite changes only the counters. The randomness of
    step i is ``fold_in(key(seed), i)``.
    """

    def step(state: TrainState, batch: Any, frozen: Params = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mean, gradients = loss_and_gradients(
            loss_fn, state.params, frozen, batch, key, state.step, config.accumulate
        )
        loss = mean.loss
        norm = optax.tree.norm(gradients)
        # Of a NaN anywhere the norm is NaN: one flag on the device, and no wait for it on the host.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = ema_rate(config.ema_decay, state.step - state.skipped)
        ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, state.ema, params)

        new = (params, ema, opt_state)
        old = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        metrics = {"loss": loss, **mean.parts, "gradient_norm": norm, "skipped": skipped}
        return TrainState(state.step + 1, skipped, params, ema, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
