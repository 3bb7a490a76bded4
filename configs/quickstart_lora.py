"""A colour that the quickstart's model never saw, taught by adapters of 2 % of its parameters.

    python -m dit_jax.train --config configs/quickstart.py          (the base: 14 minutes)
    python -m dit_jax.train --config configs/quickstart_lora.py
    python -m dit_jax.sample --checkpoint runs/quickstart_lora --prompt "a big white circle moves left"

Half of the clips are white, the others those that the base was trained on, so that it keeps them.
Figures: docs/lora.md (``benchmarks/lora.py``).
"""

import dataclasses

from quickstart import get_config as quickstart

from dit_jax.config import LogConfig
from dit_jax.lora import LoraConfig, LoraRun, lora_run
from dit_jax.training import CheckpointConfig, HeldOutLoss, OptimizerConfig


def get_config() -> LoraRun:
    base = quickstart()
    source = dataclasses.replace(base.data.source, white=0.5, seed=1)
    packing = dataclasses.replace(base.data.packing, rows=8)
    return lora_run(
        "runs/quickstart",
        template=base,
        output="runs/quickstart_lora",
        steps=250,
        data=dataclasses.replace(base.data, source=source, packing=packing),
        lora=LoraConfig(rank=4, alpha=8.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, ema_decay=0.98),
        checkpoint=CheckpointConfig(every=250),
        log=LogConfig(draw_every=0),
        evaluators=(HeldOutLoss(),),
    )
