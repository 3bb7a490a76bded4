"""A minute of 1920 x 1080 video in one row: 2.9 million tokens, spread over ``context``.

    python -m dit_jax.train --config configs/minute_1080p.py --data.source.path RECORDS

60 s at 24 frames a second are 361 latent frames of 136 x 240 (1088 rows of pixels, the nearest that
the codec and the patches divide), 8,160 tokens each. The transformer is ``video_1b3``'s with a window:
every other layer attends to the whole minute, the others to four latent frames (2/3 s) on either side.

Compiled for v5p:8x8x8 (512 chips), not run (``python -m dit_jax.plan --config
configs/minute_1080p.py --topology v5p:8x8x8``, libtpu 0.0.42): 7.9 of 95 GB a chip, 12.9 s a step at
least, at most 82 % MFU. Keys and values travel between 128 groups of four chips, 3 heads a chip.
"""

import dataclasses

from video_1b3 import get_config as video_1b3

from dit_jax.config import VideoRun
from dit_jax.parallel import MeshConfig

FRAME_TOKENS = 68 * 120


def get_config() -> VideoRun:
    base = video_1b3()
    packing = dataclasses.replace(base.data.packing, rows=1, row_tokens=45 * 65_536)
    dit = dataclasses.replace(base.model.dit, window=4 * FRAME_TOKENS, global_every=2)
    return dataclasses.replace(
        base,
        output="runs/minute_1080p",
        data=dataclasses.replace(base.data, packing=packing),
        model=dataclasses.replace(base.model, dit=dit),
        mesh=MeshConfig(data=1, context=-1),
        sampling=dataclasses.replace(base.sampling, frames=361, height=136, width=240, fps=6.0),
    )
