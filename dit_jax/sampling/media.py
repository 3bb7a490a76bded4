"""Pictures and clips in and out of files with PyAV alone: mp4, GIF and PNG out, what FFmpeg knows in.

Clips are uint8 RGB ``[t, h, w, 3]``, pictures ``[h, w, 3]``; ``to_float`` and ``to_uint8`` are the way
to the model's range [-1, 1] and back. The same array gives the same bytes of a file.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av.codec.context
import av.container
import numpy as np
from av.error import EOFError as FFmpegEOFError
from av.error import FFmpegError
from av.filter import Graph, filters_available
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from dit_jax.data import centre, resized
from dit_jax.files import InputError, as_path, atomic_path, check_file, local_copy

EXTENSIONS = (".mp4", ".gif", ".png")
GIF_TICK = Fraction(1, 100)  # GIF's unit of time, in seconds
GIF_MAX_FPS = 50  # players slow delays under 2/100 s down to 10/100 s
GREY = 128
_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_SCALER |= Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
# PQ and HLG to BT.709 at BT.2408's diffuse white, where the build of FFmpeg has zimg.
_TO_SDR = (
    ("zscale", "t=linear:npl=203"),
    ("format", "gbrpf32le"),
    ("zscale", "p=bt709"),
    ("tonemap", "mobius"),
    ("zscale", "t=bt709:m=bt709:r=full"),
    ("format", "gbrp"),
)


def to_uint8(x: Any) -> np.ndarray:
    """Turns floats in [-1, 1] into uint8: rounded, and clipped outside."""
    x = np.asarray(x).astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(
            f"{np.sum(~np.isfinite(x))} of {x.size} pixels are NaN or infinite: check the parameters "
            "and the sampler that made them."
        )
    return np.rint((np.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def to_float(x: Any) -> np.ndarray:
    """Turns uint8 into float32 in [-1, 1]; ``to_uint8`` inverts it exactly."""
    x = np.asarray(x)
    assert x.dtype == np.uint8, x.dtype
    return x.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


# --- reading ---


def read_video(
    path: str | os.PathLike,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> tuple[np.ndarray, float]:
    """Reads a video or picture as a player shows it: frames ``[t, h, w, 3]``, and frames a second.

    Frames are turned and stretched as the file says, deinterlaced, and set before white if they
    are transparent. Colour profiles (ICC) are not applied, and sound is left out.

    Args:
        height: with ``width``, frames are scaled to cover that size, and their centre is cropped.
        fps: frames are repeated or left out, each the nearest in time. Unset: the file's own rate.
        max_frames: the first so many alone.
    """
    frames: list[np.ndarray] = []
    times: list[float] = []
    try:
        # An open file and not a name, in which FFmpeg would see protocols ("a:") and "%d".
        with local_copy(path).open("rb") as file, av.open(file, "r") as container:
            stream: Any = next(iter(container.streams.video), None)
            for frame in _decoded(container, stream, path) if stream else ():
                if times and frame.time is not None and frame.time <= times[-1]:
                    continue  # damage: a frame that comes late
                pixels = _displayed(frame, float(stream.sample_aspect_ratio or 1))
                if height and width:
                    h, w = pixels.shape[:2]
                    scale = max(height / h, width / w)
                    size = max(round(h * scale), height), max(round(w * scale), width)
                    pixels = centre(resized(pixels[None], *size), height, width)[0]
                frames.append(pixels)
                times.append(len(times) if frame.time is None else frame.time)
                if max_frames and len(frames) == max_frames and fps is None:
                    break
                if max_frames and (times[-1] - times[0]) * (fps or 0) >= max_frames:
                    break
            rate = _rate_of(stream, times) if stream else 0.0
    except (OSError, FFmpegError) as error:
        raise InputError(
            f"cannot read {str(path)!r} as a video ({error.strerror or error}): check the path, or "
            "convert it to mp4 with ffmpeg."
        ) from error
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) != 1:
        raise InputError(
            f"{str(path)!r} has frames of sizes {sorted(sizes)}: give a video or picture of one."
        )
    video = np.stack(frames)
    if fps is not None and len(video) > 1:
        # Frame k is the nearest to k / fps; halfway, the later one. The last is shown for a frame.
        clock = (np.array(times) - times[0]) * fps
        count = max(math.ceil(clock[-1] + 0.5 - 1e-6), 1)
        middles = (clock[1:] + clock[:-1]) / 2
        video, rate = video[np.searchsorted(middles - 1e-6, np.arange(count), "right")], fps
    return video[:max_frames], rate


def video_shape(path: str | os.PathLike) -> tuple[int, int, float, bool]:
    """Height, width and frames a second of a file as it is shown, and whether it is a still picture."""
    video, _ = read_video(path, max_frames=1)
    with local_copy(path).open("rb") as file, av.open(file, "r") as container:
        stream = container.streams.video[0]
        times = [float(p.pts * p.time_base) for p in container.demux(stream) if p.pts is not None]
        return *video.shape[1:3], _rate_of(stream, sorted(times)), len(times) < 2


def _decoded(container: Any, stream: Any, path: str | os.PathLike) -> Iterator[av.VideoFrame]:
    """The frames of a stream, deinterlaced and in SDR; up to the first damage, which is a warning."""
    graph: Graph | None = None
    try:
        for frame in container.decode(stream):
            hdr = frame.color_trc in (16, 18)  # PQ and HLG, by ITU-T H.273
            if graph is None and not (hdr or frame.interlaced_frame):
                yield frame
                continue
            if hdr and "zscale" not in filters_available:
                raise InputError(
                    f"{str(path)!r} is HDR, and this build of FFmpeg cannot map its tones: convert it "
                    "first (ffmpeg -vf zscale=t=linear:npl=203,tonemap=mobius,zscale=t=bt709)."
                )
            if graph is None:
                graph = Graph()
                graph.threads = 1
                size = {"width": frame.width, "height": frame.height}
                start = graph.add_buffer(**size, format=frame.format, time_base=frame.time_base)
                chain = ("bwdif", "deint=interlaced:mode=send_frame"), *(_TO_SDR if hdr else ())
                nodes = [graph.add(*one) for one in chain]
                graph.link_nodes(start, *nodes, graph.add("buffersink")).configure()
            graph.vpush(frame)
            yield from _filtered(graph)
    except FFmpegError as error:
        warnings.warn(
            f"{str(path)!r} is damaged ({error.strerror}): used up to there", stacklevel=2
        )
    if graph is not None:
        graph.vpush(None)
        yield from _filtered(graph)


def _filtered(graph: Graph) -> Iterator[av.VideoFrame]:
    """The frames that a graph of filters holds ready."""
    with contextlib.suppress(FFmpegEOFError, BlockingIOError):
        while True:
            yield graph.vpull()


def _displayed(frame: av.VideoFrame, aspect: float) -> np.ndarray:
    """A decoded frame as it is shown, ``[h, w, 3]``."""
    alpha = any(part.is_alpha for part in frame.format.components) or frame.format.has_palette
    rgb = frame.format.is_rgb or frame.format.has_palette
    full = rgb or frame.color_range == 2 or frame.format.name.startswith("yuvj")
    # Of a picture that names no matrix: BT.709 if it is large, BT.601 below, as players guess.
    large = frame.height >= 720 or frame.width >= 1280
    guess = Colorspace.ITU709 if large else Colorspace.ITU601
    image = frame.reformat(
        max(round(frame.width * aspect), 1),
        frame.height,
        "rgba" if alpha else "rgb24",
        src_colorspace=guess if not rgb and int(frame.colorspace) == 2 else None,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=_SCALER,
        threads=1,
    ).to_ndarray()
    if alpha:
        part = image[..., 3:].astype(np.float32) / 255
        image = np.rint(image[..., :3] * part + 255 * (1 - part)).astype(np.uint8)
    matrix, side_data = None, cast(Any, frame.side_data)
    with contextlib.suppress(ValueError):  # data of a kind that PyAV does not know
        matrix = next((d for d in side_data.keys() if d.type == Type.DISPLAYMATRIX), None)
    if matrix is not None:
        # ISO 14496-12: nine int32, row by row; a negative determinant mirrors left to right.
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(np.int64)
        if a * d - b * c < 0:
            image, a, b = image[:, ::-1], -a, -b
        image = np.rot90(image, -round(math.degrees(math.atan2(b, a)) / 90))
    return np.ascontiguousarray(image)


def _rate_of(stream: Any, times: Sequence[float]) -> float:
    """Frames a second: what the file says, unless its frames' times contradict it (as of GIF)."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    if len(times) < 2 or times[-1] <= times[0]:
        return rate
    gaps, span = len(times) - 1, times[-1] - times[0]
    return rate if abs(gaps / rate - span) < 0.75 * float(stream.time_base) else gaps / span


# --- writing ---


def check_output(path: str | os.PathLike) -> Path:
    """Refuses a path that ``write_video`` could not write, before the long work starts."""
    path = as_path(path)
    if path.suffix.lower() not in EXTENSIONS:
        raise InputError(
            f"output {str(path)!r} has extension {path.suffix!r}: give one of {', '.join(EXTENSIONS)}."
        )
    return check_file(path, "output")


def write_video(
    path: str | os.PathLike, video: np.ndarray | Iterable[np.ndarray], fps: float
) -> Path:
    """Writes a clip ``[t, h, w, 3]``, or its parts ``[n, h, w, 3]``, one at a time in mp4.

    .mp4  H.264, yuv420p, BT.709: opens everywhere. Of odd heights and widths the last row or column is
          repeated, with a warning. Colour has half the resolution: enlarge tiny clips first.
    .gif  one palette of 256 colours for the clip, looping for ever; at most 50 frames a second.
    .png  one frame: that image; several: a strip from left to right.
    """
    path = check_output(path)
    parts = iter([video] if isinstance(video, np.ndarray) else video)
    extension, first = path.suffix.lower(), next(parts)
    if extension != ".mp4":
        first = np.concatenate([first, *parts])
    assert first.dtype == np.uint8 and first.ndim == 4 and first.shape[-1] == 3, first.shape
    if extension == ".png":
        return write_png(path, np.concatenate(list(first), axis=1))
    rate, (h, w) = Fraction(fps).limit_denominator(1001), first.shape[1:3]
    if extension == ".gif":
        if rate > GIF_MAX_FPS:
            warnings.warn(f"{path}: {fps} frames/s, but players stop at 50: slower", stacklevel=2)
        rate = min(rate, Fraction(GIF_MAX_FPS))
        # Times are rounded to 1/100 s each, and not delays, so that the clip keeps its length.
        ticks = [round(i / rate / GIF_TICK) for i in range(len(first) + 1)]
        options = {"loop": "0", "final_delay": str(min(ticks[-1] - ticks[-2], 65535))}
        with _encoder(path, "gif", "pal8", rate, (h, w), **options) as (container, stream):
            stream.codec_context.time_base = GIF_TICK
            for frame in _paletted(first, ticks):
                container.mux(stream.encode(frame))
        return path
    if h % 2 or w % 2:
        warnings.warn(f"{path}: H.264 needs even sizes: {h}x{w} gets more edge", stacklevel=2)
    even = ((0, 0), (0, h % 2), (0, w % 2), (0, 0))
    images = (x for part in itertools.chain([first], parts) for x in np.pad(part, even, "edge"))
    bt709 = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
    size = h + h % 2, w + w % 2
    opened = _encoder(path, "libx264", "yuv420p", rate, size, movflags="+faststart")
    with opened as (container, stream):
        # No B-frames and no macroblock trees, on one thread: with them x264's assembler gave other
        # bytes for the same small frames in up to one run of eight.
        stream.options = {"crf": "12", "preset": "medium", "x264-params": "bframes=0:no-mbtree=1"}
        encoder = stream.codec_context
        encoder.colorspace, encoder.color_range = Colorspace.ITU709, ColorRange.MPEG
        encoder.color_primaries, encoder.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for i, image in enumerate(images):
            frame = _frame(image, i, 1 / rate)
            frame = frame.reformat(format="yuv420p", interpolation=_SCALER, threads=1, **bt709)
            container.mux(stream.encode(frame))
    return path


def write_png(path: str | os.PathLike, image: np.ndarray) -> Path:
    """Writes a picture uint8 ``[h, w, 3]`` without loss."""
    path = as_path(path)
    with _writing(path) as scratch:
        picture = scratch.with_suffix(".png")  # save() knows the lower case alone
        _frame(image, 0, Fraction(1)).save(str(picture))
        picture.replace(scratch)
    return path


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A local file that becomes ``path`` if the block ends well; FFmpeg's errors by what they mean."""
    try:
        with atomic_path(path) as scratch:
            yield scratch
    except FFmpegError as error:
        if error.errno in errno.errorcode and error.errno != errno.EINVAL:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk, say
        raise InputError(
            f"cannot write {str(path)!r} ({error.strerror or error}): its size must be one that the "
            f"format allows; try another of {', '.join(EXTENSIONS)}."
        ) from error


@contextlib.contextmanager
def _encoder(
    path: Path, codec: str, pixels: str, rate: Fraction, size: tuple[int, int], **options: str
) -> Iterator[tuple[Any, Any]]:
    """A container and its one stream, whose bytes depend on the frames alone."""
    opened, kind = _writing(path), path.suffix[1:].lower()
    with opened as scratch, av.open(str(scratch), "w", format=kind, options=options) as container:
        container.flags |= av.container.Flags.bitexact.value
        stream: Any = container.add_stream(codec, rate)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact.value
        yield container, stream
        container.mux(stream.encode(None))


def _frame(image: np.ndarray, pts: int, time_base: Fraction) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame.pts, frame.time_base = pts, time_base
    return frame


def _paletted(video: np.ndarray, ticks: Sequence[int]) -> Iterator[av.VideoFrame]:
    """The frames, at their times, in one palette of 256 colours chosen over the whole clip."""
    h, w = video.shape[1:3]
    graph = Graph()
    graph.threads = 1
    start = graph.add_buffer(None, w, h, av.VideoFormat("rgb24", w, h), time_base=GIF_TICK)
    split = graph.add("split")
    palette = graph.add("palettegen", "reserve_transparent=0:stats_mode=full")
    # Ordered dithering: still pixels stay still, while error diffusion flickers.
    use = graph.add("paletteuse", "dither=bayer:bayer_scale=5")
    start.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(graph.add("buffersink"))
    graph.configure()
    for i, image in enumerate(video):
        start.push(_frame(image, i, GIF_TICK))
    start.push(None)
    for now, after in itertools.pairwise(ticks):
        frame = graph.vpull()
        frame.pts, frame.duration, frame.time_base = now, after - now, GIF_TICK
        yield frame


# --- pictures of several clips ---


def upscale(video: np.ndarray, factor: int) -> np.ndarray:
    """Repeats pixels: ``[..., h, w, 3]`` to ``[..., h factor, w factor, 3]``."""
    return np.repeat(np.repeat(video, factor, axis=-3), factor, axis=-2)


def grid(videos: Sequence[np.ndarray], columns: int | None = None, pad: int = 2) -> np.ndarray:
    """Tiles clips of any sizes in rows into one clip on grey; shorter ones hold their last frame."""
    t, h, w = (max(video.shape[axis] for video in videos) for axis in range(3))
    n, cell = len(videos), (h + pad, w + pad)
    if columns is None:  # as near to a square as can be
        ratios = {c: c * cell[1] / (math.ceil(n / c) * cell[0]) for c in range(n, 0, -1)}
        columns = min(ratios, key=lambda c: abs(math.log(ratios[c])))
    rows = math.ceil(n / columns)
    canvas = np.full((t, rows * cell[0] + pad, columns * cell[1] + pad, 3), GREY, np.uint8)
    for i, video in enumerate(videos):
        count, vh, vw, _ = video.shape
        y = pad + (i // columns) * cell[0] + (h - vh) // 2
        x = pad + (i % columns) * cell[1] + (w - vw) // 2
        canvas[:count, y : y + vh, x : x + vw] = video
        canvas[count:, y : y + vh, x : x + vw] = video[-1]
    return canvas


def contact_sheet(
    videos: Sequence[np.ndarray], frames_per_video: int = 8, scale: int = 1
) -> np.ndarray:
    """A picture ``[h, w, 3]`` with a row for each clip: frames from its first to its last."""
    columns = min(frames_per_video, max(map(len, videos)))
    blank, cells = np.full((1, 1, 1, 3), GREY, np.uint8), []
    for video in (upscale(video, scale) for video in videos):
        indices = np.rint(np.linspace(0, len(video) - 1, min(columns, len(video)))).astype(int)
        cells += [video[i : i + 1] for i in indices] + [blank] * (columns - len(indices))
    return grid(cells, columns)[0]


def psnr(out: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 clips of the same shape (peak 255)."""
    assert out.shape == true.shape, (out.shape, true.shape)
    error = np.mean(np.square(out.astype(np.float64) - true.astype(np.float64)))
    return float(10 * np.log10(255.0**2 / max(error, 1e-10)))


def mean_psnr(out: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> float:
    """The mean over clips of each clip's PSNR in dB."""
    return float(np.mean([psnr(a, b) for a, b in zip(out, true, strict=True)]))
