"""DiT-XL/2 on 256 x 256 images: latents of 32 x 32 x 4, 256 tokens each, the class's name as caption.

    python -m dit_jax.train --config configs/dit_xl2_imagenet256.py --data.source.path RECORDS

The size, batch, optimizer, average and caption dropout of Peebles & Xie 2022 (section 4); the
objective is rectified flow (SiT, Ma et al. 2024), the positions are rotary, and the class enters as
the mean of the states of its name's bytes where DiT has a table of classes.

Compiled for v5e:4x8 (32 chips), not run (``python -m dit_jax.plan --config
configs/dit_xl2_imagenet256.py --topology v5e:4x8``, libtpu 0.0.42): 8.1 of 16 GB a chip, 0.13 s a step
at least, at most 23 % MFU (8 images a chip: a batch of 256 is small for 32 chips).
"""

import dataclasses

from dit_jax.config import Config, DataConfig, EvaluationConfig, LogConfig
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.diffusion import DiffusionConfig
from dit_jax.models import PRESETS, ByteEncoderConfig, ModelConfig, PatchConfig
from dit_jax.parallel import AttentionConfig, MeshConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


def get_config() -> Config:
    dit = dataclasses.replace(PRESETS["XL"], cross_attention=False, pooled_text=True, remat="none")
    return Config(
        output="runs/dit_xl2_imagenet256",
        steps=400_000,
        data=DataConfig(
            source=RecordsConfig(path="data/imagenet_latents", fps_key=None),
            packing=PackingConfig(rows=256, row_tokens=256, row_text=64, row_segments=1, bins=2),
        ),
        model=ModelConfig(
            dit=dit,
            patch=PatchConfig(t=1, h=2, w=2, channels=4),
            text=ByteEncoderConfig(width=384, depth=2, heads=6, max_bytes=63),
        ),
        diffusion=DiffusionConfig(caption_dropout=0.1),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", warmup_steps=0, b2=0.999, ema_decay=0.9999
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        attention=AttentionConfig(kernel="xla"),
        checkpoint=CheckpointConfig(every=5000),
        log=LogConfig(draw_every=0),
        sampling=SamplingConfig(frames=1, height=32, width=32, steps=50, cfg_scale=4.0),
        evaluation=EvaluationConfig(prompts=0),
    )
