"""A small codec of moving shapes, drawn on the fly: 4 x 4 x 4 pixels to a latent of 8 channels.

    python -m dit_jax.train --config configs/codec_shapes.py

Not measured: it was only seen to run.
"""

from dit_jax.config import CodecDataConfig, CodecEvaluationConfig, CodecRun, LogConfig
from dit_jax.data import CropConfig, ShapesConfig
from dit_jax.models import CausalAutoencoderConfig, ReconstructionLossConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


def get_config() -> CodecRun:
    return CodecRun(
        output="runs/codec_shapes",
        steps=600,
        data=CodecDataConfig(
            source=ShapesConfig(), crop=CropConfig(rows=8, frames=9, height=24, width=24)
        ),
        model=CausalAutoencoderConfig(
            latent_channels=8,
            widths=(32, 64, 64),
            strides=((2, 1), (2, 1)),
            layers=1,
            patch=4,
            mid_attention=False,
        ),
        loss=ReconstructionLossConfig(l1=1.0, l2=4.0, kl=1e-6),
        optimizer=OptimizerConfig(kind="muon", learning_rate=1e-2, warmup_steps=50, ema_decay=0.99),
        checkpoint=CheckpointConfig(every=300),
        log=LogConfig(draw_every=300),
        evaluation=CodecEvaluationConfig(clips=96),
    )
