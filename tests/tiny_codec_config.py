"""The smallest run of a codec: windows of clips and images, drawn, measured, written as a folder."""

from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.crops import CropConfig
from dit_jax.codec.reconstruction_loss import ReconstructionLossConfig
from dit_jax.codec.run import CodecDataConfig, CodecEvaluationConfig, CodecRun
from dit_jax.config import LogConfig
from dit_jax.data import ShapesConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


def get_config() -> CodecRun:
    return CodecRun(
        steps=16,
        data=CodecDataConfig(
            source=ShapesConfig(
                num_examples=40, sizes=((24, 24),), frames=(5,), image_sizes=((24, 24),)
            ),
            crop=CropConfig(rows=8, frames=5, height=16, width=16),
        ),
        model=CausalAutoencoderConfig(
            latent_channels=3,
            widths=(4, 4),
            strides=((2, 1),),
            layers=1,
            patch=4,
            mid_attention=False,
        ),
        loss=ReconstructionLossConfig(l1=1.0, l2=1.0, kl=1e-4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule="constant"),
        checkpoint=CheckpointConfig(every=8, max_to_keep=20),
        log=LogConfig(every=1, draw_every=16),
        evaluation=CodecEvaluationConfig(clips=6, statistics=8),
    )
