"""What a run shows (a progress bar, scalars, use of the hardware), and signals that end it."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter

# Protocol buffers make their classes when they are imported; no stub says so.
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

from dit_jax.files import explain, is_remote, write_whole
from dit_jax.parallel import peak_flops
from dit_jax.training.task import Work


class StopSignal:
    """A clean stop on SIGTERM and SIGINT: knows whether the run was asked to stop; all processes learn
    it at the same step. A second signal stops at once."""

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
        if (
            self._several
            and self.name is None
            and multihost_utils.reached_preemption_sync_point(step)
        ):
            self.name = "SIGTERM"
        return self.name is not None


class Events:
    """TensorBoard's files in a directory, local or on Cloud Storage.

    Storage has no appending: there the files grow in a temporary directory and are copied at each
    ``flush``. A directory that cannot be written ends no run: one warning, and logging stops.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: SummaryWriter | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        with self._unless_broken():
            local = str(directory)
            if is_remote(directory):
                self._scratch = tempfile.TemporaryDirectory(prefix="dit_jax-logs-")
                local = self._scratch.name
            self._writer = SummaryWriter(local)

    @contextlib.contextmanager
    def _unless_broken(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Of the file system, or of a client of storage.
            self._writer = None
            print(
                f"warning: logs cannot be written to {str(self._directory)!r} ({explain(error)}): "
                "the run goes on without them.",
                file=sys.stderr,
                flush=True,
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if self._writer:
                with self._unless_broken():
                    self._writer.add_scalar(name, value, step)

    def image(self, name: str, encoded: bytes, step: int) -> None:
        """Logs a picture, an encoded PNG."""
        if self._writer:
            # The file as it is: tensorboardX would want Pillow to make it again.
            image = Summary.Image(encoded_image_string=encoded, colorspace=3)
            summary = Summary(value=[Summary.Value(tag=name, image=image)])
            with self._unless_broken():
                assert self._writer.file_writer is not None
                self._writer.file_writer.add_summary(summary, step)

    def flush(self) -> None:
        """Puts everything logged so far where it belongs."""
        if self._writer:
            with self._unless_broken():
                self._writer.flush()
                if self._scratch:
                    for file in Path(self._scratch.name).iterdir():
                        write_whole(self._directory / file.name, file.read_bytes())

    def close(self) -> None:
        self.flush()
        if self._writer:
            with self._unless_broken():
                self._writer.close()
        if self._scratch:
            self._scratch.cleanup()


class Progress:
    """Progress bar and scalars of a run; silent on all processes but the first.

    Rates are measured from one report to the next, the time of saves and pictures left out.
    """

    def __init__(self, directory: Path, start: int, steps: int) -> None:
        self._first = jax.process_index() == 0
        self._bar = tqdm(
            initial=start, total=steps, unit="step", disable=not self._first, dynamic_ncols=True
        )
        self._events = Events(directory / "logs") if self._first else None
        self._work: list[Work] = []
        self._clock = time.perf_counter()
        self._away = 0.0
        devices = jax.devices()
        peak = peak_flops(devices[0].device_kind)
        self._peak = peak * len(devices) if peak else None

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
        if self._work:
            tokens, capacity, flops = (sum(part) for part in zip(*self._work, strict=True))
            share = jax.process_count()
            scalars["tokens_per_second"] = tokens * share / seconds
            scalars["packing_efficiency"] = tokens / capacity
            scalars["seconds_per_step"] = seconds / len(self._work)
            if self._peak:
                scalars["mfu"] = flops * share / seconds / self._peak
            self._work = []
        self.scalars(step, scalars)
        shown = {
            "loss": f"{scalars['loss']:.4f}",
            "tok/s": f"{scalars.get('tokens_per_second', 0):.0f}",
            "packed": f"{scalars.get('packing_efficiency', 0):.0%}",
        }
        if "mfu" in scalars:
            shown["mfu"] = f"{scalars['mfu']:.1%}"
        if scalars["skipped"]:
            shown["skipped"] = f"{scalars['skipped']:.0f}"
        self._bar.set_postfix(shown)

    def flush(self) -> None:
        """Puts on disk what was written: a resumed run does not write again what it has saved."""
        if self._events:
            self._events.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars, such as those of an evaluator."""
        if self._events:
            self._events.scalars(values, step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Logs a picture, the PNG file at ``path``."""
        if self._events:
            self._events.image(name, path.read_bytes(), step)

    def say(self, text: str) -> None:
        """Prints a line above the bar, once."""
        if self._first:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        if self._events:
            self._events.close()
