"""The stages of preparation that work on the host: files are examined, and clips are read again."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.files import checking_input, json_bytes, write_whole
from dit_jax.prepare.clips import Geometry, Rect
from dit_jax.prepare.encoded import EncodedVideo, encode_video
from dit_jax.prepare.examining import Clip, ExamineConfig, FileReport, examine, read_clip
from dit_jax.prepare.listing import Item
from dit_jax.prepare.measuring import Rejection
from dit_jax.prepare.media import Probe
from dit_jax.prepare.pixels import DecodingConfig
from dit_jax.prepare.refusals import MACHINE_REASONS
from dit_jax.prepare.work import Logs, Progress, digest, file_name
from dit_jax.prepare.workers import Outcome, WorkersConfig, run

AHEAD = 2
"""Clips that are read, for each process that reads, before they are asked for: they are large."""
TRIES = 3
"""Runs that try a file which time, memory, a disk or a crash kept them from reading. After these the
refusal stays: nothing else tells a decoder that crashes every time from one that is short of memory."""
ENCODING = 0.25
"""Of the time limit of a file, after which no more of its clips are encoded while it is examined."""
BEAM_BATCH = 256
"""Files that a worker of Beam takes at a time."""
THUMBNAILS = 400
"""Of the first clips of a process, so many keep theirs."""
Add = Callable[[int, int, float], None]
"""Counts work that is done, as ``Progress.stage`` yields it."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """A clip, with the file that it is of."""

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
        return 0.0 if self.probe.kind == "image" else self.clip.seconds


def clips_of(item: Item, report: FileReport) -> Iterator[Kept]:
    """The clips of a file in order, those that a filter rejected too."""
    for index, clip in enumerate(report.clips):
        assert report.probe is not None
        yield Kept(item, index, clip, report.probe, report.caption)


class Examined:
    """The reports of files under one way to examine them, in a folder.

    A refusal that follows from the content is kept for ever. One for the machine's sake
    (``MACHINE_REASONS``) is kept as a try: each run tries the file once more, up to ``TRIES`` runs
    under the same limits of time and memory. After these it counts as if the content were the reason.
    """

    def __init__(
        self,
        work: Path,
        config: ExamineConfig,
        workers: WorkersConfig,
        strides: Any = (1, 1, 1),
        encoded: bool = False,
    ):
        """``strides``: of a codec, ``(t, h, w)``, that takes the clips' lengths and sizes as well.
        ``encoded``: kept clips are stored as encoded video, too, if their frames could be held."""
        clips, (time, *sides) = config.clips, strides
        stride, multiple = math.lcm(clips.stride, time), math.lcm(clips.multiple, *sides)
        clips = dataclasses.replace(clips, stride=stride, multiple=multiple)
        self.config, self.workers = dataclasses.replace(config, clips=clips), workers
        self.encoded, self.logs = encoded, Logs(work / "examined" / digest(self.config))
        self.limits = digest(workers.time_limit, workers.memory_limit)

    def missing(self, items: Iterable[Item], tried: bool = False) -> list[Item]:
        """Those without a report; with ``tried`` also those that are worth another try."""
        self.logs.refresh()
        most, count = TRIES if tried else 1, self.logs.count
        return [x for x in items if not count(x.key) and count(x.key + self.limits) < most]

    def report(self, item: Item) -> FileReport:
        """What was found in a file that is examined."""
        line = self.logs.latest(item.key) or self.logs.latest(item.key + self.limits)
        assert line is not None, item.name
        return _unpack(line)

    def tries_left(self, item: Item, report: FileReport) -> bool:
        """Whether the next run tries a file again that this one could not read."""
        return _is_try(report) and self.logs.count(item.key + self.limits) < TRIES

    def kept(self, items: Iterable[Item]) -> Iterator[Kept]:
        """The clips of these files that no filter rejected, in order."""
        clips = (one for item in items for one in clips_of(item, self.report(item)))
        return (one for one in clips if one.clip.rejection is None)


def _is_try(report: FileReport) -> bool:
    return report.refusal is not None and report.refusal[0] in MACHINE_REASONS


def report_line(item: Item, report: FileReport, limits: str, thumbnails: bool) -> bytes:
    """The line of a log that holds a report; one that is a try has a key of its own."""
    key = item.key + limits if _is_try(report) else item.key
    values = {"key": key, **dataclasses.asdict(report), "path": item.name}
    for clip in values["clips"]:
        clip["thumbnail"] = base64.b64encode(clip["thumbnail"] if thumbnails else b"").decode()
    return json_bytes(values) + b"\n"


def _unpack(line: bytes) -> FileReport:
    """The report of a line."""
    kinds = {"probe": Probe, "clips": Clip, "geometry": Geometry, "rejection": Rejection}
    kinds |= {"crop": Rect, "source": Rect}

    def restored(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(restored(name, one) for one in value)
        if name in kinds and value is not None:
            return kinds[name](**{field: restored(field, inner) for field, inner in value.items()})
        return base64.b64decode(str(value)) if name == "thumbnail" else value

    values = json.loads(line)
    del values["key"]
    return FileReport(**{name: restored(name, value) for name, value in values.items()})


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Where Apache Beam runs: on this machine, on Dataflow, Flink or Spark.

    Its workers read the media and write logs of reports, so all must see both.
    """

    runner: str | None = None
    """DirectRunner, DataflowRunner, FlinkRunner, SparkRunner; None: Beam is not used."""
    options: tuple[str, ...] = ()
    """Of the pipeline, as its own flags: ``--project=...``."""


def examine_files(
    items: Iterable[Item], examined: Examined, progress: Progress, beam: BeamConfig | None = None
) -> None:
    """Examines those of the files that have no report yet; every one has one afterwards."""
    wanted = examined.missing(items, tried=True)
    shared = (
        examined.logs.folder,
        examined.config,
        examined.limits,
        examined.workers,
        examined.encoded,
    )
    with progress.stage("examine", len(wanted), "files") as add:
        if beam is None or beam.runner is None:
            reports = _examine(wanted, *shared)
        else:
            _examine_on_beam(wanted, shared, beam)
            examined.logs.refresh()
            reports = map(examined.report, wanted)
        for item, report in zip(wanted, reports, strict=True):
            kept = [one for one in clips_of(item, report) if one.clip.rejection is None]
            add(1, len(kept), sum(one.video_seconds for one in kept))
    examined.logs.refresh()


def _examine(
    items: Sequence[Item],
    folder: Path,
    config: ExamineConfig,
    limits: str,
    workers: WorkersConfig,
    encoded: bool,
) -> Iterator[FileReport]:
    """Examines files in child processes, and adds each report to a log."""
    clips, seconds = 0, workers.time_limit * ENCODING if encoded else 0.0
    function = partial(_examine_one, config=config, folder=folder, seconds=seconds)
    outcomes = run(function, ((item.path, item.key) for item in items), workers)
    with contextlib.closing(Logs(folder)) as logs:
        for item, outcome in zip(items, outcomes, strict=True):
            refusal = outcome.reason, outcome.detail
            report = outcome.value or FileReport(item.name, refusal=refusal, cost=outcome.seconds)
            # Thumbnails are for the report's page, which shows the first clips.
            logs.append(report_line(item, report, limits, thumbnails=clips < THUMBNAILS))
            clips += len(report.clips)
            yield report


def _examine_one(
    job: tuple[str, str], config: ExamineConfig, folder: Path, seconds: float
) -> FileReport:
    """Examines a file, and stores its clips as encoded video in the first so many seconds."""
    path, key = job

    def keep(clip: Clip, frames: np.ndarray) -> None:
        write_whole(encoded_place(folder, key, clip), encode_video(frames, clip.fps).data)

    return examine(path, config, keep if seconds else None, seconds)


def encoded_place(folder: Path, key: str, clip: Clip) -> Path:
    """Where a clip of a file is stored as encoded video; ``folder``: of the logs."""
    made_of = digest(key, clip.start, clip.frames, clip.geometry)
    return folder / "clips" / file_name(str(clip.start), made_of, ".mkv")


def _examine_on_beam(items: Sequence[Item], shared: tuple[Any, ...], beam: BeamConfig) -> None:
    """``_examine`` by a pipeline; in every worker the decoder is in a process of its own."""
    if items:
        with checking_input("--beam.runner needs Apache Beam", "pip install -e '.[beam]'"):
            engine: Any = importlib.import_module("apache_beam")
            options: Any = importlib.import_module("apache_beam.options.pipeline_options")
        flags = options.PipelineOptions(list(beam.options))
        with engine.Pipeline(runner=beam.runner, options=flags) as pipeline:
            files = pipeline | engine.Create(items) | engine.Reshuffle()
            batches = files | engine.BatchElements(min_batch_size=1, max_batch_size=BEAM_BATCH)
            _ = batches | engine.FlatMap(_examine, *shared)


def read_clips(
    kept: Iterable[Kept], examined: Examined, at: Any = None, encoded: bool = False
) -> Iterator[Outcome]:
    """uint8 ``[t, h, w, 3]`` of every clip in order, or why there is none; of the frames ``at(t)``.

    With ``encoded``, the folder of the examined files' logs, an ``EncodedVideo``: the one that was
    stored there, or else every worker encodes, and little crosses the pipe.
    """
    folder = examined.logs.folder if encoded else None
    function = partial(_read, decoding=examined.config.decoding, at=at, encoded=folder)
    jobs = ((one.item.path, one.item.key, one.clip) for one in kept)
    return run(function, jobs, examined.workers, AHEAD)


def _read(
    job: tuple[str, str, Clip], decoding: DecodingConfig, at: Any, encoded: Path | None
) -> Any:
    path, key, clip = job
    if encoded is not None and (place := encoded_place(encoded, key, clip)).exists():
        assert clip.geometry is not None
        crop = clip.geometry.crop
        return EncodedVideo(place.read_bytes(), (clip.frames, crop.height, crop.width))
    frames = read_clip(path, clip, decoding)
    if encoded is not None:
        return encode_video(frames, clip.fps)
    return frames if at is None else frames[at(len(frames))]
