"""Captioned moving shapes in pixels, on a laptop: nothing to download."""

from dit_jax.config import Config, DataConfig, LogConfig
from dit_jax.data import PackingConfig, ShapesConfig
from dit_jax.diffusion import DiffusionConfig, TimeConfig
from dit_jax.models import PRESETS, ByteEncoderConfig, ModelConfig, PatchConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


def get_config() -> Config:
    return Config(
        output="runs/quickstart",
        steps=1500,
        data=DataConfig(
            source=ShapesConfig(fps=8.0),
            packing=PackingConfig(rows=8, row_tokens=256, row_text=192, row_segments=8),
        ),
        model=ModelConfig(
            dit=PRESETS["Ti"],
            patch=PatchConfig(t=2, h=8, w=8, channels=3, reference_fps=8.0),
            text=ByteEncoderConfig(width=128, depth=2, heads=4, max_bytes=47),
        ),
        diffusion=DiffusionConfig(prediction="x0", time=TimeConfig(shift=3.0)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, ema_decay=0.995),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(draw_every=500),
        sampling=SamplingConfig(frames=9, height=32, width=32, fps=8.0, steps=24, cfg_scale=3.0),
    )
