"""The joined model: what it computes in, and that text may be encoded apart."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.model import ModelConfig
from tests.denoiser import struct


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float32", "tpu", "float32"),
    ],
)
def test_activations_are_of_low_precision_on_accelerators(dtype, platform, expected):
    assert ModelConfig(dtype=dtype).on(platform).dtype == expected
    assert ModelConfig().compute_dtype() == jnp.float32  # The tests run on CPUs.


def test_text_may_be_encoded_once_and_apart(model, forward, params, inputs, jit):
    encode = jit(functools.partial(model.apply, method="encode_text"))
    denoise = jit(functools.partial(model.apply, encoded=True))
    given = dict(inputs)
    states = encode(params, given.pop("text"), given["text_segment_ids"])
    out = denoise(params, struct(given, text=states))
    # The same operations, compiled in two parts.
    np.testing.assert_allclose(out, forward(params, **inputs), rtol=1e-5, atol=1e-5)
