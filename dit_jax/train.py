"""``python -m dit_jax.train --config FILE``: trains, from the top of this page to its bottom.

config -> processes -> mesh -> task -> state -> data -> loop. A run is a directory, local or on Cloud
Storage: if it holds a checkpoint, the run goes on from there and ends up, bit for bit, where it would
have without the interruption.

Exit status: 0, the run is complete; 2, the command line, the config or the data are wrong (only before
the loop begins: starting again would not help); 143 or 130 (128 + the signal, as shells count), SIGTERM
or SIGINT stopped it after it saved its step; 1, something failed by itself (a full disk, storage that
does not answer, another process of the run); 134, JAX aborted this process because another died. What
did not end in 0 or 2 goes on when all its processes are started again.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.config import Run, absolute_paths, parse_config, read_config, to_dict
from dit_jax.data import DataError, RowStreams
from dit_jax.files import (
    InputError,
    Lock,
    check_writable,
    checking_input,
    explain,
    is_storage_error,
    write_json,
)
from dit_jax.parallel import (
    PROCESS_HELP,
    global_batch,
    joined,
    local_rows,
    make_mesh,
    take_process_flags,
)
from dit_jax.training import (
    Checkpointer,
    Evaluator,
    Progress,
    StopSignal,
    Task,
    TrainState,
    abstract_state,
    gather_data_state,
    init_frozen,
    init_state,
    learning_rate,
    make_optimizer,
    make_step,
)
from dit_jax.training.resume import changes, check_same_run, init_from
from dit_jax.types import Params

PROG = "python -m dit_jax.train"
LOST_STEPS = 200
"""A run whose last steps, this many, all had gradients that are not finite has diverged: it ends."""
NAMES_IN_REPORT = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what the command line says; returns the exit status."""
    arguments, flags = take_process_flags(sys.argv[1:] if arguments is None else arguments)
    config = parse_config(
        arguments,
        prog=PROG,
        description="Trains a model. Any field of the config can be given by its dotted name. "
        + PROCESS_HELP,
        kind=Run,
    )
    # Of a save that fails Orbax logs every trace, and TensorStore prints one for every array.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = without_closed_loops
    try:
        with joined(flags, PROG, InputError):
            stopped = train(config)
    except InputError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not isinstance(error, DataError | DivergedError) and not is_storage_error(error):
            raise
        # Several hundred lines of traces would hide the one that matters.
        print(
            f"{PROG}: failed: {type(error).__name__}: {explain(error)}\nWhen the cause is mended, the "
            "same command goes on from the newest checkpoint.",
            file=sys.stderr,
        )
        return 1
    return 128 + signal.Signals[stopped] if stopped else 0


def without_closed_loops(unraisable: Any) -> None:
    """``sys.unraisablehook``, but for arrays that are written after their save has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class DivergedError(RuntimeError):
    """The gradients of many steps in a row were not finite."""


def prepare_directory(config: Run) -> tuple[Path, Run | None]:
    """Makes the run's directory; returns it and the stored config of the run that it holds, if any."""
    directory = check_writable(config.output)
    stored = None
    if (directory / "config.json").exists() and (directory / "checkpoints").is_dir():
        if any(one.name.isdigit() for one in (directory / "checkpoints").iterdir()):
            stored = read_config(directory / "config.json", Run)
            check_same_run(config, stored, directory)
    return directory, stored


# ---------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------


def train(config: Run) -> str | None:
    """Trains; returns the name of the signal that stopped the run, if one did."""
    with contextlib.ExitStack() as stack:
        with checking_input():
            # Relative paths would mean something else to whoever resumes or samples from elsewhere.
            config = absolute_paths(config).with_hashes()
            directory, stored = prepare_directory(config)
            if jax.process_index() == 0:
                stack.callback(Lock(directory).release)
                write_json(directory / "config.json", to_dict(config))

            # What is trained, and on what: the config knows, and the loop does not.
            mesh = make_mesh(config.mesh)
            rows = local_rows(mesh, config.rows)
            task = config.build(mesh)
            loader = task.loader(rows)
            stack.callback(loader.close)

            # The state, sharded from the start: no device ever holds the whole model.
            optimizer = make_optimizer(config.optimizer, config.steps)
            shapes, shardings = abstract_state(task.init, optimizer, mesh, task.trainable)
            step_fn = make_step(task.loss, optimizer, config.optimizer, config.seed, shardings)
            key = jax.random.key(config.seed)
            frozen = init_frozen(task.init, mesh, key, task.trainable, task.load_frozen)
            checkpointer = Checkpointer(directory, config.checkpoint)
            latest, repacked = checkpointer.latest(), False
            if latest is None:
                state = init_state(task.init, optimizer, shardings, key, task.trainable)
                state = init_from(config, state, shapes, shardings)
            else:
                state, data_state = checkpointer.restore(latest, shapes, shardings)
                repacked = not loader.set_state(data_state)
        start = int(state.step)

        progress = Progress(directory, start, config.steps)
        stack.callback(progress.close)
        progress.say(introduction(task, mesh, shapes, start))
        if stored is not None and start and (text := changes(config, stored, start)):
            progress.say(text)
        if repacked:
            progress.say(
                "rows are packed anew: the order of samples goes on, but those that waited in rows "
                "which were not full are left out of this epoch."
            )
        # Whatever is raised below, the save under way is finished first.
        stack.enter_context(checkpointer)
        stop = StopSignal()
        schedule = learning_rate(config.optimizer, config.steps)
        # The loader reads ahead: its state is taken right behind the batch that is trained on.
        data_state = loader.get_state()
        reported, healthy, skipped = start, start, int(state.skipped)
        for step in range(start, config.steps):
            local = next(loader)
            data_state = loader.get_state()
            # Returns before the devices are done; nothing below waits for them but a report or a save.
            state, metrics = step_fn(state, global_batch(mesh, local, rows, task.rows), frozen)
            done = step + 1
            progress.advance(task.work(local))

            if done % config.log.every == 0 or done in (start + 1, config.steps):
                # The optimizer counts the steps that it took, not those skipped.
                rate = float(np.asarray(schedule(step - int(metrics["skipped"]))))
                counts = {
                    "learning_rate": rate,
                    "records_left_out": len(loader.reader.left_out),
                    "captions_cut": loader.reader.cut_captions,
                }
                progress.report(done, {**metrics, **counts})
                # One finite step since the last report is enough: a lone batch may overflow.
                if int(metrics["skipped"]) - skipped < done - reported:
                    healthy = done
                reported, skipped = done, int(metrics["skipped"])
                if done - healthy >= LOST_STEPS:
                    raise DivergedError(
                        f"the gradients of the last {done - healthy} steps were not finite: resume "
                        "from an earlier checkpoint with a lower optimizer.learning_rate."
                    )

            # Every process must come to the same answer, at the same step: saving is collective.
            stopping = stop.asked(done) and done < config.steps
            clock = time.perf_counter()
            if done == config.steps or stopping or done % config.checkpoint.every == 0:
                checkpointer.save(state, data_state, to_dict(config), done)
                progress.flush()
            for evaluator in () if stopping or done == config.steps else task.evaluators:
                if evaluator.every and done % evaluator.every == 0:
                    evaluate(evaluator, state, frozen, directory, progress)
            progress.away(time.perf_counter() - clock)
            if stopping:
                progress.say(f"{stop.name}: saving step {done}; the same command resumes there.")
                break

        checkpointer.wait()
        finished = int(state.step) >= config.steps
        if finished:
            # Also of a run that was complete before: its report may have been what failed.
            conclude(task, state, frozen, directory, progress, loader)
        checkpointer.close()
    return None if finished else stop.name


def introduction(task: Task, mesh: Mesh, shapes: TrainState, start: int) -> str:
    """What is trained on what, in a line."""
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes.params))
    return (
        f"{task.name}: {count / 1e6:.1f} M parameters, {len(jax.devices())} x "
        f"{jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}, "
        + (f"resumed at step {start}" if start else "compiling the step...")
    )


def evaluate(
    evaluator: Evaluator, state: TrainState, frozen: Params, directory: Path, progress: Progress
) -> Mapping[str, float]:
    """Runs an evaluator and logs what it measures. A picture that cannot be written ends no run."""
    scalars: Mapping[str, float] = {}
    step, name = int(state.step), evaluator.name
    try:
        scalars, picture = evaluator.evaluate(state.ema, frozen, step, directory)
        progress.scalars(step, {k if "/" in k else f"{name}/{k}": x for k, x in scalars.items()})
        if picture is not None:
            progress.image(step, name, picture)
    except Exception as error:
        if not is_storage_error(error):
            raise
        progress.say(f"warning: {name} of step {step} not written ({explain(error)}).")
    return scalars


def conclude(
    task: Task, state: TrainState, frozen: Params, directory: Path, progress: Progress, loader: Any
) -> None:
    """Measures the finished model, prints the report, and stores it as ``report.json``."""
    report: dict[str, Any] = {}
    for evaluator in task.evaluators:
        report |= evaluate(evaluator, state, frozen, directory, progress)
    if report:
        text = ", ".join(f"{name} {value:.3g}" for name, value in report.items())
        pictures = directory / "samples.png"
        where = f"\npictures: {pictures}" if pictures.exists() else ""
        progress.say(f"{task.name} report: {text}{where}")
    data = data_report(loader)
    if data:
        progress.say(
            f"{data['records_left_out']} records were left out, and captions were cut "
            f"{data['captions_cut']} times (report.json names them)."
        )
    if (report or data) and jax.process_index() == 0:
        write_json(directory / "report.json", {**report, **data})


def data_report(loader: RowStreams[Any]) -> dict[str, Any]:
    """Which of the data were not trained on; empty if all were."""
    reader = loader.reader
    left_out = gather_data_state(loader.get_state())["run"]["left_out"]
    before = 0 if reader.unfit is None else int(reader.unfit.sum())
    if not left_out and not before and not reader.cut_captions:
        return {}
    names = [f"{name}: it does not fit" for name in reader.unfit_names(NAMES_IN_REPORT)]
    return {
        "records_left_out": len(left_out) + before,
        "captions_cut": reader.cut_captions,
        "left_out": [*names, *left_out.values()][:NAMES_IN_REPORT],
    }


if __name__ == "__main__":
    raise SystemExit(main())
