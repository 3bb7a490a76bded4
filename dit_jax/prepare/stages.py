"""The stages of preparation that work on the host: files are examined, and clips are read again.

Files are dealt out in *parts* of so many in a row, whole, so that what is computed together is the same
however many machines there are, and so is every bit of the result.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.prepare.encoded import encode_video
from dit_jax.prepare.examining import Clip, ExamineConfig, FileReport, examine, read_clip
from dit_jax.prepare.listing import Item
from dit_jax.prepare.media import Probe
from dit_jax.prepare.pixels import DecodingConfig
from dit_jax.prepare.refusals import MACHINE_REASONS
from dit_jax.prepare.work import Logs, Progress, digest, pack, unpack
from dit_jax.prepare.workers import Outcome, WorkersConfig, run

AHEAD = 2
"""Clips that are read, for each process that reads, before they are asked for: they are large."""
TRIES = 3
"""Runs that try a file which time, memory, a disk or a crash kept them from reading. After these the
refusal stays: nothing else tells a decoder that crashes every time from one that is short of memory."""
BEAM_BATCH = 256
"""Files that a worker of Beam takes at a time."""
THUMBNAILS = 400
"""Of the first clips of a process, so many keep theirs."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """A clip that is prepared."""

    item: Item
    index: int
    """Among its file's clips, those counted that were rejected."""
    clip: Clip
    probe: Probe
    caption: str = ""
    """That came with its record."""

    @property
    def name(self) -> str:
        return f"{self.item.name}#{self.index}"

    @property
    def video_seconds(self) -> float:
        """How long it lasts; a picture has no duration."""
        return video_seconds(self.probe, (self.clip,))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        assert self.clip.geometry is not None
        crop = self.clip.geometry.crop
        return self.clip.frames, crop.height, crop.width


def share(total: int, size: int, index: int = 0, count: int = 1) -> list[range]:
    """The parts, of ``size`` files in a row, of the ``index``-th of ``count`` machines."""
    parts = [range(start, min(start + size, total)) for start in range(0, total, size)]
    return parts[index::count]


def fitting(config: ExamineConfig, strides: tuple[int, int, int]) -> ExamineConfig:
    """Clips in lengths and sizes that a codec of these strides takes as well."""
    time, high, wide = strides
    clips = config.clips
    fitted = dataclasses.replace(
        clips,
        stride=math.lcm(clips.stride, time),
        multiple=math.lcm(clips.multiple, high, wide),
    )
    return dataclasses.replace(config, clips=fitted)


class Examined:
    """The reports of files under one way to examine them, in a folder.

    A refusal that follows from the content is kept for ever. One for the machine's sake
    (``MACHINE_REASONS``) is kept as a try: each run tries the file once more, up to ``TRIES`` runs
    under the same limits of time and memory. After these it counts as if the content were the reason.
    """

    def __init__(self, work: Path, config: ExamineConfig, workers: WorkersConfig):
        self.config, self.workers = config, workers
        self.logs = Logs(work / "examined" / digest(config))
        self.limits = int(digest(workers.time_limit, workers.memory_limit), 16)

    def missing(self, items: Sequence[Item], tried: bool = False) -> list[Item]:
        """Those without a report; with ``tried`` also those that are worth another try."""
        self.logs.refresh()
        done = self.logs.count(_key(item) for item in items) > 0
        tries = self.logs.count(_key(item) ^ self.limits for item in items)
        done |= tries >= (TRIES if tried else 1)
        return [items[int(i)] for i in np.flatnonzero(~done)]

    def report(self, item: Item) -> FileReport:
        """What was found."""
        line = self.logs.latest(_key(item)) or self.logs.latest(_key(item) ^ self.limits)
        if line is None:
            raise KeyError(item.name)
        return unpack(line)

    def tries_left(self, item: Item, report: FileReport) -> bool:
        """Whether the next run tries a file again that this one could not read."""
        if report.refusal is None or report.refusal[0] not in MACHINE_REASONS:
            return False
        return int(self.logs.count([_key(item) ^ self.limits])[0]) < TRIES

    def kept(self, items: Iterable[Item]) -> Iterator[Kept]:
        """The clips of these files that no filter rejected, in order."""
        for item in items:
            report = self.report(item)
            for index, clip in enumerate(report.clips):
                if clip.rejection is None and report.probe is not None:
                    yield Kept(item, index, clip, report.probe, report.caption)


def _key(item: Item) -> int:
    return int(item.key, 16)


def video_seconds(probe: Probe | None, clips: Iterable[Clip]) -> float:
    """How long clips of a file last; pictures have no duration."""
    if probe is None or probe.kind == "image":
        return 0.0
    return sum(clip.seconds for clip in clips)


def report_line(item: Item, report: FileReport, limits: int, thumbnails: bool) -> bytes:
    """The line of a log that holds a report; one that is a try has a key of its own."""
    try_ = report.refusal is not None and report.refusal[0] in MACHINE_REASONS
    report = dataclasses.replace(report, path=item.name)
    return pack(f"{_key(item) ^ limits if try_ else _key(item):016x}", report, thumbnails)


def examine_one(
    job: tuple[Item, bool], config: ExamineConfig, limits: int
) -> tuple[bytes, int, int, float]:
    """Examines a file: (item, whether thumbnails are kept). Its line, its clips, those that are kept,
    and their seconds of video."""
    item, thumbnails = job
    report = examine(item.path, config)
    kept = [clip for clip in report.clips if clip.rejection is None]
    line = report_line(item, report, limits, thumbnails)
    return line, len(report.clips), len(kept), video_seconds(report.probe, kept)


def examine_into(
    logs: Logs,
    items: Sequence[Item],
    config: ExamineConfig,
    limits: int,
    workers: WorkersConfig,
) -> Iterator[tuple[int, float]]:
    """Examines files in child processes, and adds a line of each to a log.

    Yields the clips of each file that are kept, and their seconds of video.
    """
    clips = 0
    # Thumbnails are for the report's page, which shows the first clips.
    jobs = ((item, clips < THUMBNAILS) for item in items)
    outcomes = run(partial(examine_one, config=config, limits=limits), jobs, workers)
    for item, outcome in zip(items, outcomes, strict=True):
        line, count, kept, seconds = outcome.value or (b"", 0, 0, 0.0)
        if outcome.reason:
            refusal = outcome.reason, outcome.detail
            report = FileReport(item.name, refusal=refusal, cost=outcome.seconds)
            line = report_line(item, report, limits, False)
        logs.append(line)
        clips += count
        yield kept, seconds
    logs.close()


def examine_files(items: Sequence[Item], examined: Examined, progress: Progress) -> None:
    """Examines those of the files that have no report yet; every one has one afterwards."""
    wanted = examined.missing(items, tried=True)
    parts = (examined.logs, wanted, examined.config, examined.limits, examined.workers)
    with progress.stage("examine", len(wanted), "files") as add:
        for clips, seconds in examine_into(*parts):
            add(1, clips, seconds)
    examined.logs.refresh()


def _read(job: tuple[str, Clip], decoding: DecodingConfig, at: Any, encoded: bool) -> Any:
    frames = read_clip(*job, decoding)
    if encoded:
        return encode_video(frames, job[1].fps)
    return frames if at is None else frames[at(len(frames))]


def read_clips(
    kept: Iterable[Kept],
    decoding: DecodingConfig,
    workers: WorkersConfig,
    at: Any = None,
    encoded: bool = False,
) -> Iterator[Outcome]:
    """uint8 ``[t, h, w, 3]`` of every clip in order, or why there is none; of the frames ``at(t)``.

    With ``encoded`` an ``EncodedVideo``: every worker encodes, and little crosses the pipe.
    """
    function = partial(_read, decoding=decoding, at=at, encoded=encoded)
    jobs = ((one.item.path, one.clip) for one in kept)
    return run(function, jobs, dataclasses.replace(workers, ahead=AHEAD))


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Where Apache Beam runs: on this machine, on Dataflow, Flink or Spark.

    Its workers read the media and write logs of reports, so all must see both.
    """

    runner: str | None = None
    """DirectRunner, DataflowRunner, FlinkRunner, SparkRunner; None: Beam is not used."""
    options: tuple[str, ...] = ()
    """Of the pipeline, as its own flags: ``--project=...``."""


def examine_on_beam(
    items: Sequence[Item], examined: Examined, beam: BeamConfig, progress: Progress
) -> None:
    """``examine_files`` by a pipeline; in every worker the decoder is in a process of its own."""
    try:
        engine: Any = importlib.import_module("apache_beam")
        options: Any = importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError as error:
        raise ImportError(
            f"--beam.runner needs Apache Beam: pip install -e '.[beam]' ({error})"
        ) from error
    wanted = examined.missing(items, tried=True)
    with progress.stage("examine", len(wanted), "files") as add:
        if wanted:
            flags = options.PipelineOptions(list(beam.options))
            shared = (examined.logs.folder, examined.config, examined.limits, examined.workers)
            with engine.Pipeline(runner=beam.runner, options=flags) as pipeline:
                batches = engine.BatchElements(min_batch_size=1, max_batch_size=BEAM_BATCH)
                files = pipeline | engine.Create(wanted) | engine.Reshuffle()
                _ = files | batches | engine.Map(_examine_batch, shared)
        examined.logs.refresh()
        for item in wanted:
            report = examined.report(item)
            kept = [clip for clip in report.clips if clip.rejection is None]
            add(1, len(kept), video_seconds(report.probe, kept))


def _examine_batch(
    items: Sequence[Item], shared: tuple[Path, ExamineConfig, int, WorkersConfig]
) -> None:
    folder, config, limits, workers = shared
    for _ in examine_into(Logs(folder), items, config, limits, workers):
        pass
