"""Patches: which pixels a token holds, that nothing is lost, and where a token stands."""

import numpy as np
import pytest

from dit_jax.config import check_types
from dit_jax.model import PatchConfig, patchify, positions, unpatchify


def numbered(t: int, h: int, w: int, c: int = 1) -> np.ndarray:
    """A clip float32 whose pixel (t, h, w, c) says 1000 t + 100 h + 10 w + c."""
    i, y, x, z = np.mgrid[0:t, 0:h, 0:w, 0:c]
    return (1000 * i + 100 * y + 10 * x + z).astype(np.float32)


# --- round trips ---


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 8, 8), (4, 2, 2)])
@pytest.mark.parametrize("frames", [1, 9])
def test_patches_put_together_are_the_clip(patch, frames):
    config = PatchConfig(*patch, channels=3)
    clip = np.random.default_rng(0).normal(size=(frames, 16, 24, 3)).astype(np.float32)
    tokens = patchify(config, clip)
    assert tokens.dtype == np.float32
    assert tokens.shape == (config.num_tokens(frames, 16, 24), config.dim)
    assert config.dim == 3 * np.prod(patch)
    back = unpatchify(config, tokens, frames, 16, 24)
    # Bit for bit: the mean of 2 or 4 equal floats is exact.
    assert np.array_equal(back, clip)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 8, 8)])
def test_uint8_clips_keep_their_dtype_as_tokens(patch):
    clip = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    assert patchify(PatchConfig(*patch, channels=3), clip).dtype == np.uint8


def test_the_first_frame_is_the_mean_of_its_copies():
    config = PatchConfig(2, 1, 1, channels=1)
    tokens = np.array([[3.0, 5.0], [7.0, 9.0]], np.float32)
    assert unpatchify(config, tokens, 3, 1, 1).ravel().tolist() == [4.0, 7.0, 9.0]


@pytest.mark.parametrize("part", [1, 2])
def test_a_loop_has_no_first_frame(part: int):
    config, size = PatchConfig(part, 2, 2, channels=3), (8, 4, 6)
    clip = numbered(*size, 3)
    tokens = patchify(config, clip, loop=True)
    assert tokens.shape == (8 // part * 6, config.dim)
    np.testing.assert_array_equal(unpatchify(config, tokens, *size, loop=True), clip)
    # Both are what they are behind a first frame.
    longer = np.concatenate([clip[:1], clip])
    np.testing.assert_array_equal(patchify(config, longer)[6:], tokens)
    places, _ = positions(config, *size, 24.0, loop=True)
    np.testing.assert_array_equal(positions(config, 9, 4, 6, 24.0)[0][6:], places)
    for frames, height, value in ((8, 3, "height 3"), (0, 4, "loop of 0")):
        with pytest.raises(ValueError, match=value):
            config.grid(frames, height, 6, loop=True)


# --- which pixels a token holds ---


def test_tokens_are_in_raster_order_and_so_are_their_numbers():
    tokens = patchify(PatchConfig(1, 2, 2, channels=2), numbered(2, 4, 4, 2))
    assert tokens.shape == (8, 8)
    assert tokens[0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111]
    # Along w first, then h, then t.
    assert tokens[:, 0].tolist() == [0, 20, 200, 220, 1000, 1020, 1200, 1220]
    assert tokens[7].tolist() == [1220, 1221, 1230, 1231, 1320, 1321, 1330, 1331]


def test_the_first_frame_stands_alone():
    tokens = patchify(PatchConfig(4, 1, 1, channels=1), numbered(9, 1, 2))
    assert tokens.tolist() == [
        [0, 0, 0, 0],
        [10, 10, 10, 10],
        [1000, 2000, 3000, 4000],
        [1010, 2010, 3010, 4010],
        [5000, 6000, 7000, 8000],
        [5010, 6010, 7010, 8010],
    ]


# --- positions ---


def test_coordinates_and_frames_in_token_order():
    coordinates, frames = positions(PatchConfig(1, 2, 2), 2, 4, 6, fps=24.0)
    assert coordinates.dtype == np.float32 and frames.dtype == np.int32
    grid = [[t, h, w] for t in range(2) for h in range(2) for w in range(3)]
    assert coordinates.tolist() == grid
    assert frames.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize(
    ("fps", "clock"), [(24.0, [0, 1, 2, 3]), (12.0, [0, 2, 4, 6]), (30.0, [0, 0.8, 1.6, 2.4])]
)
def test_clips_of_every_frame_rate_share_a_clock(fps, clock):
    coordinates, frames = positions(PatchConfig(1, 1, 1), 4, 1, 1, fps)
    # float32 of 0.8 and its multiples.
    np.testing.assert_allclose(coordinates[:, 0], clock, rtol=1e-7)
    assert frames.tolist() == [0, 1, 2, 3]


def test_the_reference_frame_rate_sets_the_unit():
    config = PatchConfig(1, 1, 1, reference_fps=8.0)
    assert positions(config, 3, 1, 1, 8.0)[0][:, 0].tolist() == [0, 1, 2]
    assert positions(config, 3, 1, 1, 16.0)[0][:, 0].tolist() == [0, 0.5, 1]


def test_a_patch_stands_at_the_middle_of_its_frames():
    # Patches hold frames {0}, {1, 2, 3, 4} and {5, 6, 7, 8}; four frames are a unit of time.
    coordinates, frames = positions(PatchConfig(4, 1, 1), 9, 1, 1, 24.0)
    assert coordinates[:, 0].tolist() == [0, 2.5 / 4, 6.5 / 4]
    assert frames.tolist() == [0, 1, 2]
    # The same instants at half the frame rate are twice as late.
    assert positions(PatchConfig(4, 1, 1), 9, 1, 1, 12.0)[0][:, 0].tolist() == [0, 1.25, 3.25]


# --- errors ---


@pytest.mark.parametrize(
    ("size", "what", "nearest"),
    [
        ((4, 16, 16), "4 frames", "3 and 5"),
        ((0, 16, 16), "0 frames", "1 and 3"),
        ((5, 20, 16), "height 20", "16 and 24"),
        ((5, 3, 16), "height 3", "8 and 16"),
        ((5, 16, 30), "width 30", "24 and 32"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest(size, what, nearest):
    config = PatchConfig(2, 8, 8, channels=3)
    for call in (
        lambda: config.grid(*size),
        lambda: patchify(config, np.zeros((*size, 3), np.float32)),
        lambda: positions(config, *size, fps=24.0),
    ):
        with pytest.raises(ValueError, match=f"{what}.*nearest are {nearest}"):
            call()


def test_a_clip_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="3 channels and the model's patches 4"):
        patchify(PatchConfig(channels=4), np.zeros((1, 4, 4, 3), np.float32))


@pytest.mark.parametrize("fps", [0.0, -24.0, float("nan")])
def test_a_frame_rate_is_above_zero(fps):
    with pytest.raises(ValueError, match="frame rate is above 0"):
        positions(PatchConfig(), 1, 4, 4, fps)


@pytest.mark.parametrize("field", ["t", "h", "w", "channels", "reference_fps"])
def test_nonsense_patches_are_refused(field):
    with pytest.raises(ValueError, match=f"patch.{field} is 0"):
        check_types(PatchConfig(**{field: 0}), "patch")
