"""A LoRA of each of the two experts of Wan 2.2's A14B (docs/wan.md).

    python -m dit_jax.convert --input Wan2.2-T2V-A14B-Diffusers --output runs/wan_a14b --to run
    python -m dit_jax.train --config configs/wan_lora_a14b.py
    python -m dit_jax.train --config configs/wan_lora_a14b.py --base runs/wan_a14b/low_noise \\
        --diffusion.time.lowest 0 --diffusion.time.highest 0.875 --output runs/wan_lora_low

Each is trained on the noise levels that its expert is asked about in sampling.

Not trained: published weights could not be had.
"""

import dataclasses

from wan_lora import adapters_of

from dit_jax.lora import LoraRun
from dit_jax.parallel import MeshConfig


def get_config() -> LoraRun:
    config = adapters_of("runs/wan_a14b", "2.2-t2v-a14b")
    time = dataclasses.replace(config.diffusion.time, lowest=0.875)
    return dataclasses.replace(
        config,
        output="runs/wan_lora_high",
        diffusion=dataclasses.replace(config.diffusion, time=time),
        mesh=MeshConfig(data=1, fsdp=1, context=-1),
    )
