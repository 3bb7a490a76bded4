"""Clips that tests make, and what files show."""

from fractions import Fraction

import av
import numpy as np

from dit_jax.prepare.media import DecodingLog, pictures, sampled
from dit_jax.prepare.refusals import Refused
from dit_jax.prepare.workers import Outcome


def moving(count, height=96, width=128, seed=0, speed=2):
    """A clip uint8 [t, h, w, 3]: smooth random colours that move, with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (height // 12 + 2, (width + speed * count) // 12 + 2, 3))
    fine = np.kron(coarse, np.ones((12, 12, 1)))
    frames = [fine[:height, speed * i : speed * i + width] for i in range(count)]
    noisy = np.stack([f + rng.integers(-6, 7, f.shape) for f in frames])
    return noisy.clip(0, 255).astype(np.uint8)


def write_video(
    path, frames, fps=25, *, times=None, codec="libx264", kind=None, options=None, **more
):
    """Writes a file and returns its path.

    `frames`: uint8 RGB [t, h, w, 3], stored as `kind` (by default yuv444p, nearly lossless), or
    `av.VideoFrame`s as they are; `more`: attributes of the encoder.
    """
    rate = Fraction(fps).limit_denominator(1001)
    base = 1 / rate if times is None else Fraction(1, 1000)
    fine = kind is None and codec == "libx264" and isinstance(frames[0], np.ndarray)
    options = options or ({"crf": "4", "g": "12"} if fine else {})
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate, options=options)
        for i, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
                frame = frame.reformat(format=kind or "yuv444p")
            if not i:
                stream.height, stream.width = frame.height, frame.width
                stream.pix_fmt = frame.format.name
                for key, value in more.items():
                    setattr(stream.codec_context, key, value)
                if times is not None:
                    stream.codec_context.time_base = base
            frame.pts, frame.time_base = i if times is None else round(times[i] * 1000), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def probe(path, config=None):
    """What a file is."""
    log = DecodingLog()
    next(pictures(path, config, log))
    return log.probe


def displayed(path, config=None):
    """The seconds and pixels of a file's displayed frames."""
    return [(picture.time, picture.pixels()) for _, picture in sampled(path, config=config)]


def cropped(frames, crop):
    """The part of frames that a clip shows."""
    rows = slice(crop.top, crop.top + crop.height)
    return np.stack(list(frames))[:, rows, crop.left : crop.left + crop.width]


def run_here(function, items, *_):
    """`workers.run` in this process: each child takes seconds to start (test_workers.py)."""
    for item in items:
        try:
            yield Outcome(function(item))
        except Refused as refused:
            yield Outcome(None, refused.reason, refused.detail)
