"""Modes of what does not fit together are refused, with what would."""

import numpy as np
import pytest

from dit_jax.sampling import (
    KnownLatents,
    blend,
    check_request,
    extend,
    image_to_video,
    interpolate,
)
from tests.sampling.test_modes import MODEL, PAIRS, clip, like

IMAGE = clip(1)[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: image_to_video(PAIRS, like(PAIRS), {3: IMAGE, 4: IMAGE}),
            "frames 3 and 4 share a token of 2",
        ),
        (
            lambda: image_to_video(PAIRS, like(PAIRS, frames=3), {0: IMAGE, 1: IMAGE}),
            "all 2 tokens",
        ),
        (lambda: extend(PAIRS, like(PAIRS), clip(3), 2, context=5), "context has 5 frames"),
        (lambda: blend(PAIRS, like(PAIRS), clip(5), clip(5), 7), "overlap has 7 frames"),
        (lambda: blend(PAIRS, like(PAIRS), clip(5), clip(5), 3), "has no middle"),
        (lambda: interpolate(PAIRS, like(PAIRS), clip(5), 1), "give at least 2"),
        (lambda: KnownLatents(np.zeros((2, 1, 1, 3)), np.array([0, 1.5])), "1.5"),
        (lambda: KnownLatents(np.zeros((2, 1, 1, 3)), np.zeros(3)), r"\(3,\)"),
        (lambda: check_request(like(PAIRS, loop=True), MODEL), "a loop of 9 frames"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
