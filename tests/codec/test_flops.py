"""What the causal autoencoder is counted to take, against the products of the traced program."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from dit_jax.codec.causal_autoencoder import (
    CausalAutoencoder,
    CausalAutoencoderConfig,
    Computation,
    autoencoder_flops,
)
from dit_jax.plan.kernels import traced_flops

PLAIN = CausalAutoencoderConfig(
    latent_channels=3, widths=(4, 8, 8), strides=((2, 2), (2, 1)), layers=1
)
VARIANTS = {
    "plain": PLAIN,
    "shortcuts": dataclasses.replace(PLAIN, shortcuts=True, patch=2, variational=False),
    "linear": dataclasses.replace(PLAIN, linear=True, patch=2, mid_attention=False),
    "wide decoder": dataclasses.replace(PLAIN, decoder_widths=(8, 8, 16), mid_attention=False),
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_flops_are_those_of_the_program(name: str):
    """Of convolutions as accelerators have them; norms and activations come on top there."""
    config = VARIANTS[name]
    model = CausalAutoencoder(config, Computation())
    side = 16 * config.stride[1]
    video, latents = jnp.zeros((1, 9, side, side, 3)), jnp.zeros((1, 3, 16, 16, 3))
    variables = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), video[:, :1])))

    def products(method: str, x: jax.Array) -> float:
        return traced_flops(
            jax.make_jaxpr(lambda v, x: model.apply(v, x, method=method))(variables, x)
        )

    encode, decode = autoencoder_flops(config, 9, side, side)
    assert products("encode", video) == encode
    assert products("decode", latents) == decode
