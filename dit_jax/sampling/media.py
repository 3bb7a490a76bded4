"""Pictures and clips in and out of files with PyAV alone: mp4, GIF and PNG out, what FFmpeg knows in.

Clips are uint8 RGB ``[t, h, w, 3]``, pictures ``[h, w, 3]``; the model's range is [-1, 1]. The same
array gives the same bytes of a file.
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
from typing import Any

import av.codec.context
import av.container
import numpy as np
from av.error import EOFError as FFmpegEOFError
from av.error import FFmpegError
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from dit_jax.data.records import cover
from dit_jax.files import as_path, atomic_path, check_file, checking_input, local_copy, refuse_if

EXTENSIONS = (".mp4", ".gif", ".png")
GIF_TICK = Fraction(1, 100)  # GIF's unit of time, in seconds
GIF_MAX_FPS = 50  # players slow delays under 2/100 s down to 10/100 s
GREY = 128
_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_SCALER |= Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


def to_uint8(x: Any) -> np.ndarray:
    """Turns floats in [-1, 1] into uint8: rounded, and clipped outside."""
    x = np.asarray(x).astype(np.float32)
    bad = f"{np.sum(~np.isfinite(x))} of {x.size} pixels are NaN or infinite: check the parameters."
    refuse_if([(not np.isfinite(x).all(), bad)])
    return np.rint((np.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def to_float(x: Any) -> np.ndarray:
    """Turns uint8 into float32 in [-1, 1]; ``to_uint8`` inverts it exactly."""
    x = np.asarray(x)
    assert x.dtype == np.uint8, x.dtype
    return x.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def read_video(
    path: str | os.PathLike,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> tuple[np.ndarray, float]:
    """Reads a video or picture as a player shows it: frames ``[t, h, w, 3]``, and frames a second.

    With ``height`` and ``width``, frames are scaled to cover that size, and their centre is cropped.
    With ``fps``, frames are repeated or left out, each the nearest in time.
    """
    frames: list[np.ndarray] = []
    times: list[float] = []
    # An open file and not a name, in which FFmpeg would see protocols ("a:") and "%d".
    why = f"cannot read {str(path)!r} as a video", "check the path, or convert it with ffmpeg"
    with checking_input(*why), local_copy(path).open("rb") as file, av.open(file) as container:
        stream = container.streams.video[0]
        for frame in _decode(container, stream, path):
            if times and frame.time is not None and frame.time <= times[-1]:
                continue  # damage: a frame that comes late
            image = _as_shown(frame, float(stream.sample_aspect_ratio or 1))
            if height and width:
                image = cover(image[None], height, width)[0]
            frames.append(image)
            times.append(len(times) if frame.time is None else frame.time)
            shown = len(frames) if fps is None else (times[-1] - times[0]) * fps
            if max_frames and shown >= max_frames:
                break
        rate = _rate(stream, times)
        video = np.stack(frames)  # not of several sizes, and not of none
    if fps is not None and len(video) > 1:
        # Frame k is the nearest to k / fps; halfway, the later one. The last is shown for a frame.
        clock = (np.array(times) - times[0]) * fps
        count = max(math.ceil(clock[-1] + 0.5 - 1e-6), 1)
        middles = (clock[1:] + clock[:-1]) / 2
        video, rate = video[np.searchsorted(middles - 1e-6, np.arange(count), "right")], fps
    return video[:max_frames], rate


def video_shape(path: str | os.PathLike) -> tuple[int, int, float, bool]:
    """Height, width and frames a second of a file as it is shown, and whether it is a still picture."""
    height, width = read_video(path, max_frames=1)[0].shape[1:3]
    with local_copy(path).open("rb") as file, av.open(file, "r") as container:
        stream = container.streams.video[0]
        times = [float(p.pts * p.time_base) for p in container.demux(stream) if p.pts is not None]
        return height, width, _rate(stream, sorted(times)), len(times) < 2


def _decode(container: Any, stream: Any, path: str | os.PathLike) -> Iterator[Any]:
    """The frames of a stream, deinterlaced; up to the first damage, which is a warning."""
    graph: Graph | None = None
    try:
        for frame in container.decode(stream):
            if graph is None and frame.interlaced_frame:
                graph = Graph()
                graph.threads = 1
                size = {"width": frame.width, "height": frame.height}
                source = graph.add_buffer(**size, format=frame.format, time_base=frame.time_base)
                bwdif = graph.add("bwdif", "deint=interlaced:mode=send_frame")
                graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
            yield from [frame] if graph is None else _filtered(graph, frame)
    except FFmpegError as error:
        text = f"{str(path)!r} is damaged ({error.strerror}): used up to there"
        warnings.warn(text, stacklevel=2)
    if graph is not None:
        yield from _filtered(graph, None)  # the filter holds a frame back


def _filtered(graph: Graph, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    graph.vpush(frame)
    with contextlib.suppress(FFmpegEOFError, BlockingIOError):
        while True:
            yield graph.vpull()


def _as_shown(frame: av.VideoFrame, aspect: float) -> np.ndarray:
    """A decoded frame as RGB ``[h, w, 3]``: stretched, before white if it is transparent, turned."""
    if frame.color_trc in (16, 18):  # PQ and HLG, by ITU-T H.273; PyAV's FFmpeg does not map them
        raise ValueError("it is HDR: -vf zscale=t=linear:npl=203,tonemap=mobius,zscale=t=bt709")
    palette = frame.format.has_palette
    alpha = palette or any(part.is_alpha for part in frame.format.components)
    rgb = palette or frame.format.is_rgb
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
    with contextlib.suppress(KeyError, ValueError):  # no matrix, or data that PyAV does not know
        # ISO 14496-12: nine int32, row by row; a negative determinant mirrors left to right.
        data: Any = frame.side_data
        matrix = np.frombuffer(bytes(data[Type.DISPLAYMATRIX]), np.int32)
        a, b, _, c, d = matrix[:5].astype(np.int64)
        if a * d - b * c < 0:
            image, a, b = image[:, ::-1], -a, -b
        image = np.rot90(image, -round(math.degrees(math.atan2(b, a)) / 90))
    return np.ascontiguousarray(image)


def _rate(stream: Any, times: Sequence[float]) -> float:
    """Frames a second: what the file says, unless its frames' times contradict it (as of GIF)."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    if len(times) < 2 or times[-1] <= times[0]:
        return rate
    gaps, span = len(times) - 1, times[-1] - times[0]
    return rate if abs(gaps / rate - span) < 0.75 * float(stream.time_base) else gaps / span


def check_output(path: str | os.PathLike) -> Path:
    """Refuses a path that ``write_video`` could not write, before the long work starts."""
    path = as_path(path)
    known, suffix = ", ".join(EXTENSIONS), path.suffix
    message = f"output {str(path)!r} has extension {suffix!r}: give one of {known}."
    refuse_if([(suffix.lower() not in EXTENSIONS, message)])
    return check_file(path, "output")


def write_video(
    path: str | os.PathLike, video: np.ndarray | Iterable[np.ndarray], fps: float
) -> Path:
    """Writes a clip ``[t, h, w, 3]``, or its parts ``[n, h, w, 3]``, one at a time in mp4.

    mp4 is H.264 (yuv420p, BT.709) of even sizes: colour has half the resolution. A GIF has a palette
    of 256 colours, loops for ever, and shows at most 50 frames a second. A PNG of several frames is a
    strip from left to right.
    """
    path = check_output(path)
    parts = iter([video] if isinstance(video, np.ndarray) else video)
    kind, first = path.suffix[1:].lower(), next(parts)
    if kind != "mp4":
        first = np.concatenate([first, *parts])
    assert first.dtype == np.uint8 and first.ndim == 4 and first.shape[-1] == 3, first.shape
    if kind == "png":
        return write_png(path, np.concatenate(list(first), axis=1))
    rate, (h, w) = Fraction(fps).limit_denominator(1001), first.shape[1:3]
    if kind == "gif":
        if rate > GIF_MAX_FPS:
            warnings.warn(f"{path}: {fps} frames/s, but players stop at 50: slower", stacklevel=2)
        rate = min(rate, Fraction(GIF_MAX_FPS))
        # Times are rounded to 1/100 s each, and not delays, so that the clip keeps its length.
        ticks = [round(i / rate / GIF_TICK) for i in range(len(first) + 1)]
        options = {"loop": "0", "final_delay": str(min(ticks[-1] - ticks[-2], 65535))}
        frames, codec, pixels = _with_palette(first, ticks), "gif", "pal8"
    else:
        if h % 2 or w % 2:
            warnings.warn(f"{path}: H.264 needs even sizes: {h}x{w} gets more edge", stacklevel=2)
        frames, codec, pixels = _bt709(itertools.chain([first], parts), rate), "libx264", "yuv420p"
        options, h, w = {"movflags": "+faststart"}, h + h % 2, w + w % 2
    with (
        _writing(path) as scratch,
        av.open(str(scratch), "w", format=kind, options=options) as container,
    ):
        # Bytes that depend on the frames alone: no versions in them, one thread.
        container.flags |= av.container.Flags.bitexact.value
        stream: Any = container.add_stream(codec, rate)
        stream.height, stream.width, stream.pix_fmt = h, w, pixels
        encoder = stream.codec_context
        encoder.thread_count, encoder.flags = 1, encoder.flags | av.codec.context.Flags.bitexact
        if kind == "gif":
            encoder.time_base = GIF_TICK
        else:
            # No B-frames and no macroblock trees: with them x264's assembler gave other bytes for the
            # same small frames in up to one run of eight.
            stream.options = {"crf": "12", "preset": "medium"}
            stream.options |= {"x264-params": "bframes=0:no-mbtree=1"}
            encoder.colorspace, encoder.color_range = Colorspace.ITU709, ColorRange.MPEG
            encoder.color_primaries, encoder.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in itertools.chain(frames, [None]):
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
        remedy = f"its size must be one that the format allows; try another of {EXTENSIONS}"
        with checking_input(f"cannot write {str(path)!r}", remedy):
            raise


def _frame(image: np.ndarray, pts: int, time_base: Fraction) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame.pts, frame.time_base = pts, time_base
    return frame


def _bt709(parts: Iterable[np.ndarray], rate: Fraction) -> Iterator[av.VideoFrame]:
    """The frames as yuv420p of even sizes."""
    bt709 = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
    for i, image in enumerate(itertools.chain.from_iterable(parts)):
        h, w, _ = image.shape
        frame = _frame(np.pad(image, ((0, h % 2), (0, w % 2), (0, 0)), "edge"), i, 1 / rate)
        yield frame.reformat(format="yuv420p", interpolation=_SCALER, threads=1, **bt709)


def _with_palette(video: np.ndarray, ticks: Sequence[int]) -> Iterator[av.VideoFrame]:
    """The frames, at their times, in one palette of 256 colours chosen over the whole clip."""
    h, w = video.shape[1:3]
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(None, w, h, av.VideoFormat("rgb24", w, h), time_base=GIF_TICK)
    split = graph.add("split")
    palette = graph.add("palettegen", "reserve_transparent=0:stats_mode=full")
    # Ordered dithering: still pixels stay still, while error diffusion flickers.
    use = graph.add("paletteuse", "dither=bayer:bayer_scale=5")
    graph.link_nodes(source, split, use, graph.add("buffersink"))
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    graph.configure()
    for i, image in enumerate(video):
        source.push(_frame(image, i, GIF_TICK))
    source.push(None)
    for tick, following in itertools.pairwise(ticks):
        frame = graph.vpull()
        frame.pts, frame.duration, frame.time_base = tick, following - tick, GIF_TICK
        yield frame


def upscale(video: np.ndarray, factor: int) -> np.ndarray:
    """Repeats pixels: ``[..., h, w, 3]`` to ``[..., h factor, w factor, 3]``."""
    return video.repeat(factor, axis=-3).repeat(factor, axis=-2)


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
        canvas[:, y : y + vh, x : x + vw] = video[np.minimum(np.arange(t), count - 1)]
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
