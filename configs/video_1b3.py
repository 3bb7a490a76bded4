"""A 1.3 B-parameter text-to-video transformer on latents: 480 x 832, 81 frames, on 64 chips.

    python -m dit_jax.train --config configs/video_1b3.py --data.source.path RECORDS --mesh.fsdp 64

A clip of 21 x 60 x 104 latents (16 channels, time / 4 and space / 8) is 32,760 tokens of 1 x 2 x 2
patches and fills a row. Captions come as states of a T5-like encoder, 512 x 4096.

Compiled, not run (``python -m dit_jax.plan --config configs/video_1b3.py --topology ...``, libtpu
0.0.42; the times are the least that the compiled step allows):

    v5p:4x4x4   28.4 of 95 GB a chip, 2.44 s a step, at most 76 % MFU
    v6e:8x8     28.3 of 32 GB a chip, 1.54 s a step, at most 60 % MFU

One guided denoising step over 64 chips (``--what sample --mesh.data 2 --mesh.fsdp 1 --mesh.context
32``) takes 24.4 ms at least on v5p:4x4x4 and 17.0 ms on v6e:8x8.
"""

from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.diffusion import DiffusionConfig, TimeConfig
from dit_jax.model import DiTConfig, ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.parallel import MeshConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.text.config import TextEncoderConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


def get_config() -> VideoRun:
    return VideoRun(
        output="runs/video_1b3",
        steps=100_000,
        data=DataConfig(
            source=RecordsConfig(path="data/video_latents", text_states_key="text_states"),
            packing=PackingConfig(
                rows=64, row_tokens=32_768, row_text=512, row_segments=1, bins=2, threads=4
            ),
        ),
        model=ModelConfig(
            dit=DiTConfig(
                width=1536,
                depth=30,
                heads=12,
                mlp_dim=8960,
                modulation="shared",
                remat="projections",
            ),
            patch=PatchConfig(t=1, h=2, w=2, channels=16, reference_fps=4.0),
            text=TextStatesConfig(encoder="umt5-xxl", dim=4096, max_tokens=512),
        ),
        text_encoder=TextEncoderConfig(),
        diffusion=DiffusionConfig(time=TimeConfig(shift=5.0)),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, schedule="constant", warmup_steps=1000, ema_decay=0.9999
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
        log=LogConfig(draw_every=0),
        sampling=SamplingConfig(frames=21, height=60, width=104, fps=4.0, steps=50, cfg_scale=5.0),
    )
