"""The joined model: what it computes in, and that text may be encoded apart."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.model import ModelConfig
from tests.denoiser import struct


@pytest.mark.parametrize(
    ("dtype", "backend", "expected"),
    [
        ("auto", "cpu", jnp.float32),
        ("auto", "gpu", jnp.bfloat16),
        ("auto", "tpu", jnp.bfloat16),
        ("auto", None, jnp.float32),  # this process's backend: the tests run on CPUs
        ("bfloat16", "cpu", jnp.bfloat16),
        ("float32", "tpu", jnp.float32),
    ],
)
def test_activations_are_of_low_precision_on_accelerators(dtype, backend, expected):
    assert ModelConfig(dtype=dtype).compute_dtype(backend) == expected


def test_text_may_be_encoded_once_and_apart(model, forward, params, inputs, jit):
    encode = jit(functools.partial(model.apply, method="encode_text"))
    denoise = jit(functools.partial(model.apply, method="denoise"))
    given = dict(inputs)
    states = encode(params, given.pop("text"), given["text_segment_ids"])
    out = denoise(params, struct(given, text=states))
    # The same operations, compiled in two parts.
    np.testing.assert_allclose(out, forward(params, **inputs), rtol=1e-5, atol=1e-5)
