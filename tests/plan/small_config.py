"""A small transformer on latents whose attention is the TPU's kernel: quick to compile."""

from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.model import DiTConfig, ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.parallel import MeshConfig
from dit_jax.sampling import SamplingConfig


def get_config() -> VideoRun:
    return VideoRun(
        data=DataConfig(
            source=RecordsConfig(path="none", text_states_key="text_states"),
            packing=PackingConfig(rows=8, row_tokens=1024, row_text=128, row_segments=1, bins=2),
        ),
        model=ModelConfig(
            dit=DiTConfig(width=128, depth=2, heads=1),
            patch=PatchConfig(t=1, h=2, w=2, channels=16),
            text=TextStatesConfig(encoder="t5", dim=128, max_tokens=128),
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        log=LogConfig(draw_every=0),
        sampling=SamplingConfig(frames=4, height=32, width=32, fps=4.0, cfg_scale=5.0),
    )
