"""``python -m dit_jax.train --config FILE``: trains, from the top of this page to its bottom.

config -> processes -> mesh -> task -> state -> data -> loop. A run is a directory: if it holds a
checkpoint, the run goes on from there and ends up, bit for bit, where it would have without the
interruption.

Exit status: 0, the run is complete; 2, something given is wrong, and the message says what; 143 or
130 (128 + the signal, as shells count), SIGTERM or SIGINT stopped it after it saved its step; 1,
something failed, or another process of the run died. What did not end in 0 or 2 goes on when all its
processes are started again.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import tasks
from dit_jax.config import Run, differences, parse_config, read_config, stored_config, to_dict
from dit_jax.parallel import (
    PROCESS_HELP,
    global_batch,
    joined,
    local_rows,
    make_mesh,
    restart_with_huge_pages,
    take_process_flags,
)
from dit_jax.training import (
    Checkpointer,
    Progress,
    StopSignal,
    Task,
    TrainState,
    abstract_state,
    begin_from,
    init_state,
    make_optimizer,
    make_step,
)

PROG = "python -m dit_jax.train"
FIXED = ("model", "data", "seed", "optimizer.kind", "codec.hash", "text_encoder.hash")
"""What a run is made of: a resumed run must have the same."""
MAY_CHANGE = ("path", "data_dir", "threads", "scan", "remat")
"""Fields in these that a resumed run may change all the same: where the data lies, and how the
same numbers are computed."""
MEANT = ("model", "diffusion.prediction", "diffusion.path", "codec.hash", "text_encoder.hash")
"""What parameters mean: a run that begins with another's must have the same of it."""
MAY_DIFFER = ("scan", "remat", "dtype", "matmul", "mlp_dim", "time_std", "max_bytes", "max_tokens")
"""Fields in these that it may have otherwise: how the same is computed, what shapes tell, how fresh
parameters are drawn, and where captions are cut."""


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
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with joined(flags, PROG):
            config = tasks.recorded(config)
            directory = prepare_directory(config)
            stopped = train(config, directory)
    except ValueError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    return 128 + signal.Signals[stopped] if stopped else 0


def prepare_directory(config: Run) -> Path:
    """Makes the run's directory and stores the config in it.

    Raises:
        ValueError: where it cannot be written, or holds a run of another model or data.
    """
    directory = Path(config.output).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"output {config.output!r} cannot be written ({error.strerror}): give another directory "
            "with --output."
        ) from error
    stored = directory / "config.json"
    if stored.exists() and any(p.name.isdigit() for p in directory.glob("checkpoints/*")):
        check_same_run(config, read_config(stored, Run), directory)
    if jax.process_index() == 0:
        fresh = stored.with_suffix(".tmp")
        fresh.write_text(json.dumps(to_dict(config), indent=2))
        os.replace(fresh, stored)
    return directory


def check_same_run(config: Run, stored: Run, directory: Path) -> None:
    """Raises ``ValueError`` where a run cannot be resumed under this config."""
    for name, now, before in differences(config, stored):
        fixed = any(f"{name}.".startswith(f"{part}.") for part in FIXED)
        if fixed and name.split(".")[-1] not in MAY_CHANGE:
            raise ValueError(
                f"{str(directory)!r} holds a run with {name} = {before!r}, and not {now!r}: give a new "
                "--output, or the config that the run was made with."
            )


def check_same_meaning(config: Run, values: dict[str, Any], where: Path) -> tasks.Inflation | None:
    """How a run under this config begins with the parameters of a run whose stored config is
    ``values``: as they are, or inflated, which is said.

    Raises:
        ValueError: where they would mean something else.
    """
    stored = stored_config(values, where, Run)
    inflated = tasks.inflation(config, stored)
    covered = inflated.fields if inflated else ()
    for name, now, before in differences(config, stored):
        meant = any(f"{name}.".startswith(f"{part}.") for part in MEANT)
        if meant and name.split(".")[-1] not in MAY_DIFFER and name not in covered:
            raise ValueError(
                f"checkpoint.initial {config.checkpoint.initial!r} is a run with {name} = {before!r}, "
                f"and not {now!r}, under which its parameters mean something else: set {name} as there "
                f"({str(where.parents[2] / 'config.json')!r}), or begin with another run."
            )
    if inflated and jax.process_index() == 0:
        print(f"checkpoint.initial {config.checkpoint.initial!r} is {inflated}", flush=True)
    return inflated


def begin(config: Run, fresh: TrainState, shapes: TrainState, shardings: TrainState) -> TrainState:
    """The state that a new run begins with: with another run's parameters, where one is named."""
    if config.checkpoint.initial is None:
        return fresh
    initial = Path(config.checkpoint.initial).absolute()
    return begin_from(initial, fresh, shapes, shardings, partial(check_same_meaning, config))


def train(config: Run, directory: Path) -> str | None:
    """The training loop; returns the name of the signal that stopped it, if one did."""
    mesh = make_mesh(config.mesh)
    rows = local_rows(mesh, config.rows)
    task = tasks.build(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    shapes, shardings = abstract_state(task.init, optimizer, mesh)
    step_fn = make_step(task.loss, optimizer, config.optimizer, config.seed, shardings)

    checkpointer = Checkpointer(directory, config.checkpoint)
    loader = task.loader(rows)
    latest = checkpointer.latest()
    if latest is None:
        state = init_state(task.init, optimizer, shardings, jax.random.key(config.seed))
        state = begin(config, state, shapes, shardings)
    else:
        state, data_state = checkpointer.restore(latest, shapes, shardings)
        loader.set_state(data_state)
    start = int(state.step)

    progress = Progress(directory, start, config.steps)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes.params))
    progress.say(
        f"{task.name}: {count / 1e6:.1f} M parameters, {len(jax.devices())} x "
        f"{jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}, "
        + (f"resumed at step {start}" if start else "compiling the step...")
    )
    stop = StopSignal()
    data_state = loader.get_state()
    for step in range(start, config.steps):
        local = next(loader)
        data_state = loader.get_state()
        state, metrics = step_fn(state, global_batch(mesh, local, rows, task.rows))
        done = step + 1
        progress.advance(task.work(local))
        if done % config.log.every == 0 or done in (start + 1, config.steps):
            progress.report(done, metrics)
        stopping = stop.asked(done) and done < config.steps
        clock = time.perf_counter()
        if done == config.steps or stopping or done % config.checkpoint.every == 0:
            checkpointer.save(state, data_state, to_dict(config), done)
            progress.flush()
        if config.log.draw_every and done % config.log.draw_every == 0 and not stopping:
            picture = directory / f"samples_{done:07d}.png"
            task.draw(state.ema, picture)
            progress.image(done, "samples", picture)
        progress.away(time.perf_counter() - clock)
        if stopping:
            progress.say(f"{stop.name}: saving step {done}; the same command resumes there.")
            break

    checkpointer.wait()
    finished = int(state.step) >= config.steps
    if finished:
        conclude(task, state, progress, directory)
    loader.close()
    progress.close()
    checkpointer.close()
    return None if finished else stop.name


def conclude(task: Task, state: TrainState, progress: Progress, directory: Path) -> None:
    """Measures the finished model, says what came of it, and stores it as ``report.json``."""
    report = dict(task.report(state.ema, directory))
    if not report:
        return
    progress.scalars(int(state.step), report, "report")
    text = ", ".join(f"{name} {value:.3g}" for name, value in report.items())
    progress.say(f"{task.name} report: {text}\npictures: {directory / 'samples.png'}")
    if jax.process_index() == 0:
        (directory / "report.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    restart_with_huge_pages()
    raise SystemExit(main())
