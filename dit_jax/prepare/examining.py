"""Everything about one file in one pass over its frames: clips, scores, hashes, or why it is refused.

Every frame is decoded once, and drawn small. Shots, black, change and hashes are measured on those;
one frame a second is measured in full size as well, for sharpness, bars and a thumbnail
(`measuring.py`). When a shot has ended, its clips are known. If their pixels are wanted, frames are
held until then in the size of clips, and given away with each clip that is kept. `read_clip` decodes
one clip alone, for what was not held, and gets the frames that were examined.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
from av.error import FFmpegError

from dit_jax.prepare.clips import ClipConfig, Geometry, Rect, bounds, fit, spans
from dit_jax.prepare.duplicates import hashed_frames, perceptual_hash
from dit_jax.prepare.measuring import FilterConfig, Rejection, Run, small_frame, verdict
from dit_jax.prepare.media import DecodingLog, Entry, Picture, Probe, pictures
from dit_jax.prepare.pixels import DecodingConfig
from dit_jax.prepare.refusals import Refused
from dit_jax.prepare.shots import ShotConfig
from dit_jax.prepare.timeline import on_grid

SAMPLES = 1.0  # Frames a second that are measured in full size.
SAME = 4  # Bits by which the hash of a frame may differ where it is decoded again.
MIN_CLEAN_FRAMES = 8  # Fewer that could be decoded of a damaged video are not worth keeping.
HELD = 1 << 28  # Bytes of frames of one shot, at most; of longer shots none are held.


@dataclasses.dataclass(frozen=True)
class ExamineConfig:
    """How files are examined."""

    decoding: DecodingConfig = DecodingConfig()
    shots: ShotConfig = ShotConfig()
    clips: ClipConfig = ClipConfig()
    filters: FilterConfig = FilterConfig()


@dataclasses.dataclass(frozen=True)
class Clip:
    """A part of a file in time and space, what was measured of it, and whether it is kept."""

    shot: int  # Of its file, from 0.
    start: int  # Its first frame, in grid indices of the file (`timeline.py`).
    frames: int
    fps: float
    # Seconds by the file's clock: frame i is the one nearest to `begin + i / fps`. Where time stamps
    # begin anew, the parts follow one another (`timeline.Clock`).
    begin: float
    geometry: Geometry | None  # None where the picture is too small; such a clip is rejected.
    scores: dict[str, float]
    rejection: Rejection | None
    hashes: tuple[int, ...]
    thumbnail: bytes  # JPEG of the sampled frame nearest to its middle, as displayed.
    # The `media.Entry` at which it is read again; None: the file is decoded from its start.
    entry: tuple[float, int | None, float] | None = None

    @property
    def seconds(self) -> float:
        """How long it lasts, its last frame included."""
        return self.frames / self.fps


Keep = Callable[[Clip, np.ndarray], None]
"""What takes a clip that no filter rejects, and its frames uint8 `[t, h, w, 3]`."""


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What became of a file: refused, or clips. Can be pickled."""

    path: str
    probe: Probe | None = None
    refusal: tuple[str, str] | None = None  # One of `refusals.REASONS`, and words.
    clips: tuple[Clip, ...] = ()
    shots: tuple[tuple[int, int], ...] = ()  # (first, last + 1) of each, in grid indices.
    frames: int = 0  # On the grid.
    notes: tuple[str, ...] = ()  # What was lost of a file that is used nevertheless.
    cost: float = 0.0  # Seconds of work.
    caption: str = ""  # Of a record that came with one; those of files are read elsewhere.


def examine(
    path: str | os.PathLike,
    config: ExamineConfig | None = None,
    keep: Keep | None = None,
    keep_seconds: float = math.inf,
) -> FileReport:
    """Decodes a file once; what is in the file never makes it raise.

    `keep` is given the clips of the first `keep_seconds` of work whose frames could be held.

    Errors: ImportError where the extra `prepare` is not installed.
    """
    begun, name = time.perf_counter(), os.fspath(path)
    cv2.setNumThreads(1)  # Its pictures are small here, and there is a worker a core.
    try:
        report = _examined(name, config or ExamineConfig(), keep, begun + keep_seconds)
    except Refused as refused:
        report = FileReport(name, refusal=(refused.reason, refused.detail))
    except MemoryError:  # Of Python, or of FFmpeg.
        report = FileReport(name, refusal=("out of memory", "while it was decoded"))
    except FFmpegError as error:
        words = f"{type(error).__name__}: {error.strerror or error}"
        report = FileReport(name, refusal=("cannot be decoded", words))
    return dataclasses.replace(report, cost=time.perf_counter() - begun)


def _examined(path: str, config: ExamineConfig, keep: Keep | None, until: float) -> FileReport:
    log = DecodingLog()
    decoded = pictures(path, config.decoding, log)
    first = next(decoded)
    probe, target = log.probe, config.clips.fps
    assert probe is not None
    if probe.kind == "image":
        keep = None  # To read it again takes less than a file of its own.
    fps = target if target and probe.kind == "video" and probe.fps > target * 1.01 else probe.fps
    # All frames on the grid are measured, in runs without gaps.
    step = max(min(round(fps / SAMPLES), bounds(fps, config.clips)[0]), 1)
    run, frames, held = Run(0, fps, config.shots, step, config.clips.area), 0, _Held()
    shots: list[tuple[int, int]] = []
    clips: list[Clip] = []

    def add_shots(ended: bool) -> None:
        """Adds what is complete of the run, and gives away the clips that are held."""
        for start, stop in run.shots(ended):
            new = list(_clips(run, len(shots), start, stop, first.time, probe, config))
            shots.append((start, stop))
            clips.extend(new)
            for clip in new if keep is not None else ():
                pixels = held.take(clip) if clip.rejection is None else None
                if keep is not None and pixels is not None:
                    keep(clip, pixels)
            held.drop(stop)

    for k, picture in on_grid(itertools.chain([first], decoded), fps, first.time):
        if k != run.stop:
            if frames:
                add_shots(ended=True)
            run = Run(k, fps, config.shots, step, config.clips.area)
        run.add(picture)
        frames += 1
        if keep is not None and time.perf_counter() < until:
            if frames == 1:  # As a clip would be that ended here.
                held.geometry = next(_clips(run, 0, k, k + 1, first.time, probe, config)).geometry
            held.add(k, picture)
        if frames % step == 0:
            add_shots(ended=False)
    add_shots(ended=True)
    if log.errors and probe.kind == "video" and frames < MIN_CLEAN_FRAMES:
        raise Refused("cannot be decoded", f"{frames} clean frames; {log.first_error}")
    if probe.timed:
        entries = (_entry(clip, log.entries) for clip in clips)
        clips = [dataclasses.replace(c, entry=e) for c, e in zip(clips, entries, strict=True)]
    notes = log.notes()
    lasts, declared = run.stop / fps, probe.declared_duration
    if declared and lasts < 0.9 * declared - 1 / fps and log.errors:
        notes.append(f"truncated: {lasts:.2f} s of {declared:.2f} s")
    return FileReport(
        path,
        probe,
        clips=tuple(clips),
        shots=tuple(shots),
        frames=frames,
        notes=tuple(notes),
        caption=log.caption,
    )


class _Held:
    """The latest frames by their grid indices, drawn as the latest clip shows them."""

    def __init__(self) -> None:
        self.geometry: Geometry | None = None
        self._frames: dict[int, np.ndarray] = {}
        self._latest: tuple[Picture, np.ndarray] | None = None
        self._full = False

    def add(self, k: int, picture: Picture) -> None:
        """Holds a frame; if there are too many, none of this shot."""
        if self.geometry is None or self._full:
            return
        if self._latest is None or self._latest[0] is not picture:
            self._latest = picture, _cut(picture, self.geometry)
        self._frames[k] = self._latest[1]
        self._full = len(self._frames) * self._latest[1].size > HELD
        if self._full:
            self._frames.clear()

    def take(self, clip: Clip) -> np.ndarray | None:
        """The frames of a clip, if all are held as it shows them."""
        indices = range(clip.start, clip.start + clip.frames)
        if clip.geometry == self.geometry and all(k in self._frames for k in indices):
            return np.stack([self._frames[k] for k in indices])
        if clip.geometry not in (None, self.geometry):
            self.geometry, self._latest = clip.geometry, None
            self._frames.clear()
        return None

    def drop(self, stop: int) -> None:
        """Forgets the frames before a grid index, where a shot begins."""
        self._frames = {k: frame for k, frame in self._frames.items() if k >= stop}
        self._full = False


def _cut(picture: Picture, geometry: Geometry) -> np.ndarray:
    """A picture as a clip shows it."""
    whole, crop = picture.pixels(geometry.scaled_height, geometry.scaled_width), geometry.crop
    return whole[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def _clips(
    run: Run, shot: int, start: int, stop: int, origin: float, probe: Probe, config: ExamineConfig
) -> Iterator[Clip]:
    """The clips of one shot, [start, stop) in grid indices; one that is rejected if it has none."""
    image, fps, rejection = probe.kind == "image", run.fps, None
    parts = [(0, 1)] if image else spans(stop - start, fps, config.clips)
    if not parts:
        rejection = Rejection("duration", (stop - start) / fps, config.clips.min_seconds)
        parts = [(0, stop - start)]
    elif image and not config.clips.images:
        rejection = Rejection("image", 1.0, 0.0)
    whole = Rect(0, 0, probe.height, probe.width)
    for offset, count in parts:
        scores, inner, hashes, thumbnail = run.measured(start + offset, count)
        part = inner if config.filters.crop_bars else whole
        geometry = fit(probe.height, probe.width, part, config.clips)
        short, long = sorted((part.height, part.width))
        bars = 1 - short * long / (probe.height * probe.width)
        scores |= {"side": float(short), "aspect": long / short, "bars": bars}
        why = rejection or verdict(scores, config.filters)
        if why is None and geometry is None:
            why = Rejection("resolution", float(short), float(config.clips.multiple))
        where = shot, start + offset, count, fps, origin + (start + offset) / fps
        yield Clip(*where, geometry, scores, why, hashes, thumbnail)


def _entry(clip: Clip, entries: Sequence[Entry]) -> Entry | None:
    """Where a clip is entered; in a file of several parts at a key frame of its own part."""
    begin, frame = clip.begin, 1 / clip.fps
    if len({one.offset for one in entries}) <= 1:
        return Entry(begin - 1.5 * frame)
    inside = [one for one in entries if one.time < begin + 0.5 * frame]
    part = [one for one in inside if one.offset == inside[-1].offset]
    before = [one for one in part if one.time < begin - 1.5 * frame] or part[:1]
    return before[-1] if before else None


def read_clip(
    path: str | os.PathLike, clip: Clip, config: DecodingConfig | None = None
) -> np.ndarray:
    """A clip's frames as they were examined: uint8 RGB [t, h, w, 3].

    Entered at a key frame before the clip; if other frames come (their hashes tell), the file is
    decoded from its start. Refused: if the file does not give it any more.
    """
    entry = Entry(*clip.entry) if clip.entry else None
    for start in dict.fromkeys((entry, None)):
        frames = _cropped(pictures(path, config, start=start), clip)
        if frames is not None:
            return frames
    raise Refused("cannot be decoded", f"frames from {clip.begin:.3f} s on are not as examined")


def _cropped(decoded: Iterator[Picture], clip: Clip) -> np.ndarray | None:
    """The clip of these pictures; None if they are not the ones that were examined."""
    assert clip.geometry is not None, "a clip without geometry is rejected"
    hashes = dict(zip(hashed_frames(clip.frames), clip.hashes, strict=True))
    origin, end = clip.begin - clip.start / clip.fps, clip.begin + (clip.frames - 0.5) / clip.fps
    grid = on_grid(decoded, clip.fps, origin, end)
    grid = itertools.dropwhile(lambda one: one[0] < clip.start, grid)
    frames: list[np.ndarray] = []
    latest = None
    for at, (k, picture) in enumerate(itertools.islice(grid, clip.frames)):
        known = hashes.get(at)
        if known is not None:
            known ^= perceptual_hash(small_frame(picture))
        if k != clip.start + at or (known or 0).bit_count() > SAME:
            return None
        frames.append(frames[-1] if picture is latest else _cut(picture, clip.geometry))
        latest = picture
    return np.stack(frames) if len(frames) == clip.frames else None
