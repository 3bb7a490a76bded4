"""The page on conditions: its code, run as it stands there."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_jax.train import train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "conditions.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The Python of the page as one module."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    file = tmp_path_factory.mktemp("page") / "light.py"
    file.write_text("\n\n".join(blocks))
    spec = importlib.util.spec_from_file_location("light", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["light"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["light"]


def test_a_signal_of_every_frame_is_followed(page, tmp_path):
    config = dataclasses.replace(page.get_config(), output=str(tmp_path / "run"))
    assert train(config) is None
    # Steps up and down and constants: training saw straight lines of other values.
    signals = [np.full(5, level) for level in (0.1, 0.35, 0.6, 0.85)]
    signals += [np.repeat([low, high], [3, 2]) for low, high in ((0.2, 0.8), (0.9, 0.3))]
    signals = np.array(signals, np.float32)
    clips = page.lit_clips(config.output, signals)
    background = np.array([np.median(clip, axis=(1, 2, 3)) for clip in clips])
    assert np.corrcoef(background.ravel(), signals.ravel())[0, 1] >= 0.9
    # Within a clip too: the step is there, in every frame.
    for k in (4, 5):
        assert np.corrcoef(background[k], signals[k])[0, 1] >= 0.9
