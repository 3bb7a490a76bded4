"""The stages of preparation that work on the host: files are examined, and clips are read again.

Files are dealt out in *parts* of so many in a row, whole, so that what is computed together is the same
however many machines there are, and so is every bit of the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.preparation.decoding import DecodingConfig
from dit_jax.preparation.duplicates import near_duplicates
from dit_jax.preparation.examining import Clip, ExamineConfig, FileReport, examine, read_clip
from dit_jax.preparation.listing import Item
from dit_jax.preparation.media import Probe
from dit_jax.preparation.progress import Progress
from dit_jax.preparation.refusals import check_installed
from dit_jax.preparation.work import digest, file_name, read_report, write_report
from dit_jax.preparation.workers import Outcome, WorkersConfig, run
from dit_jax.video import EncodedVideo, encode_video

AHEAD = 2
"""Clips that are read, for each process that reads, before they are asked for: they are large."""


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
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        assert self.clip.geometry is not None
        crop = self.clip.geometry.crop
        return self.clip.frames, crop.height, crop.width


def share(items: Sequence[Item], size: int, index: int = 0, count: int = 1) -> list[list[Item]]:
    """The parts, of ``size`` files, of the ``index``-th of ``count`` machines."""
    parts = [list(items[start : start + size]) for start in range(0, len(items), size)]
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
    """The reports of files under one way to examine them, in a folder."""

    def __init__(self, work: Path, config: ExamineConfig):
        self.config = config
        self.folder = work / "examined" / digest(config)

    def place(self, item: Item) -> Path:
        """Where a file's report is, or will be."""
        return self.folder / file_name(item.name, item.key, ".json")

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Those without a report."""
        return [item for item in items if not self.place(item).exists()]

    def report(self, item: Item, thumbnails: bool = False) -> FileReport:
        """What was found."""
        return read_report(self.place(item), thumbnails)

    def kept(self, items: Iterable[Item]) -> list[Kept]:
        """The clips of these files that no filter rejected, in order."""
        found = []
        for item in items:
            report = self.report(item)
            for index, clip in enumerate(report.clips):
                if clip.rejection is None and report.probe is not None:
                    found.append(Kept(item, index, clip, report.probe, report.caption))
        return found


def examine_one(job: tuple[Item, str], config: ExamineConfig) -> tuple[int, float]:
    """Examines a file and stores its report: (item, place). Clips that are kept, and their seconds."""
    item, place = job
    report = dataclasses.replace(examine(item.path, config), path=item.name)
    write_report(place, report)
    kept = [clip for clip in report.clips if clip.rejection is None]
    return len(kept), sum(clip.seconds for clip in kept)


def examine_files(
    items: Sequence[Item], examined: Examined, workers: WorkersConfig, progress: Progress
) -> None:
    """Examines those of the files that have no report yet; every one has one afterwards."""
    check_installed()
    wanted = examined.missing(items)
    jobs = [(item, str(examined.place(item))) for item in wanted]
    with progress.stage("examine", len(jobs), "files") as bar:
        outcomes = run(partial(examine_one, config=examined.config), jobs, workers)
        for item, outcome in zip(wanted, outcomes, strict=True):
            if outcome.reason:
                refusal = outcome.reason, outcome.detail
                report = FileReport(item.name, refusal=refusal, cost=outcome.seconds)
                write_report(examined.place(item), report)
            clips, seconds = outcome.value or (0, 0.0)
            bar.add(1, clips, seconds)


def without_duplicates(
    kept: Sequence[Kept], distance: float | None
) -> tuple[list[Kept], dict[str, str]]:
    """The clips without those that show the same as an earlier one, and of these the earlier one."""
    if distance is None:
        return list(kept), {}
    near = near_duplicates(((one.name, one.clip.hashes) for one in kept), distance)
    left = [one for one in kept if one.name not in near]
    return left, {str(name): str(earlier) for name, (earlier, _) in near.items()}


def _read(job: tuple[str, Clip], decoding: DecodingConfig) -> np.ndarray:
    path, clip = job
    return read_clip(path, clip, decoding)


def _read_encoded(job: tuple[str, Clip], decoding: DecodingConfig) -> EncodedVideo:
    return encode_video(read_clip(*job, decoding), job[1].fps)


def _read_some(job: tuple[str, Clip], decoding: DecodingConfig, at: Any) -> np.ndarray:
    frames = read_clip(*job, decoding)
    return frames[at(len(frames))]


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
    function = partial(_read_encoded if encoded else _read, decoding=decoding)
    if at is not None:
        function = partial(_read_some, decoding=decoding, at=at)
    jobs = ((one.item.path, one.clip) for one in kept)
    return run(function, jobs, dataclasses.replace(workers, ahead=AHEAD))
