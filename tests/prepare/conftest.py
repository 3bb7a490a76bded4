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

    def write(name, frames, fps=25, *, times=None, codec="libx264", aspect=None, **attributes):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream(codec, rate)
            first = frames[0]
            if isinstance(first, np.ndarray):
                stream.height, stream.width = first.shape[:2]
                stream.pix_fmt = "yuv444p"
                if codec == "libx264":
                    stream.options = {"crf": "4", "g": "12"}
            else:
                stream.height, stream.width, stream.pix_fmt = (
                    first.height,
                    first.width,
                    first.format.name,
                )
            if aspect:
                stream.codec_context.sample_aspect_ratio = aspect
            for key, value in attributes.items():
                setattr(stream.codec_context, key, value)
            base = Fraction(1, 1000) if times is not None else 1 / rate
            if times is not None:
                stream.codec_context.time_base = base
            for i, image in enumerate(frames):
                frame = image
                if isinstance(image, np.ndarray):
                    image = np.ascontiguousarray(image)
                    frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv444p")
                frame.time_base = base
                frame.pts = i if times is None else round(times[i] * 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write
