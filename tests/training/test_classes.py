"""Models of classes: from labelled images, in pixels or a codec's latents, to what the judge says."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.codec.config import LatentCodecConfig
from dit_jax.codec.folders import load_codec
from dit_jax.config import DataConfig, LogConfig, VideoRun
from dit_jax.data import PackingConfig, RecordsConfig, RecordsSource, TransformConfig
from dit_jax.evaluate import ClassEvaluator, judge_classes
from dit_jax.model import (
    ClassLabels,
    DiTConfig,
    ModelConfig,
    NoTextConfig,
    PatchConfig,
)
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.prepare.writing import write_records
from dit_jax.sampling import SamplingConfig, to_float
from dit_jax.training import OptimizerConfig
from tests.codecs import tiny_images, write_images
from tests.runs import changed
from tests.scripts import load_script

CLASSES = 3


def image(i, rng, side=16):
    """A bright stripe: along the top, down the left, or neither."""
    picture = rng.integers(0, 60, (1, side, side, 3), np.uint8)
    if i % CLASSES == 0:
        picture[:, :5] += 180
    if i % CLASSES == 1:
        picture[:, :, :5] += 180
    return picture


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The directory of a builder of labelled images."""
    rng = np.random.default_rng(0)

    def samples(count):
        for i in range(count):
            yield {"video": image(i, rng), "caption": "", "fps": 1.0, "label": i % CLASSES}

    return write_records(
        tmp_path_factory.mktemp("images"),
        "stripes",
        {"train": samples(90), "test": samples(150)},
        description="d",
        labels=("label",),
    )


@pytest.fixture(scope="module")
def codec_path(tmp_path_factory):
    """The folder of a small autoencoder with random weights, two pixels to a latent."""
    return write_images(tmp_path_factory.mktemp("codec") / "vae", tiny_images(8, 8, norm_groups=4))


def config_of(records):
    return VideoRun(
        data=DataConfig(
            source=RecordsConfig(str(records), label_key="label"),
            packing=PackingConfig(rows=2, row_tokens=32, row_text=4, row_segments=2, bins=1),
        ),
        model=ModelConfig(
            dit=DiTConfig(width=24, depth=1, heads=2, cross_attention=False),
            patch=PatchConfig(t=1, h=4, w=4, channels=3),
            text=NoTextConfig(),
            conditioners={"label": ClassLabels(CLASSES)},
        ),
        optimizer=OptimizerConfig(warmup_steps=1, schedule="constant"),
        log=LogConfig(draw_every=0),
        sampling=SamplingConfig(frames=1, height=16, width=16, steps=2, cfg_scale=2.0),
        evaluators=(ClassEvaluator(prompts=9),),
    )


def first_batch(config):
    task = config.build(make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))
    loader = task.loader((0, 1))
    try:
        return task, next(loader)
    finally:
        loader.close()


def test_a_step_learns_from_labels_beside_their_images_and_a_report_judges(records, tmp_path):
    task, batch = first_batch(config_of(records))
    assert (batch.segment_ids != 0).all() and task.work(batch).flops > 0
    for row, j in np.ndindex(2, 2):
        label = batch.segment_fields["label"][row, j]
        tokens = batch.tokens[row, 16 * j : 16 * j + 16].reshape(4, 4, 4, 4, 3)
        bright = [tokens[0].mean() > 0.1, tokens[:, 0].mean() > 0.1]
        assert bright == [label == 0, label == 1]
    batch = jax.tree.map(jnp.asarray, batch)

    def mean_loss(params):
        total, totals = task.loss(params, {}, batch, jax.random.key(1), 0)
        return total / totals.weight

    params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert 1 < loss < 4  # noise and images of about unit variance, and a model that says zero
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    evaluators = {one.name: one.evaluate for one in task.evaluators}
    report = evaluators["report"](params, {}, 0, tmp_path).scalars
    # A fresh model makes noise, which the classifier takes for one class or another.
    assert report["classifier"] == 1 and report["recognised"] < 0.7 and report["count"] == 9
    assert report["frechet"] > 5 * report["frechet_real"]
    assert (tmp_path / "samples.png").stat().st_size > 0


def test_latents_are_written_once_and_trained_on(
    records, codec_path, tmp_path, monkeypatch, capsys
):
    given = ["--input", str(records), "--codec", str(codec_path), "--output", str(tmp_path)]
    given += ["--image-key", "video", "--flip", "--splits", "test"]
    monkeypatch.setattr(sys, "argv", ["images_to_latents", *given])
    load_script("scripts", "images_to_latents").main()
    path = Path(capsys.readouterr().out.split()[-1])
    assert path == tmp_path / "stripes_latents" / "1.0.0"
    codec = load_codec(codec_path)
    latents = RecordsConfig(str(path), "test", label_key="label")
    made = RecordsSource(latents)
    source = RecordsSource(RecordsConfig(str(records), "test", label_key="label"))
    assert len(made) == 2 * len(source) and made.codec == codec.hash
    for i in (0, 7, 149):
        pixels = to_float(source[i]["video"])
        for j, picture in enumerate((pixels, pixels[:, :, ::-1])):
            found = made[2 * i + j]
            assert found["segment_fields"] == source[i]["segment_fields"]
            # Stored as float16.
            np.testing.assert_allclose(found["video"], codec.encode(picture), rtol=2e-3, atol=1e-3)
    changes = {
        "evaluators": (),
        "codec": LatentCodecConfig(str(codec_path), h=2, w=2),
        "model.patch": PatchConfig(1, 2, 2, channels=4),
        "data.source": latents,
        "data.transform": TransformConfig(crop=8),
    }
    config = changed(config_of(records), changes)
    _, batch = first_batch(config)
    assert batch.tokens.shape == (2, 32, 16)
    assert config.with_hashes().codec.hash == codec.hash
    with pytest.raises(ValueError, match=f"are of the codecs other, {codec.hash}"):
        changed(config, {"codec.hash": "other"}).with_hashes()


@pytest.mark.slow
def test_the_judge_knows_right_from_wrong():
    rng = np.random.default_rng(1)
    labels = np.arange(240) % CLASSES
    images = np.concatenate([image(i, rng) for i in range(240)])
    made = np.concatenate([image(i, rng) for i in range(60)])
    others = np.concatenate([image(i, rng) for i in range(60)])
    asked = np.arange(60) % CLASSES
    right = judge_classes(made, asked, images, labels, others)
    assert right["recognised"] == 1 and right["frechet"] < 3 * right["frechet_real"]
    wrong = judge_classes(made, (asked + 1) % CLASSES, images, labels, others)
    assert wrong["recognised"] == 0 and wrong["frechet"] == right["frechet"]
    # The right classes, but one image of each for all: the distance tells.
    same = judge_classes(made[asked], asked, images, labels, others)
    assert same["recognised"] == 1 and same["frechet"] > 3 * right["frechet"]
    noise = rng.integers(0, 256, made.shape, np.uint8)
    with pytest.raises(ValueError, match="too few to judge"):
        judge_classes(noise, asked, rng.permutation(np.repeat(noise, 4, 0)), labels, others)
