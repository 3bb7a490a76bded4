"""The first stage of a cascade in pixels, after Make-A-Video and Imagen Video: text to 64 x 64.

    python -m dit_jax.train --config configs/cascade_64.py --data.source.path RECORDS --mesh.fsdp 32

``cascade_256.py`` and ``cascade_768.py`` enlarge what it makes, each a model of its own
(docs/super_resolution.md). All three predict clean patches (Li & He 2025, "Back to Basics"), read
captions as states of a T5-like encoder, and see 17 frames at 8 a second of the same records.

Not measured: built and checked without data, and not trained.
"""

import dataclasses

from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig, TransformConfig
from dit_jax.diffusion import DiffusionConfig, TimeConfig
from dit_jax.model import PRESETS, ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.parallel import MeshConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.text.config import TextEncoderConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


def get_config() -> VideoRun:
    return VideoRun(
        output="runs/cascade_64",
        steps=400_000,
        data=DataConfig(
            source=RecordsConfig(path="data/clips_768", text_states_key="text_states"),
            # 9 x 16 x 16 tokens of 2 x 4 x 4 pixels.
            packing=PackingConfig(rows=256, row_tokens=2304, row_text=128, row_segments=1, bins=2),
            transform=TransformConfig(crop=64, flip=True),
        ),
        model=ModelConfig(
            dit=dataclasses.replace(PRESETS["XL"], modulation="shared"),
            patch=PatchConfig(t=2, h=4, w=4, channels=3, reference_fps=8.0),
            text=TextStatesConfig(encoder="t5-v1_1-xxl", dim=4096, max_tokens=128),
        ),
        text_encoder=TextEncoderConfig(),
        diffusion=DiffusionConfig(prediction="x0", time=TimeConfig(shift=2.0)),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", warmup_steps=1000, ema_decay=0.9999
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
        log=LogConfig(draw_every=0),
        sampling=SamplingConfig(frames=17, height=64, width=64, fps=8.0, steps=50, cfg_scale=6.0),
    )
