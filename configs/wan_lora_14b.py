"""A LoRA of Wan 2.1's 14 B model, over four chips (docs/wan.md).

    python -m dit_jax.convert --input Wan2.1-T2V-14B-Diffusers --output runs/wan_14b --to run
    python -m dit_jax.prepare --input videos --output data --name style --for-run runs/wan_14b
    python -m dit_jax.train --config configs/wan_lora_14b.py

Not trained: published weights could not be had.
"""

import dataclasses

from wan_lora import adapters_of

from dit_jax.lora import LoraRun
from dit_jax.parallel import MeshConfig


def get_config() -> LoraRun:
    config = adapters_of("runs/wan_14b", "2.1-t2v-14b")
    # One row, whose tokens lie on all chips, and so do the parameters.
    mesh = MeshConfig(data=1, fsdp=1, context=-1)
    return dataclasses.replace(config, output="runs/wan_lora_14b", mesh=mesh)
