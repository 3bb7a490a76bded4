"""A file's pictures in order, as a player shows them, with their times: videos and images alike.

`frames` is the whole of it for a caller; `pictures` gives the same undrawn, so that each is drawn in
the sizes that are needed and no other, and `sampled` puts them on a grid of a constant rate
(`timeline.py`). Edit lists are respected (FFmpeg's demuxer applies them).

Damage: FFmpeg conceals it by painting over. Here a packet that cannot be decoded, or a frame that is
marked corrupt, ends what is used, until the next key frame; nothing in between is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation

from dit_jax.preparation.media import (
    Probe,
    Timing,
    is_still,
    opened,
    rewound,
    scanned,
    unscanned,
)
from dit_jax.preparation.recorded import is_record, read_record
from dit_jax.preparation.refusals import Refused, extra
from dit_jax.preparation.rendering import EXACT, Renderer
from dit_jax.preparation.stills import images, probe_image
from dit_jax.preparation.timeline import on_grid


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How pictures are shown."""

    background: tuple[int, int, int] = (255, 255, 255)
    """What transparent pixels stand before, RGB in 0..255."""
    hdr: str = "tone map"
    """`tone map`, or `refuse`."""

    def __post_init__(self) -> None:
        if self.hdr not in ("tone map", "refuse"):
            raise ValueError(f"hdr is {self.hdr!r}: it is 'tone map' or 'refuse'")
        if len(self.background) != 3 or not all(0 <= x <= 255 for x in self.background):
            raise ValueError(f"background is {self.background}: it is three numbers in 0..255")


@dataclasses.dataclass
class Losses:
    """What a file did not give, counted while it is decoded."""

    timing: Timing | None = None
    """Its timing, once the first picture is there; images have none."""
    errors: int = 0
    """Packets or frames that could not be decoded."""
    dropped: int = 0
    """Frames left out because they were damaged, followed damage, or came out of order."""
    resized: int = 0
    """Frames left out because their size is not the first one's."""
    first_error: str = ""

    def add(self, error: object) -> None:
        """Counts an error, the first one in words."""
        self.errors += 1
        self.first_error = self.first_error or str(error)

    def notes(self) -> list[str]:
        """What is to be said about it, a line each."""
        said = []
        if self.errors:
            said.append(f"{self.errors} errors in decoding, the first: {self.first_error}")
        if self.dropped:
            said.append(f"{self.dropped} frames left out after damage or out of order")
        if self.resized:
            said.append(f"{self.resized} frames left out: their size is another")
        return said


class Picture(NamedTuple):
    """A decoded frame that is not drawn yet."""

    time: float
    """Seconds."""
    after_gap: bool
    """Frames before it were lost."""
    frame: av.VideoFrame
    renderer: Renderer

    def pixels(
        self,
        height: int | None = None,
        width: int | None = None,
        how: Interpolation = EXACT,
    ) -> np.ndarray:
        """The displayed picture, uint8 RGB [height, width, 3]; by default of its own size."""
        return self.renderer.pixels(self.frame, height, width, how)

    def lightness(self, every: int = 1) -> np.ndarray:
        """The displayed picture's luma, uint8 [h, w], not stretched: see `Renderer.lightness`."""
        return self.renderer.lightness(self.frame, every)


def probe(path: str | os.PathLike, config: DecodingConfig | None = None) -> Probe:
    """What a file's pictures are. Decodes the first one: only the decoder knows how it looks.

    Refused: every reason that can be told from that.
    """
    if not is_record(path) and is_still(path):
        _check_heif()
        return probe_image(path)
    losses = Losses()
    first = next(pictures(path, config, losses), None)
    if first is None or losses.timing is None:
        raise nothing_decoded(losses)
    return describe(first, losses.timing)


def describe(first: Picture, when: Timing) -> Probe:
    """A video's probe, by its first picture and its packets."""
    renderer = first.renderer
    count = len(when.times)
    span = float(when.times[-1] - when.times[0]) + 1 / when.fps if count else 0.0
    return Probe(
        kind="video" if count > 1 else "image",
        container=when.container,
        codec=when.codec,
        width=renderer.width,
        height=renderer.height,
        fps=when.fps,
        constant_rate=when.constant,
        frames=count,
        duration=span if count > 1 else 0.0,
        declared_duration=when.declared_duration,
        pixel_format=renderer.pixel_format,
        sample_aspect_ratio=when.aspect,
        rotation=renderer.orientation.rotation,
        mirrored=renderer.orientation.mirrored,
        transfer=renderer.transfer,
        primaries=renderer.primaries,
        matrix=renderer.matrix,
        full_range=renderer.full_range,
        hdr=renderer.hdr,
        timed=when.trusted,
        audio=when.audio,
    )


def pictures(
    path: str | os.PathLike,
    config: DecodingConfig | None = None,
    losses: Losses | None = None,
    start: float | None = None,
) -> Iterator[Picture]:
    """A file's pictures in order of time, of one size. What is lost is counted in `losses`.

    `start`: begin at a key frame before this time, in seconds; only for files that are known to have
    time stamps, for which nothing but the header is read first.
    Refused: as `media.opened`, and for what cannot be shown (HDR, if so configured).
    """
    config, losses = config or DecodingConfig(), Losses() if losses is None else losses
    if is_record(path):
        yield from _of_record(path, losses)
        return
    if is_still(path):
        _check_heif()
        yield from _drawn(path, config, losses)
        return
    with contextlib.ExitStack() as stack:
        container, stream = stack.enter_context(opened(path))
        if start is not None:
            when = unscanned(container, stream)
            with contextlib.suppress(FFmpegError):  # It cannot be entered there: from its start.
                container.seek(int(start / float(stream.time_base or 1)), stream=stream)
        else:
            when = scanned(container, stream)
            if not rewound(container, stream):
                stack.close()
                container, stream = stack.enter_context(opened(path))
        losses.timing = when
        aspect = when.aspect
        renderer, latest, gap = None, -np.inf, False
        for count, (frame, after_gap) in enumerate(_decoded(container, stream, losses)):
            gap |= after_gap
            renderer = renderer or Renderer(frame, aspect, config.background, config.hdr)
            counted = count / when.fps
            time = counted if not when.trusted or frame.pts is None else float(frame.time)
            if (frame.height, frame.width) != renderer.stored:
                losses.resized, gap = losses.resized + 1, True
            elif time <= latest:
                losses.dropped += 1
            else:
                yield Picture(time, gap, frame, renderer)
                latest, gap = time, False


def sampled(
    path: str | os.PathLike,
    fps: float | None = None,
    config: DecodingConfig | None = None,
    losses: Losses | None = None,
) -> Iterator[tuple[int, Picture]]:
    """(k, picture) on a grid of `fps` frames per second from the file's first frame on.

    By default the file's own rate, where every frame of a constant rate appears once. `losses` counts
    what is lost.
    """
    losses = losses or Losses()
    found = pictures(path, config, losses)
    first = next(found, None)
    if first is not None:
        rate = fps or (losses.timing or probe_image(path)).fps
        yield from on_grid(itertools.chain([first], found), rate, first.time)


def frames(
    path: str | os.PathLike, fps: float | None = None, config: DecodingConfig | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, uint8 RGB [h, w, 3]) of a file's displayed frames at a constant rate.

    `fps`: by default the file's own. Refused: whatever keeps the file from being decoded at all.
    """
    latest, drawn = None, None
    for _, picture in sampled(path, fps, config):
        if picture is not latest or drawn is None:
            latest, drawn = picture, picture.pixels()
        yield picture.time, drawn


def nothing_decoded(losses: Losses) -> Refused:
    """The refusal of a file that gave no frame."""
    if losses.errors:
        return Refused("cannot be decoded", losses.first_error)
    return Refused("no frames", "the decoder gave none")


def _decoded(container, stream, losses: Losses) -> Iterator[tuple[av.VideoFrame, bool]]:
    """(frame, whether frames before it were lost) of a stream, damaged ones left out."""
    packets = container.demux(stream)
    waiting = False
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (FFmpegError, OSError) as error:  # The rest of the file cannot be read.
            losses.add(error.strerror or error)
            return
        try:
            decoded = packet.decode()
        except FFmpegError as error:
            losses.add(error.strerror or error)
            waiting = True
            continue
        for frame in decoded:
            if frame.is_corrupt:
                losses.add("a frame is marked as corrupt")
                waiting = True
            if waiting and (frame.is_corrupt or not frame.key_frame):
                losses.dropped += 1
            else:
                yield frame, waiting
                waiting = False


def _drawn(path, config: DecodingConfig, losses: Losses) -> Iterator[Picture]:
    """An image's pictures in the form of decoded frames; damage after the first one ends them."""
    renderer = None
    try:
        for still in images(path, config.background):
            frame = av.VideoFrame.from_ndarray(still.pixels, format="rgb24")
            renderer = renderer or Renderer(frame)
            yield Picture(still.time, False, frame, renderer)
    except Refused as refused:
        if renderer is None:
            raise
        losses.add(refused)


def _of_record(path: str | os.PathLike, losses: Losses) -> Iterator[Picture]:
    """The pictures of a record of a TFDS builder."""
    video, fps, _ = read_record(os.fspath(path))
    fps = fps if len(video) > 1 else 1.0
    times = np.arange(len(video)) / fps
    losses.timing = Timing(times, fps, True, True, "tfds", "records", 1.0, None, False)
    renderer = None
    for time, pixels in zip(times, video, strict=True):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        renderer = renderer or Renderer(frame)
        yield Picture(float(time), False, frame, renderer)


def _check_heif() -> None:
    """Lets Pillow read HEIC where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        extra("pillow_heif").register_heif_opener()
