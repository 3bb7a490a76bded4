"""Checkpoints: asynchronous, in items that are read apart, restorable onto another mesh.

A run's directory, local or on Cloud Storage, holds ``config.json`` and ``checkpoints/<step>/`` with the
items ``params``, ``ema``, ``opt`` (moments and counters), ``data`` (where every row's stream stands)
and ``config``. Sampling restores ``ema`` alone: in a run without averages it holds the parameters, and
there is no ``params``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dit_jax.data.packing import merge_states
from dit_jax.files import InputError, as_path, check_exists, explain, passes, refuse_if, retry
from dit_jax.training.step import TrainState
from dit_jax.types import Params, PositiveInt


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved and how much of it is kept."""

    paths: ClassVar[tuple[str, ...]] = ("initial",)

    every: PositiveInt = 1000  # Steps from one save to the next; the last step is always saved.
    max_to_keep: PositiveInt = 3  # Older checkpoints are deleted.
    keep_period: PositiveInt | None = None  # Checkpoints at multiples of this are never deleted.
    # Directory of a run (a converted one, say) whose averaged parameters a new run begins with.
    initial: str | None = None


def gather_data_state(state: dict[str, Any]) -> dict[str, Any]:
    """The data state of all processes' rows, on every process."""
    if jax.process_count() == 1:
        return state
    # Only arrays of one shape are gathered: JSON as bytes, padded to the longest.
    mine = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size])).ravel()
    padded = np.pad(mine, (0, int(sizes.max()) - mine.size))
    rows = zip(multihost_utils.process_allgather(padded), sizes, strict=True)
    return merge_states([json.loads(bytes(row[:size])) for row, size in rows])


def weights(state: TrainState) -> dict[str, Params]:
    """The items of a state's parameters and their averages."""
    return {"params": state.params, "ema": state.ema} if state.ema else {"ema": state.params}


class Checkpointer:
    """Saves and restores the states of one run; as a context it ends when the last save has."""

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig) -> None:
        self.directory = as_path(directory)  # Orbax reads no relative paths.
        self._last: tuple[int, Any] | None = None
        self._manager = ocp.CheckpointManager(
            self.directory / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.max_to_keep,
                keep_period=config.keep_period,
                enable_async_checkpointing=True,
            ),
            item_names=("params", "ema", "opt", "data", "config"),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.directory / "checkpoints" / str(step)

    def save(
        self, state: TrainState, data: dict[str, Any], config: dict[str, Any], step: int
    ) -> None:
        """Starts to save; returns as soon as the state is copied. If the save before failed by an error
        of storage that passes, this one takes its place."""
        if step == self.latest():
            return
        opt = {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}
        arrays = weights(state) | {"opt": opt}
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
            data=ocp.args.JsonSave(gather_data_state(data)),
            config=ocp.args.JsonSave(config),
        )
        retry(lambda: self._save(step, items), f"saving step {step}")

    def save_weights(self, params: Params, config: dict[str, Any], step: int = 0) -> None:
        """Saves EMA weights alone, for converted models, which have no optimizer state."""
        ema, settings = ocp.args.StandardSave(params), ocp.args.JsonSave(config)
        self._save(step, ocp.args.Composite(ema=ema, config=settings))

    def _save(self, step: int, items: Any) -> None:
        self._last = step, items
        self._manager.save(step, force=True, args=items)

    def restore(
        self, step: int, shapes: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state at ``step``, sharded by ``shardings``, and the data state."""
        like = _placed(shapes, shardings)
        opt = {"opt_state": like.opt_state, "step": like.step, "skipped": like.skipped}
        out = self._read(step, **weights(like), opt=opt, data=None)
        params, ema = (out["params"], out["ema"]) if like.ema else (out["ema"], {})
        return TrainState(params=params, ema=ema, **out["opt"]), out["data"]

    def restore_ema(self, step: int, shapes: Params, shardings: Params) -> Params:
        """The averaged parameters alone."""
        return self._read(step, ema=_placed(shapes, shardings))["ema"]

    def config(self, step: int) -> dict[str, Any]:
        """The config that made a checkpoint."""
        return self._read(step, config=None)["config"]

    def _read(self, step: int, **templates: Any) -> Any:
        """Items of a checkpoint: arrays as their templates, JSON for None."""
        items = {
            name: ocp.args.JsonRestore() if one is None else ocp.args.StandardRestore(one)
            for name, one in templates.items()
        }
        try:
            return retry(
                lambda: self._manager.restore(step, args=ocp.args.Composite(**items)),
                f"reading step {step}",
            )
        except (KeyError, OSError, TypeError, ValueError) as error:
            # A disk or a server that does not answer is no fault of the checkpoint.
            if passes(error):
                raise
            raise InputError(
                f"{str(self.path(step))!r} cannot be read ({explain(error)}): it is damaged, or of "
                f"another model than the config's. There are the steps {self.steps()}: sampling takes "
                "another with --step, and training the newest that has not been moved away."
            ) from error

    def wait(self) -> None:
        """Returns when everything is on disk; a save that fails by an error that passes is repeated."""
        attempts = itertools.count()

        def finish() -> None:
            if next(attempts) and self._last:
                self._save(*self._last)
            self._manager.wait_until_finished()

        retry(finish, "saving")
        self._last = None

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            return self.wait()
        try:  # The error that ends the run is the one to raise, not one of its last save.
            self._manager.wait_until_finished()
            text = f"saved: {self.steps()}"
        except Exception as error:
            text = f"the save under way failed, too: {explain(error)}"
        print(text, file=sys.stderr, flush=True)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def open_run(directory: str | os.PathLike, step: int | None = None) -> tuple[Checkpointer, int]:
    """The checkpoints of a finished or running run, to read, and the step asked for or the newest."""
    hint = "give the output directory of a training run (it has a folder 'checkpoints')"
    directory = check_exists(directory, "the run", hint)
    name, empty = repr(str(directory)), not (directory / "checkpoints").is_dir()
    refuse_if([(empty, f"{name} holds no checkpoints: {hint}.")])
    checkpointer = Checkpointer(directory, CheckpointConfig())
    steps = checkpointer.steps()
    early = f"{name} has no finished checkpoint yet: wait for the first save (checkpoint.every)."
    missing = f"{name} has no checkpoint of step {step}: there are {steps}."
    refuse_if([(not steps, early), (step not in (None, *steps), missing)])
    return checkpointer, steps[-1] if step is None else step
