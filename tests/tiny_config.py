"""The smallest run that has everything: clips of two lengths and images, packed, drawn, reported."""

from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, ShapesConfig
from dit_jax.evaluate import ShapeEvaluator
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import CheckpointConfig, HeldOutLoss, OptimizerConfig


def get_config() -> VideoRun:
    return VideoRun(
        steps=20,
        data=DataConfig(
            source=ShapesConfig(
                num_examples=60, sizes=((24, 24), (24, 32)), frames=(3, 5), image_sizes=((24, 24),)
            ),
            packing=PackingConfig(rows=4, row_tokens=64, row_text=96, row_segments=6, bins=2),
        ),
        model=ModelConfig(
            dit=DiTConfig(width=32, depth=1, heads=2),
            patch=PatchConfig(t=2, h=8, w=8, channels=3, reference_fps=8.0),
            text=ByteEncoderConfig(width=16, depth=1, heads=2, max_bytes=47),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        checkpoint=CheckpointConfig(every=4, max_to_keep=20),
        log=LogConfig(every=1, draw_every=10, draw_count=2),
        sampling=SamplingConfig(
            frames=5, height=24, width=24, fps=8.0, steps=3, cfg_scale=2.0, batch=2
        ),
        evaluators=(HeldOutLoss(), ShapeEvaluator(prompts=3)),
    )
