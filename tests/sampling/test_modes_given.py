"""What is given at the edge of what is made: single frames, and parts of tokens."""

import numpy as np

from dit_jax.sampling import connect, extend, make_inputs
from tests.sampling.test_modes import CAUSAL, MODEL, PAIRS, PIXELS, blank, clip, free, given, like


def test_single_frames_leave_as_much_to_make_as_was_asked_for():
    """Through a causal codec a picture at the end stands still for a token, behind the new frames."""
    a, b = clip(1), clip(1, 100)
    for space, marks in ((PIXELS, "-+++-"), (PAIRS, "-+++-"), (CAUSAL, "-++-")):
        edit = connect(space, like(space), a, b, gap=3)
        assert free(edit.requests[0]) == marks
        assert blank(edit, space) == [0, 200, 200, 200, 100]
        edit = extend(space, like(space), b, backward=4)
        assert free(edit.requests[0]) == ("+++-" if space is CAUSAL else "++++-")
        assert blank(edit, space) == [200, 200, 200, 200, 100]


def test_noise_on_what_is_given_leaves_none_of_it_out():
    edit = extend(PAIRS, like(PAIRS), clip(3), backward=4, noise=0.25)
    (request,) = edit.requests
    # Latent 4 shares a token with 3, which is free: it is put back, as without noise.
    np.testing.assert_array_equal(given(request).noise_caps, [1, 1, 1, 1, 0, 0.25, 0.25])
    known = make_inputs([request], MODEL)
    assert known.noise_caps.tolist() == [[1, 1, 1, 0.25]]
    assert known.kept is not None and known.kept.any(-1).tolist() == [[False, False, True, False]]
