"""Modes of what does not fit together are refused, with what would."""

import numpy as np
import pytest

from dit_jax.sampling import (
    Given,
    blend,
    check_request,
    connect,
    extend,
    image_to_video,
    interpolate,
    restyle,
)
from tests.sampling.test_modes import PAIRS, clip, like


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: image_to_video(PAIRS, like(PAIRS), {9: clip(1)[0]}), "frame 9 of a clip of 9"),
        (
            lambda: image_to_video(PAIRS, like(PAIRS), {3: clip(1)[0], 4: clip(1)[0]}),
            "frames 3 and 4 share a token of 2",
        ),
        (lambda: image_to_video(PAIRS, like(PAIRS), {0: clip(1, side=16)[0]}), "for one of 8 x 8"),
        (
            lambda: image_to_video(PAIRS, like(PAIRS, frames=3), {0: clip(1)[0], 1: clip(1)[0]}),
            "all 2 tokens along time are given",
        ),
        (lambda: extend(PAIRS, like(PAIRS), clip(9)), "not both 0"),
        (lambda: extend(PAIRS, like(PAIRS), clip(9), 3), "give a multiple of 2"),
        (lambda: extend(PAIRS, like(PAIRS), clip(3), 2, context=5), "context has 5 frames"),
        (lambda: connect(PAIRS, like(PAIRS), clip(5), clip(5), 4), "a gap of 4 frames"),
        (lambda: blend(PAIRS, like(PAIRS), clip(5), clip(5), 7), "overlap has 7 frames"),
        (lambda: blend(PAIRS, like(PAIRS), clip(5), clip(5), 3), "has no middle"),
        (lambda: restyle(PAIRS, like(PAIRS), clip(5), 0), "strength 0"),
        (lambda: interpolate(PAIRS, like(PAIRS), clip(5), 1), "give at least 2"),
        (lambda: Given(np.zeros((2, 1, 1, 3)), np.array([0, 1.5])), "ceilings from 0.0 to 1.5"),
        (lambda: Given(np.zeros((2, 1, 1, 3)), np.zeros(3)), r"with ceilings \(3,\)"),
        (lambda: check_request(like(PAIRS, loop=True), PAIRS.patch), "a loop of 9 frames"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
