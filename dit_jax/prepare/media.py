"""What a file is, and its pictures in order with their times: videos, images and records alike.

A file's kind is that of its content, not its name: still images (and GIF, WebP, APNG) are Pillow's,
everything else FFmpeg's through PyAV. Frames that are marked as interlaced are deinterlaced, one frame
of each. FFmpeg conceals damage by painting over; here a packet that cannot be decoded, or a frame that
is marked corrupt, ends what is used, until the next key frame.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import EOFError as FFmpegEOFError
from av.error import FFmpegError
from av.filter import Graph
from av.stream import Disposition

from dit_jax.prepare.pixels import DecodingConfig, Renderer
from dit_jax.prepare.recorded import is_record, read_record
from dit_jax.prepare.refusals import Refused, refuse_file
from dit_jax.prepare.stills import TURNS, opened_image, schedule, to_rgb
from dit_jax.prepare.timeline import Clock, native_rate, on_grid

NOT_MEDIA = {"tty", "hls", "dash", "concat", "image2", "sdp", "rtsp", "lavfi", "vobsub", "ass"}
"""Formats of FFmpeg that name other files, or that take text for pictures."""
_BOXES = b"ftyp moov mdat wide free skip styp".split()
_HEIF = b"heic heix heim heis hevc hevx mif1 msf1 avif avis".split()
_STILL = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
_STILL += (b"8BPS", b"\0\0\0\x0cjP  ", b"qoif")
_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read the transparency beside a picture, by codecs of which FFmpeg's own do not."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is known of a file by its packets and its first picture."""

    container: str
    codec: str
    fps: float  # Of the grid that the file is sampled on; 1 for an image.
    constant_rate: bool
    frames: int  # By the file's index.
    duration: float  # Seconds, the last frame included; 0 for an image.
    declared_duration: float | None = None  # What the file says itself.
    timed: bool = True  # Whether frames have time stamps of their own; else they are counted.
    sample_aspect_ratio: float = 1.0  # Width of a stored pixel over its height.
    kind: str = "video"  # Or `image`, of one picture.
    width: int = 0  # As displayed: turned, and with square pixels.
    height: int = 0
    rotation: int = 0  # Degrees clockwise from the stored picture: 0, 90, 180 or 270.
    hdr: str = ""  # `pq`, `hlg`, or empty.


class Entry(NamedTuple):
    """A key frame, at which a file can be entered."""

    time: float  # Seconds, as of `Picture`.
    position: int  # Of its first byte in the file.
    offset: float  # By how much time is ahead of the file's stamps.


@dataclasses.dataclass
class DecodingLog:
    """What a file is, and what it did not give, or not as it is stored; grows while it is decoded."""

    probe: Probe | None = None  # Once the first picture is there.
    caption: str = ""  # Of a record that came with one.
    errors: int = 0  # Packets or frames that could not be decoded.
    first_error: str = ""
    dropped: int = 0  # Frames that were damaged, followed damage, or came out of order.
    resized: int = 0  # Frames left out because their size is not the first one's.
    deinterlaced: int = 0
    entries: list[Entry] = dataclasses.field(default_factory=list)  # In order.

    def add(self, error: object) -> None:
        """Counts an error, the first one in words."""
        self.errors += 1
        self.first_error = self.first_error or getattr(error, "strerror", None) or str(error)

    @property
    def parts(self) -> int:
        """In how many parts time stamps begin anew, as far as key frames tell."""
        return len({entry.offset for entry in self.entries})

    def notes(self) -> list[str]:
        """What is to be said about it, a line each."""
        lines = {
            f"{self.errors} errors in decoding, the first: {self.first_error}": self.errors,
            f"{self.dropped} frames left out after damage or out of order": self.dropped,
            f"{self.resized} frames left out: their size is another": self.resized,
            f"{self.deinterlaced} frames deinterlaced": self.deinterlaced,
            f"time stamps begin anew: {self.parts} parts": self.parts > 1,
        }
        return [line for line, due in lines.items() if due]


class Picture(NamedTuple):
    """A decoded frame that is not drawn yet, so that it is drawn in the sizes that are needed alone."""

    time: float  # Seconds.
    after_gap: bool  # Frames before it were lost.
    frame: av.VideoFrame
    renderer: Renderer

    def pixels(self, height: int | None = None, width: int | None = None) -> np.ndarray:
        """The displayed picture, uint8 RGB [height, width, 3]; by default of its own size."""
        return self.renderer.pixels(self.frame, height, width)

    def lightness(self, height: int | None = None, width: int | None = None) -> np.ndarray:
        """The displayed picture's luma, uint8 [height, width] over the full range."""
        return self.renderer.lightness(self.frame, height, width)


Decoded = tuple[av.VideoFrame, float, bool]
"""A frame, its time in seconds, and whether frames before it were lost."""


def pictures(
    path: str | os.PathLike,
    config: DecodingConfig | None = None,
    log: DecodingLog | None = None,
    start: float | Entry | None = None,
) -> Iterator[Picture]:
    """A file's pictures in order of time, of one size, and in `log` what it is and what is lost.

    `start`: begin at this key frame, or at one before this time, in seconds; only for files that are
    known to have time stamps. Refused: what cannot be opened, decoded or shown.
    """
    config, log = config or DecodingConfig(), log or DecodingLog()
    renderer = turn = None
    try:
        with contextlib.ExitStack() as stack:
            if is_record(path):
                probe, frames = _record(os.fspath(path), log)
            elif _is_still(path):
                image = stack.enter_context(opened_image(path))
                turn = TURNS.get(image.getexif().get(0x0112, 1), (False, 0))
                probe, frames = _image(image, config)
            else:
                probe, frames = _video(path, stack, log, start)
            for frame, time, gap in frames:
                if renderer is None:
                    renderer = Renderer(frame, config, probe.sample_aspect_ratio, turn)
                    looks = ("width", "height", "rotation", "hdr")
                    kind = "video" if probe.frames > 1 else "image"
                    values = {name: getattr(renderer, name) for name in looks}
                    log.probe = dataclasses.replace(probe, kind=kind, **values)
                yield Picture(time, gap, frame, renderer)
    except Refused as refused:
        if renderer is None or refused.reason == "cannot be read":
            raise
        log.add(refused)  # An animation that is damaged further on.
    if renderer is None and start is None:
        reason = "cannot be decoded" if log.errors else "no frames"
        raise Refused(reason, log.first_error or "the decoder gave none")


def sampled(
    path: str | os.PathLike, fps: float | None = None, config: DecodingConfig | None = None
) -> Iterator[tuple[int, Picture]]:
    """(k, picture) on a grid of `fps` frames per second (by default the file's own)."""
    log = DecodingLog()
    decoded = pictures(path, config, log)
    first = next(decoded)
    assert log.probe is not None
    yield from on_grid(itertools.chain([first], decoded), fps or log.probe.fps, first.time)


def _record(path: str, log: DecodingLog) -> tuple[Probe, Iterator[Decoded]]:
    video, fps, log.caption = read_record(path)
    count = len(video)
    fps, seconds = (fps, count / fps) if count > 1 else (1.0, 0.0)
    frames = (
        (_rgb_frame(np.ascontiguousarray(pixels)), i / fps, False) for i, pixels in enumerate(video)
    )
    return Probe("tfds", "records", fps, True, count, seconds), frames


def _image(image: Any, config: DecodingConfig) -> tuple[Probe, Iterator[Decoded]]:
    first, times, seconds = schedule(image)

    def frames() -> Iterator[Decoded]:
        for i, time in enumerate(times, first):
            if i:
                image.seek(i)
            yield _rgb_frame(to_rgb(image, config.background)), time, False

    name = image.format.lower()
    return Probe(name, name, *native_rate(np.array(times)), len(times), seconds), frames()


def _rgb_frame(pixels: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(pixels, format="rgb24")


def _video(
    path: str | os.PathLike,
    stack: contextlib.ExitStack,
    log: DecodingLog,
    start: float | Entry | None,
) -> tuple[Probe, Iterator[Decoded]]:
    stream = stack.enter_context(_opened(path))
    hint = stream.average_rate or stream.guessed_rate
    fps, constant, base = float(hint or 25), True, float(stream.time_base or 1)
    times, timed, offset, seconds = np.empty(0), True, 0.0, 0.0
    if start is None:
        times, timed = _stamps(stream, fps)
        if timed:
            fps, constant = native_rate(times, float(hint) if hint else None)
        seconds = float(times[-1] - times[0]) + 1 / fps if len(times) > 1 else 0.0
        if not _rewound(stream):
            stack.close()
            stream = stack.enter_context(_opened(path))
    else:
        with contextlib.suppress(FFmpegError):  # It cannot be entered there: from its start.
            if isinstance(start, Entry):
                offset, at = start.offset, start.position
                stream.container.seek(at, stream=stream, unsupported_byte_offset=True)
            else:
                stream.container.seek(int(start / base), stream=stream)
    names = stream.container.format.name, stream.codec_context.codec.name
    declared = float(stream.duration * stream.time_base) if stream.duration else None
    if declared is None and stream.container.duration:
        declared = stream.container.duration / av.time_base
    aspect = float(stream.sample_aspect_ratio or 1)
    probe = Probe(*names, fps, constant, len(times), seconds, declared, timed, aspect)
    clock = Clock(1 / fps, offset) if timed else None
    return probe, _progressive(_frames(stream, fps, clock, log), log)


def _stamps(stream: Any, fps: float) -> tuple[np.ndarray, bool]:
    """(seconds of all frames, float64 [n], sorted; whether they are the stream's own, else they are
    counted) by its packets alone."""
    stamps, count = [], 0
    clock, base = Clock(1 / fps), float(stream.time_base or 1)
    for packet in _packets(stream, DecodingLog()):
        drm = packet.has_sidedata("encryption_info")
        refuse_file([(drm, "encrypted", "its video samples are under DRM")])
        if packet.size and not packet.is_discard:
            count += 1
            if packet.pts is not None:
                clock.read((packet.pts if packet.dts is None else packet.dts) * base)
                stamps.append(packet.pts * base + clock.offset)
    refuse_file([(not count, "no frames", f"{stream.codec_context.name} without a packet")])
    # AVI counts frames in the order of decoding, and so do streams that are nothing else.
    if len(stamps) < count or stream.container.format.name == "avi":
        return np.arange(count) / fps, False
    return np.unique(stamps), True


def _packets(stream: Any, log: DecodingLog) -> Iterator[Any]:
    try:
        yield from stream.container.demux(stream)
    except FFmpegError as error:  # The rest of the file cannot be read.
        log.add(error)


def _rewound(stream: Any) -> bool:
    """Goes back to the first frame, in containers where that is known to work."""
    with contextlib.suppress(FFmpegError):
        if {"mov", "matroska"} & set(stream.container.format.name.split(",")):
            stream.container.seek(-(1 << 48), stream=stream)
            return True
    return False


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """A disk that fails is a refusal of its own."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FFmpegError):  # By the content: some of those are OSErrors, too.
            raise
        raise Refused("cannot be read", error.strerror or str(error)) from error


def _is_still(path: str | os.PathLike) -> bool:
    """Whether Pillow is to read this file, by its first bytes."""
    with _reading(), open(path, "rb") as file:
        head = file.read(32)
    refuse_file([(not head, "empty file", "0 bytes")])
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return webp or head[4:8] == b"ftyp" and head[8:12] in _HEIF or head.startswith(_STILL)


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    """The main video stream of an open file, which is decoded in this thread alone: the first one
    marked as default, as in browsers. Cover art in music is no video stream."""
    options: dict[str, Any] = {"buffer_size": 1 << 18, "metadata_errors": "replace"}
    options["options"] = {"protocol_whitelist": "file"}
    # An open file and not a name, in which FFmpeg would see protocols ("a:") and patterns ("%d").
    with _reading(), open(path, "rb") as file, contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(av.open(file, "r", **options))
        except FFmpegError as error:
            file.seek(0)
            head = file.read(1 << 20)
            # Of MP4 (ISO 14496-12) that begins well, the index is missing or cut.
            cut = isinstance(error, FFmpegEOFError) or head[4:8] in _BOXES
            reason = "encrypted" if b"encv" in head else "truncated" if cut else "not media"
            raise Refused(reason, str(error.strerror or error)) from error
        name, art = container.format.name, Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & art]
        default = [s for s in streams if s.disposition & Disposition.default]
        stream = next(iter(default or streams), None)
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        unreadable = stream is not None and stream.codec_context is None
        refuse_file(
            [
                (bool(NOT_MEDIA & set(name.split(","))), "not media", f"{name} is text, or a list"),
                (stream is None, "no video stream", f"{name} with {', '.join(kinds)}"),
                (unreadable, "unsupported", "FFmpeg has no decoder for its codec"),
            ]
        )
        assert stream is not None
        stream.codec_context.thread_count = 1
        yield stream


def _decoder(stream: Any) -> Any:
    codec = stream.codec_context.codec.canonical_name
    if stream.metadata.get("alpha_mode") != "1" or codec not in _ALPHA:
        return stream.codec_context
    decoder: Any = av.CodecContext.create(_ALPHA[codec], "r")
    decoder.thread_count = 1
    return decoder


def _frames(stream: Any, fps: float, clock: Clock | None, log: DecodingLog) -> Iterator[Decoded]:
    """The frames of a stream in order of time, of the first one's size, damaged ones left out.

    Without a clock their times are counted.
    """
    decoder = _decoder(stream)
    size, latest, count, damaged, gap = None, -np.inf, 0, False, False
    positions: dict[int | None, int] = {}  # Of key frames in the file, by their time stamps.
    for packet in _packets(stream, log):
        if packet.is_keyframe and packet.pos is not None and packet.pos >= 0:
            positions[packet.pts] = packet.pos
        try:
            frames = decoder.decode(packet)
        except MemoryError:
            raise
        except FFmpegError as error:
            log.add(error)
            damaged, frames = True, []
        for frame in frames:
            if frame.is_corrupt:
                log.add("a frame is marked as corrupt")
                damaged = True
            # Decoders of libvpx mark no frames, and have no delay.
            key = packet.is_keyframe if decoder.name in _ALPHA.values() else frame.key_frame
            if damaged and (frame.is_corrupt or not key):
                log.dropped += 1
                continue
            shape, gap, damaged = (frame.height, frame.width), gap or damaged, False
            size, time, offset = size or shape, count / fps, 0.0
            count += 1
            if clock is not None and frame.pts is not None:
                time, anew = clock.read(float(frame.time))
                gap, offset = gap or anew, clock.offset
            if shape != size:
                log.resized, gap = log.resized + 1, True
            elif time <= latest:
                log.dropped += 1
            else:
                if frame.pts in positions:
                    log.entries.append(Entry(time, positions.pop(frame.pts), offset))
                yield frame, time, gap
                latest, gap = time, False


def _progressive(frames: Iterable[Decoded], log: DecodingLog) -> Iterator[Decoded]:
    """The same, deinterlaced from the first frame on that is marked as interlaced, if there is one."""
    graph: Any = None
    waiting = collections.deque[tuple[float, bool]]()

    def pushed(frame: av.VideoFrame | None) -> Iterator[Decoded]:
        graph.vpush(frame)
        with contextlib.suppress(BlockingIOError, FFmpegEOFError):
            while True:
                yield graph.vpull(), *waiting.popleft()

    for frame, time, gap in frames:
        if gap and graph is not None:  # What is on its other side does not mix.
            yield from pushed(None)
            graph = None
        if graph is None and not frame.interlaced_frame:
            yield frame, time, gap
            continue
        log.deinterlaced += frame.interlaced_frame
        graph = graph or _deinterlacer(frame)
        waiting.append((time, gap))
        yield from pushed(frame)
    if graph is not None:
        yield from pushed(None)


def _deinterlacer(frame: av.VideoFrame) -> Graph:
    """A graph of filters that makes one frame of an interlaced one, and leaves others as they are."""
    graph, form = Graph(), frame.format
    graph.threads = 1
    graph.link_nodes(
        graph.add_buffer(None, frame.width, frame.height, form, time_base=frame.time_base),
        graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"),
        graph.add("buffersink"),
    ).configure()
    return graph
