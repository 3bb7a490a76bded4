"""A video model begun with an image model's weights makes, of one frame, what the image model makes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import VideoRun, to_dict
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.model.patches import absolute_features
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling import SamplingConfig
from dit_jax.train import init_from
from dit_jax.training import CheckpointConfig, Checkpointer, abstract_state, make_optimizer
from dit_jax.training.video_task import inflation, init_params, make_model
from dit_jax.upscale import LowRes
from tests.denoiser import struct
from tests.runs import changed

VIDEO = VideoRun(
    model=ModelConfig(
        dit=DiTConfig(width=24, depth=1, heads=2, absolute_positions="wht", rotary=False),
        patch=PatchConfig(t=2, h=8, w=8, channels=3, reference_fps=8.0),
        text=ByteEncoderConfig(width=16, depth=1, heads=2, max_bytes=15),
    ),
    sampling=SamplingConfig(frames=5, height=24, width=16, steps=2, cfg_scale=1.0),
)
VIDEO = changed(VIDEO, {"diffusion.prediction": "x0"})
FRAMES, FPS, PLACES = "model.patch.t", "model.patch.reference_fps", "model.dit.absolute_positions"
IMAGE = changed(VIDEO, {FRAMES: 1, FPS: 24.0, PLACES: "wh", "sampling.frames": 1})


def abstract(config, mesh):
    init = functools.partial(init_params, make_model(config.model, mesh))
    return abstract_state(init, make_optimizer(config.optimizer, 1), mesh)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 2, 1, 1), jax.devices()[:2])


@pytest.fixture(scope="module")
def image(mesh, tmp_path_factory):
    """An image model with random weights everywhere, stored as a run; the run and the weights."""
    shapes, shardings = abstract(IMAGE, mesh)
    rng = np.random.default_rng(0)
    host = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), shapes.ema)
    directory = tmp_path_factory.mktemp("image")
    checkpointer = Checkpointer(directory, CheckpointConfig())
    checkpointer.save_weights(jax.device_put(host, shardings.ema), to_dict(IMAGE))
    checkpointer.wait()
    checkpointer.close()
    return str(directory), host


def one_frame(config, params, tokens, t):
    """The output for tokens of one frame ``[1, l, q]``, repeated to fill its patches, at level t."""
    frames, count = config.model.patch.t, tokens.shape[1]
    model = make_model(config.model, make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))
    places = np.meshgrid(np.arange(3), np.arange(2), indexing="ij")
    positions = np.stack([0 * places[0], *places], -1).reshape(1, count, 3).astype(np.float32)
    ids, text = np.ones((1, count), np.int32), np.array([[5, 6, 7]], np.int32)
    inputs = struct(
        tokens=jnp.asarray(np.tile(tokens, (1, 1, frames))),
        positions=positions,
        segment_ids=ids,
        group_ids=0 * ids,
        group_t=jnp.float32([[t]]),
        text=text,
        text_segment_ids=np.ones_like(text),
        token_fields={},
        segment_fields={},
    )
    return np.asarray(jax.jit(model.apply)(params, inputs)).reshape(1, count, frames, -1)


@pytest.mark.parametrize("frames", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_one_frame_is_what_the_image_model_makes_of_it(image, mesh, frames, capsys):
    run, weights = image
    config = changed(VIDEO, {FRAMES: frames, "checkpoint.initial": run})
    shapes, shardings = abstract(config, mesh)
    state = init_from(config, shapes, shapes, shardings)
    for leaf, wanted in zip(
        jax.tree.leaves(state.ema), jax.tree.leaves(shardings.ema), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    params = jax.device_get(state.ema)
    said = capsys.readouterr().out
    assert f"checkpoint.initial {run!r} is inflated:" in said
    assert ("patches of" in said) == (frames > 1) and "features of time" in said
    tokens = np.random.default_rng(1).normal(size=(1, 6, 192)).astype(np.float32)
    wanted = one_frame(IMAGE, weights, tokens, 0.6)
    found = one_frame(config, params, tokens, 0.6)
    assert np.abs(wanted).max() > 0.1
    for each in range(frames):
        # Sums of the same numbers (and zeros) in another order: float32.
        np.testing.assert_allclose(found[:, :, each], wanted[:, :, 0], rtol=1e-5, atol=1e-5)
    # The other copies have noise of their own: of a patch the first frame alone is read.
    new, old = (x["params"]["dit"]["patch_embedding"]["kernel"] for x in (params, weights))
    assert np.array_equal(new[:192], old) and not new[192:].any()


def test_time_moves_what_is_not_the_first_frame():
    places = np.array([[[0, 2, 1], [3, 2, 1]]], np.float32)
    image, clip = (absolute_features(k, jnp.asarray(places), 24, 1e4) for k in ("wh", "wht"))
    assert np.array_equal(image[:, 0], clip[:, 0])
    rates = 1e4 ** (-np.arange(12) / 12)
    moved = np.concatenate([np.sin(3 * rates), np.cos(3 * rates) - 1])
    np.testing.assert_allclose(clip[0, 1] - image[0, 1], moved, atol=1e-5)
    with pytest.raises(ValueError, match="width is 18.*multiple of 4"):
        DiTConfig(width=18, heads=2, rotary=False, absolute_positions="wht")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({FRAMES: 4, PLACES: "thw"}, "is a run with model.dit.absolute_positions = 'wh'"),
        (
            {"diffusion.prediction": "velocity"},
            "model.patch.t 1, and not 2, of diffusion.prediction 'velocity'.*predicts 'x0'",
        ),
        ({"model.conditioners": {"low_res": LowRes()}}, "is a run with model.conditioners"),
    ],
)
def test_what_would_not_be_the_image_is_refused(image, changes, message):
    nothing: Any = None  # No weights are read.
    config = changed(VIDEO, changes | {"checkpoint.initial": image[0]})
    with pytest.raises(ValueError, match=message):
        init_from(config, nothing, nothing, nothing)


def test_models_of_clips_keep_their_clock_and_patches():
    clips = changed(VIDEO, {FRAMES: 1, PLACES: "wh", FPS: 24.0})
    assert inflation(changed(clips, {FPS: 8.0}), clips) == {}
    assert inflation(changed(VIDEO, {FRAMES: 4}), VIDEO) == inflation(VIDEO, VIDEO) == {}
    assert set(inflation(VIDEO, IMAGE)) == {FRAMES, FPS, PLACES}
