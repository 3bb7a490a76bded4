"""A LoRA of Wan 2.2's TI2V-5B, which makes clips of 24 frames a second from text or a first frame.

    python -m dit_jax.convert --input Wan2.2-TI2V-5B-Diffusers --output runs/wan_5b --to run
    python -m dit_jax.prepare --input videos --output data --name style_5b --for-run runs/wan_5b \\
        --captions.prefix "sks style, "
    python -m dit_jax.train --config configs/wan_lora_5b.py

A row holds one clip of 121 frames of 704 x 1280. In half of the clips the first frame is given.

Not trained: published weights could not be had. What it takes on TPUs is in docs/wan.md.
"""

import dataclasses

from wan_lora import adapters_of

from dit_jax.data import RecordsConfig
from dit_jax.lora import LoraRun


def get_config() -> LoraRun:
    config = adapters_of("runs/wan_5b", "2.2-ti2v-5b")
    source = RecordsConfig("data/style_5b/1.0.0", text_states_key="text_states")
    packing = dataclasses.replace(config.data.packing, row_tokens=27_648)
    data = dataclasses.replace(config.data, source=source, packing=packing)
    return dataclasses.replace(config, output="runs/wan_lora_5b", data=data)
