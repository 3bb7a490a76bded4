"""Handwritten digits by caption ("a handwritten digit seven"): still images are clips of one frame.

    python scripts/mnist_to_records.py --input mnist --output data
    python -m dit_jax.train --config configs/mnist.py

``mnist`` holds idx files as the script's help names them (CC BY-SA 3.0).

Not measured by a number. Of 30 digits made after the 1,000 steps, three for each caption, all were
read as the right one by eye.
"""

import dataclasses

from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.diffusion import DiffusionConfig, MaskConfig, TimeConfig
from dit_jax.model import PRESETS, ByteEncoderConfig, ModelConfig, PatchConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


def get_config() -> VideoRun:
    return VideoRun(
        output="runs/mnist",
        steps=1000,
        data=DataConfig(
            source=RecordsConfig(path="data/mnist_frames/1.0.0"),
            packing=PackingConfig(rows=16, row_tokens=128, row_text=256, row_segments=8),
        ),
        model=ModelConfig(
            dit=dataclasses.replace(PRESETS["Ti"], absolute_positions="thw", pooled_text=True),
            patch=PatchConfig(t=1, h=8, w=8, channels=3),
            text=ByteEncoderConfig(width=128, depth=2, heads=4, max_bytes=31),
        ),
        diffusion=DiffusionConfig(
            prediction="x0", time=TimeConfig(shift=2.0), masks=MaskConfig(), min_t=0.25
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=3e-3, warmup_steps=50, ema_decay=0.995
        ),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(draw_every=500),
        sampling=SamplingConfig(frames=1, height=32, width=32, fps=24.0, steps=24, cfg_scale=3.0),
    )
