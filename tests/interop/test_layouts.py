"""Layouts beside einops, whole and in every rectangle."""

import itertools

import numpy as np
import pytest
from einops import rearrange

from dit_jax.interop.layouts import Layout

SIZES = {"x": 3, "n": 2, "e": 4, "i": 5, "o": 2, "c": 3, "ph": 2, "pw": 2, "d": 6}
PATTERNS = [
    "d c ph pw -> (ph pw c) d",
    "(x n e) i -> i (n x e)",
    "(ph pw o c) d -> d (o ph pw c)",
    "(x n e) -> (n x e)",
    "d -> d",
]


@pytest.mark.parametrize(
    "pattern, joined",
    [(pattern, False) for pattern in PATTERNS] + [(p, True) for p in PATTERNS if "(x" in p],
)
def test_a_layout_is_what_einops_makes_of_it_in_any_rectangle(pattern, joined):
    layout = Layout(pattern, SIZES, "x" if joined else None)
    shape = Layout(pattern, SIZES).their_shape
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    names = pattern.replace("(", "").replace(")", "").split("->")[0].split()
    ours = rearrange(whole, pattern, **{name: SIZES[name] for name in names})
    assert layout.our_shape == ours.shape
    theirs = np.split(whole, 3) if joined else [whole]
    np.testing.assert_array_equal(layout.read(theirs), ours)
    # Saved transposed, as strided views are.
    np.testing.assert_array_equal(layout.read([np.asfortranarray(x) for x in theirs]), ours)
    for written, part in zip(layout.write(ours), theirs, strict=True):
        np.testing.assert_array_equal(written, part)
    sides = [list(itertools.combinations(range(size + 1), 2)) for size in ours.shape]
    rng = np.random.default_rng(0)
    for _ in range(200):
        index = tuple(slice(*side[rng.integers(len(side))]) for side in sides)
        np.testing.assert_array_equal(layout.read(theirs, index), ours[index])
