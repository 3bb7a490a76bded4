"""Pictures and clips in and out of files, with PyAV alone: mp4, GIF, PNG.

Arrays here are numpy, uint8 RGB in 0..255, a clip `[t, h, w, 3]` and an image `[h, w, 3]`;
`to_uint8` and `to_float` are the only way to and from the model's float range [-1, 1].
Writing the same array twice gives the same bytes, and a file appears whole or not at all.

What it does not do: audio, alpha, rotation metadata, variable frame rates, resizing other than
nearest-neighbour enlargement. Clips for training are read in `dit_jax/data/`.
"""

import contextlib
import errno
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av.codec.context
import av.container
import numpy as np
from av.error import FFmpegError
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from dit_jax.files import as_path, atomic_path, check_file

EXTENSIONS = (".mp4", ".gif", ".png")
GIF_TICK = Fraction(1, 100)  # GIF's unit of time, in s.
GIF_MAX_FPS = 50  # Players slow delays under 2/100 s down to 10/100 s.
Fill = int | tuple[int, int, int]

# Only the colour planes are scaled, never the picture; all their pixels count.
_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_SCALER |= Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


def to_uint8(x) -> np.ndarray:
    """Float pixels in [-1, 1], any shape, to uint8: rounded, values outside clipped.

    Errors: ValueError for a dtype that is not floating, or for NaN or infinite values.
    """
    x = np.asarray(x)
    if x.dtype.kind in "iub":
        raise ValueError(f"to_uint8: dtype {x.dtype}, but must be floats in [-1, 1]; convert first")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(
            f"to_uint8: {np.sum(~np.isfinite(x))} of {x.size} pixels are NaN or infinite, but must "
            "be finite; check the parameters and the sampler that made them"
        )
    return np.rint((np.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def to_float(x) -> np.ndarray:
    """uint8 pixels, any shape, to float32 in [-1, 1]; `to_uint8` inverts it exactly.

    Errors: ValueError for another dtype.
    """
    x = np.asarray(x)
    if x.dtype != np.uint8:
        raise ValueError(f"to_float: dtype {x.dtype}, but pixels must be uint8; convert them first")
    return x.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def check_output(path: str | os.PathLike) -> Path:
    """Refuses an output path that `write_video` could not write, before the long work starts.

    Creates the parent directories, and proves them writable by writing. Leaves no file behind.

    Errors: ValueError if the extension is not one of `EXTENSIONS`, the name is too long for the
    file system, the path is a directory, or its directory cannot be created or written.
    """
    path = as_path(path)
    _extension(path)
    return check_file(path, "output")


def write_video(path: str | os.PathLike, video: np.ndarray, fps: float) -> Path:
    """Writes a clip; the extension chooses the format, and the parent directory must exist.

    .mp4  H.264, yuv420p, BT.709: opens everywhere. Odd heights and widths do not exist there:
          the last row or column is repeated, with a warning. Colour has half the resolution,
          so enlarge tiny clips with `upscale` before looking closely.
    .gif  one palette of 256 colours for the clip, looping for ever; at most 50 frames/s.
    .png  one frame: that image; several: a strip, frames from left to right. Ignores `fps`.

    Args: `video` uint8 `[t, h, w, 3]`, no axis empty; `fps` frames per second, finite and > 0.
    Returns: the path. Errors: ValueError for a bad array, rate, extension or path.
    """
    path = as_path(path)
    video = _check_pixels("write_video", video, 4)
    extension = _extension(path)
    if extension == ".png":
        return write_png(path, np.concatenate(list(video), axis=1))
    rate = _rate(fps)
    if extension == ".gif" and rate > GIF_MAX_FPS:
        warnings.warn(f"{path}: {fps} frames/s, but GIF players stop at 50: slower", stacklevel=2)
        rate = Fraction(GIF_MAX_FPS)
    h, w = video.shape[1:3]
    if extension == ".mp4" and (h % 2 or w % 2):
        video = np.pad(video, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
        size = f"{h}x{w} becomes {video.shape[1]}x{video.shape[2]}"
        warnings.warn(f"{path}: H.264 needs even sizes: {size}, edges repeated", stacklevel=2)
    with _writing(path) as scratch:
        if extension == ".mp4":
            _encode_mp4(scratch, video, video.shape[1:3], rate)
        else:
            _encode_gif(scratch, video, rate)
    return path


def write_parts(path: str | os.PathLike, parts: Iterable[np.ndarray], fps: float) -> Path:
    """`write_video` of a clip that comes in parts `[n, h, w, 3]`, at least one. An mp4 has one of them
    in memory at a time, the other formats the whole clip. Errors: as `write_video`."""
    path, rest = as_path(path), iter(parts)
    if _extension(path) != ".mp4":
        return write_video(path, np.concatenate(list(rest)), fps)
    first = _check_pixels("write_parts", next(rest), 4)
    h, w = first.shape[1] % 2, first.shape[2] % 2
    whole = (
        np.pad(p, ((0, 0), (0, h), (0, w), (0, 0)), "edge") for p in itertools.chain([first], rest)
    )
    size = first.shape[1] + h, first.shape[2] + w
    with _writing(path) as scratch:
        _encode_mp4(scratch, itertools.chain.from_iterable(whole), size, _rate(fps))
    return path


def write_png(path: str | os.PathLike, image: np.ndarray) -> Path:
    """Writes an image, uint8 `[h, w, 3]`, without loss; the parent directory must exist.

    Returns: the path. Errors: ValueError for a bad array, extension or path.
    """
    path = as_path(path)
    image = _check_pixels("write_png", image, 3)
    if path.suffix.lower() != ".png":
        raise ValueError(f"image {str(path)!r} has extension {path.suffix!r}; it must be '.png'")
    with _writing(path) as scratch:
        picture = scratch.with_suffix(".png")  # save() knows the lower case alone
        _frame(image, 0, Fraction(1)).save(str(picture))
        picture.replace(scratch)
    return path


def read_video(path: str | os.PathLike, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """The frames of a video or image file: uint8 `[t, h, w, 3]`, and frames per second.

    A plain reader for clips that fit in memory: every stored frame of the first video stream in
    order, or the first `max_frames`. Rotation, sample aspect and transparency are not its job and
    ignored; variable rates come back as their mean; an image is one frame, its rate meaningless.

    Errors: ValueError if the file is missing, is not a video, is damaged, or changes size.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}, but must be at least 1; or None for all")
    frames, times = [], []
    try:
        # An open file and not a name, in which FFmpeg would see protocols ("a:") and "%d".
        with as_path(path).open("rb") as file, av.open(file, "r") as container:
            if not container.streams.video:
                raise ValueError(f"{str(path)!r} has no video stream; choose a video or an image")
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                frames.append(frame.reformat(format="rgb24", interpolation=_SCALER).to_ndarray())
                times.append(frame.time)
                if len(frames) == max_frames:
                    break
            rate = _mean_rate(stream, times)
    except (OSError, FFmpegError) as error:
        raise ValueError(
            f"cannot read {str(path)!r} as a video ({error.strerror or error}); it must be a "
            "complete file in a format that FFmpeg knows; check the path, or convert it to mp4"
        ) from error
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) != 1:
        found = f"frames of sizes {sorted(sizes)}" if sizes else "no frames"
        raise ValueError(f"{str(path)!r} has {found}, but must have some, of one size; convert it")
    return np.stack(frames), rate


def upscale(video: np.ndarray, k: int) -> np.ndarray:
    """Nearest-neighbour enlargement: `[..., h, w, 3]` to `[..., h·k, w·k, 3]`, any dtype.

    Errors: ValueError unless k is an integer of at least 1.
    """
    if k < 1 or k != int(k):
        raise ValueError(f"upscale by {k}, but the factor must be an integer of at least 1")
    return np.repeat(np.repeat(video, int(k), axis=-3), int(k), axis=-2)


def grid(
    videos: Sequence[np.ndarray], columns: int | None = None, pad: int = 2, fill: Fill = 128
) -> np.ndarray:
    """Tiles clips in rows, left to right, into one clip uint8 `[t, H, W, 3]`.

    Args: `videos` uint8 `[t, h, w, 3]` each, sizes and lengths as they come: cells have the
    largest height and width, smaller clips stand centred in theirs, and shorter ones hold their
    last frame. `columns`: by default whatever makes the picture nearest to square. `pad`: pixels
    between and around cells. `fill`: colour of everything else, a grey level or RGB, 0..255.

    Errors: ValueError if there is no clip, a clip is not uint8 `[t, h, w, 3]`, or columns < 1.
    """
    videos = [_check_pixels("grid", video, 4) for video in videos]
    if not videos:
        raise ValueError("0 clips, but there must be at least one; pass some")
    t, h, w = (max(video.shape[axis] for video in videos) for axis in range(3))
    if columns is None:
        columns = _square_columns(len(videos), h + pad, w + pad)
    if columns < 1 or pad < 0:
        raise ValueError(f"grid: columns {columns} and pad {pad}, but they must be >= 1 and >= 0")
    rows = math.ceil(len(videos) / columns)
    canvas = np.empty((t, rows * (h + pad) + pad, columns * (w + pad) + pad, 3), np.uint8)
    canvas[:] = np.asarray(fill, np.uint8)
    for i, video in enumerate(videos):
        n, vh, vw, _ = video.shape
        y = pad + (i // columns) * (h + pad) + (h - vh) // 2
        x = pad + (i % columns) * (w + pad) + (w - vw) // 2
        canvas[:n, y : y + vh, x : x + vw] = video
        canvas[n:, y : y + vh, x : x + vw] = video[-1]
    return canvas


def contact_sheet(
    videos: Sequence[np.ndarray], frames_per_video: int = 8, scale: int = 1, pad=2, fill: Fill = 128
) -> np.ndarray:
    """One row a clip, some of its frames from left to right: an image uint8 `[H, W, 3]`.

    The frames are evenly spaced, first and last among them; a clip with fewer shows those it
    has. `scale` enlarges every frame by that integer, nearest neighbour. `videos`, `pad`, `fill`
    and errors as in `grid`; also ValueError if `frames_per_video` < 1.
    """
    videos = [upscale(_check_pixels("contact_sheet", video, 4), scale) for video in videos]
    if frames_per_video < 1:
        raise ValueError(f"contact_sheet: {frames_per_video} frames per video, but must be >= 1")
    columns = min(frames_per_video, max(map(len, videos), default=1))
    blank = np.full((1, 1, 1, 3), np.asarray(fill, np.uint8))
    cells = []
    for video in videos:
        shown = np.rint(np.linspace(0, len(video) - 1, min(columns, len(video)))).astype(int)
        cells += [video[i : i + 1] for i in shown] + [blank] * (columns - len(shown))
    return grid(cells, columns, pad, fill)[0]


def _square_columns(n: int, h: int, w: int) -> int:
    """The number of columns for which n cells of h by w are nearest to square."""
    return min(range(n, 0, -1), key=lambda c: abs(math.log(c * w / (math.ceil(n / c) * h))))


def _extension(path: Path) -> str:
    """The extension in lower case; ValueError if `write_video` does not know it."""
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise ValueError(
            f"output {str(path)!r} has extension {path.suffix!r}, but must have one of "
            f"{', '.join(EXTENSIONS)}; rename it"
        )
    return extension


def _rate(fps: float) -> Fraction:
    """Frames per second as a fraction such as 24000/1001; ValueError unless finite and > 0."""
    rate = Fraction(fps).limit_denominator(1001) if math.isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise ValueError(f"fps is {fps}, but must be finite and at least 1/1001; try 24")
    return rate


def _mean_rate(stream, times: list[float | None]) -> float:
    """Frames per second: what the file says, unless its frames' times contradict it (GIF)."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    first, last = (times[0], times[-1]) if times else (None, None)
    if first is None or last is None or last <= first:
        return rate
    gaps, span = len(times) - 1, last - first
    return rate if abs(gaps / rate - span) < 0.75 * float(stream.time_base) else gaps / span


def _check_pixels(who: str, pixels, ndim: int) -> np.ndarray:
    """`pixels` as a numpy array; ValueError unless uint8, of `ndim` axes, RGB and not empty."""
    pixels = np.asarray(pixels)
    want = "[t, h, w, 3]" if ndim == 4 else "[h, w, 3]"
    if pixels.dtype != np.uint8 or pixels.ndim != ndim or pixels.shape[-1] != 3 or not pixels.size:
        raise ValueError(
            f"{who}: pixels are {pixels.dtype} {list(pixels.shape)}, but must be uint8 {want} "
            "with no empty axis; convert floats with to_uint8, repeat grey three times"
        )
    return pixels


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Gives a local file to write, which becomes `path` when that went well.

    Errors: ValueError if the format does not allow the clip; OSError, with the path, if storage fails.
    """
    try:
        with atomic_path(path) as scratch:
            yield scratch
    except FFmpegError as error:
        if error.errno in errno.errorcode and error.errno != errno.EINVAL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise ValueError(
            f"cannot write {str(path)!r} ({error.strerror or error}); its size must be one that the "
            f"format allows; try another of {', '.join(EXTENSIONS)}"
        ) from error


def _frame(image: np.ndarray, pts: int, time_base: Fraction) -> av.VideoFrame:
    """An image uint8 `[h, w, 3]` as a frame at time `pts · time_base` seconds."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame.pts, frame.time_base = pts, time_base
    return frame


def _encode_mp4(
    path: Path, video: Iterable[np.ndarray], size: tuple[int, ...], rate: Fraction
) -> None:
    """H.264 at a quality that hides compression, the same bytes every time.

    That takes one thread, and neither B-frames nor macroblock trees: with both, x264's assembler
    gave other bytes for the same small frames in up to one run of eight.
    """
    quality = {"crf": "12", "preset": "medium", "x264-params": "bframes=0:no-mbtree=1"}
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.flags |= av.container.Flags.bitexact.value
        stream = container.add_stream("libx264", rate, options=quality)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        encoder = stream.codec_context
        encoder.thread_count = 1
        encoder.flags |= av.codec.context.Flags.bitexact.value
        encoder.colorspace, encoder.color_range = Colorspace.ITU709, ColorRange.MPEG
        encoder.color_primaries, encoder.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for i, image in enumerate(video):
            frame = _frame(image, i, 1 / rate).reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_SCALER,
                threads=1,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _encode_gif(path: Path, video: np.ndarray, rate: Fraction) -> None:
    """A looping GIF; times are rounded to 1/100 s each, so that the clip keeps its length."""
    ticks = [round(i / rate / GIF_TICK) for i in range(len(video) + 1)]
    options = {"loop": "0", "final_delay": str(min(ticks[-1] - ticks[-2], 65535))}
    with av.open(str(path), "w", format="gif", options=options) as container:
        container.flags |= av.container.Flags.bitexact.value
        stream = container.add_stream("gif", rate)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "pal8"
        stream.codec_context.time_base = GIF_TICK
        stream.codec_context.flags |= av.codec.context.Flags.bitexact.value
        for i, frame in enumerate(_paletted(video)):
            frame.pts, frame.duration, frame.time_base = ticks[i], ticks[i + 1] - ticks[i], GIF_TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _paletted(video: np.ndarray) -> Iterator[av.VideoFrame]:
    """The frames in one palette of 256 colours chosen over the whole clip (FFmpeg's filters)."""
    h, w = video.shape[1:3]
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(None, w, h, av.VideoFormat("rgb24", w, h), time_base=GIF_TICK)
    split = graph.add("split")
    palette = graph.add("palettegen", "reserve_transparent=0:stats_mode=full")
    # Ordered dithering: still pixels stay still, where error diffusion flickers.
    use = graph.add("paletteuse", "dither=bayer:bayer_scale=5")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(graph.add("buffersink"))
    graph.configure()
    for i, image in enumerate(video):
        source.push(_frame(image, i, GIF_TICK))
    source.push(None)
    yield from (graph.vpull() for _ in video)


def psnr(out: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 clips of the same shape (peak 255)."""
    if out.shape != true.shape:
        raise ValueError(f"clips of shapes {out.shape} and {true.shape} cannot be compared.")
    error = np.mean(np.square(out.astype(np.float64) - true.astype(np.float64)))
    return float(10 * np.log10(255.0**2 / max(error, 1e-10)))


def mean_psnr(out: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> float:
    """The mean over clips of each clip's PSNR in dB."""
    return float(np.mean([psnr(a, b) for a, b in zip(out, true, strict=True)]))
