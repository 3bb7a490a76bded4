"""What is trained, what is measured, and what a run shows meanwhile.

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
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from dit_jax.data import RowStreams
from dit_jax.files import explain, is_remote, write_whole
from dit_jax.parallel import global_batch, local_rows, peak_flops
from dit_jax.sampling import Request, contact_sheet, grid, write_png
from dit_jax.training.step import Filter, InitParams, LoadFrozen, LossFn, everything
from dit_jax.types import NonNegativeInt, Params, Totals

LEVELS = tuple((2 * i + 1) / 16 for i in range(8))
FRAMES_SHOWN, CLIPS_SHOWN, IMAGES_SHOWN, SHEET_SCALE = 5, 24, 100, 3


class Work(NamedTuple):
    """What a batch is worth, for throughput: counted on the host."""

    tokens: float  # That are not padding.
    capacity: float  # Tokens that there is room for.
    flops: float  # Of a train step: three forward passes, recomputation left out.


class Evaluation(NamedTuple):
    """What an evaluator measured."""

    scalars: Mapping[str, float] = {}
    picture: Path | None = None  # A PNG that it wrote, on the first process.


class Evaluator(NamedTuple):
    """Something to measure; every process calls ``evaluate(ema, frozen, step, directory)``."""

    name: str
    every: int  # Steps from one evaluation to the next; 0 is at the end only.
    evaluate: Callable[[Params, Params, int, Path], Evaluation]


class Task(NamedTuple):
    """What is trained: what to initialise, the loss of a batch, its data, what to measure."""

    name: str
    init: InitParams
    loss: LossFn
    loader: Callable[[tuple[int, ...]], RowStreams[Any]]  # Of this process's rows of the batch.
    rows: int  # Of the global batch.
    work: Callable[[Any], Work]
    evaluators: tuple[Evaluator, ...] = ()
    trainable: Filter = everything  # The other parameters of ``init`` are the loss's ``frozen``,
    load_frozen: LoadFrozen | None = None  # which ``init`` draws if this does not load them.


# ---------------------------------------------------------------------------------------------------
# Evaluators
# ---------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a task hands to the evaluators of its config."""

    config: Any
    mesh: Mesh
    # loss(params, frozen, batch, key, level), at a fixed noise level.
    loss: Callable[[Params, Params, Any, jax.Array, jax.Array], tuple[jax.Array, Totals]]
    levels: tuple[float, ...]  # That mean something for this loss; one, if none do.
    # Rows, as Task.loader's, of samples that training does not see, as far as the data has some.
    held_out: Callable[[tuple[int, ...]], RowStreams[Any]]
    # eval_set(count): at most so many requests for held-out prompts or classes, and the true clips
    # uint8, as far as the data are pixels; None if the task generates no clips.
    eval_set: Callable[[int], tuple[list[Request], list[np.ndarray]]] | None = None
    # sample(params, requests, progress): clips uint8 on every process.
    sample: Callable[[Params, Sequence[Request], bool], list[np.ndarray]] | None = None


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """The loss of a fixed batch of held-out samples, with averaged parameters, by noise level: eight
    forward passes, which take as long as three steps."""

    every: NonNegativeInt = 1000  # Steps from one evaluation to the next; 0 is at the end only.

    def build(self, parts: Parts) -> Evaluator:
        batch: list[Any] = []  # Read once, when it is first due.

        @jax.jit
        def mean_loss(params: Params, frozen: Params, batch: Any, level: jax.Array) -> jax.Array:
            total, totals = parts.loss(params, frozen, batch, jax.random.key(0), level)
            return total / totals.weight

        def evaluate(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
            if not batch:
                rows = local_rows(parts.mesh, parts.config.rows)
                loader = parts.held_out(rows)
                batch.append(global_batch(parts.mesh, next(loader), rows, parts.config.rows))
                loader.close()
            # One program for all levels; the host waits once.
            losses = [mean_loss(ema, frozen, batch[0], np.float32(t)) for t in parts.levels]
            values = [float(loss) for loss in jax.device_get(losses)]
            named = {f"held_out_loss/{t:.2f}": x for t, x in zip(parts.levels, values, strict=True)}
            mean = {"held_out_loss/mean": float(np.mean(values))}
            return Evaluation(mean | named if len(values) > 1 else mean)

        return Evaluator("held_out_loss", self.every, evaluate)


@dataclasses.dataclass(frozen=True)
class ClipsEvaluator:
    """Generates clips for held-out prompts, pictures them and measures them (in subclasses)."""

    prompts: NonNegativeInt = 96  # How many; 0 measures nothing.
    every: NonNegativeInt = 0  # Steps from one evaluation to the next; 0 is at the end only.

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
            return Evaluation(measure(clips), write_sheet(clips, directory / "samples.png"))

        return Evaluator("report", self.every, evaluate)


def write_sheet(clips: Sequence[np.ndarray], path: Path) -> Path:
    """Writes a picture of the first clips, once: rows of frames, or a square of still images."""
    if all(len(clip) == 1 for clip in clips):
        picture = grid(list(clips[:IMAGES_SHOWN]), 10 if len(clips) >= 30 else None)[0]
    else:
        picture = contact_sheet(clips[:CLIPS_SHOWN], FRAMES_SHOWN, SHEET_SCALE)
    if jax.process_index() == 0:
        write_png(path, picture)
    return path


# ---------------------------------------------------------------------------------------------------
# The progress bar, TensorBoard, and signals
# ---------------------------------------------------------------------------------------------------


class Progress:
    """Progress bar and TensorBoard's logs of a run; silent on all processes but the first.

    Rates are measured from one report to the next, the time of saves and pictures left out. Logs that
    cannot be written end no run: one warning, and logging stops.
    """

    def __init__(self, directory: Path, start: int, steps: int) -> None:
        self._first = self._logging = jax.process_index() == 0
        self._bar = tqdm(
            initial=start, total=steps, unit="step", disable=not self._first, dynamic_ncols=True
        )
        self._work: list[Work] = []
        self._clock, self._away = time.perf_counter(), 0.0
        self._peak = (peak_flops(jax.devices()[0].device_kind) or 0.0) * len(jax.devices())
        self._logs, self._writer, self._local = directory / "logs", None, None
        if self._first and is_remote(self._logs):
            # Storage has no appending: the files grow here, and are copied at each flush.
            self._local = tempfile.TemporaryDirectory(prefix="dit_jax-logs-")

    def _log(self, write: Callable[[Any], Any]) -> None:
        """Calls ``write`` with the writer, if there is one."""
        if not self._logging:
            return
        # Imported here, as it imports PyTorch if that is installed: seconds, for every other verb too.
        from tensorboardX import SummaryWriter

        try:
            if self._writer is None:
                self._writer = SummaryWriter(self._local.name if self._local else str(self._logs))
            write(self._writer)
        except Exception as error:  # Of the file system, or of a client of storage.
            self._logging = False
            text = f"logs cannot be written to {str(self._logs)!r} ({explain(error)})"
            print(f"warning: {text}: the run goes on without.", file=sys.stderr, flush=True)

    def advance(self, work: Work) -> None:
        """Counts one step that was begun. The work is this process's share of it."""
        self._work.append(work)
        self._bar.update()

    def away(self, seconds: float) -> None:
        """Leaves time that was not spent on steps out of the rates."""
        self._away += seconds

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes scalars and the rates since the last report. Waits for the step."""
        scalars = {name: float(value) for name, value in metrics.items()}
        seconds = time.perf_counter() - self._clock - self._away
        self._clock, self._away = time.perf_counter(), 0.0
        shown = {"loss": f"{scalars['loss']:.4f}"}
        if self._work:
            tokens, capacity, flops = np.sum(self._work, 0).tolist()
            rate = jax.process_count() / seconds
            scalars["tokens_per_second"] = tokens * rate
            scalars["packing_efficiency"] = tokens / capacity
            scalars["seconds_per_step"] = seconds / len(self._work)
            shown |= {"tok/s": f"{tokens * rate:.0f}", "packed": f"{tokens / capacity:.0%}"}
            if self._peak:
                scalars["mfu"] = flops * rate / self._peak
                shown["mfu"] = f"{scalars['mfu']:.1%}"
            self._work = []
        if scalars["skipped"]:
            shown["skipped"] = f"{scalars['skipped']:.0f}"
        self.scalars(step, scalars)
        self._bar.set_postfix(shown)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs scalars, such as those of an evaluator."""
        self._log(lambda writer: [writer.add_scalar(*item, step) for item in values.items()])

    def image(self, step: int, name: str, path: Path) -> None:
        """Logs a picture, the PNG file at ``path``."""

        def write(writer: Any) -> None:
            # Protocol buffers make their classes when they are imported; no stub says so.
            from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

            # The file as it is: tensorboardX would want Pillow to make it again.
            image = Summary.Image(encoded_image_string=path.read_bytes(), colorspace=3)
            writer.file_writer.add_summary(
                Summary(value=[Summary.Value(tag=name, image=image)]), step
            )

        self._log(write)

    def flush(self) -> None:
        """Puts on disk what was logged: a resumed run does not log again what it has saved."""
        self._log(lambda writer: writer.flush())
        for file in Path(self._local.name).iterdir() if self._local else ():
            self._log(lambda _, f=file: write_whole(self._logs / f.name, f.read_bytes()))

    def say(self, text: str) -> None:
        """Prints a line above the bar, once."""
        if self._first:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self.flush()
        self._log(lambda writer: writer.close())
        if self._local:
            self._local.cleanup()


class StopSignal:
    """Whether SIGTERM or SIGINT asked the run to stop; all processes learn it at the same step. A
    second signal stops at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        # With several processes JAX's own preemption service spreads a SIGTERM to all of them.
        self._several = jax.process_count() > 1
        if self._several:
            signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
        else:
            signal.signal(signal.SIGINT, self._note)
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; called by every process at every step."""
        if self._several and not self.name and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return self.name is not None
