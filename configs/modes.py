"""Moving shapes for every mode of sampling: the quickstart's model, trained on for given frames.

    python -m dit_jax.train --config configs/quickstart.py
    python -m dit_jax.train --config configs/modes.py
    python benchmarks/modes.py --checkpoint runs/modes

Two fifths of the clips are to be made whole; of the others some frames are given (``masks``). Paths
lie anywhere in half of the clips, as those that are given may, and some are slower and on a larger
canvas, as those that clips of four times the length need.

Measured (``docs/modes.md``): 99.0 % of 96 prompts followed from text alone, 100 % from a first frame;
clips are extended within 0.27 (forward) and 0.41 pixels a frame (backward) of the true ones, and 99.0 %
keep colour, shape and direction over four times the length. The training took 19.1 minutes on two idle
cores (AMD EPYC), with the report at its end; 34 minutes of CPU time.
"""

import dataclasses

from quickstart import get_config as quickstart

from dit_jax.config import VideoRun
from dit_jax.data import ShapesConfig
from dit_jax.diffusion import MaskConfig


def get_config() -> VideoRun:
    config = quickstart()
    masks = MaskConfig.only(
        none=0.4,
        first=0.13,
        head=0.12,
        tail=0.08,
        ends=0.05,
        every=0.04,
        keyframes=0.04,
        window=0.14,
    )
    source = config.data.source
    assert isinstance(source, ShapesConfig)
    sizes = (*source.sizes, (32, 48), (48, 32), (40, 40))
    source = dataclasses.replace(source, sizes=sizes, anywhere=0.5, speeds=(0.5, 1.5))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source),
        output="runs/modes",
        steps=1600,
        diffusion=dataclasses.replace(config.diffusion, masks=masks),
        checkpoint=dataclasses.replace(config.checkpoint, initial="runs/quickstart"),
    )
