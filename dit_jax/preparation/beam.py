"""Files examined by Apache Beam, TFDS's engine: on this machine, on Dataflow, Flink or Spark.

Workers read the media and write reports in the places that are used otherwise, so all of them must see
both. In every worker the decoder is in a process of its own, as without Beam.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from dit_jax.preparation.examining import ExamineConfig, FileReport
from dit_jax.preparation.listing import Item
from dit_jax.preparation.progress import Progress
from dit_jax.preparation.stages import Examined, examine_one
from dit_jax.preparation.work import write_report
from dit_jax.preparation.workers import WorkersConfig, run

BATCH = 32
"""Files that a worker takes at a time."""


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Where Beam runs."""

    runner: str | None = None
    """DirectRunner, DataflowRunner, FlinkRunner, SparkRunner; None: Beam is not used."""
    options: tuple[str, ...] = ()
    """Of the pipeline, as its own flags: ``--project=...``."""


def examine_on_beam(
    items: Sequence[Item],
    examined: Examined,
    workers: WorkersConfig,
    beam: BeamConfig,
    progress: Progress,
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
    wanted = examined.missing(items)
    jobs = [(item, str(examined.place(item))) for item in wanted]
    work = partial(_examine_batch, config=examined.config, workers=workers)
    given = options.PipelineOptions(list(beam.options))
    with progress.stage("examine", len(jobs), "files") as bar:
        if jobs:
            with engine.Pipeline(runner=beam.runner, options=given) as pipeline:
                batches = engine.BatchElements(min_batch_size=1, max_batch_size=BATCH)
                files = pipeline | engine.Create(jobs) | engine.Reshuffle()
                _ = files | batches | engine.Map(work)
        for item in wanted:
            kept = [one for one in examined.report(item).clips if one.rejection is None]
            bar.add(1, len(kept), sum(one.seconds for one in kept))


def _examine_batch(
    jobs: Sequence[tuple[Item, str]], config: ExamineConfig, workers: WorkersConfig
) -> None:
    outcomes = run(partial(examine_one, config=config), jobs, workers)
    for (item, place), outcome in zip(jobs, outcomes, strict=True):
        if outcome.reason:
            refusal = outcome.reason, outcome.detail
            write_report(place, FileReport(item.name, refusal=refusal, cost=outcome.seconds))
