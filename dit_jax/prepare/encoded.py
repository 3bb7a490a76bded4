"""Clips as encoded video in memory: how records hold pixels by default.

H.264 of the R'G'B' planes themselves, in Matroska: Y'CbCr in eight bits shifts the mean of a clip by up
to one level, and halved colour planes blur small clips. docs/prepare.md has what it takes beside zlib.

Encoding is in one thread and depends on nothing but the pixels and the version of x264: equal clips
give equal bytes. `data.records` decodes it. This module imports no other of ours, so that a worker
process starts quickly.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.codec.context import Flags
from av.error import FFmpegError

FORMAT = "matroska, h264, gbrp"
"""What ``encode_video`` makes, as the metadata of records say it."""
_OPTIONS = {
    "preset": "veryfast",
    "tune": "psnr,fastdecode",
    "crf": "14",
    # x264's macroblock tree reads memory that nobody wrote: the same clip gave other bytes in another
    # process (MALLOC_PERTURB_ shows it, with threads or without).
    "x264-params": "mbtree=0",
}
_FRAMES = "FRAMES"  # Matroska keeps tags in upper case.
_RATES = (Fraction(1, 100), Fraction(240))  # Time stamps are of a millisecond.


class EncodedVideo(NamedTuple):
    """A clip as ``encode_video`` makes it."""

    data: bytes
    shape: tuple[int, int, int]
    """Frames, height, width."""


def encode_video(frames: np.ndarray, fps: float) -> EncodedVideo:
    """Encodes uint8 RGB ``[t, h, w, 3]`` of any size; ``fps`` is for players and is kept roughly.

    Raises:
        ValueError: if H.264 cannot hold such frames (above 16,384 pixels a side).
    """
    count, height, width, _ = frames.shape
    rate = min(max(Fraction(fps).limit_denominator(1001), _RATES[0]), _RATES[1])
    target = io.BytesIO()
    try:
        with av.open(
            target, "w", format="matroska", container_options={"fflags": "+bitexact"}
        ) as container:
            container.metadata[_FRAMES] = str(count)
            stream: Any = container.add_stream("libx264rgb", rate, options=_OPTIONS)
            stream.height, stream.width, stream.pix_fmt = height, width, "rgb24"
            stream.codec_context.thread_count = 1
            stream.codec_context.flags |= Flags.bitexact
            for image in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except FFmpegError as error:
        raise ValueError(f"frames of {height} x {width} cannot be encoded ({error})") from error
    return EncodedVideo(target.getvalue(), (count, height, width))
