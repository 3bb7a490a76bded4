"""Counted operations: against a count by hand, and against what XLA counts in its program."""

import dataclasses

import numpy as np
import pytest

from dit_jax.model import (
    ByteEncoderConfig,
    DiTConfig,
    ModelConfig,
    PatchConfig,
    TextStatesConfig,
    forward_flops,
)


def products(*shapes: tuple[int, int, int]) -> int:
    """Operations of matrix products [m, k] x [k, n] for each (m, k, n)."""
    return sum(2 * m * k * n for m, k, n in shapes)


def counted_by_hand(config: ModelConfig, l: int, s: int) -> int:
    d, f, p = config.dit.width, config.dit.hidden, config.patch.dim
    e, pairs = config.text_width, d // config.dit.heads // 2
    self_attention = products((l, d, 3 * d), (l, d, l), (l, l, d), (l, d, d))
    cross_attention = products((l, d, d), (s, e, 2 * d), (l, d, s), (l, s, d), (l, d, d))
    mlp = products((l, d, f), (l, f, d))
    ends = products((l, p, d), (l, d, p))
    # Rotary angles, and what keeps XLA from computing their cosines and sines again.
    ends += products((l, 3, pairs), (l, pairs, pairs), (l, pairs, pairs))
    if isinstance(config.text, TextStatesConfig):
        encoder = products((s, config.text.dim, d), (s, d, d))
    else:
        letter_layer = products(
            (s, e, 3 * e), (s, e, s), (s, s, e), (s, e, e), (s, e, 4 * e), (s, 4 * e, e)
        )
        encoder = config.text.depth * letter_layer + products((s, e, e))
    attention = self_attention + cross_attention * config.dit.cross_attention
    # Of the one noise level of a segment, if there is one.
    condition = products((1, 256, d), (1, d, d), (1, d, 2 * d))
    if config.dit.pooled_text:
        condition += products((1, s, e), (1, e, d))
    modulation = products((1, d, 6 * d))
    layers = config.dit.depth * (attention + mlp + modulation * (l > 0))
    return layers + ends + condition * (l > 0) + encoder


CONFIG = ModelConfig(
    DiTConfig(width=64, depth=2, heads=2, mlp_dim=160, scan=False),
    PatchConfig(1, 2, 2, channels=3),
    ByteEncoderConfig(width=32, depth=1, heads=2, max_bytes=31),
    "float32",
)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, CONFIG.text),
        ({"cross_attention": False, "pooled_text": True}, TextStatesConfig(dim=24, max_tokens=32)),
    ],
)
def test_every_matrix_product_is_counted(changes, text):
    dit = dataclasses.replace(CONFIG.dit, **changes)
    config = dataclasses.replace(CONFIG, dit=dit, text=text)
    tokens, text = np.array([[1, 40], [96, 0]]), np.array([[1, 12], [32, 0]])
    counts = forward_flops(config, tokens, text)
    assert counts.shape == (2, 2)
    # Exact: whole numbers below 2^53.
    for index, count in np.ndenumerate(counts):
        assert count == counted_by_hand(config, int(tokens[index]), int(text[index]))
    assert counts[1, 1] == 0


@pytest.mark.parametrize(("window", "every"), [(5, 3), (5, 1), (64, 2)])
def test_windowed_layers_count_the_pairs_that_they_see(window, every):
    dit = dataclasses.replace(CONFIG.dit, depth=6, window=window, global_every=every)
    config = dataclasses.replace(CONFIG, dit=dit)
    tokens = np.array([1, 2, 5, 6, 7, 40, 64])
    counts = forward_flops(config, tokens, np.full(len(tokens), 12))
    windowed = 6 - 6 // every
    for l, count in zip(tokens.tolist(), counts.tolist(), strict=True):
        pairs = int((np.abs(np.subtract.outer(range(l), range(l))) <= window).sum())
        # A pair is a score and a share of the values, each of `width` multiplications and additions.
        unseen = windowed * (l * l - pairs) * 2 * 2 * dit.width
        assert count == counted_by_hand(config, l, 12) - unseen


def test_long_clips_cost_their_square():
    config = dataclasses.replace(CONFIG, dit=DiTConfig(width=1152, depth=28, heads=16))
    count = forward_flops(config, np.array([10**6]), np.array([1]))[0]
    # Of int32 counts nothing overflows, and attention is nearly all: 28 x 4 x 1152 x 10^12.
    assert 1.29e17 < count < 1.32e17
