"""The network against an independent one: plain NumPy in float64, one segment and one head at a time.

Nothing is packed, masked, scanned or compiled in the reference, and rotary pairs are complex numbers.
"""

import math

import jax
import numpy as np
import pytest

from dit_jax.parallel.attention import host_attention

HEADS = 2


# --- the reference ---


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms_norm(p, x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotary(x, places):
    """A head ``[l, d]`` whose pair f of an axis with n pairs turns by 10000^(-f/n) per unit."""
    half = x.shape[-1] // 2
    side = x.shape[-1] // 6
    counts = (half - 2 * side, side, side)
    angles = np.concatenate(
        [np.outer(places[:, i], 1e4 ** (-np.arange(n) / n)) for i, n in enumerate(counts)], -1
    )
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


def attend(q, k, v):
    scores = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
    return scores @ v / scores.sum(-1, keepdims=True)


def self_attention(p, x, places, heads=HEADS):
    out = []
    for head in np.split(linear(p["qkv"], x), heads, -1):
        q, k, v = np.split(head, 3, -1)
        q, k = rms_norm(p["q_norm"], q), rms_norm(p["k_norm"], k)
        if places is not None:
            q, k = rotary(q, places), rotary(k, places)
        out.append(attend(q, k, v))
    return linear(p["out"], np.concatenate(out, -1))


def cross_attention(p, x, text):
    out = []
    queries, pairs = (np.split(linear(p[n], y), HEADS, -1) for n, y in (("q", x), ("kv", text)))
    for q, pair in zip(queries, pairs, strict=True):
        k, v = np.split(pair, 2, -1)
        out.append(attend(rms_norm(p["q_norm"], q), rms_norm(p["k_norm"], k), v))
    return linear(p["out"], np.concatenate(out, -1))


def mlp(p, x):
    return linear(p["down"], gelu(linear(p["up"], x)))


def block(p, x, condition, places, text):
    """One block; ``condition`` is each token's own ``[l, d]``."""
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(
        linear(p["modulation"]["linear"], silu(condition)), 6, -1
    )
    h = layer_norm(x) * (1 + scale1) + shift1
    x = x + gate1 * self_attention(p["self_attention"], h, places)
    if "cross_attention" in p:
        x = x + cross_attention(p["cross_attention"], layer_norm(x), text)
    h = layer_norm(x) * (1 + scale2) + shift2
    return x + gate2 * mlp(p["mlp"], h)


def encode(p, letters):
    x = p["bytes"]["embedding"][letters] + p["places"]["embedding"][: len(letters)]
    for i in range(sum(name.startswith("block_") for name in p)):
        layer = p[f"block_{i}"]
        x = x + self_attention(layer["self_attention"], layer_norm(x), None)
        x = x + mlp(layer["mlp"], layer_norm(x))
    return linear(p["out"], layer_norm(x))


def sines(places, width):
    """The fixed embedding: sines, then cosines, of t, h and w in turn; the rest is zero."""
    rates = 1e4 ** (-np.arange(width // 6) / (width // 6))
    angles = np.concatenate([np.outer(places[:, axis], rates) for axis in range(3)], -1)
    features = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    return np.pad(features, ((0, 0), (0, width - features.shape[-1])))


def transformer(p, tokens, places, levels, text, absolute_positions=False):
    """A segment's output; ``levels`` is each token's own noise level ``[l]``."""
    angles = np.outer(1000 * levels, 1e4 ** (-np.arange(128) / 128))
    features = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    condition = linear(p["time"]["out"], silu(linear(p["time"]["up"], features)))
    if "pooled" in p:
        condition = condition + linear(p["pooled"], text.mean(0))
    x = linear(p["patch_embedding"], tokens)
    if absolute_positions:
        x = x + sines(places, x.shape[-1])
    for i in range(2):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        x = block(layer, x, condition, places, text)
    shift, scale = np.split(linear(p["final_modulation"]["linear"], silu(condition)), 2, -1)
    return linear(p["final"], layer_norm(x) * (1 + scale) + shift)


# --- the comparison ---


def segments_of(inputs):
    """(row, places of its tokens, places of its text) of every segment of the test rows."""
    for row, count in ((0, 3), (1, 1)):
        for j in range(1, count + 1):
            yield (
                row,
                np.flatnonzero(inputs["segment_ids"][row] == j),
                np.flatnonzero(inputs["text_segment_ids"][row] == j),
            )


@pytest.mark.parametrize("ways", ["cross-attention", "other ways"])
def test_the_model_is_that_of_numpy(ways, tiny, other_ways, params_of, inputs, apply):
    changes = {"attention": host_attention, **other_ways} if ways == "other ways" else {}
    model = tiny(**changes)
    params = params_of(model)
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), params["params"])
    out = apply(model, params, **inputs)
    for row, at, text_at in segments_of(inputs):
        expected = transformer(
            exact["dit"],
            inputs["tokens"][row, at].astype(np.float64),
            inputs["positions"][row, at],
            inputs["group_t"][row, inputs["group_ids"][row, at]].astype(np.float64),
            encode(exact["text"], inputs["text"][row, text_at]),
            changes.get("absolute_positions", False),
        )
        # float32 against float64, through all layers: some 2^-24 of values up to 30, grown by sums of
        # 128 terms; noise levels in thousandths lose 2^-24 * 1000.
        np.testing.assert_allclose(out[row, at], expected, rtol=1e-4, atol=2e-4)
