"""Noise ceilings: every pattern that training draws leaves something given and something to make."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest

from dit_jax.diffusion import CeilingConfig
from dit_jax.diffusion.ceilings import PATTERNS, Pattern, draw_pattern, held_frames

FRAMES = (1, 2, 3, 4, 5, 9, 17)
MOST = max(FRAMES)
DRAWS = 2000
NONE = dict.fromkeys(PATTERNS, 0.0)


@pytest.fixture(scope="module")
def draw(jit):
    """``draw(config, frames [m])``: a ``Pattern`` of ``[m, draws]``, and ceilings ``[m, draws]``."""
    keys = jax.random.split(jax.random.key(0), DRAWS)

    @functools.cache
    def compiled(config):
        one = functools.partial(draw_pattern, config)
        return jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))

    def run(config, frames):
        return jax.tree.map(np.asarray, compiled(config)(keys, np.array(frames, np.int32)))

    return run


@pytest.fixture(scope="module")
def held(jit):
    """``held(pattern [...])``: which of the frames 0 to 16 are given, ``[..., 17]``."""
    compiled = jit(held_frames)

    def run(pattern):
        shape = (*pattern.head.shape, MOST)
        frames = np.broadcast_to(np.arange(MOST, dtype=np.int32), shape)
        spread = jax.tree.map(lambda x: np.broadcast_to(x[..., None], shape), pattern)
        chance = np.random.default_rng(5).random(shape, np.float32)
        return np.asarray(compiled(frames, spread, chance))

    return run


def at(pattern, frames):
    """The patterns that were drawn for clips of so many frames."""
    return jax.tree.map(lambda x: x[FRAMES.index(frames)], pattern)


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
    ids = [np.array([x], np.int32) for x in pattern]
    none = np.array([-1], np.int32)
    share = np.ones(1, np.float32)
    given = held(Pattern(*ids, none, none, share, none > 0))[0, : len(frames)]
    assert "".join("#" if g else "." for g in given) == frames


@pytest.mark.parametrize("name", PATTERNS)
def test_every_draw_is_legal(draw, held, name):
    patterns, _ = draw(CeilingConfig(**{**NONE, name: 1.0}), FRAMES)
    for frames, given in zip(FRAMES, held(patterns), strict=True):
        given = given[:, :frames]
        count = given.sum(1)
        if name in ("free", "independent") or frames == 1 or (name == "ends" and frames == 2):
            assert not given.any()
            continue
        assert (count >= 1).all() and (count < frames).all(), frames
        edges = (np.diff(given.astype(int), axis=1) != 0).sum(1)
        if name == "first":
            assert given[:, 0].all() and (count == 1).all()
        elif name in ("head", "window"):
            assert given[:, 0].all() and (edges == 1).all()
        elif name == "tail":
            assert given[:, -1].all() and (edges == 1).all()
        elif name == "ends":
            assert given[:, 0].all() and given[:, -1].all() and (edges == 2).all()
        elif name == "every":
            stride = at(patterns, frames).stride
            assert set(stride.tolist()) == {2, 3, 4}
            assert (count == -(-frames // stride)).all()


@pytest.mark.parametrize("name", ["head", "tail", "window", "keyframes"])
def test_any_number_of_frames_is_given_as_often(draw, held, name):
    patterns, _ = draw(CeilingConfig(**{**NONE, name: 1.0}), FRAMES)
    given = held(at(patterns, 9))[:, :9].sum(1)
    for count in range(1, 9):
        assert within((given == count).sum(), DRAWS / 8, DRAWS)


def test_key_frames_are_at_any_places(draw, held):
    """Of one number of key frames all choices are as likely."""
    patterns, _ = draw(CeilingConfig.only(keyframes=1.0), FRAMES)
    choices = collections.Counter(map(tuple, held(at(patterns, 4))[:, :4].tolist()))
    assert len(choices) == 2**4 - 2
    for choice, count in choices.items():
        ways = {1: 4, 2: 6, 3: 4}[sum(choice)]
        assert within(count, DRAWS / 3 / ways, DRAWS), choice


def test_only_independent_segments_have_levels_of_their_own(draw):
    patterns, _ = draw(CeilingConfig.only(free=0.5, first=0.2, independent=0.3), FRAMES)
    own, head = at(patterns, 17).independent, at(patterns, 17).head
    assert within(own.sum(), 0.3 * DRAWS, DRAWS) and not head[own].any()
    assert CeilingConfig.only(free=1.0).groups == 2
    assert CeilingConfig.only(independent=0.1, levels=5).groups == 5


def test_ends_divide_what_is_given_in_every_way(draw):
    patterns, _ = draw(CeilingConfig(**{**NONE, "ends": 1.0}), FRAMES)
    ends = np.stack([at(patterns, 5).head, at(patterns, 5).tail], -1)
    assert {tuple(pair) for pair in ends.tolist()} == {
        (head, tail) for head in range(1, 4) for tail in range(1, 4) if head + tail <= 4
    }
    # Neither end is favoured: of the numbers 1 to 4, half (1 and 2) give one each.
    assert within((ends.sum(1) == 2).sum(), DRAWS / 2, DRAWS)
    longer = (ends[:, 0] > ends[:, 1]).sum(), (ends[:, 0] < ends[:, 1]).sum()
    assert within(longer[0], sum(longer) / 2, sum(longer))


def test_strides_are_equally_likely(draw):
    patterns, _ = draw(CeilingConfig(**{**NONE, "every": 1.0}), FRAMES)
    strides = collections.Counter(at(patterns, 17).stride.tolist())
    assert all(within(strides[s], DRAWS / 3, DRAWS) for s in (2, 3, 4))


def test_patterns_are_drawn_by_their_weights(draw):
    config = CeilingConfig.only(free=0.3, first=0.2, head=0.1, tail=0.1, ends=0.1, every=0.1)
    config = dataclasses.replace(config, keyframes=0.04, window=0.06)
    patterns, _ = draw(config, FRAMES)
    head, tail, stride, _, kept, *_ = at(patterns, 17)
    counts = {
        "free": ((head + tail + stride == 0) & (kept < 0)).sum(),
        "keyframes": (kept >= 0).sum(),
        "one": ((head == 1) & (tail == 0)).sum(),
        "more": ((head > 1) & (tail == 0)).sum(),
        "tail": ((head == 0) & (tail > 0)).sum(),
        "ends": ((head > 0) & (tail > 0)).sum(),
        "every": (stride > 0).sum(),
    }
    assert sum(counts.values()) == DRAWS
    # One of head's sixteen numbers gives the first frame alone, too.
    shares = {"free": 0.3, "one": 0.21, "more": 0.15, "tail": 0.1, "ends": 0.1, "every": 0.1}
    shares["keyframes"] = 0.04
    for name, share in shares.items():
        assert within(counts[name], share * DRAWS, DRAWS), name


def test_weights_are_relative(draw):
    one, _ = draw(CeilingConfig(**{**NONE, "free": 1.0, "first": 3.0}), FRAMES)
    two, _ = draw(CeilingConfig(**{**NONE, "free": 0.1, "first": 0.3}), FRAMES)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert within((one.head[-1] == 1).sum(), 0.75 * DRAWS, DRAWS)


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


def test_windows_are_never_without_noise(draw):
    config = CeilingConfig.only(window=1.0, noisy=0.0, max_noise=0.2)
    ceilings = draw(config, FRAMES)[1][-1]
    assert (ceilings > 0).mean() > 0.99
    counts = np.histogram(ceilings, 4, (0, 0.2))[0]
    assert all(within(count, DRAWS / 4, DRAWS) for count in counts)


@pytest.mark.parametrize("fields", [{"noisy": 0.0, "window": 0.0}, {"max_noise": 0.0}])
def test_without_noise_ceilings_are_zero(draw, fields):
    assert not draw(CeilingConfig(**fields), FRAMES)[1].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": -0.1}, "ceilings.head is -0.1"),
        (NONE, "every ceilings weight is 0"),
        ({"noisy": 1.5}, "ceilings.noisy is 1.5"),
        ({"max_noise": -0.1}, "ceilings.max_noise is -0.1"),
        ({"levels": 1}, "ceilings.levels is 1"),
    ],
)
def test_nonsense_ceilings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CeilingConfig(**fields)
