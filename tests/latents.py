"""A task on latents: records of them with text states, and the smallest config that trains on those."""

import numpy as np
import pytest

from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.model import DiTConfig, ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.prepare.writing import LatentsOf, StatesOf, write_records
from dit_jax.sampling import SamplingConfig
from dit_jax.training import OptimizerConfig

SIZES = [(2, 4, 4), (1, 4, 4), (3, 4, 2)]
COLOURS = np.array([[1.5, -1.0, 0.5, 0.0], [-1.0, 0.5, 1.0, -1.5]], np.float32)


@pytest.fixture(scope="session")
def latent_records(tmp_path_factory):
    """The directory of records whose latents are one of two colours, as their text states say."""
    rng, samples = np.random.default_rng(0), []
    for i in range(12):
        clip = np.broadcast_to(COLOURS[i % 2], (*SIZES[i % 3], 4))
        clip = clip + 0.05 * rng.normal(size=clip.shape).astype(np.float32)
        states = (rng.normal(size=(1 + i % 7, 8)) + 2 * (i % 2)).astype(np.float32)
        sample = {"video": clip, "caption": f"colour {i % 2}", "fps": 24.0}
        samples.append(sample | {"text_states": states})
    return str(
        write_records(
            tmp_path_factory.mktemp("latents"),
            "latents",
            {"train": samples},
            description="d",
            latents=LatentsOf(4, "a codec"),
            text_states=StatesOf(8, "an encoder", "umt5-xxl"),
        )
    )


@pytest.fixture(scope="session")
def latents(latent_records):
    """The config."""
    return VideoRun(
        data=DataConfig(
            source=RecordsConfig(latent_records, text_states_key="text_states"),
            packing=PackingConfig(rows=4, row_tokens=16, row_text=18, row_segments=3, bins=2),
        ),
        model=ModelConfig(
            dit=DiTConfig(width=32, depth=2, heads=2, modulation="shared"),
            patch=PatchConfig(t=1, h=2, w=2, channels=4),
            text=TextStatesConfig(dim=8, max_tokens=6),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule="constant"),
        log=LogConfig(draw_every=0),
        sampling=SamplingConfig(frames=2, height=4, width=4, steps=2, cfg_scale=2.0),
    )
