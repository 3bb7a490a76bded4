"""A task is what the loop trains, and an evaluator what it measures: a name, a period, and a function
from the averaged parameters to scalars and a picture.

A config lists evaluators as objects with a method ``build(parts) -> Evaluator``, of any module; a task
adds its own. The loop runs those that are due, and all of them at the end. Two are here.

Held-out loss by noise level (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.2:
of all that is cheap it goes best with what people prefer)::

    L(t) = sum of the tokens' losses at level t / sum of their weights,    t = 1/16, 3/16, ... 15/16

over the same held-out samples with the same noise at every evaluation, no caption dropped and every
token generated. Unlike the training loss it has no noise of its own from step to step.

Generated clips (``ClipsEvaluator``): subclasses say how clips for held-out prompts are measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.data import RowStreams
from dit_jax.parallel import global_batch
from dit_jax.sampling import Request, contact_sheet, grid, write_png
from dit_jax.training.step import Filter, InitParams, LoadFrozen, LossFn, everything
from dit_jax.types import NonNegativeInt, Params, Totals

LEVELS = tuple((2 * i + 1) / 16 for i in range(8))
FRAMES_SHOWN, CLIPS_SHOWN, IMAGES_SHOWN, SHEET_SCALE = 5, 24, 100, 3


class Work(NamedTuple):
    """What a batch is worth, for throughput: counted on the host."""

    tokens: float
    """Tokens that are not padding."""
    capacity: float
    """Tokens that there is room for."""
    flops: float
    """Model flops of a train step on it: three times the forward pass, recomputation left out."""


class Evaluation(NamedTuple):
    """What an evaluator measured."""

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


class Task(NamedTuple):
    """What is trained: what to initialise, the loss of a batch, its data, what to measure."""

    name: str
    init: InitParams
    loss: LossFn
    loader: Callable[[tuple[int, ...]], RowStreams[Any]]
    """``loader(rows)``: batches of this process's rows of the global batch."""
    rows: int
    """Rows of the global batch."""
    work: Callable[[Any], Work]
    evaluators: tuple[Evaluator, ...] = ()
    trainable: Filter = everything
    """Which parameters of ``init`` are trained; the others are the loss's ``frozen``."""
    load_frozen: LoadFrozen | None = None
    """Where the frozen ones come from; None: they are what ``init`` draws."""


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
    eval_set: Callable[[int], tuple[list[Request], list[np.ndarray]]] | None = None
    """``eval_set(count)``: requests for held-out prompts or classes, at most so many, and the true
    clips uint8, as far as the data are pixels; of tasks that generate some."""
    sample: Callable[[Params, Sequence[Request], bool], list[np.ndarray]] | None = None
    """``sample(params, requests, progress)``: clips uint8 on every process."""


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """The loss of a fixed batch of held-out samples, with averaged parameters, by noise level."""

    every: NonNegativeInt = 1000
    """Steps from one evaluation to the next; 0 is at the end only."""

    def build(self, parts: Parts) -> Evaluator:
        levels = parts.levels
        batch: list[Any] = []  # Read once, when it is first due.

        @jax.jit
        def mean_loss(params: Params, frozen: Params, batch: Any, level: jax.Array) -> jax.Array:
            total, totals = parts.loss(params, frozen, batch, jax.random.key(0), level)
            return total / totals.weight

        def evaluate(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
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


@dataclasses.dataclass(frozen=True)
class ClipsEvaluator:
    """Generates clips for held-out prompts, pictures them and measures them (in subclasses)."""

    prompts: NonNegativeInt = 96
    """How many; 0 measures nothing."""
    every: NonNegativeInt = 0
    """Steps from one evaluation to the next; 0 is at the end only."""

    def measure(
        self, config: Any, requests: Sequence[Request], true: Sequence[np.ndarray]
    ) -> Callable[[Sequence[np.ndarray]], Mapping[str, float]]:
        """The function from the generated clips to scalars; ``true`` may be empty."""
        raise NotImplementedError

    def build(self, parts: Parts) -> Evaluator:
        if not self.prompts:
            return Evaluator("report", 0, lambda *_: Evaluation())
        assert parts.sample and parts.eval_set, f"{parts.config} generates no clips"
        sample, (requests, true) = parts.sample, parts.eval_set(self.prompts)
        # Before the first step: a set that cannot be measured is no news for the last one.
        measure = self.measure(parts.config, requests, true)

        def evaluate(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
            clips = sample(ema, requests, True)
            write_sheet(clips, directory / "samples.png")
            return Evaluation(measure(clips), directory / "samples.png")

        return Evaluator("report", self.every, evaluate)


def write_sheet(clips: Sequence[np.ndarray], path: Path) -> None:
    """Writes a picture of the first clips, once: rows of frames, or a square of still images."""
    if jax.process_index() != 0:
        return
    if all(len(clip) == 1 for clip in clips):
        picture = grid(list(clips[:IMAGES_SHOWN]), 10 if len(clips) >= 30 else None)[0]
    else:
        picture = contact_sheet(clips[:CLIPS_SHOWN], FRAMES_SHOWN, SHEET_SCALE)
    write_png(path, picture)
