"""Modes and long clips through a causal codec with random weights, whose latents stay whole."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import DiffusionConfig
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling import (
    Generator,
    Request,
    SamplingConfig,
    Space,
    Storyboard,
    decode_long,
    extend,
    interpolate,
    loop_text,
    make_clips,
    make_generations,
    make_long,
    plan_windows,
    to_uint8,
    window_requests,
)
from dit_jax.training.video_task import init_params, make_model
from tests.codecs import make_codec, quick_compilation

pytestmark = pytest.mark.usefixtures(quick_compilation.__name__)
MODEL = ModelConfig(
    dit=DiTConfig(width=24, depth=1, heads=2),
    patch=PatchConfig(1, 2, 2, 3, 2.0),
    text=ByteEncoderConfig(width=8, depth=1, heads=2, max_bytes=15),
)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
SIDE = 8
LIKE = Request("a ball", 3, SIDE // 2, SIDE // 2, 2.0, 1)
"""Nine frames at 8 a second: 4 x 2 x 2 pixels to a latent."""


@pytest.fixture(scope="module")
def codec(quick_compilation: None):
    return make_codec()


@pytest.fixture(scope="module")
def made_by(codec):
    """A generator with random parameters, and these."""
    model = make_model(MODEL, MESH)
    generator = Generator(model, DiffusionConfig(), SamplingConfig(steps=2, cfg_scale=2.0, batch=4))
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)
    return generator, params


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)


def test_twice_the_frames_of_a_clip(codec, made_by):
    """Nine frames become seventeen: five latents, of which only the first, a single frame, is held."""
    space, clip = Space(codec, MODEL.patch), pixels(9)
    edit = interpolate(space, LIKE, clip, 2)
    (request,) = edit.requests
    assert request.known is not None and request.fps == 4.0 and request.frames == 5
    np.testing.assert_array_equal(request.known.noise_caps, np.float32([0, 0.4, 0.4, 0.4, 0.4]))
    between = np.repeat(clip, 2, 0)[:-1].astype(float)
    between[1::2] = (between[0:-1:2] + between[2::2]) / 2
    guess = space.encode(np.rint(between).astype(np.uint8))
    np.testing.assert_allclose(
        request.known.clean, guess, atol=1e-5
    )  # float32, as in test_video_codec

    (made,) = make_generations(*made_by, [edit], MODEL, MESH, decode=codec.decode)
    assert made.shape == (17, SIDE, SIDE, 3)
    np.testing.assert_array_equal(made[::2], clip)
    latents = make_clips(*made_by, [request], MODEL, MESH, decode=codec.decode)[0]
    np.testing.assert_array_equal(made[1::2], latents[1::2])


def test_both_ends_are_clips_of_their_own(codec, made_by):
    """Thirteen frames, four more on either side: what is given is pasted, what is made is decoded."""
    space, clip = Space(codec, MODEL.patch), pixels(13)
    edit = extend(space, LIKE, clip, forward=4, backward=4)
    after, before = edit.requests
    assert after.known is not None and before.known is not None
    # Behind: frames 8 to 12 as a clip of their own, then one free latent.
    np.testing.assert_array_equal(after.known.noise_caps, [0, 0, 1])
    np.testing.assert_allclose(after.known.clean[:2], space.encode(clip[8:]), atol=1e-5)
    # Before: frames 0 to 4, whose first latent, a first frame's, is left out.
    np.testing.assert_array_equal(before.known.noise_caps, [1, 1, 0])
    np.testing.assert_allclose(before.known.clean[2:], space.encode(clip[:5])[1:], atol=1e-5)
    (made,) = make_generations(*made_by, [edit], MODEL, MESH, decode=codec.decode)
    np.testing.assert_array_equal(made[4:17], clip)
    plain = make_clips(*made_by, [after, before], MODEL, MESH, decode=codec.decode)
    np.testing.assert_array_equal(made[17:], plain[0][5:])
    np.testing.assert_array_equal(made[:4], plain[1][:4])


def test_windows_pass_latents_on_and_are_decoded_once(codec, made_by):
    windows = plan_windows(7, 3, 1)
    requests = window_requests(LIKE, windows, Storyboard((0.0,), ("a ball",)))
    (latents,) = make_long(*made_by, [requests], windows, MODEL, MESH)
    assert len(windows) == 3 and latents.shape == (7, SIDE // 2, SIDE // 2, 3)
    # Never encoded or decoded between windows: the codec is not even known there. In the end all
    # latents are one clip, in which only the first holds a single frame.
    long = np.concatenate(list(decode_long(codec, latents, 25)))
    assert len(long) == 25
    np.testing.assert_array_equal(long, to_uint8(codec.decode(latents)))
    (first,) = make_clips(*made_by, [requests[0]], MODEL, MESH, decode=codec.decode)
    np.testing.assert_array_equal(long[:9], first)
    short = np.concatenate(list(decode_long(codec, latents, 22)))
    np.testing.assert_array_equal(short, long[:22])


def test_a_loop_has_no_first_latent(codec, made_by):
    """Eight frames, the last followed by the first, decoded after their own end."""
    edit = loop_text(Space(codec, MODEL.patch), LIKE)
    (request,) = edit.requests
    assert request.loop and request.frames == 2
    (made,) = make_generations(*made_by, [edit], MODEL, MESH, decode=codec.decode)
    assert made.shape == (8, SIDE, SIDE, 3)
    turned = dataclasses.replace(request, seed=2)
    (other,) = make_clips(*made_by, [turned], MODEL, MESH, decode=codec.decode)
    assert (made != other).any()
