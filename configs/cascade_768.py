"""The last stage of a cascade: clips of 256 x 256 pixels to 768 x 768 (see ``cascade_64.py``).

    python -m dit_jax.train --config configs/cascade_768.py --data.source.path RECORDS --mesh.fsdp 32

Patches span one frame.

Not measured: built and checked without data, and not trained.
"""

import dataclasses

from cascade_256 import get_config as stage_256

from dit_jax.config import VideoRun
from dit_jax.model import PRESETS
from dit_jax.upscale import LowRes


def get_config() -> VideoRun:
    base = stage_256()
    data, patch = base.data, base.model.patch
    return dataclasses.replace(
        base,
        output="runs/cascade_768",
        data=dataclasses.replace(
            data,
            # 17 x 24 x 24 tokens of 32 x 32 pixels.
            packing=dataclasses.replace(data.packing, rows=64, row_tokens=9792),
            transform=dataclasses.replace(data.transform, crop=768),
        ),
        model=dataclasses.replace(
            base.model,
            dit=dataclasses.replace(PRESETS["B"], modulation="shared", remat="projections"),
            patch=dataclasses.replace(patch, t=1, h=32, w=32),
            conditioners={"low_res": LowRes(factor=3, augmentation=0.3)},
        ),
        sampling=dataclasses.replace(base.sampling, height=768, width=768, steps=10),
    )
