"""Your own videos, prepared small, in pixels on a CPU: the whole way from a folder to clips made.

    python -m dit_jax.prepare --input videos --output data --name folder --examine.clips.fps 8 \\
        --examine.clips.max-seconds 2 --examine.clips.area 1024 --examine.clips.multiple 8
    python -m dit_jax.train --config configs/folder.py --data.source.path data/folder/1.0.0

Clips of up to 17 frames and 1,024 pixels a frame keep their aspect ratio and length; still images are
clips of one frame. It is the quickstart's model at half its depth, and only shows that all parts fit.

Not measured: no number is made of its clips.
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
        output="runs/folder",
        steps=300,
        data=DataConfig(
            source=RecordsConfig(path="data/folder/1.0.0"),
            packing=PackingConfig(rows=6, row_tokens=192, row_text=256, row_segments=4),
        ),
        model=ModelConfig(
            dit=dataclasses.replace(
                PRESETS["Ti"], depth=6, rope_theta=100.0, absolute_positions="thw", pooled_text=True
            ),
            patch=PatchConfig(t=2, h=8, w=8, channels=3, reference_fps=8.0),
            text=ByteEncoderConfig(width=128, depth=2, heads=4, max_bytes=127),
        ),
        diffusion=DiffusionConfig(
            prediction="x0",
            time=TimeConfig(shift=4.0),
            masks=MaskConfig.only(none=0.9, first=0.1),
            min_t=0.25,
        ),
        optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, warmup_steps=30, ema_decay=0.98),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(draw_every=150, draw_count=4),
        sampling=SamplingConfig(frames=17, height=24, width=40, fps=8.0, steps=20, cfg_scale=1.5),
    )
