"""Moving shapes for long clips: the model of ``configs/modes.py``, trained on what windows are given.

    python -m dit_jax.train --config configs/long_shapes.py
    python benchmarks/long.py --checkpoint runs/long_shapes

Shapes are as slow as those that take four times the trained length to cross the canvas, paths lie
anywhere, and in most clips the first frames are given, with noise.
"""

import dataclasses

from modes import get_config as modes

from dit_jax.config import Config
from dit_jax.data import ShapesConfig
from dit_jax.diffusion import CeilingConfig


def get_config() -> Config:
    config = modes()
    source = config.data.source
    assert isinstance(source, ShapesConfig)
    source = dataclasses.replace(
        source,
        sizes=((32, 32), (40, 40), (32, 40), (40, 32)),
        frames=(9,),
        speeds=(0.5, 1.2),
        anywhere=0.8,
    )
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source),
        output="runs/long_shapes",
        diffusion=dataclasses.replace(
            config.diffusion,
            ceilings=CeilingConfig.only(free=0.3, first=0.1, head=0.2, window=0.4),
        ),
    )
