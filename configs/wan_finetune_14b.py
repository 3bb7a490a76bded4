"""All parameters of Wan 2.1's 14 B model on clips of 720 x 1280 with 81 frames (docs/wan.md).

    python -m dit_jax.convert --input Wan2.1-T2V-14B-Diffusers --output runs/wan_14b --to run
    python -m dit_jax.train --config configs/wan_finetune_14b.py

For four chips: a row is one clip of 75,600 tokens, which lie on all of them, and so do the parameters.

Not trained: published weights could not be had. What it takes on TPUs is in docs/wan.md.
"""

import dataclasses

from wan_finetune import get_config as finetune

from dit_jax.config import VideoRun
from dit_jax.parallel import MeshConfig
from dit_jax.wan.published import base_run

BASE = "runs/wan_14b"
ROW = 75_776  # 75,600 and padding: a row is a multiple of 512 for each chip.


def get_config() -> VideoRun:
    base, config = base_run(BASE, "2.1-t2v-14b"), finetune()
    dit = dataclasses.replace(base.model.dit, remat="full")
    packing = dataclasses.replace(config.data.packing, row_tokens=ROW, row_text=512, row_segments=1)
    return dataclasses.replace(
        config,
        output="runs/wan_finetune_14b",
        model=dataclasses.replace(base.model, dit=dit),
        data=dataclasses.replace(config.data, packing=packing),
        codec=base.codec,
        text_encoder=base.text_encoder,
        sampling=dataclasses.replace(base.sampling, height=720, width=1280, shift=5.0),
        mesh=MeshConfig(data=1, fsdp=1, context=-1),
        checkpoint=dataclasses.replace(config.checkpoint, initial=BASE),
    )
