"""A task on latents: records of them with text states, and the smallest config that trains on those."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig
from dit_jax.model import DiTConfig, ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.sampling import SamplingConfig
from dit_jax.training import OptimizerConfig

SIZES = [(2, 4, 4), (1, 4, 4), (3, 4, 2)]
COLOURS = np.array([[1.5, -1.0, 0.5, 0.0], [-1.0, 0.5, 1.0, -1.5]], np.float32)


@pytest.fixture(scope="session")
def latent_records(tmp_path_factory):
    """The directory of a builder whose latents are one of two colours, as their text states say."""
    rng = np.random.default_rng(0)

    def example(i):
        clip = np.broadcast_to(COLOURS[i % 2], (*SIZES[i % 3], 4))
        states = rng.normal(size=(1 + i % 7, 8)) + 2 * (i % 2)
        return {
            "video": clip + 0.05 * rng.normal(size=clip.shape).astype(np.float32),
            "caption": f"colour {i % 2}",
            "text_states": states.astype(np.float32),
        }

    class Latents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "latents"

        def _info(self):
            features = {
                "video": tfds.features.Tensor(
                    shape=(None, None, None, 4), dtype=np.float32, encoding="zlib"
                ),
                "caption": tfds.features.Text(),
                "text_states": tfds.features.Tensor(shape=(None, 8), dtype=np.float32),
            }
            return tfds.core.DatasetInfo(
                builder=self, description="d", features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": ((i, example(i)) for i in range(12))}

        def _generate_examples(self):
            raise NotImplementedError

    root = tmp_path_factory.mktemp("latents")
    made = Latents(data_dir=str(root), file_format="array_record")
    made.download_and_prepare(download_dir=str(root / "downloads"))
    return str(root / "latents" / "1.0.0")


@pytest.fixture(scope="session")
def latents(latent_records):
    """The config."""
    return VideoRun(
        data=DataConfig(
            source=RecordsConfig(latent_records, text_states_key="text_states", fps=24.0),
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
