"""Feature caching across steps: which steps of a solver run the transformer's blocks.

TeaCache (Liu et al. 2024, arXiv 2411.19108, section 3.3) adds up how much the modulated input of the
first block changes from step to step, and runs the blocks again where the sum reaches a threshold.
Here the sum is of the part of that change which the noise level alone decides, its shift and scale:
the input's own change differs little from clip to clip (by 2 to 6 % at a step of the quickstart's
model). So steps are planned before the first: the same for every clip of a batch, whatever its
neighbours, on every mesh. No polynomial is fitted to a model, as TeaCache does: the threshold counts
the plain relative change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_jax.model import DiTConfig, TextToVideo, denoise_and_keep, first_modulation
from dit_jax.types import DenoiserInputs, Params


def relative_changes(
    config: DiTConfig, params: Params, levels: Float[Array, "k"]
) -> Float[Array, "m"]:
    """How much the first block's modulation changes from each level to the next, ``m = k - 1``: the
    mean absolute change over the mean absolute value before."""
    made = first_modulation(config, params["params"]["dit"], levels)
    change = jnp.abs(made[1:] - made[:-1]).mean(-1)
    return change / jnp.abs(made[:-1]).mean(-1)


def plan_steps(
    changes: Sequence[float] | Float[np.ndarray, "m"], guided: Sequence[bool], threshold: float
) -> list[bool]:
    """Whether each step runs the blocks; the others reuse what the last of those added.

    The first step and the last run them, and so does each whose guidance is on or off unlike the one's
    before, which has no such rows. ``changes[i]`` is that from step i to step i + 1.
    """
    runs: list[bool] = []
    total = 0.0
    for i, here in enumerate(guided):
        total += float(changes[i - 1]) if i else 0.0
        must = i in (0, len(guided) - 1) or here != guided[i - 1]
        runs.append(must or total >= threshold)
        total = 0.0 if runs[-1] else total
    return runs


class CachedSteps:
    """The compiled steps of a solver that keep what the blocks added, and those that reuse it.

    ``solve(evaluate, carry, *given)`` is a step with ``evaluate`` for the transformer, which it calls
    once.
    """

    def __init__(self, model: TextToVideo, solve: Callable[..., Any], threshold: float) -> None:
        self._model, self._solve, self._threshold = model, solve, threshold
        self._keep = jax.jit(self._make_kept, donate_argnums=1)
        self._reuse = jax.jit(self._make_reused, donate_argnums=2)
        self._changes = jax.jit(self._make_changes)

    def plan(
        self, params: Params, levels: Float[np.ndarray, "k"], guided: Sequence[bool]
    ) -> list[bool]:
        """Whether each step runs the blocks (see ``plan_steps``)."""
        return plan_steps(np.asarray(self._changes(params, levels)), guided, self._threshold)

    def following(self, plan: Sequence[bool]) -> Callable[..., Any]:
        """``step(params, carry, *given)``, to be called once for each step of a plan, in order."""
        runs = iter(plan)
        residual: Any = None

        def step(params: Params, carry: Any, *given: Any) -> Any:
            nonlocal residual
            if not next(runs):
                return self._reuse(params, residual, carry, *given)
            carry, residual = self._keep(params, carry, *given)
            return carry

        return step

    def _make_kept(
        self, params: Params, carry: Any, *given: Any
    ) -> tuple[Any, Float[Array, "c l d"]]:
        kept: list[jax.Array] = []

        def evaluate(inputs: DenoiserInputs) -> jax.Array:
            output, residual = denoise_and_keep(self._model, params, inputs)
            kept.append(residual)
            return output

        carry = self._solve(evaluate, carry, *given)
        (residual,) = kept
        return carry, residual

    def _make_reused(
        self, params: Params, residual: Float[Array, "c l d"], carry: Any, *given: Any
    ) -> Any:
        denoise = partial(self._model.apply, params, method="denoise", residual=residual)
        return self._solve(denoise, carry, *given)

    def _make_changes(self, params: Params, levels: Float[Array, "k"]) -> Float[Array, "m"]:
        changes = relative_changes(self._model.config.dit, params, levels)
        return self._model.constrain(changes, None)
