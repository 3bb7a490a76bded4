"""Files examined by Apache Beam, TFDS's engine: on this machine, on Dataflow, Flink or Spark.

Workers read the media and write logs of reports where these are otherwise, so all of them must see
both. In every worker the decoder is in a process of its own, as without Beam.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_jax.prepare.examining import ExamineConfig
from dit_jax.prepare.listing import Item
from dit_jax.prepare.progress import Progress
from dit_jax.prepare.stages import Examined, examine_into, video_seconds
from dit_jax.prepare.work import Logs
from dit_jax.prepare.workers import WorkersConfig

BATCH = 256
"""Files that a worker takes at a time."""


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Where Beam runs."""

    runner: str | None = None
    """DirectRunner, DataflowRunner, FlinkRunner, SparkRunner; None: Beam is not used."""
    options: tuple[str, ...] = ()
    """Of the pipeline, as its own flags: ``--project=...``."""


def examine_on_beam(
    items: Sequence[Item], examined: Examined, beam: BeamConfig, progress: Progress
) -> None:
    """``stages.examine_files`` by a pipeline.

    Raises:
        ValueError: where the extra ``beam`` is not installed.
    """
    try:
        engine: Any = importlib.import_module("apache_beam")
        options: Any = importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError as error:
        raise ValueError(
            f"--beam.runner needs Apache Beam ({error}): pip install -e '.[beam]', or leave it out."
        ) from error
    wanted = examined.missing(items, tried=True)
    shared = (examined.logs.folder, examined.config, examined.limits, examined.workers)
    given = options.PipelineOptions(list(beam.options))
    with progress.stage("examine", len(wanted), "files") as bar:
        if wanted:
            with engine.Pipeline(runner=beam.runner, options=given) as pipeline:
                batches = engine.BatchElements(min_batch_size=1, max_batch_size=BATCH)
                files = pipeline | engine.Create(wanted) | engine.Reshuffle()
                _ = files | batches | engine.Map(_examine_batch, shared)
        examined.logs.refresh()
        for item in wanted:
            report = examined.report(item)
            kept = [clip for clip in report.clips if clip.rejection is None]
            bar.add(1, len(kept), video_seconds(report.probe, kept))


def _examine_batch(
    items: Sequence[Item], shared: tuple[Path, ExamineConfig, int, WorkersConfig]
) -> None:
    folder, config, limits, workers = shared
    for _ in examine_into(Logs(folder), items, config, limits, workers):
        pass
