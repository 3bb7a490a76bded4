"""Rates from time stamps, and frames on a grid, by hand."""

from typing import NamedTuple

import numpy as np
import pytest

from dit_jax.prepare.timeline import Clock, native_rate, on_grid


class Frame(NamedTuple):
    time: float
    after_gap: bool = False


def grid(times, fps, origin=0.0, **kwargs):
    frames = [t if isinstance(t, Frame) else Frame(t) for t in times]
    return [(k, frames.index(frame)) for k, frame in on_grid(frames, fps, origin, **kwargs)]


@pytest.mark.parametrize(
    "times, hint, expected",
    [
        (np.arange(50) / 25, 25.0, (25.0, True)),
        (np.round(np.arange(90) * 1001 / 30000, 3), 1000.0, (30000 / 1001, True)),
        (np.round(np.arange(900) / 30, 3), None, (30.0, True)),
        (np.arange(10) / 13.7, None, (13.7, True)),
        (np.delete(np.arange(100) / 30, [3, 50, 51]), 29.1, (30.0, True)),
        (np.array([0, 0.1, 0.2, 0.3, 0.45, 0.55, 0.65, 0.72]), None, (10.0, False)),
        (np.array([0.0]), 24.0, (24.0, True)),
        (np.array([0.0, 1.0, 4.0]), None, (0.5, False)),
    ],
)
def test_rates(times, hint, expected):
    rate, constant = native_rate(times, hint)
    assert rate == pytest.approx(expected[0], rel=2e-3) and constant == expected[1]


def test_the_nearest_frame_is_taken():
    assert grid([0, 0.9, 2.2, 5.0], 1.0) == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (5, 3)]
    assert grid([0, 1, 2, 3, 4], 0.5) == [(0, 0), (1, 2), (2, 4)]
    assert grid([0, 0, 1, 0.5, 2], 1.0) == [(0, 0), (1, 2), (2, 4)]
    # Jitter under half an interval changes nothing.
    times = np.arange(200) / 30 + np.random.default_rng(0).uniform(-0.45, 0.45, 200) / 30
    times[0] = 0.0
    assert grid(times, 30.0) == [(k, k) for k in range(200)]


def test_gaps_have_no_indices():
    assert grid([0, 1, Frame(5, True), 6], 1.0) == [(0, 0), (1, 1), (5, 2), (6, 3)]
    assert grid([0, 0.1, 0.2, 3.0, 3.1], 10.0) == [(0, 0), (1, 1), (2, 2), (30, 3), (31, 4)]
    assert len(grid([0, 3, 6], 1 / 3)) == 3  # Slow is not a gap.
    frames = [0, 0.1, 0.2, Frame(0.4, True), 0.5, 0.6, 0.7]
    assert [k for k, _ in grid(frames, 10.0)] == [0, 1, 2, 4, 5, 6, 7]
    assert [k for k, _ in grid(frames, 4.0)] == [0, 1, 3]  # Point 2 is left out.


def test_a_part_of_the_frames_gives_a_part_of_the_grid():
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.uniform(0.2, 1.8, 60)) / 25
    whole = grid(times, 25.0, times[0])
    part = grid(times[20:], 25.0, times[0])
    last = times[0] + (whole[-1][0] - 9.5) / 25
    first = next(k for k, i in whole if i == 22)
    assert [(k, i + 20) for k, i in part if k >= first] == [(k, i) for k, i in whole if k >= first]
    assert grid(times, 25.0, times[0], end=last) == whole[:-10]


def test_stamps_that_begin_anew_go_on():
    clock = Clock(0.5)
    stamps = [100.0, 101.0, 100.6, 101.5, 3.0, 3.5, 95000.0, 96000.0, 5.0]
    read = [clock.read(stamp) for stamp in stamps]
    times = [100.0, 101.0, 100.6, 101.5, 102.5, 103.0, 104.0, 1104.0, 1105.0]
    assert [time for time, _ in read] == pytest.approx(times)
    assert [i for i, (_, anew) in enumerate(read) if anew] == [4, 6, 8]
