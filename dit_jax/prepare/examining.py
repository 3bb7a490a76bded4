"""Everything about one file in one pass over its frames: clips, scores, hashes, or why it is refused.

Every frame is decoded once, and drawn once, small. Shots, black, change and hashes are measured on
those; one frame a second is measured in full size as well, for sharpness, bars, text and a thumbnail
(`measuring.py`). `read_clip` later decodes one clip alone, and gets the frames that were examined.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator

import cv2
import numpy as np
from av.error import FFmpegError

from dit_jax.prepare.clips import ClipConfig, Geometry, Rect, bounds, fit, spans
from dit_jax.prepare.decoding import (
    DecodingConfig,
    Entry,
    Losses,
    Picture,
    describe,
    nothing_decoded,
    pictures,
)
from dit_jax.prepare.duplicates import hashed_frames, perceptual_hash
from dit_jax.prepare.measuring import FilterConfig, Rejection, Run, small_frame, verdict
from dit_jax.prepare.media import Probe
from dit_jax.prepare.recorded import is_record, read_record
from dit_jax.prepare.refusals import Refused
from dit_jax.prepare.shots import ShotConfig
from dit_jax.prepare.stills import probe_image
from dit_jax.prepare.timeline import on_grid

SAMPLES = 1.0
"""Frames a second that are measured in full size."""
SAME = 4
"""Bits by which the hash of a frame may differ where it is decoded again."""


@dataclasses.dataclass(frozen=True)
class ExamineConfig:
    """How files are examined."""

    decoding: DecodingConfig = DecodingConfig()
    shots: ShotConfig = ShotConfig()
    clips: ClipConfig = ClipConfig()
    filters: FilterConfig = FilterConfig()
    min_clean_frames: int = 8
    """Of a damaged video, fewer frames than this that could be decoded are not worth keeping."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A part of a file in time and space, what was measured of it, and whether it is kept."""

    shot: int
    """Which shot of its file, from 0."""
    start: int
    """Its first frame, in grid indices of the file (`timeline.py`)."""
    frames: int
    fps: float
    begin: float
    """The time of the first frame by the file's clock, in seconds; frame i is the one nearest to
    `begin + i / fps`. Where time stamps begin anew, the parts follow one another (`timeline.Clock`)."""
    geometry: Geometry | None
    """None only where the picture is too small for one multiple; such a clip is rejected."""
    scores: dict[str, float]
    rejection: Rejection | None
    hashes: tuple[int, ...]
    thumbnail: bytes
    """JPEG of the sampled frame nearest to its middle, as displayed."""
    timed: bool = True
    """Whether one time stamp is of one frame of the file, so that it can be entered anywhere."""
    position: int | None = None
    """Where the file is entered instead, if its time stamps begin anew: the byte at which a key frame
    before the clip begins, if there is one."""
    offset: float = 0.0
    """Seconds by which the file's clock, its parts one after another, is ahead of the stamps there."""

    @property
    def seconds(self) -> float:
        """How long it lasts, its last frame included."""
        return self.frames / self.fps


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What became of a file: refused, or clips. Can be pickled."""

    path: str
    probe: Probe | None = None
    refusal: tuple[str, str] | None = None
    """(one of `refusals.REASONS`, words)."""
    clips: tuple[Clip, ...] = ()
    shots: tuple[tuple[int, int], ...] = ()
    """(first, last + 1) of each shot, in grid indices."""
    frames: int = 0
    """Frames on the grid."""
    notes: tuple[str, ...] = ()
    """What was lost of a file that is used nevertheless."""
    cost: float = 0.0
    """Seconds of work."""
    caption: str = ""
    """Of a record that came with one; those of files are read elsewhere."""


def examine(path: str | os.PathLike, config: ExamineConfig | None = None) -> FileReport:
    """Decodes a file once; what is in the file never makes it raise.

    Errors: ImportError where the extra `prepare` is not installed.
    """
    begun, name = time.perf_counter(), os.fspath(path)
    cv2.setNumThreads(1)  # Its pictures are small here, and there is a worker a core.
    try:
        report = _examined(name, config or ExamineConfig())
    except Refused as refused:
        report = FileReport(name, refusal=(refused.reason, refused.detail))
    except MemoryError:  # Of Python, or of FFmpeg.
        report = FileReport(name, refusal=("out of memory", "while it was decoded"))
    except FFmpegError as error:
        words = f"{type(error).__name__}: {error.strerror or error}"
        report = FileReport(name, refusal=("cannot be decoded", words))
    return dataclasses.replace(report, cost=time.perf_counter() - begun)


def _examined(path: str, config: ExamineConfig) -> FileReport:
    losses = Losses()
    decoded = pictures(path, config.decoding, losses)
    first = next(decoded, None)
    if first is None:
        raise nothing_decoded(losses)
    probe = describe(first, losses.timing) if losses.timing else probe_image(path)
    target = config.clips.fps
    fps = target if target and probe.kind == "video" and probe.fps > target * 1.01 else probe.fps
    # All frames on the grid are measured, in runs without gaps.
    step = max(min(round(fps / SAMPLES), bounds(fps, config.clips)[0]), 1)
    text = config.filters.max_text is not None
    runs: list[Run] = []
    for k, picture in on_grid(itertools.chain([first], decoded), fps, first.time):
        if not runs or k != runs[-1].stop:
            runs.append(Run(k, fps, config.shots, step, config.clips.area, text))
        runs[-1].add(picture)
    frames = sum(run.stop - run.start for run in runs)
    if losses.errors and probe.kind == "video" and frames < config.min_clean_frames:
        raise Refused("cannot be decoded", f"{frames} clean frames; {losses.first_error}")
    shots = [(run, *shot) for run in runs for shot in run.shots()]
    clips = [
        clip
        for i, (run, start, stop) in enumerate(shots)
        for clip in _clips(run, i, start, stop, fps, first.time, probe, config)
    ]
    if len({entry.offset for entry in losses.entries}) > 1:
        clips = [_entered(clip, losses.entries) for clip in clips]
    notes = losses.notes()
    lasts, declared = runs[-1].stop / fps, probe.declared_duration
    if declared and lasts < 0.9 * declared - 1 / fps and losses.errors:
        notes.append(f"truncated: {lasts:.2f} s of {declared:.2f} s")
    return FileReport(
        path,
        probe,
        clips=tuple(clips),
        shots=tuple((start, stop) for _, start, stop in shots),
        frames=frames,
        notes=tuple(notes),
        caption=read_record(path)[2] if is_record(path) else "",
    )


def _clips(
    run: Run,
    shot: int,
    start: int,
    stop: int,
    fps: float,
    origin: float,
    probe: Probe,
    config: ExamineConfig,
) -> Iterator[Clip]:
    """The clips of one shot, [start, stop) in grid indices; one that is rejected if it has none."""
    margin, image = config.clips.margin, probe.kind == "image"
    begin = start + (margin if start > run.start else 0)
    end = stop - (margin if stop < run.stop else 0)
    parts = [(0, 1)] if image else spans(end - begin, fps, config.clips)
    rejection = None
    if not parts:
        rejection = Rejection("duration", (end - begin) / fps, config.clips.min_seconds)
        begin, parts = start, [(0, stop - start)]
    elif image and not config.clips.images:
        rejection = Rejection("image", 1.0, 0.0)
    whole = Rect(0, 0, probe.height, probe.width)
    for offset, count in parts:
        first = begin + offset
        part = run.picture(first, count, whole) if config.filters.crop_bars else whole
        geometry = fit(probe.height, probe.width, part, config.clips)
        sides = sorted((part.height, part.width))
        scores = run.scores(first, count) | {
            "side": float(sides[0]),
            "aspect": sides[1] / sides[0],
            "bars": 1 - sides[0] * sides[1] / (probe.height * probe.width),
        }
        why = rejection or verdict(scores, config.filters)
        if why is None and geometry is None:
            why = Rejection("resolution", float(sides[0]), float(config.clips.multiple))
        yield Clip(
            shot=shot,
            start=first,
            frames=count,
            fps=fps,
            begin=origin + first / fps,
            geometry=geometry,
            scores=scores,
            rejection=why,
            hashes=run.hashes(first, count),
            thumbnail=run.thumbnail(first, count),
            timed=probe.timed,
        )


def _entered(clip: Clip, entries: list[Entry]) -> Clip:
    """The clip with the key frame of its part from which it is read, in a file of several parts."""
    inside = [entry for entry in entries if entry.time < clip.begin + 0.5 / clip.fps]
    part = [entry for entry in inside if entry.offset == inside[-1].offset]
    before = [entry for entry in part if entry.time < clip.begin - 1.5 / clip.fps] or part[:1]
    if not before:
        return dataclasses.replace(clip, timed=False)
    _, position, offset = before[-1]
    return dataclasses.replace(clip, timed=False, position=position, offset=offset)


def read_clip(
    path: str | os.PathLike, clip: Clip, config: DecodingConfig | None = None
) -> np.ndarray:
    """A clip's frames as they were examined: uint8 RGB [t, h, w, 3].

    Entered at a key frame before the clip; where the frames found there are others (their hashes
    tell), the file is decoded from its start.
    Errors: ValueError for a clip without geometry. Refused: if the file does not give it any more.
    """
    if clip.geometry is None:
        raise ValueError("the clip has no geometry: its picture is too small, and it is rejected")
    entry: float | Entry | None = clip.begin - 1.5 / clip.fps if clip.timed else None
    if clip.position is not None:
        entry = Entry(clip.begin, clip.position, clip.offset)
    for start in dict.fromkeys((entry, None)):
        frames = _cropped(pictures(path, config, start=start), clip)
        if frames is not None:
            return frames
    raise Refused("cannot be decoded", f"frames from {clip.begin:.3f} s on are not as examined")


def _cropped(found: Iterator[Picture], clip: Clip) -> np.ndarray | None:
    """The clip of these pictures; None if they are not the ones that it was made of."""
    assert clip.geometry is not None
    geometry, crop = clip.geometry, clip.geometry.crop
    origin, hashed = clip.begin - clip.start / clip.fps, hashed_frames(clip.frames)
    end = clip.begin + (clip.frames - 0.5) / clip.fps
    frames: list[np.ndarray] = []
    latest, drawn = None, np.empty(0)
    for k, picture in on_grid(found, clip.fps, origin, end):
        if k < clip.start:
            continue
        at = len(frames)
        if k != clip.start + at:
            return None
        if at in hashed:
            value = perceptual_hash(small_frame(picture))
            if (value ^ clip.hashes[hashed.index(at)]).bit_count() > SAME:
                return None
        if picture is not latest:
            whole = picture.pixels(geometry.scaled_height, geometry.scaled_width)
            drawn = whole[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            latest = picture
        frames.append(drawn)
        if len(frames) == clip.frames:
            return np.stack(frames)
    return None
