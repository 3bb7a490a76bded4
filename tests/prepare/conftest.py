"""Where the shared media are, and files made as cameras and phones make them."""

import os
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

for module in ("PIL", "cv2", "openai"):
    pytest.importorskip(module, reason="needs the extra: pip install -e '.[prepare]'")

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
# Helpers beside the tests are imported by name.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def shared():
    """The path of a shared file by its name; skips where there are none."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared media at {os.fspath(SHARED)}")
    return lambda name: SHARED / name


@pytest.fixture
def slept(monkeypatch):
    """Without a key in the environment: the seconds a chat client waits for, which take none."""
    seconds = []

    async def sleep(wait):
        seconds.append(wait)

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
    return seconds


@pytest.fixture
def written(tmp_path):
    """Writes frames to a file: `written("a.mp4", frames, fps=25, times=None, ...)`."""

    def write(
        name,
        frames,
        fps=25,
        *,
        times=None,
        codec="libx264",
        aspect=None,
        kind=None,
        options=None,
        **more,
    ):
        """`frames`: uint8 RGB [t, h, w, 3], stored as `kind` (by default yuv444p, nearly lossless), or
        `av.VideoFrame`s as they are; `more`: attributes of the encoder."""
        path, rate = tmp_path / name, Fraction(fps).limit_denominator(1001)
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
                    if aspect:
                        stream.codec_context.sample_aspect_ratio = aspect
                    for key, value in more.items():
                        setattr(stream.codec_context, key, value)
                    if times is not None:
                        stream.codec_context.time_base = base
                frame.pts, frame.time_base = i if times is None else round(times[i] * 1000), base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write
