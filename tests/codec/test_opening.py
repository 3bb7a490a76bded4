"""A model of latents and its codec of video: encoded as it is read, decoded as it is drawn, refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dit_jax.codec import folders
from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.config import LatentCodecConfig
from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig, RecordsSource, open_source
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig, unpatchify
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.prepare.writing import write_records
from dit_jax.sampling import SamplingConfig, to_float
from dit_jax.sampling.media import read_video
from dit_jax.training import abstract_state, init_state, make_optimizer
from dit_jax.training.video_task import tokenize
from tests.codecs import random_params

FRAMES = (3, 1, 5)
ENCODER = CausalAutoencoderConfig(
    latent_channels=4,
    widths=(4, 4),
    strides=((2, 2),),
    layers=1,
    shift=(0.1, -0.2, 0.0, 0.3),
    scale=(0.5, 2.0, 1.0, 1.0),
)
"""2 x 2 x 2 pixels to a latent of four channels."""


def clips(frames: tuple[int, ...]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"video": rng.integers(0, 256, (t, 16, 8, 3), np.uint8), "caption": f"clip {i}", "fps": 8.0}
        for i, t in enumerate(frames)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codecs") / "small"
    folders.write_codec(path, ENCODER, random_params(ENCODER))
    return path


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixels; of the split "odd", one clip of six frames, which has no whole latents."""
    splits = {"train": clips(FRAMES), "odd": clips((3, 6))}
    return write_records(tmp_path_factory.mktemp("records"), "tiny", splits, description="d")


@pytest.fixture(scope="module")
def config(records: Path, folder: Path) -> VideoRun:
    return VideoRun(
        data=DataConfig(
            source=RecordsConfig(str(records)),
            packing=PackingConfig(rows=2, row_tokens=32, row_text=24, row_segments=3, bins=2),
        ),
        model=ModelConfig(
            dit=DiTConfig(width=16, depth=1, heads=2),
            patch=PatchConfig(t=1, h=2, w=2, channels=4),
            text=ByteEncoderConfig(width=8, depth=1, heads=2, max_bytes=7),
        ),
        codec=LatentCodecConfig(path=str(folder), t=2, h=2, w=2),
        log=LogConfig(draw_every=5, draw_count=1),
        sampling=SamplingConfig(frames=5, height=16, width=8, fps=8.0, steps=2, batch=1),
    )


def one_device() -> Any:
    return make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])


def test_clips_are_encoded_as_they_are_read(config: VideoRun, folder: Path):
    task = config.build(one_device())
    loader = task.loader((0, 1))
    batch = next(loader)
    loader.close()
    codec, source = folders.load_codec(folder), open_source(config.data.source)
    wanted = [codec.encode(to_float(source[i]["video"])) for i in range(len(FRAMES))]
    assert [len(latents) for latents in wanted] == [2, 1, 3]
    found = 0
    for row, slot in np.ndindex(batch.num_tokens.shape):
        if batch.num_tokens[row, slot]:
            mine = np.asarray(batch.segment_ids[row]) == slot + 1
            tokens, count = np.asarray(batch.tokens[row])[mine], int(batch.num_frames[row, slot])
            latents = unpatchify(config.model.patch, tokens, count, 8, 4)
            near = [x.shape == latents.shape and np.allclose(x, latents, atol=1e-5) for x in wanted]
            assert sum(near) == 1
            found += 1
    assert found >= 4


def test_what_is_drawn_is_decoded(config: VideoRun, tmp_path: Path):
    mesh = one_device()
    task = config.build(mesh)
    optimizer = make_optimizer(config.optimizer, 1)
    _, shardings = abstract_state(task.init, optimizer, mesh)
    state = init_state(task.init, optimizer, shardings, jax.random.key(0))
    samples = {one.name: one.evaluate for one in task.evaluators}["samples"]
    picture = samples(state.ema, {}, 7, tmp_path).picture
    assert picture is not None
    picture = read_video(picture)[0]
    # Pixels, and not latents, of which a frame has 8 x 4.
    assert picture.std() > 0 and picture.shape[1] >= 16


def test_clips_that_have_no_whole_latents_are_refused_by_name(config: VideoRun):
    source = dataclasses.replace(config.data.source, split="odd")
    data = dataclasses.replace(config.data, source=source, bad_records="refuse")
    with pytest.raises(ValueError, match="1 of 2 records cannot be packed") as error:
        dataclasses.replace(config, data=data).build(one_device())
    assert "record 1 of" in str(error.value) and "1 of 6 x 16 x 8" in str(error.value)
    # Of a set without sizes in its metadata it is told when the clip is read.
    said = r"a clip of 6 frames of 16 x 8: small takes 1 \+ 2n"
    with pytest.raises(ValueError, match=said) as error:
        tokenize(config.model, RecordsSource(source)[1], codec=config.codec.open(4))
    assert "Cut it to 5 of 16 x 8" in str(error.value)


def test_sampling_sizes_that_have_no_whole_latents_are_refused(config: VideoRun):
    sampling = dataclasses.replace(config.sampling, frames=8)
    with pytest.raises(ValueError, match=r"8 frames.*1 \+ 2n"):
        dataclasses.replace(config, sampling=sampling)


@pytest.mark.parametrize(
    "change, channels, said",
    [
        ({"t": 1}, 4, r"4 channels with strides \(2, 2, 2\).* make them the same"),
        ({}, 8, r"latents of 4 channels .* model.patch.channels 8"),
        ({"path": str(Path(__file__).parent)}, 4, "config.json' is not there"),
    ],
)
def test_codecs_that_do_not_fit_are_refused(config, change, channels, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config.codec, **change).open(channels)


def test_latents_that_another_codec_made_are_refused(config, folder, tmp_path):
    mine = folders.load_codec(folder).hash
    sample = {"video": np.zeros((2, 8, 4, 4), np.float32), "caption": "latents", "fps": 8.0}

    def recorded(made_by: str) -> VideoRun:
        splits: Any = {"train": [sample] * 2}
        path = write_records(
            tmp_path, f"by_{made_by}", splits, description="d", latents=(4, made_by)
        )
        data = dataclasses.replace(config.data, source=RecordsConfig(str(path)))
        return dataclasses.replace(config, data=data)

    assert recorded(mine).with_hashes().build(one_device()).rows == 2
    said = f"are of the codecs 0123456789abcdef, {mine}: give the one that made the latents"
    with pytest.raises(ValueError, match=said):
        recorded("0123456789abcdef").with_hashes()
