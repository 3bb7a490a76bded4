"""DiT-XL/2 on 256 x 256 images as published: latents of 32 x 32 x 4, 256 tokens each, class labels.

    python scripts/images_to_latents.py --input imagenet2012 --codec CODEC --crop 256 --flip \
        --output data
    python -m dit_jax.train --config configs/dit_xl2_imagenet256.py --codec.path CODEC

Blocks, batch, optimizer, average, label dropout, a thousand DDPM steps with linear betas, predicted
noise and a learned variance are those of Peebles & Xie 2022, section 4; 675 M parameters. Their
latents are drawn anew in every epoch, where these are the codec's means (its deviations are small).
CODEC is the folder of Stable Diffusion's autoencoder (``sd-vae-ft-ema``). To encode images as they are
read, in place of the first command and at the price of an encoding for each, add ``--data.source.path
imagenet2012 --data.source.video-key image --data.transform.crop 256 --data.transform.flip True``.

Not trained here. Compiled for v5e:4x8 (32 chips) with a batch of 1024 (``python -m dit_jax.plan
--config configs/dit_xl2_imagenet256.py --topology v5e:4x8 --data.packing.rows 1024``, libtpu 0.0.42):
11.4 of 16 GB a chip, 0.22 s a step at least, at most 53 % MFU.
"""

import dataclasses

from dit_jax.codec.config import LatentCodecConfig
from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.diffusion import DiffusionConfig, MaskConfig, PathConfig, TimeConfig
from dit_jax.model import ClassLabels, ModelConfig, NoTextConfig, PatchConfig, published
from dit_jax.parallel import MeshConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


def get_config() -> VideoRun:
    return VideoRun(
        output="runs/dit_xl2_imagenet256",
        steps=400_000,
        data=DataConfig(
            source=RecordsConfig(
                path="data/imagenet2012_latents/1.0.0", label_key="label", fps_key=None
            ),
            packing=PackingConfig(rows=256, row_tokens=256, row_text=1, row_segments=1, bins=1),
        ),
        model=ModelConfig(
            dit=dataclasses.replace(published("XL"), remat="dots"),
            patch=PatchConfig(t=1, h=2, w=2, channels=4),
            text=NoTextConfig(),
            conditioners={"label": ClassLabels(1000)},
            learned_variance=True,
        ),
        diffusion=DiffusionConfig(
            path=PathConfig(kind="ddpm", betas="linear"),
            prediction="eps",
            loss="prediction",
            variance="learned_range",
            time=TimeConfig(distribution="uniform"),
            masks=MaskConfig.only(none=1),
            caption_dropout=0.1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            schedule="constant",
            warmup_steps=0,
            b2=0.999,
            clip_norm=None,
            ema_decay=0.9999,
        ),
        mesh=MeshConfig(data=-1, fsdp=4),
        codec=LatentCodecConfig(h=8, w=8),
        checkpoint=CheckpointConfig(every=5000),
        log=LogConfig(draw_every=0),
        sampling=SamplingConfig(
            frames=1,
            height=256,
            width=256,
            steps=250,
            solver="ddpm",
            spacing="linspace",
            cfg_scale=1.5,
            cfg_channels=3,
        ),
    )
