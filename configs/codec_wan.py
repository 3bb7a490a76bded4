"""Wan 2.1's autoencoder, 4 x 8 x 8 pixels to a latent of 16 channels, for training on pods.

    python -m dit_jax.train --config configs/codec_wan.py --data.source.path DIR --loss.vgg vgg16.pth
    python -m dit_jax.plan --config configs/codec_wan.py --what decode --topology v5e:2x4 \
        --mesh.context 8 --data.crop.rows 1 --data.crop.frames 81 --data.crop.height 480 \
        --data.crop.width 832 --tiles.frames 1

Its published weights are read by ``codec.path`` (docs/codec.md); this trains it from random ones.

Not measured: compiled for TPUs (docs/codec.md), not run.
"""

from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.crops import CropConfig
from dit_jax.codec.reconstruction_loss import ReconstructionLossConfig
from dit_jax.codec.run import CodecDataConfig, CodecEvaluationConfig, CodecRun
from dit_jax.config import LogConfig
from dit_jax.data import RecordsConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


def get_config() -> CodecRun:
    return CodecRun(
        output="runs/codec_wan",
        steps=200_000,
        data=CodecDataConfig(
            source=RecordsConfig(path="data/clips/1.0.0"),
            crop=CropConfig(rows=64, frames=17, height=256, width=256, threads=2),
        ),
        model=CausalAutoencoderConfig(),
        loss=ReconstructionLossConfig(
            kl=3e-6, perceptual=0.0, adversarial=0.05, adversarial_start=50_000
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1000, ema_decay=0.9999),
        checkpoint=CheckpointConfig(every=5000),
        log=LogConfig(every=100, draw_every=5000),
        evaluation=CodecEvaluationConfig(clips=64),
    )
