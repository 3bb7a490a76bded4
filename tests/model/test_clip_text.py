"""CLIP's text transformer: what it looks back at, and where captions end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.text.clip_text import ACTIVATIONS, CLIP_PRESETS, CLIPTextConfig, CLIPTextEncoder

TINY = CLIPTextConfig(
    vocabulary=20, width=8, depth=2, heads=2, hidden=12, max_tokens=9, end=18, projection=4
)
TOKENS = jnp.array([[17, 3, 5, 18, 0, 0, 0], [17, 19, 3, 5, 7, 18, 2]])


@pytest.fixture(scope="module")
def params():
    return CLIPTextEncoder(TINY).init(jax.random.key(0), TOKENS)


def test_states_do_not_depend_on_what_follows(params):
    whole = CLIPTextEncoder(TINY).apply(params, TOKENS)
    short = CLIPTextEncoder(TINY).apply(params, TOKENS[:, :4])
    for name in ("last", "penultimate"):
        cut = getattr(whole, name)[:, :4]
        np.testing.assert_allclose(getattr(short, name), cut, rtol=1e-5, atol=1e-6)
    assert whole.last.shape == (2, 7, 8) and whole.pooled.shape == (2, 4)
    assert np.abs(whole.last - whole.penultimate).max() > 0.01


@pytest.mark.parametrize(("end", "places"), [(18, [3, 5]), (2, [3, 1])])
def test_the_summary_is_at_the_end(params, end, places):
    """At the first token that ends captions, or at the highest where configs name none."""
    config = dataclasses.replace(TINY, end=end)
    found = CLIPTextEncoder(config).apply(params, TOKENS)
    kernel = nn.unbox(params)["params"]["project"]["kernel"]
    wanted = np.asarray(found.last)[[0, 1], places] @ kernel
    np.testing.assert_allclose(found.pooled, wanted, rtol=1e-5, atol=1e-6)


def test_without_a_projection_the_summary_is_a_state(params):
    config = dataclasses.replace(TINY, projection=None)
    found = CLIPTextEncoder(config).apply(params, TOKENS)
    np.testing.assert_array_equal(found.pooled, np.asarray(found.last)[[0, 1], [3, 5]])


def test_activations_in_closed_form():
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    np.testing.assert_allclose(
        ACTIVATIONS["quick_gelu"](x), x / (1 + np.exp(-1.702 * x)), atol=1e-6
    )
    assert float(ACTIVATIONS["gelu"](jnp.float32(1))) == pytest.approx(0.8413447, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "millions"), [("clip-l", 123.1), ("openclip-h", 354.0), ("openclip-bigg", 694.7)]
)
def test_presets_have_the_published_sizes(name, millions):
    config = CLIP_PRESETS[name]
    made = jax.eval_shape(CLIPTextEncoder(config).init, jax.random.key(0), TOKENS)
    count = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(made)))
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 0}, "width is 0: it is at least 1"),
        ({"projection": 0}, "projection is 0"),
        ({"max_tokens": 1}, "max_tokens is 1: a beginning and an end are two"),
        ({"heads": 7}, "width 768 does not divide into 7 heads"),
    ],
)
def test_odd_sizes_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        CLIPTextConfig(**fields)
