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
    """A model with random parameters, compiled, and a clip of thirteen frames: four latents."""

    def __init__(self, config: CausalAutoencoderConfig) -> None:
        model, self.variables = (
            CausalAutoencoder(config, config.computation()),
            random_params(config),
        )
        self.model = model
        self.apply = jax.jit(model.apply, static_argnames=("first", "method", "mutable"))
        side = 4 * config.stride[1]
        self.clip = jax.random.uniform(jax.random.key(1), (1, 13, side, side, 3), minval=-1)

    def run(self, method: str, x: jax.Array) -> Any:
        y = self.apply(self.variables, x, method=method)
        return y[0] if method == "encode" else y

    def in_parts(self, method: str, x: jax.Array, lengths: tuple[int, ...]) -> jax.Array:
        parts, cache, start = [], {}, 0
        for length in lengths:
            part, variables = x[:, start : start + length], {**self.variables, **cache}
            given: Any = dict(first=start == 0, method=method, mutable=("cache",))
            y, cache = self.apply(variables, part, **given)
            parts.append(y[0] if method == "encode" else y)
            start += length
        return jnp.concatenate(parts, 1)


# Wan's comparison with Diffusers and the codec's tests take the plain one in parts too.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "linear"]


@pytest.fixture(scope="module", params=["linear", *SLOW])
def opened(request: pytest.FixtureRequest) -> Opened:
    return Opened(VARIANTS[request.param])


def test_a_frame_changes_its_own_latent_and_later_ones_alone(opened: Opened):
    """The table of docs/codec.md: latent i holds frames 1 + 4 (i - 1) to 4 i, and sees earlier ones."""
    clip, frames = opened.clip, (0, 1, 4, 5, 8, 9, 12)
    latents = opened.run(
        "encode", jnp.concatenate([clip, *(clip.at[:, f].add(0.5) for f in frames)])
    )
    assert latents.shape == (8, 4, 4, 4, 3)
    changed = np.abs(latents[1:] - latents[0]).max((2, 3, 4)) > 1e-6
    assert changed.tolist() == [[i >= -(-frame // 4) for i in range(4)] for frame in frames]


def test_a_latent_changes_its_own_frames_and_later_ones_alone(opened: Opened):
    latents = opened.run("encode", opened.clip)
    changes = [latents.at[:, i].add(1.0) for i in range(4)]
    clips = opened.run("decode", jnp.concatenate([latents, *changes]))
    assert clips.shape == (5, *opened.clip.shape[1:])
    changed = np.abs(clips[1:] - clips[0]).max((2, 3, 4)) > 1e-6
    assert changed.argmax(1).tolist() == [0, 1, 5, 9]


def test_parts_of_any_length_are_the_whole(opened: Opened):
    """The first of them alone too: a clip's first latent is that of its first frame as an image."""
    latents = opened.run("encode", opened.clip)
    pixels = opened.run("decode", latents)
    for counts in ((1, 1, 1, 1), (3, 1)):
        frames = tuple(4 * count - 3 * (i == 0) for i, count in enumerate(counts))
        for method, x, lengths, whole in (
            ("encode", opened.clip, frames, latents),
            ("decode", latents, counts, pixels),
        ):
            np.testing.assert_allclose(opened.in_parts(method, x, lengths), whole, atol=CLOSE)


@pytest.mark.parametrize("taps, step, before", [(3, 1, 2), (3, 2, 0), (1, 1, 0)])
def test_frame_by_frame_is_the_same_convolution(taps: int, step: int, before: int):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 5, 6, 4, 3))
    kernel = jax.random.normal(keys[1], (taps, 3, 3, 3, 2))
    given = (x, kernel, (step, 1, 1), before, (1, 1))
    found, expected = (f(*given) for f in (convolve_by_frames, convolve))
    np.testing.assert_allclose(found, expected, atol=1e-5)  # sums of 81 products, in another order


def test_a_flat_image_has_a_bounded_gradient(opened: Opened):
    """A norm divides by a length, and of the grey that is nearest to 0 that is small."""

    def loss(variables: Any) -> jax.Array:
        flat = jnp.full_like(opened.clip[:, :1], 127 / 127.5 - 1)
        back: Any = opened.model.apply(variables, flat)
        return ((back - 1) ** 2).mean()

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(opened.variables))
    assert max(float(np.abs(leaf).max()) for leaf in gradients) < 1e3


@pytest.mark.slow
def test_linear_begins_as_a_projection_of_own_pixels():
    """Each latent is linear in its own pixels alone, and each frame in its own latent."""
    model = CausalAutoencoder(VARIANTS["linear"])
    clips = jax.random.normal(jax.random.key(1), (2, 9, 8, 8, 3))
    params = nn.unbox(model.init(jax.random.key(0), clips[:, :1], mutable="params"))
    encode = lambda x: model.apply(params, x, method="encode")[0]  # noqa: E731
    latents = encode(clips)
    both = encode(clips[:1] + clips[1:])[0]
    np.testing.assert_allclose(latents[0] + latents[1], both, atol=CLOSE)
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
        ({"norm_groups": 2}, "norm_groups is 2"),
    ],
)
def test_refuses_what_cannot_be(change: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        check_types(dataclasses.replace(PLAIN, **change))
