"""Long clips of moving shapes: ``modes_slow`` for 800 more steps, mostly on what windows are given.

    python -m dit_jax.train --config configs/modes_slow.py
    python -m dit_jax.train --config configs/modes_long.py
    python benchmarks/long.py --checkpoint runs/modes_long --clips 96 --noise 0.1

Measured: 93.8 % of 96 clips of 36 frames, made in windows of nine from three true frames on, keep
colour, shape and direction; all that do not are small crosses, which lose their arms. The training took
16 minutes of CPU time, on two cores that are half as fast as those of the README's other figures.
"""

import dataclasses

from modes_slow import get_config as modes_slow

from dit_jax.config import Config, EvaluationConfig


def get_config() -> Config:
    config = modes_slow()
    ceilings = dataclasses.replace(
        config.diffusion.ceilings, free=0.25, first=0.05, head=0.2, tail=0.05, window=0.4
    )
    return dataclasses.replace(
        config,
        output="runs/modes_long",
        steps=800,
        diffusion=dataclasses.replace(config.diffusion, ceilings=ceilings),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=2e-3),
        checkpoint=dataclasses.replace(config.checkpoint, initial="runs/modes_slow"),
        evaluation=EvaluationConfig(prompts=0),
    )
