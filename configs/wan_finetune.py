"""All parameters of Wan, trained on one's own clips (docs/wan.md).

    python -m dit_jax.train --config configs/wan_finetune.py --mesh.fsdp 4 --data.packing.rows 4

Begins with the weights of the run in BASE, whose model, codec and text encoder it has. Memory is saved
by moments in bfloat16 and by no averages.

Not trained: published weights could not be had. What it takes on TPUs is in docs/wan.md.
"""

import dataclasses

from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.parallel import MeshConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig
from dit_jax.wan.published import base_run

BASE = "runs/wan"


def get_config() -> VideoRun:
    base = base_run(BASE, "2.1-t2v-1.3b")
    dit = dataclasses.replace(base.model.dit, remat="full")
    return dataclasses.replace(
        base,
        output="runs/wan_finetune",
        steps=2000,
        model=dataclasses.replace(base.model, dit=dit),
        data=DataConfig(
            source=RecordsConfig("data/style/1.0.0", text_states_key="text_states"),
            packing=PackingConfig(
                rows=1, row_tokens=32_768, row_text=4096, row_segments=8, bins=2, threads=4
            ),
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-5,
            schedule="constant",
            warmup_steps=100,
            weight_decay=1e-3,
            moments="bfloat16",
            ema="none",
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=500, initial=BASE),
        log=LogConfig(every=10, draw_every=0),
    )
