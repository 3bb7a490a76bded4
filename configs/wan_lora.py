"""A LoRA of Wan on your own clips, for ComfyUI, Diffusers and this codebase (docs/wan.md).

    python -m dit_jax.convert --input Wan2.1-T2V-1.3B-Diffusers --output runs/wan --to run
    python -m dit_jax.prepare --input videos --output data --name style --for-run runs/wan \\
        --captions.prefix "sks style, "
    python -m dit_jax.train --config configs/wan_lora.py

The model, its codec and text encoder, its objective and how it is sampled are those of the run in
BASE. A row holds one clip of 81 frames of 480 x 832, or several shorter clips and pictures.

Not trained: published weights could not be had. What it takes on TPUs is in docs/wan.md.
"""

import dataclasses

from dit_jax.config import DataConfig, LogConfig
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.lora import LoraConfig, LoraRun, lora_run
from dit_jax.training import CheckpointConfig, OptimizerConfig
from dit_jax.wan.published import base_run

BASE = "runs/wan"


def adapters_of(base: str, model: str) -> LoraRun:
    """A LoRA of the run ``base``, which is planned as the published ``model`` if it is not there."""
    config = lora_run(
        base,
        base_run(base, model),
        output="runs/wan_lora",
        steps=1000,
        data=DataConfig(
            source=RecordsConfig("data/style/1.0.0", text_states_key="text_states"),
            # A caption has 512 states, so 4,096 are eight clips or pictures.
            packing=PackingConfig(
                rows=1, row_tokens=32_768, row_text=4096, row_segments=8, bins=2, threads=4
            ),
        ),
        lora=LoraConfig(rank=32, base_dtype="bfloat16"),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", warmup_steps=50, ema_decay=0.99
        ),
        checkpoint=CheckpointConfig(every=250),
        # Pictures on the way cost as much as sampling does: --log.draw-every 250.
        log=LogConfig(every=10, draw_every=0),
    )
    # Of every block the input alone is kept: without this a row of a whole clip takes all of a chip.
    dit = dataclasses.replace(config.model.dit, remat="full")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dit=dit))


def get_config() -> LoraRun:
    return adapters_of(BASE, "2.1-t2v-1.3b")
