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
import dataclasses
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import files, parallel, training
from dit_jax.config import (
    Run,
    VideoRun,
    absolute_paths,
    differences,
    parse_config,
    read_config,
    stored_config,
    to_dict,
)
from dit_jax.data import DataError, RowStreams
from dit_jax.training import TrainState
from dit_jax.training.video_task import inflate, inflation
from dit_jax.types import Params

PROG = "python -m dit_jax.train"
DESCRIPTION = "Trains a model. Any field of the config can be given by its dotted name. "
# A run whose last steps, this many, all had gradients that are not finite has diverged: it ends.
LOST_STEPS = 200
NAMES_IN_REPORT = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what the command line says; returns the exit status."""
    arguments, flags = parallel.take_process_flags(sys.argv[1:] if arguments is None else arguments)
    config = parse_config(arguments, PROG, DESCRIPTION + parallel.PROCESS_HELP, Run)
    files.silence_traces()

    def work() -> int:
        with parallel.joined(flags, PROG, files.InputError):
            stopped = train(config)
        return 128 + signal.Signals[stopped] if stopped else 0

    return files.run_verb(PROG, work, files.InputError, (DataError, DivergedError))


class DivergedError(RuntimeError):
    """The gradients of many steps in a row were not finite."""


# ---------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------


def train(config: Run) -> str | None:
    """Trains; returns the name of the signal that stopped the run, if one did."""
    with contextlib.ExitStack() as stack:
        try:
            # Relative paths would mean something else to whoever resumes or samples from elsewhere.
            config = absolute_paths(config).with_hashes()
            directory, stored = files.check_writable(config.output), None
            saved = directory / "checkpoints"
            begun = saved.is_dir() and any(one.name.isdigit() for one in saved.iterdir())
            if begun and (directory / "config.json").exists():
                stored = read_config(directory / "config.json", Run)
                run = f"{str(directory)!r} holds a run"
                remedy = "give a new --output, or the config that the run was made with"
                check_same(config, stored, FIXED, MAY_CHANGE, run, remedy)
            if jax.process_index() == 0:
                stack.enter_context(files.locked(directory))
                files.write_json(directory / "config.json", to_dict(config))

            # What is trained, and on what: the config knows, and the loop does not.
            mesh = parallel.make_mesh(config.mesh)
            rows = parallel.local_rows(mesh, config.rows)
            task = config.build(mesh)
            loader = task.loader(rows)
            stack.callback(loader.close)

            # The state, sharded from the start: no device ever holds the whole model.
            optimizer = training.make_optimizer(config.optimizer, config.steps)
            of_state = {"trainable": task.trainable, "config": config.optimizer}
            shapes, shardings = training.abstract_state(task.init, optimizer, mesh, **of_state)
            step_fn = training.make_step(
                task.loss, optimizer, config.optimizer, config.seed, shardings
            )
            key = jax.random.key(config.seed)
            frozen = training.init_frozen(task.init, mesh, key, task.trainable, task.load_frozen)
            checkpointer = training.Checkpointer(directory, config.checkpoint)
            latest, repacked = checkpointer.latest(), False
            if latest is None:
                state = training.init_state(task.init, optimizer, shardings, key, **of_state)
                state = init_from(config, state, shapes, shardings)
            else:
                state, data_state = checkpointer.restore(latest, shapes, shardings)
                repacked = not loader.set_state(data_state)
        except ValueError as error:
            # Only what the user gave was looked at: exit status 2, which launchers do not start again.
            raise files.InputError(str(error)) from error
        start = int(state.step)

        progress = training.Progress(directory, start, config.steps)
        stack.callback(progress.close)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        progress.say(
            f"{task.name}: {count / 1e6:.1f} M parameters, {len(jax.devices())} x "
            f"{jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}, "
            + (f"resumed at step {start}" if start else "compiling the step...")
        )
        if stored is not None and start and (text := changes(config, stored, start)):
            progress.say(text)
        if repacked:
            progress.say(
                "rows are packed anew: the order of samples goes on, but those that waited in rows "
                "which were not full are left out of this epoch."
            )
        # Whatever is raised below, the save under way is finished first.
        stack.enter_context(checkpointer)
        stop = training.StopSignal()
        schedule = training.learning_rate(config.optimizer, config.steps)
        # The loader reads ahead: its state is taken right behind the batch that is trained on.
        data_state = loader.get_state()
        reported, healthy, skipped = start, start, int(state.skipped)
        for step in range(start, config.steps):
            local = next(loader)
            data_state = loader.get_state()
            batch = parallel.global_batch(mesh, local, rows, task.rows)
            # Returns before the devices are done; nothing below waits for them but a report or a save.
            state, metrics = step_fn(state, batch, frozen)
            done = step + 1
            if step == start:
                parallel.trim_memory()  # What compiling it took.
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
        report: dict[str, Any] = {}
        # Also of a run that was complete before: its report may have been what failed.
        for evaluator in task.evaluators if finished else ():
            report |= evaluate(evaluator, state, frozen, directory, progress)
        if report:
            text = ", ".join(f"{name} {value:.3g}" for name, value in report.items())
            sheet = directory / "samples.png"
            where = f"\npictures: {sheet}" if sheet.exists() else ""
            progress.say(f"{task.name} report: {text}{where}")
        if finished and (left_out := data_report(loader)):
            report |= left_out
            progress.say(
                f"{left_out['records_left_out']} records were left out, and captions were cut "
                f"{left_out['captions_cut']} times (report.json names them)."
            )
        if report and jax.process_index() == 0:
            files.write_json(directory / "report.json", report)
        checkpointer.close()
    return None if finished else stop.name


def evaluate(
    evaluator: training.Evaluator,
    state: TrainState,
    frozen: Params,
    directory: Path,
    progress: training.Progress,
) -> Mapping[str, float]:
    """Runs an evaluator and logs what it measures. A picture that cannot be written ends no run."""
    scalars: Mapping[str, float] = {}
    step, name = int(state.step), evaluator.name
    parallel.trim_memory()
    try:
        scalars, picture = evaluator.evaluate(state.ema or state.params, frozen, step, directory)
        progress.scalars(step, {k if "/" in k else f"{name}/{k}": x for k, x in scalars.items()})
        if picture is not None:
            progress.image(step, name, picture)
    except Exception as error:
        if not files.is_storage_error(error):
            raise
        progress.say(f"warning: {name} of step {step} not written ({files.explain(error)}).")
    finally:
        parallel.trim_memory()
    return scalars


def data_report(loader: RowStreams[Any]) -> dict[str, Any]:
    """Which of the data were not trained on; empty if all were. Every process calls it."""
    reader = loader.reader
    left_out = training.gather_data_state(loader.get_state())["run"]["left_out"]
    count = len(left_out) + (0 if reader.unfit is None else int(reader.unfit.sum()))
    names = [f"{name}: it does not fit" for name in reader.unfit_names(NAMES_IN_REPORT)]
    names = [*names, *left_out.values()][:NAMES_IN_REPORT]
    report = {"records_left_out": count, "captions_cut": reader.cut_captions, "left_out": names}
    return report if any(report.values()) else {}


# ---------------------------------------------------------------------------------------------------
# What a run goes on from, or begins with
# ---------------------------------------------------------------------------------------------------

# What a resumed run must have the same, but for fields that say where the data lies and how the same
# numbers are computed; ``data.packing`` says which samples share a row.
FIXED = ("model", "data.source", "data.transform", "data.crop", "seed", "optimizer.kind")
FIXED += ("optimizer.moments", "optimizer.ema", "codec.hash", "text_encoder.hash")
MAY_CHANGE = ("path", "data_dir", "threads", "scan", "remat")
# What a run that begins with another's parameters must have the same, but for how it is computed, what
# shapes tell, how fresh parameters are drawn and where captions are cut.
MEANING = ("model", "diffusion.prediction", "diffusion.path", "codec.hash", "text_encoder.hash")
MAY_DIFFER = ("scan", "remat", "dtype", "matmul", "mlp_dim", "time_std", "max_bytes", "max_tokens")


def check_same(
    config: Run, stored: Run, parts: Sequence[str], free: Sequence[str], run: str, remedy: str
) -> None:
    """Raises ``InputError`` if two configs differ in a field of ``parts`` that is not in ``free``, by
    its last or whole name."""
    inside = tuple(f"{part}." for part in parts)
    files.refuse_if(
        (
            f"{name}.".startswith(inside) and {name, name.split(".")[-1]}.isdisjoint(free),
            f"{run} with {name} = {before!r}, and not {now!r}: {remedy}.",
        )
        for name, now, before in differences(config, stored)
    )


def changes(config: Run, stored: Run, step: int) -> str:
    """What a resumed run does differently from here on, in words; empty if nothing."""
    lines = [
        f"  {name}: {now!r} (it was {before!r})"
        for name, now, before in differences(config, stored)
        if name.split(".")[-1] not in ("output", "path", "data_dir")
    ]
    schedules = (training.learning_rate(one.optimizer, one.steps) for one in (config, stored))
    now, before = (float(np.asarray(schedule(step))) for schedule in schedules)
    if not np.isclose(now, before, rtol=1e-3):
        lines.append(f"  the learning rate at step {step}: {now:.3g} (it was {before:.3g})")
    return "resumed with changes:\n" + "\n".join(lines) if lines else ""


def init_from(
    config: Run, fresh: TrainState, shapes: TrainState, shardings: TrainState
) -> TrainState:
    """The state that a new run begins with: a fresh one, but for the newest averaged parameters of
    ``checkpoint.initial`` if it names a run."""
    if config.checkpoint.initial is None:
        return fresh
    checkpointer, step = training.open_run(config.checkpoint.initial)
    stored = stored_config(checkpointer.config(step), checkpointer.path(step) / "config", Run)
    inflated, run = inflation(config, stored), f"checkpoint.initial {config.checkpoint.initial!r}"
    remedy = (
        f"set it as there ({str(checkpointer.directory / 'config.json')!r}), for otherwise the "
        "parameters mean something else, or begin with another run"
    )
    check_same(config, stored, MEANING, (*MAY_DIFFER, *inflated), f"{run} is a run", remedy)
    if inflated and jax.process_index() == 0:
        print(f"{run} is inflated: {'; '.join(inflated.values())}", flush=True)
    read = partial(checkpointer.restore_ema, step)
    if "model.patch.t" in inflated:
        assert isinstance(config, VideoRun)
        read = partial(inflate, config, read)
    params = read(shapes.params, shardings.params)
    checkpointer.close()
    ema = training.begin_ema(params, config.optimizer)
    return dataclasses.replace(fresh, params=params, ema=ema)


if __name__ == "__main__":
    parallel.tune_cpu()
    sys.exit(main())
