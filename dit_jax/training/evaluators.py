"""Evaluators: what a run measures and pictures while it trains, and when it is done.

An evaluator has a name, a period, and a function from the averaged parameters to scalars and a
picture. A config lists objects with a method ``build(parts) -> Evaluator`` (``evaluators``), of any
module; a task adds its own. The loop runs those that are due, and all of them at the end.

Held-out loss by noise level (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.2:
of all that is cheap it goes best with what people prefer)::

    L(t) = sum of the tokens' losses at level t / sum of their weights,    t = 1/16, 3/16, ... 15/16

over the same held-out samples with the same noise at every evaluation, no caption dropped and every
token generated. Unlike the training loss it has no noise of its own from step to step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.parallel import global_batch
from dit_jax.types import NonNegativeInt, Params, Totals

LEVELS = tuple((2 * i + 1) / 16 for i in range(8))


class Evaluation(NamedTuple):
    """What an evaluator found."""

    scalars: Mapping[str, float] = {}
    picture: Path | None = None
    """A PNG that it wrote, on the first process."""


class Evaluator(NamedTuple):
    """Something to measure."""

    name: str
    every: int
    """Steps from one evaluation to the next; 0 is at the end only."""
    evaluate: Callable[[Params, Params, int, Path], Evaluation]
    """``evaluate(ema, frozen, step, directory)``; every process calls it."""


class Parts(NamedTuple):
    """What a task hands to the evaluators of its config."""

    config: Any
    mesh: Mesh
    rows: tuple[int, ...]
    """Of the global batch, this process's."""
    loss: Callable[[Params, Params, Any, jax.Array, jax.Array], tuple[jax.Array, Totals]]
    """``loss(params, frozen, batch, key, level)`` at a fixed noise level."""
    levels: tuple[float, ...]
    """Noise levels that mean something for this loss: one, if it has none."""
    held_out: Callable[[], Any]
    """A (local, NumPy) batch of samples that training does not see, as far as the data has some."""
    sample: Callable[..., list[np.ndarray]] | None = None
    """``sample(params, requests)``: clips uint8 on every process, of tasks that generate some."""


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """The loss of a fixed batch of held-out samples, with averaged parameters, by noise level."""

    every: NonNegativeInt = 1000
    """Steps from one evaluation to the next; 0 is at the end only."""

    def build(self, parts: Parts) -> Evaluator:
        """See the top of the module."""
        levels = parts.levels
        batch: list[Any] = []  # Read once, when it is first due.

        @jax.jit
        def mean_loss(params: Params, frozen: Params, batch: Any, level: jax.Array) -> jax.Array:
            total, totals = parts.loss(params, frozen, batch, jax.random.key(0), level)
            return total / totals.weight

        def evaluate(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
            del step, directory
            if not batch:
                total = parts.config.rows
                batch.append(global_batch(parts.mesh, parts.held_out(), parts.rows, total))
            # One program for all levels; the host waits once.
            losses = [mean_loss(ema, frozen, batch[0], np.float32(level)) for level in levels]
            values = [float(loss) for loss in jax.device_get(losses)]
            named = {f"{level:.2f}": value for level, value in zip(levels, values, strict=True)}
            scalars = {**(named if len(levels) > 1 else {}), "mean": float(np.mean(values))}
            return Evaluation({f"held_out_loss/{name}": value for name, value in scalars.items()})

        return Evaluator("held_out_loss", self.every, evaluate)
