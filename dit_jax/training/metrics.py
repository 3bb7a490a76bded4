"""What a run tells while it goes: a progress bar, scalars, and how well the hardware is used."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

# Protocol buffers make their classes when they are imported; no stub says so.
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

from dit_jax.parallel.topologies import peak_flops
from dit_jax.training.task import Work


class Progress:
    """Progress bar and scalars of a run; silent on all processes but the first.

    Rates are measured from one report to the next, the time of saves and pictures left out.
    """

    def __init__(self, directory: Path, start: int, steps: int) -> None:
        self._first = jax.process_index() == 0
        self._bar = tqdm(
            initial=start, total=steps, unit="step", disable=not self._first, dynamic_ncols=True
        )
        self._writer = SummaryWriter(str(directory / "logs")) if self._first else None
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
        if self._writer:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
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
        if self._writer:
            self._writer.flush()

    def scalars(self, step: int, values: dict[str, float], prefix: str) -> None:
        """Writes other scalars, such as a final report."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Logs a picture, the PNG file at ``path``."""
        if self._writer:
            # The file as it is: tensorboardX would want Pillow to make it again.
            encoded = Summary.Image(encoded_image_string=path.read_bytes(), colorspace=3)
            summary = Summary(value=[Summary.Value(tag=name, image=encoded)])
            writer = self._writer.file_writer
            assert writer is not None
            writer.add_summary(summary, step)

    def say(self, text: str) -> None:
        """Prints a line above the bar, once."""
        if self._first:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()
