"""Modes and long clips through a causal codec with random weights, whose latents stay whole."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.codec.codec import PixelCodec
from dit_jax.diffusion import DiffusionConfig
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.sampling import Generator, Request, SamplingConfig, Space, make_clips, plain, to_uint8
from dit_jax.sampling.modes import (
    decode_long,
    extend,
    interpolate,
    loop_text,
    make_long,
    plan_windows,
    window_requests,
)
from dit_jax.training.video_task import init_params, make_model
from tests.codecs import make_codec

MODEL = ModelConfig(
    dit=DiTConfig(width=24, depth=1, heads=2),
    patch=PatchConfig(1, 2, 2, 3, 2.0),
    text=ByteEncoderConfig(width=8, depth=1, heads=2, max_bytes=15),
)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
SIDE = 8
TEMPLATE = Request("a ball", 3, SIDE // 2, SIDE // 2, 2.0, 1)
"""Nine frames at 8 a second: 4 x 2 x 2 pixels to a latent."""
STRIDES = dataclasses.replace(PixelCodec(), strides=(4, 2, 2))
WINDOWS = plan_windows(Space(STRIDES, MODEL.patch), 25, 9, 1)
PIXELS = np.random.default_rng(2).integers(0, 256, (13, SIDE, SIDE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def codec():
    return make_codec()


@pytest.fixture(scope="module")
def generator():
    """A generator with random parameters, and these."""
    model = make_model(MODEL, MESH)
    generator = Generator(model, DiffusionConfig(), SamplingConfig(steps=2, cfg_scale=2.0, batch=8))
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)
    return generator, params


@pytest.fixture(scope="module")
def made(codec, generator):
    """By mode its requests, its clip, and the clips of the requests themselves; in one batch."""
    space = Space(codec, MODEL.patch)
    modes = {
        "interpolate": interpolate(space, TEMPLATE, PIXELS[:9], 2),
        "extend": extend(space, TEMPLATE, PIXELS, forward=4, backward=4),
        "loop": loop_text(space, TEMPLATE),
        "window": plain(window_requests(TEMPLATE, WINDOWS)[0]),
    }
    alone = [plain(request) for one in modes.values() for request in one.requests]
    batch = [*modes.values(), *alone]
    clips = iter(make_clips(*generator, batch, MESH, decode=codec.decode))
    whole = {name: next(clips) for name in modes}
    return {
        name: (one.requests, whole[name], [next(clips) for _ in one.requests])
        for name, one in modes.items()
    }


def test_twice_the_frames_of_a_clip(codec, made):
    """Nine frames become seventeen: five latents, of which only the first, a single frame, is held."""
    (request,), clip, (own,) = made["interpolate"]
    assert request.known is not None and request.fps == 4.0 and request.frames == 5
    np.testing.assert_array_equal(request.known.noise_caps, np.float32([0, 0.4, 0.4, 0.4, 0.4]))
    between = np.repeat(PIXELS[:9], 2, 0)[:-1].astype(float)
    between[1::2] = (between[0:-1:2] + between[2::2]) / 2
    guess = Space(codec, MODEL.patch).encode(np.rint(between).astype(np.uint8))
    np.testing.assert_allclose(request.known.clean, guess, atol=1e-5)  # float32
    assert clip.shape == (17, SIDE, SIDE, 3)
    np.testing.assert_array_equal(clip[::2], PIXELS[:9])
    np.testing.assert_array_equal(clip[1::2], own[1::2])


def test_both_ends_are_clips_of_their_own(codec, made):
    """Thirteen frames, four more on either side: what is known is pasted, what is new is decoded."""
    space, ((after, before), clip, own) = Space(codec, MODEL.patch), made["extend"]
    assert after.known is not None and before.known is not None
    # Behind: frames 8 to 12 as a clip of their own, then one free latent.
    np.testing.assert_array_equal(after.known.noise_caps, [0, 0, 1])
    np.testing.assert_allclose(after.known.clean[:2], space.encode(PIXELS[8:]), atol=1e-5)
    # Before: frames 0 to 4, whose first latent, a first frame's, is left out.
    np.testing.assert_array_equal(before.known.noise_caps, [1, 1, 0])
    np.testing.assert_allclose(before.known.clean[2:], space.encode(PIXELS[:5])[1:], atol=1e-5)
    np.testing.assert_array_equal(clip[4:17], PIXELS)
    np.testing.assert_array_equal(clip[17:], own[0][5:])
    np.testing.assert_array_equal(clip[:4], own[1][:4])


def test_windows_pass_latents_on_and_are_decoded_once(codec, generator, made):
    requests = window_requests(TEMPLATE, WINDOWS)
    (latents,) = make_long(*generator, [requests], WINDOWS, MESH)
    assert len(WINDOWS) == 3 and latents.shape == (7, SIDE // 2, SIDE // 2, 3)
    # Never encoded or decoded between windows: in the end all latents are one clip, in which only the
    # first holds a single frame.
    long = np.concatenate(list(decode_long(codec, latents, 25)))
    np.testing.assert_array_equal(long, to_uint8(codec.decode(latents)))
    # A grey level: the window alone runs in a batch of another size.
    assert len(long) == 25 and np.abs(long[:9].astype(int) - made["window"][1]).max() <= 1
    short = np.concatenate(list(decode_long(codec, latents, 22)))
    np.testing.assert_array_equal(short, long[:22])


def test_a_loop_has_no_first_latent(made):
    """Eight frames, the last followed by the first, decoded after their own end."""
    (request,), clip, _ = made["loop"]
    assert request.loop and request.frames == 2 and clip.shape == (8, SIDE, SIDE, 3)
    assert clip.std() > 0
