"""Checkpoints: Orbax items apart, asynchronous, restorable onto another mesh.

A run's directory holds ``config.json`` and ``checkpoints/<step>/`` with the items ``params``,
``ema``, ``opt`` (moments and counters), ``data`` (where every row's stream stands) and ``config``.
Sampling restores ``ema`` alone. The directory is local or on Cloud Storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dit_jax.data import merge_states
from dit_jax.files import InputError, as_path, check_exists, explain, passes, retry
from dit_jax.training.step import TrainState
from dit_jax.types import Params, PositiveInt


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved and how much of it is kept."""

    paths: ClassVar[tuple[str, ...]] = ("initial",)

    every: PositiveInt = 1000
    """Steps from one save to the next; the last step is always saved."""
    max_to_keep: PositiveInt = 3
    """Older checkpoints are deleted."""
    keep_period: PositiveInt | None = None
    """Checkpoints at multiples of this are never deleted."""
    initial: str | None = None
    """Directory of a run (a converted one, say) whose averaged parameters a new run begins with, in
    place of fresh ones. A run that goes on takes its own."""


def gather_data_state(state: dict[str, Any]) -> dict[str, Any]:
    """The data state of all processes' rows, on every process."""
    if jax.process_count() == 1:
        return merge_states([state])
    mine = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size]))
    padded = np.pad(mine, (0, int(sizes.max()) - mine.size))
    gathered = multihost_utils.process_allgather(padded)
    rows = zip(sizes.ravel(), gathered, strict=True)
    return merge_states([json.loads(bytes(row[: int(size)]).decode()) for size, row in rows])


class Checkpointer:
    """Saves and restores the states of one run.

    As a context it ends only when the save under way has: whatever is raised inside, nothing that was
    begun is lost.
    """

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig) -> None:
        self.directory = as_path(directory)  # Orbax reads no relative paths.
        self._again: Callable[[], None] | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.max_to_keep,
            keep_period=config.keep_period,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(
            self.directory / "checkpoints",
            options=options,
            item_names=("params", "ema", "opt", "data", "config"),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, data: dict[str, Any], config: dict[str, Any], step: int
    ) -> None:
        """Starts to save; returns as soon as the state is copied. Errors of storage that pass are tried
        again; if the save before failed by one, this one takes its place."""
        if step == self._manager.latest_step():
            return
        counters = {"step": state.step, "skipped": state.skipped}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            opt=ocp.args.StandardSave({"opt_state": state.opt_state, **counters}),
            data=ocp.args.JsonSave(gather_data_state(data)),
            config=ocp.args.JsonSave(config),
        )

        def begin() -> None:
            self._manager.save(step, force=True, args=args)

        retry(begin, f"saving step {step}")
        self._again = begin

    def save_weights(self, params: Params, config: dict[str, Any], step: int = 0) -> None:
        """Saves averaged weights alone, to sample from, as what came from elsewhere has no more."""
        items = ocp.args.Composite(
            ema=ocp.args.StandardSave(params), config=ocp.args.JsonSave(config)
        )
        self._manager.save(step, force=True, args=items)

    def restore(
        self, step: int, shapes: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state at ``step``, sharded by ``shardings``, and the data state."""
        target = jax.tree.map(_abstract, shapes, shardings)
        opt = {"opt_state": target.opt_state, "step": target.step, "skipped": target.skipped}
        self._check_arrays(step, "params", target.params)
        out = self._read(
            step,
            params=ocp.args.StandardRestore(target.params),
            ema=ocp.args.StandardRestore(target.ema),
            opt=ocp.args.StandardRestore(opt),
            data=ocp.args.JsonRestore(),
        )
        return TrainState(params=out["params"], ema=out["ema"], **out["opt"]), out["data"]

    def restore_ema(self, step: int, shapes: Params, shardings: Params) -> Params:
        """The averaged parameters alone."""
        target = jax.tree.map(_abstract, shapes, shardings)
        self._check_arrays(step, "ema", target)
        return self._read(step, ema=ocp.args.StandardRestore(target))["ema"]

    def config(self, step: int) -> dict[str, Any]:
        """The config that made a checkpoint."""
        return self._read(step, config=ocp.args.JsonRestore())["config"]

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.directory / "checkpoints" / str(step)

    def _read(self, step: int, **items: Any) -> Any:
        def read() -> Any:
            return self._manager.restore(step, args=ocp.args.Composite(**items))

        with self._reading(step):
            return retry(read, f"reading step {step}")

    def _check_arrays(self, step: int, item: str, target: Params) -> None:
        """Raises ``ValueError`` if an item's arrays are not those of the model."""
        with self._reading(step):
            path: Any = self.path(step) / item  # Orbax types a kind of its own, and takes any.
            stored = _shapes(ocp.StandardCheckpointHandler().metadata(path).tree)
        expected = _shapes(target)
        for name in sorted(stored | expected):
            if stored.get(name) != expected.get(name):
                raise InputError(
                    f"{str(self.path(step))!r} is a checkpoint of another model: {item} {name!r} is "
                    f"{stored.get(name, 'absent')} there and {expected.get(name, 'absent')} in the "
                    "model of the config. Use the config that the checkpoint was made with."
                )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what is wrong with a checkpoint into ``InputError``; a disk or server that does not
        answer is no fault of the checkpoint, and its errors stay what they are."""
        try:
            yield
        except (KeyError, OSError, TypeError, ValueError) as error:
            if passes(error):
                raise
            raise InputError(
                f"{str(self.path(step))!r} cannot be read ({explain(error)}): the checkpoint is "
                f"damaged. Take another of {self.steps()}: sampling does with --step, and training "
                "goes on from the newest that is left when this one is moved away."
            ) from error

    def wait(self) -> None:
        """Returns when everything begun is on disk; what went wrong and passes is tried again."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            if self._again is None or not passes(error):
                raise
            again = self._again

            def save() -> None:
                again()
                self._manager.wait_until_finished()

            retry(save, f"saving again after {explain(error)}")
        self._again = None

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            return
        try:  # The error that ends the run is the one to raise; of another it is said.
            self._manager.wait_until_finished()
            print(f"saved: {self.steps()}", file=sys.stderr, flush=True)
        except Exception as error:
            print(f"the save under way failed, too: {explain(error)}", file=sys.stderr, flush=True)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def _abstract(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def open_run(directory: str | os.PathLike, step: int | None = None) -> tuple[Checkpointer, int]:
    """The checkpoints of a finished or running run, to read, and the step asked for or the newest."""
    hint = "give the output directory of a training run (it has a folder 'checkpoints')"
    directory = check_exists(directory, "the run", hint)
    if not (directory / "checkpoints").is_dir():
        raise InputError(f"{str(directory)!r} holds no checkpoints: {hint}.")
    checkpointer = Checkpointer(directory, CheckpointConfig())
    steps = checkpointer.steps()
    if not steps:
        raise InputError(
            f"{str(directory)!r} has no finished checkpoint yet: wait for the first save "
            "(checkpoint.every steps), or give another run."
        )
    if step is not None and step not in steps:
        raise InputError(f"{str(directory)!r} has no checkpoint of step {step}: there are {steps}.")
    return checkpointer, steps[-1] if step is None else step
