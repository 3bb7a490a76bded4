"""A file's pictures in order, as a player shows them, with their times: videos and images alike.

`frames` is the whole of it for a caller; `pictures` gives the same undrawn, so that each is drawn in
the sizes that are needed and no other, and `sampled` puts them on a grid of a constant rate
(`timeline.py`). Edit lists are respected (FFmpeg's demuxer applies them).

Interlaced frames are deinterlaced, one frame of each, and frames that are not marked so stay as they
are.

Damage: FFmpeg conceals it by painting over. Here a packet that cannot be decoded, or a frame that is
marked corrupt, ends what is used, until the next key frame; nothing in between is given.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
from av.error import EOFError as FFmpegEOFError
from av.error import FFmpegError
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import Interpolation

from dit_jax.files import refuse_if
from dit_jax.prepare.media import Probe, Timing, is_still, opened, rewound, scanned, unscanned
from dit_jax.prepare.recorded import is_record, read_record
from dit_jax.prepare.refusals import Refused
from dit_jax.prepare.rendering import EXACT, Renderer
from dit_jax.prepare.stills import images, probe_image
from dit_jax.prepare.timeline import Clock, on_grid


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How pictures are shown."""

    background: tuple[int, int, int] = (255, 255, 255)
    """What transparent pixels stand before, RGB in 0..255."""
    hdr: str = "tone map"
    """`tone map`, or `refuse`."""

    def __post_init__(self) -> None:
        colour = len(self.background) == 3 and all(0 <= x <= 255 for x in self.background)
        refuse_if(
            [
                (
                    self.hdr not in ("tone map", "refuse"),
                    f"hdr is {self.hdr!r}: it is 'tone map' or 'refuse'",
                ),
                (not colour, f"background is {self.background}: it is three numbers in 0..255"),
            ]
        )


LOOKS = "width height pixel_format transfer primaries matrix full_range hdr".split()
"""What a probe has of the renderer of the first picture."""


class Entry(NamedTuple):
    """A key frame, at which a file can be entered."""

    time: float
    """Seconds, as of `Picture`."""
    position: int
    """Of its first byte in the file."""
    offset: float
    """By how much time is ahead of the file's stamps."""


@dataclasses.dataclass
class Losses:
    """What a file did not give, or not as it is stored, counted while it is decoded."""

    timing: Timing | None = None
    """Its timing, once the first picture is there; images have none."""
    errors: int = 0
    """Packets or frames that could not be decoded."""
    dropped: int = 0
    """Frames left out because they were damaged, followed damage, or came out of order."""
    resized: int = 0
    """Frames left out because their size is not the first one's."""
    deinterlaced: int = 0
    """Frames marked as interlaced."""
    entries: list[Entry] = dataclasses.field(default_factory=list)
    """The key frames, in order."""
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
        if self.deinterlaced:
            said.append(f"{self.deinterlaced} frames deinterlaced")
        parts = len({entry.offset for entry in self.entries})
        if parts > 1:
            said.append(f"time stamps begin anew: {parts} parts")
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
        constant_rate=when.constant,
        frames=count,
        duration=span if count > 1 else 0.0,
        sample_aspect_ratio=when.aspect,
        rotation=renderer.orientation.rotation,
        mirrored=renderer.orientation.mirrored,
        timed=when.trusted,
        **{
            k: getattr(when, k) for k in ("container", "codec", "fps", "declared_duration", "audio")
        },
        **{k: getattr(renderer, k) for k in LOOKS},
    )


def pictures(
    path: str | os.PathLike,
    config: DecodingConfig | None = None,
    losses: Losses | None = None,
    start: float | Entry | None = None,
) -> Iterator[Picture]:
    """A file's pictures in order of time, of one size. What is lost is counted in `losses`.

    `start`: begin at this key frame, or at one before this time, in seconds; only for files that are
    known to have time stamps, for which nothing but the header is read first.
    Refused: as `media.opened`, and for what cannot be shown (HDR, if so configured).
    """
    config, losses = config or DecodingConfig(), Losses() if losses is None else losses
    if is_record(path):
        yield from _of_record(path, losses)
        return
    if is_still(path):
        yield from _drawn(path, config, losses)
        return
    with contextlib.ExitStack() as stack:
        container, stream = stack.enter_context(opened(path))
        if start is not None:
            when = unscanned(container, stream)
            with contextlib.suppress(FFmpegError):  # It cannot be entered there: from its start.
                if isinstance(start, Entry):
                    container.seek(start.position, stream=stream, unsupported_byte_offset=True)
                else:
                    container.seek(int(start / float(stream.time_base or 1)), stream=stream)
        else:
            when = scanned(container, stream)
            if not rewound(container, stream):
                stack.close()
                container, stream = stack.enter_context(opened(path))
        losses.timing = when
        clock = Clock(1 / when.fps, start.offset if isinstance(start, Entry) else 0.0)
        renderer = None
        for frame, time, gap in _progressive(_timed(container, stream, clock, losses), losses):
            renderer = renderer or Renderer(frame, when.aspect, config.background, config.hdr)
            yield Picture(time, gap, frame, renderer)


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


def nothing_decoded(losses: Losses) -> Refused:
    """The refusal of a file that gave no frame."""
    if losses.errors:
        return Refused("cannot be decoded", losses.first_error)
    return Refused("no frames", "the decoder gave none")


Decoded = tuple[av.VideoFrame, float, bool]
"""A frame, its time in seconds, and whether frames before it were lost."""


def _timed(container, stream, clock: Clock, losses: Losses) -> Iterator[Decoded]:
    """The frames of a stream in order of time, of the first one's size, damaged ones left out."""
    assert losses.timing is not None
    when, size, latest, gap = losses.timing, None, -np.inf, False
    keys: dict[int | None, int] = {}
    for count, (frame, lost) in enumerate(_decoded(container, stream, losses, keys)):
        size, gap = size or (frame.height, frame.width), gap or lost
        if not when.trusted or frame.pts is None:
            time = count / when.fps
        else:
            time, anew = clock.read(float(frame.time))
            gap |= anew
        if (frame.height, frame.width) != size:
            losses.resized, gap = losses.resized + 1, True
        elif time <= latest:
            losses.dropped += 1
        else:
            if frame.pts in keys:
                losses.entries.append(Entry(time, keys.pop(frame.pts), clock.offset))
            yield frame, time, gap
            latest, gap = time, False


def _progressive(frames: Iterator[Decoded], losses: Losses) -> Iterator[Decoded]:
    """The same, deinterlaced from the first frame on that is marked as interlaced, if there is one."""
    graph, waiting = None, collections.deque()

    def done() -> Iterator[Decoded]:
        with contextlib.suppress(BlockingIOError, FFmpegEOFError):
            while graph is not None:
                yield graph.vpull(), *waiting.popleft()

    for frame, time, gap in frames:
        if gap and graph is not None:  # What is on its other side does not mix.
            graph.vpush(None)
            yield from done()
            graph = None
        if graph is None and not frame.interlaced_frame:
            yield frame, time, gap
            continue
        losses.deinterlaced += frame.interlaced_frame
        graph = graph or _deinterlacer(frame)
        waiting.append((time, gap))
        graph.vpush(frame)
        yield from done()
    if graph is not None:
        graph.vpush(None)
        yield from done()


def _deinterlacer(frame: av.VideoFrame) -> Graph:
    """A graph of filters that makes one frame of an interlaced one, and leaves others as they are."""
    graph = Graph()
    graph.threads = 1
    graph.link_nodes(
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        ),
        graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"),
        graph.add("buffersink"),
    ).configure()
    return graph


def _decoded(
    container, stream, losses: Losses, keys: dict[int | None, int]
) -> Iterator[tuple[av.VideoFrame, bool]]:
    """(frame, whether frames before it were lost) of a stream, damaged ones left out.

    `keys`: where the positions in the file of key frames are put, by their time stamps.
    """
    packets, decoder = container.demux(stream), _decoder(stream)
    waiting = False
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except FFmpegError as error:  # The rest of the file cannot be read.
            losses.add(error.strerror or error)
            return
        if packet.is_keyframe and packet.pos is not None and packet.pos >= 0:
            keys[packet.pts] = packet.pos
        try:
            decoded = decoder.decode(packet)
        except MemoryError:
            raise
        except FFmpegError as error:
            losses.add(error.strerror or error)
            waiting = True
            continue
        for frame in decoded:
            if frame.is_corrupt:
                losses.add("a frame is marked as corrupt")
                waiting = True
            # Decoders of libvpx mark no frames, and have no delay.
            key = packet.is_keyframe if decoder.name in _ALPHA.values() else frame.key_frame
            if waiting and (frame.is_corrupt or not key):
                losses.dropped += 1
            else:
                yield frame, waiting
                waiting = False


_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read the transparency beside a picture, by codecs of which FFmpeg's own do not."""


def _decoder(stream) -> VideoCodecContext:
    """What decodes a stream, in this thread alone."""
    codec = stream.codec_context.codec.canonical_name
    if stream.metadata.get("alpha_mode") != "1" or codec not in _ALPHA:
        return stream.codec_context
    decoder = av.CodecContext.create(_ALPHA[codec], "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.thread_count = 1
    return decoder


def _drawn(path, config: DecodingConfig, losses: Losses) -> Iterator[Picture]:
    """An image's pictures in the form of decoded frames; damage after the first one ends them."""
    renderer = None
    try:
        for time, pixels in images(path, config.background):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            renderer = renderer or Renderer(frame)
            yield Picture(time, False, frame, renderer)
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
