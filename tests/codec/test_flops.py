"""What the causal autoencoder takes, against sums over its layers by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig, autoencoder_flops

PLAIN = CausalAutoencoderConfig(
    latent_channels=3, widths=(4, 8, 8), strides=((2, 2), (2, 1)), layers=1
)
CASES = {
    "plain": ({}, 54_228_992, 89_540_096),
    "shortcuts": (dict(shortcuts=True, patch=2, variational=False), 71_108_096, 124_184_064),
    "linear": (dict(linear=True, patch=2, mid_attention=False), 66_123_776, 101_434_880),
    "wide decoder": (dict(decoder_widths=(8, 8, 16), mid_attention=False), 47_544_320, 239_261_184),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_flops_of_encoding_and_decoding(name: str):
    """Of nine frames of 16 x 16 latents."""
    change, *expected = CASES[name]
    config = dataclasses.replace(PLAIN, **change)
    side = 16 * config.stride[1]
    assert autoencoder_flops(config, 9, side, side) == tuple(expected)
