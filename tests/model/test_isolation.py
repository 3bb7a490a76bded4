"""Segments of a row do not see each other: neither tokens, nor text, nor noise levels.

Comparisons within one compiled function are bit for bit: a key of another segment has a weight of
exactly zero, and each row of a matrix product is computed from its own inputs alone.
"""

import functools

import numpy as np
import pytest

from dit_jax.parallel.attention import host_attention
from dit_jax.types import PAD
from tests.denoiser import byte_tokens


@pytest.fixture(scope="module", params=["reference", "other_ways"])
def way(request, tiny, other_ways):
    """The model with the reference attention, and with that of CPUs and the text pooled."""
    return tiny(**({"attention": host_attention, **other_ways} if "other" in request.param else {}))


@pytest.fixture(scope="module")
def params(way, params_of):
    return params_of(way)


@pytest.fixture(scope="module")
def forward(way, params, apply):
    return functools.partial(apply, way, params)


@pytest.fixture(scope="module")
def base(forward, inputs):
    return forward(**inputs)


def altered(inputs, name, where, value):
    """The inputs with other values at some places of one field."""
    field = inputs[name].copy()
    field[where] = value
    return {**inputs, name: field}


def changed(inputs, base, other):
    """Which tokens differ, ``[b, l]``; what is at padding does not count."""
    return (base != other).any(-1) & (inputs["segment_ids"] != PAD)


def tokens_of(inputs, j):
    """Which tokens are of segment ``j`` of the first row, ``[b, l]``."""
    mine = inputs["segment_ids"] == j
    mine[1] = False
    return mine


def test_the_test_rows_are_what_they_should_be(inputs, base):
    assert [inputs["segment_ids"][0].tolist().count(i) for i in range(4)] == [10, 12, 4, 6]
    assert np.isfinite(base).all() and base.std() > 0.1


@pytest.mark.parametrize("j", [1, 2, 3])
def test_what_is_of_a_segment_reaches_that_segment_alone(forward, inputs, base, j):
    mine = tokens_of(inputs, j)
    at = tuple(np.argwhere(mine)[0])
    text_at = (0, np.flatnonzero(inputs["text_segment_ids"][0] == j)[-1])
    groups = [(0, g) for g in np.unique(inputs["group_ids"][mine])]
    changes = [("tokens", at, 3.0), ("positions", at, 5.0), ("text", text_at, 99)]
    for name, where, value in changes + [("group_t", group, 0.33) for group in groups]:
        other = forward(**altered(inputs, name, where, value))
        assert np.array_equal(changed(inputs, base, other), mine), name


def test_padding_is_seen_by_none(forward, inputs, base):
    padding = inputs["segment_ids"] == PAD
    other = altered(inputs, "tokens", padding, 1e4)
    other = altered(other, "positions", padding, 77.0)
    other = altered(other, "text", inputs["text_segment_ids"] == PAD, byte_tokens("x", 1)[1])
    out = forward(**other)
    assert np.array_equal(out[~padding], base[~padding])
    assert np.isfinite(out).all()


def test_a_row_of_nothing_is_finite(forward, inputs):
    empty = {name: np.zeros_like(field) for name, field in inputs.items()}
    assert np.isfinite(forward(**empty)).all()


def test_packed_equals_alone(forward, segment, packed, inputs, base):
    third, nobody = segment(3, (3, 2, 4), levels=(0.4, 0.0), caption="é"), segment(9, (1, 2, 2))
    out = forward(**packed([[nobody], [third]]))[1, : len(third["tokens"])]
    # Sums of a few dozen terms in another order in float32, through two blocks: the largest
    # output is about 10.
    expected = base[0][inputs["segment_ids"][0] == 3]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
