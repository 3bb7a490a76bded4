"""Moving shapes for every mode, slower ones among them, also on 40 x 40: where ``modes_long`` begins.

    python -m dit_jax.train --config configs/modes_slow.py

``configs/modes.py`` knows no shape as slow as those that need four times its clips' length to cross a
canvas. More to learn in as many steps costs text: 80.2 % of 96 held-out prompts followed. The training
took 59 minutes of CPU time, on two cores that are half as fast as those of the README's other figures.
"""

import dataclasses

from modes import get_config as modes

from dit_jax.config import Config
from dit_jax.data import ShapesConfig


def get_config() -> Config:
    config = modes()
    source = config.data.source
    assert isinstance(source, ShapesConfig)
    source = dataclasses.replace(
        source, sizes=(*source.sizes, (40, 40)), anywhere=0.5, speeds=(0.5, 1.5)
    )
    ceilings = dataclasses.replace(
        config.diffusion.ceilings, first=0.14, keyframes=0.03, window=0.06
    )
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source),
        output="runs/modes_slow",
        steps=2800,
        diffusion=dataclasses.replace(config.diffusion, ceilings=ceilings),
    )
