"""What a file is, and its pictures in order with their times: videos, images and records alike.

A file's kind is that of its content, not its name: still images (and GIF, WebP, APNG) are Pillow's,
everything else FFmpeg's through PyAV. Images become opaque, of 8 bits, in sRGB: transparency stands
before a background colour; CMYK, palettes, greys and 16 bits become RGB; an embedded colour profile is
converted. GIF, WebP, APNG and AVIF animations give their frames with their own times (delays under
20 ms count as 100 ms, as in browsers); of other files with several pictures (MPO, TIFF) the first is
taken.

Frames that are marked as interlaced are deinterlaced, one frame of each. FFmpeg conceals damage by
painting over; here a packet that cannot be decoded, or a frame that is marked corrupt, ends what is
used, until the next key frame.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import itertools
import os
import struct
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import EOFError as FFmpegEOFError
from av.error import FFmpegError
from av.filter import Graph
from av.stream import Disposition
from PIL import Image, ImageCms, UnidentifiedImageError

from dit_jax.prepare.pixels import LARGEST, DecodingConfig, Renderer
from dit_jax.prepare.recorded import is_record, read_record
from dit_jax.prepare.refusals import Refused, refuse_file
from dit_jax.prepare.timeline import Clock, native_rate, on_grid

with contextlib.suppress(ImportError):  # Pillow reads HEIC where it is installed.
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = None  # Larger ones are refused by name.
ANIMATED = {"GIF", "WEBP", "PNG", "AVIF"}
SHORTEST, DEFAULT = 0.02, 0.1  # Seconds.
TURNS = {2: (True, 0), 3: (False, 180), 4: (True, 180), 5: (True, 270)}
TURNS |= {6: (False, 90), 7: (True, 90), 8: (False, 270)}
"""(mirrored left to right, then degrees turned clockwise) by EXIF's numbers of the orientation."""
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, LookupError, RuntimeError, TypeError)
DAMAGE += (ArithmeticError, struct.error)
"""What Pillow raises for damaged files."""
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
    """Where a file is entered: at the key frame before a time, or at one whose place is known."""

    time: float  # Seconds, as of `Picture`.
    position: int | None = None  # Of the key frame's first byte in the file.
    offset: float = 0.0  # By how much time is ahead of the file's stamps.


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

    def notes(self) -> list[str]:
        """What is to be said about it, a line each."""
        parts = len({entry.offset for entry in self.entries})  # As far as key frames tell.
        lines = {
            f"{self.errors} errors in decoding, the first: {self.first_error}": self.errors,
            f"{self.dropped} frames left out after damage or out of order": self.dropped,
            f"{self.resized} frames left out: their size is another": self.resized,
            f"{self.deinterlaced} frames deinterlaced": self.deinterlaced,
            f"time stamps begin anew: {parts} parts": parts > 1,
        }
        return [line for line, due in lines.items() if due]


class Picture(NamedTuple):
    """A decoded frame that is not drawn yet, so that it is drawn in the sizes that are needed alone."""

    time: float  # Seconds.
    after_gap: bool  # Frames before it were lost.
    frame: av.VideoFrame
    renderer: Renderer

    def pixels(self, *size: int) -> np.ndarray:
        """The displayed picture, uint8 RGB [height, width, 3]; by default of its own size."""
        return self.renderer.pixels(self.frame, size)

    def lightness(self, *size: int) -> np.ndarray:
        """The displayed picture's luma, uint8 [height, width] over the full range."""
        return self.renderer.lightness(self.frame, size)


Decoded = tuple[av.VideoFrame, float, bool]
"""A frame, its time in seconds, and whether frames before it were lost."""


def pictures(
    path: str | os.PathLike,
    config: DecodingConfig | None = None,
    log: DecodingLog | None = None,
    start: Entry | None = None,
) -> Iterator[Picture]:
    """A file's pictures in order of time, of one size, and in `log` what it is and what is lost.

    `start`: begin there; only for files that are known to have time stamps. Refused: what cannot be
    opened, decoded or shown.
    """
    config, log = config or DecodingConfig(), log or DecodingLog()
    renderer = turn = None
    try:
        with contextlib.ExitStack() as stack:
            if is_record(path):
                probe, frames = _record(os.fspath(path), log)
            elif _is_still(path):
                image = stack.enter_context(_opened_image(path))
                turn = TURNS.get(image.getexif().get(0x0112, 1), (False, 0))
                probe, frames = _image(image, config)
            else:
                probe, frames = _video(path, log, start, stack)
            for frame, time, gap in frames:
                if renderer is None:
                    renderer = Renderer(frame, config, probe.sample_aspect_ratio, turn)
                    kind = "video" if probe.frames > 1 else "image"
                    log.probe = dataclasses.replace(probe, kind=kind, **renderer.looks)
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
    frames = ((_rgb_frame(pixels), i / fps, False) for i, pixels in enumerate(video))
    return Probe("tfds", "records", fps, True, count, seconds), frames


def _image(image: Any, config: DecodingConfig) -> tuple[Probe, Iterator[Decoded]]:
    first, times, seconds = _schedule(image)

    def frames() -> Iterator[Decoded]:
        for i, time in enumerate(times, first):
            if i:
                image.seek(i)
            yield _rgb_frame(_to_rgb(image, config.background)), time, False

    name = image.format.lower()
    return Probe(name, name, *native_rate(np.array(times)), len(times), seconds), frames()


@contextlib.contextmanager
def _opened_image(path: str | os.PathLike) -> Iterator[Any]:
    """Pillow's image. Refused: no image, an unsupported format, too many pixels, and whatever Pillow
    raises within."""
    try:
        with _reading(), warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            size = f"{image.width} x {image.height} pixels, at most {LARGEST}"
            refuse_file([(image.width * image.height > LARGEST, "too large", size)])
            yield image
    except DAMAGE as error:
        words, head = str(error) or type(error).__name__, _first_bytes(path)
        unknown = isinstance(error, UnidentifiedImageError)
        heif = "HEIF: pip install pillow-heif decodes it"
        cut = "truncated" in words or isinstance(error, EOFError) or unknown and len(head) < 32
        refuse_file(
            [
                (unknown and head[4:8] == b"ftyp", "unsupported", heif),
                (cut, "truncated", words),
                (True, "cannot be decoded", words),
            ]
        )


def _schedule(image: Any) -> tuple[int, list[float], float]:
    """(number of the first picture, when each is shown, when the last one ends), in seconds from 0."""
    # APNG may have another picture before the animation, for who cannot animate.
    first = int(bool(getattr(image, "default_image", False)))
    count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
    times = [0.0]
    for i in range(first, count if count - first > 1 else 0):
        try:
            image.seek(i)
            if image.format != "GIF":  # The others tell a picture's time once it is decoded.
                image.load()
        except DAMAGE:
            break
        delay = float(image.info.get("duration") or 0) / 1000
        times.append(times[-1] + (delay if delay >= SHORTEST else DEFAULT))
    image.seek(0)
    return (first, times[:-1], times[-1]) if len(times) > 2 else (first, [0.0], 0.0)


def _to_rgb(image: Any, background: tuple[int, int, int]) -> np.ndarray:
    """A Pillow image as uint8 [h, w, 3], before the background, in sRGB; not turned."""
    if image.mode.startswith("I") or image.mode == "F":  # Of 16 bits (or 32): 65535 is white.
        grey = np.asarray(image).astype(np.float64)
        levels = f"grey levels from {grey.min():g} to {grey.max():g}"
        unlike = image.mode == "F" or grey.min() < 0 or grey.max() > 65535
        refuse_file([(unlike, "unsupported", levels)])
        return np.repeat(np.rint(grey / 257).astype(np.uint8)[..., None], 3, axis=2)
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "RGBA", "L", "CMYK"):
        # A damaged profile counts as none.
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
            mode = "RGBA" if image.mode == "RGBA" else "RGB"
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, source, target, outputMode=mode) or image
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _rgb_frame(pixels: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def _video(
    path: str | os.PathLike, log: DecodingLog, start: Entry | None, stack: contextlib.ExitStack
) -> tuple[Probe, Iterator[Decoded]]:
    stream = stack.enter_context(_opened(path))
    rate = stream.average_rate or stream.guessed_rate
    fps, constant, timed, times = float(rate or 25), True, True, np.empty(0)
    if start is None:
        times, timed = _stamps(stream, fps)
        if timed:
            fps, constant = native_rate(times, float(rate) if rate else None)
        stack.close()
        stream = stack.enter_context(_opened(path))
    else:
        known = start.position is not None
        at = start.position if known else int(start.time / float(stream.time_base or 1))
        with contextlib.suppress(FFmpegError):  # It cannot be entered there: from its start.
            stream.container.seek(at, stream=stream, unsupported_byte_offset=known)
    seconds = float(times[-1] - times[0]) + 1 / fps if len(times) > 1 else 0.0
    declared = float(stream.duration * stream.time_base) if stream.duration else None
    if declared is None and stream.container.duration:
        declared = stream.container.duration / av.time_base
    names = stream.container.format.name, stream.codec_context.codec.name
    aspect = float(stream.sample_aspect_ratio or 1)
    probe = Probe(*names, fps, constant, len(times), seconds, declared, timed, aspect)
    clock = Clock(1 / fps, start.offset if start else 0.0) if timed else None
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


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """A disk that fails is a refusal of its own."""
    try:
        yield
    except OSError as error:
        # FFmpeg's and Pillow's errors are about the content, though some are OSErrors, too.
        if isinstance(error, FFmpegError) or not error.errno:
            raise
        raise Refused("cannot be read", error.strerror or str(error)) from error


def _first_bytes(path: str | os.PathLike) -> bytes:
    """The first 32 bytes of a file, by which its kind is told."""
    with _reading(), open(path, "rb") as file:
        return file.read(32)


def _is_still(path: str | os.PathLike) -> bool:
    """Whether Pillow is to read this file, by its first bytes."""
    head = _first_bytes(path)
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
