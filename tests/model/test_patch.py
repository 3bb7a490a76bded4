"""Patches: which pixels a token holds, that nothing is lost, and where a token stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.model import PatchConfig, patchify, positions, unpatchify
from dit_jax.model.patches import frequencies, rotary_angles, rotate


def numbered(t: int, h: int, w: int, c: int = 1) -> np.ndarray:
    """A clip float32 whose pixel (t, h, w, c) says 1000 t + 100 h + 10 w + c."""
    i, y, x, z = np.mgrid[0:t, 0:h, 0:w, 0:c]
    return (1000 * i + 100 * y + 10 * x + z).astype(np.float32)


# --- round trips ---


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize(("patch", "frames"), [((1, 2, 2), 9), ((2, 8, 8), 1), ((4, 2, 2), 9)])
def test_patches_put_together_are_the_clip(patch, frames, dtype):
    config = PatchConfig(*patch, channels=3)
    clip = np.random.default_rng(0).integers(0, 256, (frames, 16, 24, 3)).astype(dtype)
    tokens = patchify(config, clip)
    assert tokens.dtype == dtype
    assert tokens.shape == (config.num_tokens(frames, 16, 24), config.dim)
    assert config.dim == 3 * np.prod(patch)
    if dtype == np.float32:  # Bit for bit: the mean of 2 or 4 equal floats is exact.
        assert np.array_equal(unpatchify(config, tokens, frames, 16, 24), clip)


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
    ("reference", "fps", "clock"),
    [(24.0, 12.0, [0, 2, 4]), (24.0, 30.0, [0, 0.8, 1.6]), (8.0, 16.0, [0, 0.5, 1])],
)
def test_clips_of_every_frame_rate_share_a_clock(reference, fps, clock):
    config = PatchConfig(1, 1, 1, reference_fps=reference)
    coordinates, frames = positions(config, 3, 1, 1, fps)
    # float32 of 0.8 and its multiples.
    np.testing.assert_allclose(coordinates[:, 0], clock, rtol=1e-7)
    assert frames.tolist() == [0, 1, 2]


def test_a_patch_stands_at_the_middle_of_its_frames():
    # Patches hold frames {0}, {1, 2, 3, 4} and {5, 6, 7, 8}; four frames are a unit of time.
    coordinates, frames = positions(PatchConfig(4, 1, 1), 9, 1, 1, 24.0)
    assert coordinates[:, 0].tolist() == [0, 2.5 / 4, 6.5 / 4]
    assert frames.tolist() == [0, 1, 2]
    # The same instants at half the frame rate are twice as late.
    assert positions(PatchConfig(4, 1, 1), 9, 1, 1, 12.0)[0][:, 0].tolist() == [0, 1.25, 3.25]


# --- rotary embedding: which dimensions are whose, in what precision, and computed once ---

THETA = 1e4


@jax.jit
def turn(x: jax.Array, places: jax.Array) -> jax.Array:
    return rotate(x, *rotary_angles(places, x.shape[-1], THETA))


@pytest.mark.parametrize(
    ("head_dim", "dims"),
    [(128, (44, 42, 42)), (72, (24, 24, 24)), (64, (24, 20, 20)), (8, (4, 2, 2)), (6, (2, 2, 2))],
)
def test_dimensions_are_shared_out_evenly(head_dim, dims):
    rows = frequencies(head_dim, THETA)
    assert rows.shape == (3, head_dim // 2) and rows.dtype == np.float32
    # Every pair belongs to one axis, and each axis to its share of pairs.
    assert ((rows > 0).sum(0) == 1).all()
    assert tuple(2 * (rows > 0).sum(1)) == dims


def test_low_precision_heads_are_turned_in_float32():
    x = np.random.default_rng(0).normal(size=(1, 4, 1, 16)).astype(jnp.bfloat16)
    places = np.random.default_rng(1).uniform(0, 9, (1, 4, 3)).astype(np.float32)
    low, exact = np.asarray(turn(x, places)), np.asarray(turn(x.astype(np.float32), places))
    assert low.dtype == jnp.bfloat16
    assert np.array_equal(low, exact.astype(jnp.bfloat16))


def test_angles_are_made_once_for_all_layers():
    """Not again wherever they are used, as XLA for CPUs likes to."""

    def layers(x: jax.Array, places: jax.Array) -> jax.Array:
        rotary = rotary_angles(places, x.shape[-1], THETA)
        for _ in range(3):
            x = jnp.einsum("blad,de->blae", rotate(x, *rotary), jnp.full((16, 16), 0.1))
        return x

    given = jnp.ones((2, 64, 4, 16)), jnp.ones((2, 64, 3))
    program = jax.jit(layers).lower(*given).compile().as_text()
    assert program is not None
    assert program.count(" cosine(") == program.count(" sine(") == 1


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
    with pytest.raises(ValueError, match=f"{what}.*nearest are {nearest}"):
        config.grid(*size)
    with pytest.raises(ValueError, match=what):
        patchify(config, np.zeros((*size, 3), np.float32))
    with pytest.raises(ValueError, match=what):
        positions(config, *size, fps=24.0)


def test_a_clip_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="3 channels and the model's patches 4"):
        patchify(PatchConfig(channels=4), np.zeros((1, 4, 4, 3), np.float32))


@pytest.mark.parametrize("fps", [0.0, -24.0, float("nan")])
def test_a_frame_rate_is_above_zero(fps):
    with pytest.raises(ValueError, match="frame rate is above 0"):
        positions(PatchConfig(), 1, 4, 4, fps)
