"""The page on conditions: its code, run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "conditions.md"
RUN = """
import dataclasses
import sys
import numpy as np
from dit_jax.train import train
from light import get_config, lit_clips

config = dataclasses.replace(get_config(), output="run", evaluators=(), steps=int(sys.argv[1]))
assert train(config) is None
np.save("clips.npy", lit_clips(config.output, np.load("signals.npy")))
"""


@pytest.mark.parametrize("steps", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_a_signal_of_every_frame_is_followed(tmp_path, steps):
    # Steps up and down and constants: training saw straight lines of other values.
    signals = [np.full(5, level) for level in (0.1, 0.35, 0.6, 0.85)]
    signals += [np.repeat([low, high], [3, 2]) for low, high in ((0.2, 0.8), (0.9, 0.3))]
    signals = np.array(signals, np.float32)
    np.save(tmp_path / "signals.npy", signals)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "light.py").write_text("\n\n".join(blocks))
    # A process of its own has one device, and not the eight emulated ones of these tests.
    (tmp_path / "run.py").write_text(RUN)
    done = subprocess.run(
        [sys.executable, "run.py", str(steps)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    clips = np.load(tmp_path / "clips.npy")
    background = np.median(clips, axis=(2, 3, 4))  # [clip, t]
    assert np.corrcoef(background.ravel(), signals.ravel())[0, 1] >= 0.9
    # Within a clip too: the step is there, in every frame.
    for k in (4, 5):
        assert np.corrcoef(background[k], signals[k])[0, 1] >= 0.9
