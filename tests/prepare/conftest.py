"""Where the shared media are, and files made as cameras and phones make them."""

import os
from pathlib import Path

import av.logging
import pytest

for module in ("PIL", "cv2", "openai"):
    pytest.importorskip(module, reason="needs the extra: pip install -e '.[prepare]'")

from tests.prepare.made_media import write_video  # noqa: E402

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def shared():
    """The path of a shared file by its name; skips where there are none."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared media at {os.fspath(SHARED)}")
    av.logging.set_level(av.logging.PANIC)
    return SHARED.joinpath


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
    return lambda name, *args, **more: write_video(tmp_path / name, *args, **more)
