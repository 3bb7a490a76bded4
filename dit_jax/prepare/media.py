"""What a file is, before any of it is decoded: its kind, streams, shape and rate, or why it is refused.

Kinds are told by content and never by a file's name. Still images (and GIF, WebP, APNG) are Pillow's,
everything else FFmpeg's through PyAV; playlists and text that FFmpeg would take for media are not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
from collections.abc import Iterator

import av
import numpy as np
from av.container import InputContainer
from av.error import EOFError as FFmpegEOFError
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from dit_jax.prepare.refusals import Refused
from dit_jax.prepare.timeline import Clock, native_rate

NOT_MEDIA = {"tty", "hls", "dash", "concat", "image2", "sdp", "rtsp", "lavfi", "vobsub", "ass"}
"""Formats of FFmpeg that name other files, or that take text for pictures."""
_LARGEST_MOOV = 256 << 20
_BOXES = b"ftyp moov mdat wide free skip styp".split()
_HEIF = b"heic heix heim heis hevc hevx mif1 msf1 avif avis".split()
_STILL = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
_STILL += (b"8BPS", b"\0\0\0\x0cjP  ", b"qoif")


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is known of a file's pictures without decoding them."""

    kind: str
    """`video` or `image`; a file that is neither is refused."""
    container: str
    codec: str
    width: int
    """As displayed: turned, and with square pixels."""
    height: int
    fps: float
    """Frames per second of the grid that the file is sampled on; 1 for an image."""
    constant_rate: bool
    frames: int
    """Pictures that the file holds by its index, before any is decoded."""
    duration: float
    """Seconds, the last frame included; 0 for an image."""
    declared_duration: float | None = None
    """What the file says itself."""
    pixel_format: str = ""
    sample_aspect_ratio: float = 1.0
    """Width of a stored pixel over its height."""
    rotation: int = 0
    """Degrees clockwise that the stored picture is turned by for display: 0, 90, 180 or 270."""
    mirrored: bool = False
    """Mirrored left to right, before it is turned."""
    transfer: int = 2
    """H.273's number of the transfer characteristics; 2 is unknown."""
    primaries: int = 2
    matrix: int = 2
    full_range: bool = False
    hdr: str = ""
    """`pq`, `hlg`, `dolby vision` (that alone, without another base layer), or empty."""
    timed: bool = True
    """Whether the frames have time stamps of their own; else they are counted."""
    audio: bool = False


@dataclasses.dataclass(frozen=True)
class Timing:
    """When the frames of a stream are shown, by its packets, and what its container says of it."""

    times: np.ndarray
    """float64 [n], sorted, seconds."""
    fps: float
    constant: bool
    trusted: bool
    """False: the stamps are counted, `i / fps`, because the container has none that can be used."""
    container: str
    codec: str
    aspect: float
    """Width of a stored pixel over its height."""
    declared_duration: float | None
    """Seconds that the file says the stream lasts, if it does."""
    audio: bool


def is_still(path: str | os.PathLike) -> bool:
    """Whether Pillow is to read this file, by its first bytes. Refused: empty, or unreadable."""
    try:
        if os.path.isdir(path):
            raise Refused("cannot be read", "it is a directory")
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise Refused("cannot be read", error.strerror or str(error)) from error
    if not head:
        raise Refused("empty file", "0 bytes")
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return webp or head[4:8] == b"ftyp" and head[8:12] in _HEIF or head.startswith(_STILL)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream, which is decoded in this thread alone.

    That is the first one marked as default, as in browsers. Cover art in music is no video stream.
    Refused: encrypted, truncated, not media, no video stream; cannot be read, also later on.
    """
    _check_boxes(path)
    # An open file and not a name, in which FFmpeg would see protocols ("a:") and patterns ("%d").
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            options = {"protocol_whitelist": "file"}
            container = av.open(
                file, "r", options=options, buffer_size=1 << 18, metadata_errors="replace"
            )
            stack.enter_context(container)
        except FFmpegError as error:
            reason = "truncated" if isinstance(error, FFmpegEOFError) else "not media"
            raise Refused(reason, str(error.strerror or error)) from error
        except OSError as error:
            raise Refused("cannot be read", error.strerror or str(error)) from error
        formats = set(container.format.name.split(","))
        if formats & NOT_MEDIA:
            raise Refused("not media", f"{container.format.name} is text or a list of files")
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            kinds = sorted({s.type for s in container.streams}) or ["nothing"]
            raise Refused("no video stream", f"{container.format.name} with {', '.join(kinds)}")
        stream = next(filter(_is_default, streams), streams[0])
        if stream.codec_context is None:
            raise Refused("unsupported", "FFmpeg has no decoder for its codec")
        stream.codec_context.thread_count = 1
        try:
            yield container, stream
        except OSError as error:
            if isinstance(error, FFmpegError):  # By the content: some of those are OSErrors, too.
                raise
            raise Refused("cannot be read", error.strerror or str(error)) from error


def unscanned(container: InputContainer, stream: VideoStream) -> Timing:
    """What the header alone says of a file whose time stamps are known to be good; no times."""
    hint = stream.average_rate or stream.guessed_rate
    return Timing(
        times=np.empty(0),
        fps=float(hint or 25),
        constant=True,
        trusted=True,
        container=container.format.name,
        codec=stream.codec_context.codec.name,
        aspect=float(stream.sample_aspect_ratio or 1),
        declared_duration=_declared_duration(container, stream),
        audio=bool(container.streams.audio),
    )


def scanned(container: InputContainer, stream: VideoStream) -> Timing:
    """The timing of a file that was just opened; it stands at its end afterwards."""
    header, base = unscanned(container, stream), float(stream.time_base or 1)
    stamps, count, clock = [], 0, Clock(1 / header.fps)
    with contextlib.suppress(FFmpegError):  # Damage: what was read until then counts.
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                count += 1
                if packet.pts is not None:
                    clock.read((packet.pts if packet.dts is None else packet.dts) * base)
                    stamps.append(packet.pts * base + clock.offset)
    if not count:
        raise Refused("no frames", f"{stream.codec_context.name} without a packet")
    # AVI counts frames in the order of decoding, and so do streams that are nothing else.
    if len(stamps) < count or container.format.name == "avi":
        counted = np.arange(count) / header.fps
        return dataclasses.replace(header, times=counted, trusted=False)
    times = np.unique(stamps)
    hint = stream.average_rate or stream.guessed_rate
    fps, constant = native_rate(times, float(hint) if hint else None)
    return dataclasses.replace(header, times=times, fps=fps, constant=constant)


def rewound(container: InputContainer, stream: VideoStream) -> bool:
    """Goes back to the first frame, in containers where that is known to work."""
    if not {"mov", "matroska"} & set(container.format.name.split(",")):
        return False
    try:
        container.seek(-(1 << 48), stream=stream)
    except FFmpegError:
        return False
    return True


def _declared_duration(container, stream: VideoStream) -> float | None:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _check_boxes(path: str | os.PathLike) -> None:
    """Walks the boxes of an ISO file (MP4, MOV). Refused: encrypted, or cut off before its index."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at, kinds = 0, []
        while at + 8 <= size:
            file.seek(at)
            header = file.read(16)
            length, kind = struct.unpack(">I4s", header[:8])
            if not at and kind not in _BOXES:
                return
            if length == 1 and len(header) == 16:
                length = struct.unpack(">Q", header[8:])[0]
            kinds.append(kind)
            if kind == b"moov" and length <= _LARGEST_MOOV and b"encv" in file.read(length):
                raise Refused("encrypted", "its video samples are under DRM (encv)")
            if length < 8:  # 0: up to the end of the file.
                break
            at += length
        if kinds and b"moov" not in kinds and b"moof" not in kinds:
            raise Refused("truncated", f"{size} bytes without the index of an MP4 file (moov)")


def _is_cover(stream: VideoStream) -> bool:
    return bool(stream.disposition & Disposition.attached_pic)


def _is_default(stream: VideoStream) -> bool:
    return bool(stream.disposition & Disposition.default)
