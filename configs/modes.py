"""Moving shapes for every mode of sampling: the quickstart's model, trained on mixed noise levels.

    python -m dit_jax.train --config configs/modes.py
    python benchmarks/modes.py --checkpoint runs/modes

Half of the clips are to be made whole; of the others some frames are given (``ceilings``). Paths lie
anywhere in part of the clips, as those that are given may.

Measured (``docs/modes.md``): 91.7 % of 96 prompts followed from text alone, 97.9 % from a first frame;
clips are extended within 0.30 (forward) and 0.43 pixels a frame (backward) of the true ones.
"""

import dataclasses

from quickstart import get_config as quickstart

from dit_jax.config import Config
from dit_jax.data import ShapesConfig
from dit_jax.diffusion import CeilingConfig


def get_config() -> Config:
    config = quickstart()
    ceilings = CeilingConfig.only(
        free=0.5,
        first=0.15,
        head=0.1,
        tail=0.08,
        ends=0.05,
        every=0.04,
        keyframes=0.04,
        window=0.04,
    )
    source = config.data.source
    assert isinstance(source, ShapesConfig)
    sizes = (*source.sizes, (32, 48), (48, 32))
    source = dataclasses.replace(source, sizes=sizes, anywhere=0.4)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source),
        output="runs/modes",
        steps=3000,
        diffusion=dataclasses.replace(config.diffusion, ceilings=ceilings),
    )
