"""A 14 B-parameter text-to-video transformer on the data and objective of ``video_1b3``.

python -m dit_jax.train --config configs/video_14b.py --data.source.path RECORDS

Compiled for v5p:4x4x4 (64 chips), not run (``python -m dit_jax.plan --config configs/video_14b.py
--topology v5p:4x4x4``, libtpu 0.0.42): 74.7 of 95 GB a chip, 14.7 s a step at least, at most 75 % MFU.
"""

import dataclasses

from video_1b3 import get_config as video_1b3

from dit_jax.config import VideoRun
from dit_jax.model import DiTConfig


def get_config() -> VideoRun:
    base = video_1b3()
    dit = DiTConfig(
        width=5120, depth=40, heads=40, mlp_dim=13_824, modulation="shared", remat="attention"
    )
    return dataclasses.replace(
        base,
        output="runs/video_14b",
        model=dataclasses.replace(base.model, dit=dit),
    )
