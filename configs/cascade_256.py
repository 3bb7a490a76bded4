"""The second stage of a cascade: clips of 64 x 64 pixels to 256 x 256 (see ``cascade_64.py``).

    python -m dit_jax.train --config configs/cascade_256.py --data.source.path RECORDS --mesh.fsdp 32

Not measured: built and checked without data, and not trained.
"""

import dataclasses

from cascade_64 import get_config as stage_64

from dit_jax.config import VideoRun
from dit_jax.diffusion import MaskConfig, TimeConfig
from dit_jax.model import PRESETS
from dit_jax.upscale import LowRes


def get_config() -> VideoRun:
    base = stage_64()
    data, patch = base.data, base.model.patch
    return dataclasses.replace(
        base,
        output="runs/cascade_256",
        data=dataclasses.replace(data, transform=dataclasses.replace(data.transform, crop=256)),
        model=dataclasses.replace(
            base.model,
            dit=dataclasses.replace(PRESETS["L"], modulation="shared"),
            # 9 x 16 x 16 tokens, as many as the stage before has.
            patch=dataclasses.replace(patch, h=16, w=16),
            conditioners={"low_res": LowRes(factor=4, augmentation=0.3)},
        ),
        diffusion=dataclasses.replace(
            base.diffusion,
            time=TimeConfig(shift=4.0),
            masks=MaskConfig.only(none=1),
        ),
        sampling=dataclasses.replace(base.sampling, height=256, width=256, steps=20, cfg_scale=2.0),
    )
