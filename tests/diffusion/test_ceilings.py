"""Noise ceilings: every pattern that training draws leaves something given and something to make."""

import collections
import functools

import jax
import numpy as np
import pytest

from dit_jax.diffusion import CeilingConfig
from dit_jax.diffusion.ceilings import PATTERNS, draw_pattern, held_frames

FRAMES = (1, 2, 3, 4, 5, 9, 17)
MOST = max(FRAMES)
DRAWS = 2000
NONE = dict.fromkeys(PATTERNS, 0.0)


@pytest.fixture(scope="module")
def draw(jit):
    """``draw(config, frames [m])``: patterns ``[m, draws, 4]`` and ceilings ``[m, draws]``."""
    keys = jax.random.split(jax.random.key(0), DRAWS)

    @functools.cache
    def compiled(config):
        one = functools.partial(draw_pattern, config)
        return jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))

    def run(config, frames):
        patterns, ceilings = compiled(config)(keys, np.array(frames, np.int32))
        return np.asarray(patterns), np.asarray(ceilings)

    return run


@pytest.fixture(scope="module")
def held(jit):
    """``held(patterns [..., 4])``: which of the frames 0 to 16 are given, ``[..., 17]``."""
    compiled = jit(held_frames)

    def run(patterns):
        patterns = np.asarray(patterns, np.int32)
        frames = np.broadcast_to(np.arange(MOST, dtype=np.int32), (*patterns.shape[:-1], MOST))
        spread = np.broadcast_to(patterns[..., None, :], (*frames.shape, 4))
        return np.asarray(compiled(frames, spread))

    return run


def within(count: float, expected: float, total: int) -> bool:
    """Whether a count is within 4.5 standard deviations of a binomial's mean (1 in 10^5)."""
    p = expected / total
    return abs(count - expected) <= 4.5 * (total * p * (1 - p)) ** 0.5


# --- which frames are given ---


@pytest.mark.parametrize(
    ("pattern", "frames"),
    [
        ((0, 0, 0, 0), "....."),
        ((1, 0, 0, 5), "#...."),
        ((3, 0, 0, 5), "###.."),
        ((0, 1, 0, 5), "....#"),
        ((0, 2, 0, 5), "...##"),
        ((1, 2, 0, 5), "#..##"),
        ((2, 1, 0, 5), "##..#"),
        ((0, 0, 2, 5), "#.#.#"),
        ((0, 0, 3, 5), "#..#."),
        ((0, 0, 4, 5), "#...#"),
        ((1, 0, 0, 2), "#."),
        ((0, 1, 0, 2), ".#"),
    ],
)
def test_given_frames_by_hand(held, pattern, frames):
    given = held([pattern])[0, : len(frames)]
    assert "".join("#" if g else "." for g in given) == frames


@pytest.mark.parametrize("name", PATTERNS)
def test_every_draw_is_legal(draw, held, name):
    patterns, _ = draw(CeilingConfig(**{**NONE, name: 1.0}), FRAMES)
    for frames, drawn, given in zip(FRAMES, patterns, held(patterns), strict=True):
        given = given[:, :frames]
        count = given.sum(1)
        if name == "free" or frames == 1 or (name == "ends" and frames == 2):
            assert not given.any()
            continue
        assert (count >= 1).all() and (count < frames).all(), frames
        edges = (np.diff(given.astype(int), axis=1) != 0).sum(1)
        if name == "first":
            assert given[:, 0].all() and (count == 1).all()
        elif name == "head":
            assert given[:, 0].all() and (edges == 1).all()
        elif name == "tail":
            assert given[:, -1].all() and (edges == 1).all()
        elif name == "ends":
            assert given[:, 0].all() and given[:, -1].all() and (edges == 2).all()
        else:
            stride = drawn[:, 2]
            assert set(stride.tolist()) == {2, 3, 4}
            assert (count == -(-frames // stride)).all()


@pytest.mark.parametrize("name", ["head", "tail"])
def test_any_number_of_frames_is_given_as_often(draw, held, name):
    patterns, _ = draw(CeilingConfig(**{**NONE, name: 1.0}), FRAMES)
    given = held(patterns[FRAMES.index(9)])[:, :9].sum(1)
    for count in range(1, 9):
        assert within((given == count).sum(), DRAWS / 8, DRAWS)


def test_ends_divide_what_is_given_in_every_way(draw):
    patterns, _ = draw(CeilingConfig(**{**NONE, "ends": 1.0}), FRAMES)
    ends = patterns[FRAMES.index(5)][:, :2]
    assert {tuple(pair) for pair in ends.tolist()} == {
        (head, tail) for head in range(1, 4) for tail in range(1, 4) if head + tail <= 4
    }
    # Neither end is favoured: of the numbers 1 to 4, half (1 and 2) give one each.
    assert within((ends.sum(1) == 2).sum(), DRAWS / 2, DRAWS)
    longer = (ends[:, 0] > ends[:, 1]).sum(), (ends[:, 0] < ends[:, 1]).sum()
    assert within(longer[0], sum(longer) / 2, sum(longer))


def test_strides_are_equally_likely(draw):
    patterns, _ = draw(CeilingConfig(**{**NONE, "every": 1.0}), FRAMES)
    strides = collections.Counter(patterns[FRAMES.index(17)][:, 2].tolist())
    assert all(within(strides[s], DRAWS / 3, DRAWS) for s in (2, 3, 4))


def test_patterns_are_drawn_by_their_weights(draw):
    config = CeilingConfig(free=0.3, first=0.2, head=0.16, tail=0.1, ends=0.1, every=0.14)
    patterns, _ = draw(config, FRAMES)
    head, tail, stride, _ = patterns[FRAMES.index(17)].T
    counts = {
        "free": (head + tail + stride == 0).sum(),
        "one": ((head == 1) & (tail == 0)).sum(),
        "more": ((head > 1) & (tail == 0)).sum(),
        "tail": ((head == 0) & (tail > 0)).sum(),
        "ends": ((head > 0) & (tail > 0)).sum(),
        "every": (stride > 0).sum(),
    }
    assert sum(counts.values()) == DRAWS
    # One of head's sixteen numbers gives the first frame alone, too.
    shares = {"free": 0.3, "one": 0.21, "more": 0.15, "tail": 0.1, "ends": 0.1, "every": 0.14}
    for name, share in shares.items():
        assert within(counts[name], share * DRAWS, DRAWS), name


def test_weights_are_relative(draw):
    one, _ = draw(CeilingConfig(**{**NONE, "free": 1.0, "first": 3.0}), FRAMES)
    two, _ = draw(CeilingConfig(**{**NONE, "free": 0.1, "first": 0.3}), FRAMES)
    assert np.array_equal(one, two)
    assert within((one[-1, :, 0] == 1).sum(), 0.75 * DRAWS, DRAWS)


# --- the ceiling of what is given ---


def test_ceilings_are_uniform_or_zero(draw):
    config = CeilingConfig(**{**NONE, "first": 1.0}, noisy=0.4, max_noise=0.2)
    ceilings = draw(config, FRAMES)[1][-1]
    assert (ceilings >= 0).all() and (ceilings < 0.2).all()
    noisy = ceilings[ceilings > 0]
    assert within(len(noisy), 0.4 * DRAWS, DRAWS)
    for quarter in range(4):
        inside = (noisy >= 0.05 * quarter) & (noisy < 0.05 * (quarter + 1))
        assert within(inside.sum(), len(noisy) / 4, len(noisy))


@pytest.mark.parametrize("fields", [{"noisy": 0.0}, {"max_noise": 0.0}])
def test_without_noise_ceilings_are_zero(draw, fields):
    assert not draw(CeilingConfig(**fields), FRAMES)[1].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": -0.1}, "ceilings.head is -0.1"),
        (NONE, "every ceilings weight is 0"),
        ({"noisy": 1.5}, "ceilings.noisy is 1.5"),
        ({"max_noise": -0.1}, "ceilings.max_noise is -0.1"),
    ],
)
def test_nonsense_ceilings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CeilingConfig(**fields)
