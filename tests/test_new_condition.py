"""The page on conditions: its code, run as it stands there."""

import dataclasses
import importlib
import re

import numpy as np
import pytest

from dit_jax.train import train
from tests.runs import ROOT


@pytest.mark.usefixtures("one_device")
def test_a_signal_of_every_frame_is_followed(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "conditions.md").read_text()
    code = "\n\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    (tmp_path / "light.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    light = importlib.import_module("light")
    output = str(tmp_path / "run")
    config = dataclasses.replace(light.get_config(), output=output, evaluators=(), steps=100)
    assert train(config) is None

    # Steps up and down and constants: training saw straight lines of other values.
    signals = [np.full(5, level) for level in (0.1, 0.35, 0.6, 0.85)]
    signals += [np.repeat([low, high], [3, 2]) for low, high in ((0.2, 0.8), (0.9, 0.3))]
    clips = np.array(light.lit_clips(output, np.array(signals, np.float32)))
    background = np.median(clips, axis=(2, 3, 4))  # [clip, t]
    assert np.corrcoef(background.ravel(), np.ravel(signals))[0, 1] >= 0.9
    # Within a clip too: the step is there, in every frame.
    for k in (4, 5):
        assert np.corrcoef(background[k], signals[k])[0, 1] >= 0.9
