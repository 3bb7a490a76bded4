"""The causal autoencoder: what sees what, parts against the whole, both ways to convolve."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.codec.causal_autoencoder import (
    SPACETIME_8,
    SPACETIME_8_32,
    WAN,
    CausalAutoencoder,
    CausalAutoencoderConfig,
    autoencoder_flops,
    convolve,
    convolve_by_frames,
)
from dit_jax.config import check_types
from tests.codecs import random_params

PLAIN = CausalAutoencoderConfig(
    latent_channels=3, widths=(4, 8, 8), strides=((2, 2), (2, 1)), layers=1
)
VARIANTS = {
    "plain": PLAIN,
    "shortcuts": dataclasses.replace(PLAIN, shortcuts=True, patch=2, variational=False),
    "linear": dataclasses.replace(PLAIN, linear=True, patch=2, mid_attention=False),
    "wide decoder": dataclasses.replace(PLAIN, decoder_widths=(8, 8, 16), mid_attention=False),
}
# Sums of float32 in another order, through some twenty layers; the outputs are of order one.
CLOSE = 1e-5


class Opened:
    """A model with random parameters, its methods compiled."""

    def __init__(self, config: CausalAutoencoderConfig) -> None:
        self.config = config
        self.model = CausalAutoencoder(config, config.computation())
        self.variables = random_params(config)
        self.apply = jax.jit(self.model.apply, static_argnames=("first", "method", "mutable"))

    def clip(self, frames: int, seed: int = 1) -> jax.Array:
        side = 4 * self.config.stride[1]
        return jax.random.uniform(jax.random.key(seed), (1, frames, side, side, 3), minval=-1)

    def encode(self, video: jax.Array) -> jax.Array:
        return self.apply(self.variables, video, method="encode")[0]

    def decode(self, latents: jax.Array) -> jax.Array:
        return self.apply(self.variables, latents, method="decode")

    def in_parts(self, method: str, clips: jax.Array, lengths: list[int]) -> jax.Array:
        made, cache, start = [], {}, 0
        for length in lengths:
            part = clips[:, start : start + length]
            variables = {**self.variables, **cache}
            y, cache = self.apply(
                variables, part, first=start == 0, method=method, mutable=("cache",)
            )
            made.append(y[0] if method == "encode" else y)
            start += length
        return jnp.concatenate(made, 1)


# What no preset uses is slow.
RARE = [pytest.param(name, marks=pytest.mark.slow) for name in ("shortcuts", "wide decoder")]


@pytest.fixture(scope="module", params=["plain", "linear", *RARE])
def opened(request: pytest.FixtureRequest) -> Opened:
    return Opened(VARIANTS[request.param])


@pytest.mark.parametrize("frames", [1, 17])
def test_latents_of_every_length(opened: Opened, frames: int):
    latents = opened.encode(opened.clip(frames))
    assert latents.shape == (1, 1 + (frames - 1) // 4, 4, 4, 3)
    assert opened.decode(latents).shape == opened.clip(frames).shape


def test_a_frame_changes_its_own_latent_and_later_ones_alone(opened: Opened):
    """The table of docs/codec.md: latent i holds frames 1 + 4 (i - 1) to 4 i, and sees earlier ones."""
    clip = opened.clip(13)
    before = opened.encode(clip)
    for frame in (0, 1, 4, 5, 8, 9, 12):
        after = opened.encode(clip.at[:, frame].add(0.5))
        changed = np.abs(np.asarray(after - before)).max((0, 2, 3, 4)) > 1e-6
        own = -(-frame // 4)
        assert changed.tolist() == [i >= own for i in range(4)], frame


def test_a_latent_changes_its_own_frames_and_later_ones_alone(opened: Opened):
    latents = opened.encode(opened.clip(13))
    before = opened.decode(latents)
    for i, first in enumerate((0, 1, 5, 9)):
        after = opened.decode(latents.at[:, i].add(1.0))
        changed = np.abs(np.asarray(after - before)).max((0, 2, 3, 4)) > 1e-6
        assert not changed[:first].any()
        assert changed[first]


def test_the_first_latent_is_that_of_the_first_frame_as_an_image(opened: Opened):
    clip = opened.clip(9)
    image, whole = opened.encode(clip[:, :1]), opened.encode(clip)
    np.testing.assert_allclose(image, whole[:, :1], atol=CLOSE)
    np.testing.assert_allclose(opened.decode(image), opened.decode(whole)[:, :1], atol=CLOSE)


@pytest.mark.parametrize("latents", [1, 2])
def test_parts_of_any_length_are_the_whole(opened: Opened, latents: int):
    clip = opened.clip(17)
    whole = opened.encode(clip)
    counts = [min(latents, 5 - start) for start in range(0, 5, latents)]
    frames = [4 * n - 3 * (i == 0) for i, n in enumerate(counts)]
    np.testing.assert_allclose(opened.in_parts("encode", clip, frames), whole, atol=CLOSE)
    decoded = opened.decode(whole)
    np.testing.assert_allclose(opened.in_parts("decode", whole, counts), decoded, atol=CLOSE)


@pytest.mark.slow
def test_eighty_one_frames_in_parts(opened: Opened):
    clip = opened.clip(81)
    whole = opened.encode(clip)
    assert whole.shape[1] == 21
    parts = opened.in_parts("encode", clip, [13, *[16] * 4, 4])
    np.testing.assert_allclose(parts, whole, atol=CLOSE)


@pytest.mark.parametrize("taps, step, before", [(3, 1, 2), (3, 1, 0), (3, 2, 0), (1, 1, 0)])
def test_frame_by_frame_is_the_same_convolution(taps: int, step: int, before: int):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 5, 6, 4, 3))
    kernel = jax.random.normal(keys[1], (taps, 3, 3, 3, 2))
    given = (x, kernel, (step, 1, 1), before, (1, 1))
    made, expected = (f(*given) for f in (convolve_by_frames, convolve))
    np.testing.assert_allclose(made, expected, atol=1e-5)  # sums of 81 products, in another order


def test_a_flat_clip_has_a_bounded_gradient(opened: Opened):
    """A norm divides by a length, and of the grey that is nearest to 0 that is small."""

    def loss(variables: Any) -> jax.Array:
        made: Any = opened.model.apply(variables, jnp.full_like(opened.clip(5), 127 / 127.5 - 1))
        return ((made - 1) ** 2).mean()

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(opened.variables))
    assert max(float(np.abs(leaf).max()) for leaf in gradients) < 1e3


@pytest.mark.slow
def test_linear_begins_as_a_projection_of_own_pixels():
    """Each latent is linear in its own pixels alone, and each frame in its own latent."""
    config = dataclasses.replace(PLAIN, linear=True, patch=2, mid_attention=False)
    model = CausalAutoencoder(config)
    clips = jax.random.normal(jax.random.key(1), (2, 9, 8, 8, 3))
    params = nn.unbox(model.init(jax.random.key(0), clips[:, :1], mutable="params"))

    def encode(x: jax.Array) -> Any:
        return model.apply(params, x, method="encode")[0]  # pyright: ignore[reportIndexIssue]

    latents = encode(clips)
    np.testing.assert_allclose(
        latents[0] + latents[1], encode(clips[:1] + clips[1:])[0], atol=CLOSE
    )
    changed = np.abs(encode(clips.at[:, 2, 5, 1].add(1.0)) - latents).max((0, 4)) > 0
    assert np.argwhere(changed).tolist() == [[1, 1, 0]]
    back: Any = model.apply(params, latents, method="decode")
    later: Any = model.apply(params, latents.at[:, 1, 1, 0].add(1.0), method="decode")
    moved = np.argwhere(np.abs(later - back).max((0, 4)) > 0)
    assert moved.min(0).tolist() == [1, 4, 0] and moved.max(0).tolist() == [4, 7, 3]


# Of nine frames of 16 x 16 latents: sums over the layers by hand.
FLOPS = {
    "plain": (54_228_992, 89_540_096),
    "shortcuts": (71_108_096, 124_184_064),
    "linear": (66_123_776, 101_434_880),
    "wide decoder": (47_544_320, 239_261_184),
}


@pytest.mark.parametrize("name", sorted(FLOPS))
def test_flops_of_encoding_and_decoding(name: str):
    side = 16 * VARIANTS[name].stride[1]
    assert autoencoder_flops(VARIANTS[name], 9, side, side) == FLOPS[name]


def test_presets_have_the_strides_they_are_named_for():
    assert (WAN.stride, WAN.latent_channels) == ((4, 8, 8), 16)
    assert (SPACETIME_8.stride, SPACETIME_8_32.stride) == ((8, 8, 8), (8, 32, 32))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"widths": (4, 8)}, r"widths is \(4, 8\)"),
        ({"widths": (4, 8, 9)}, "an even width for each of the 3"),
        ({"strides": ((2, 2), (4, 1))}, "strides is"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"shift": (1.0,)}, "empty, or 3 values"),
        ({"scale": (1.0, 0.0, 1.0)}, r"scale is \(1.0, 0.0, 1.0\)"),
        ({"shortcuts": True, "widths": (4, 10, 14)}, "unless shortcuts is unset"),
    ],
)
def test_refuses_what_cannot_be(change: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        check_types(dataclasses.replace(PLAIN, **change))
