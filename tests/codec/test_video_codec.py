"""The causal autoencoder as a codec: parts and tiles against the whole, memory, meshes, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter

import jax
import numpy as np
import pytest

from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.codec import TileConfig, VideoCodec
from dit_jax.config import check_types
from dit_jax.parallel import MeshConfig, make_mesh
from tests.codecs import SMALL, make_codec, noise

WHOLE = TileConfig(frames=16)
# Sums of float32 in another order, through some twenty layers; the outputs are of order one.
CLOSE = 1e-5
# Fifteen places of latents are all that a place depends on.
NEAR = CausalAutoencoderConfig(
    latent_channels=3, widths=(4, 4), strides=((2, 1),), layers=1, patch=2, mid_attention=False
)


@pytest.fixture(scope="module")
def whole() -> VideoCodec:
    """Clips of up to sixteen latents at once."""
    return make_codec(tiles=WHOLE)


@pytest.fixture(scope="module")
def by_one() -> VideoCodec:
    """Clips in parts of one latent."""
    return make_codec(tiles=TileConfig(frames=1))


def test_parts_of_any_length_are_the_whole(whole: VideoCodec, by_one: VideoCodec):
    clip = noise(17, 8, 12, 3)
    latents = whole.encode(clip)
    assert latents.shape == (5, 4, 6, 3) and latents.dtype == np.float32
    pixels = whole.decode(latents)
    assert pixels.shape == clip.shape and pixels.dtype == np.float32
    for codec in (by_one, make_codec(tiles=TileConfig(frames=2))):
        np.testing.assert_allclose(codec.encode(clip), latents, atol=CLOSE)
        np.testing.assert_allclose(codec.decode(latents), pixels, atol=CLOSE)
        parts = list(codec.decode_parts(latents))
        assert [len(part) for part in parts] == ([1] + [4] * 4 if codec is by_one else [5, 8, 4])
        np.testing.assert_array_equal(np.concatenate(parts), codec.decode(latents))


def test_many_clips_are_each_by_itself(whole: VideoCodec):
    clips = noise(2, 5, 8, 8, 3)
    latents = whole.encode_many(clips)
    for clip, made in zip(clips, latents, strict=True):
        np.testing.assert_allclose(made, whole.encode(clip), atol=CLOSE)


def test_latents_are_shifted_and_scaled_and_drawn_with_a_key(whole: VideoCodec):
    clip = noise(5, 8, 8, 3)
    config = dataclasses.replace(SMALL, shift=(), scale=())
    plain = make_codec(config, WHOLE)
    mean, drawn = plain.encode(clip), plain.encode(clip, jax.random.key(1))
    shift, scale = np.array(SMALL.shift), np.array(SMALL.scale)
    np.testing.assert_allclose(whole.encode(clip), (mean - shift) * scale, atol=CLOSE)
    np.testing.assert_allclose(whole.decode(whole.encode(clip)), plain.decode(mean), atol=1e-4)
    np.testing.assert_array_equal(drawn, plain.encode(clip, jax.random.key(1)))
    assert np.abs(drawn - mean).max() > 0.1
    point = make_codec(dataclasses.replace(config, variational=False), WHOLE)
    np.testing.assert_array_equal(point.encode(clip, jax.random.key(1)), point.encode(clip))


def test_memory_does_not_grow_with_the_length(by_one: VideoCodec):
    """One part is made at a time, and what layers look back to has a size that the length is not in."""
    assert inspect.isgenerator(by_one.decode_parts(noise(12, 4, 4, 3)))
    held = []
    for part in by_one.decode_parts(noise(12, 4, 4, 3)):
        assert part.shape[0] <= 4
        held.append(sum(leaf.nbytes for leaf in jax.live_arrays()))
    assert len(held) == 12 and len(set(held[1:])) == 1


# Tiles.


def test_tiles_are_the_whole_where_no_border_is_near():
    tiles = TileConfig(size=32, overlap=12, frames=16)
    tiled, whole = make_codec(NEAR, tiles), make_codec(NEAR, TileConfig(size=64, frames=16))
    clip = noise(3, 16, 96, 3)
    expected, made = whole.encode(clip), tiled.encode(clip)
    # Tiles of 32 latents, from 0 and from 16: each is alone beyond their overlap, its border 16 off.
    for alone in (slice(0, 16), slice(32, 48)):
        np.testing.assert_allclose(made[:, :, alone], expected[:, :, alone], atol=CLOSE)
    assert 0 < np.abs(made - expected)[:, :, 16:32].max() < 0.5
    pixels, back = whole.decode(expected), tiled.decode(expected)
    for alone in (slice(0, 32), slice(64, 96)):
        np.testing.assert_allclose(back[:, :, alone], pixels[:, :, alone], atol=CLOSE)
    assert np.abs(back - pixels).mean() < 0.1 * np.abs(pixels).mean()


def test_tiles_leave_no_seam_in_a_smooth_clip():
    """Without blending, neighbours across a border differ by a step; with it that is spread out."""
    y, x = np.mgrid[0:16, 0:96] / 96
    frame = np.stack([np.sin(3 * x), np.cos(2 * y + x), x - y], -1).astype(np.float32)
    clip = np.stack([frame, frame, frame])
    latents = make_codec(NEAR, TileConfig(size=64, frames=16)).encode(clip)
    step = {}
    for name, tiles in {
        "whole": TileConfig(size=64, frames=16),
        "blended": TileConfig(size=32, overlap=16, frames=16),
        "cut": TileConfig(size=24, overlap=0, frames=16),
    }.items():
        pixels = make_codec(NEAR, tiles).decode(latents)
        # Differences of columns two apart, as pixels of one latent differ by their place in it.
        across = np.abs(pixels[:, :, 2:] - pixels[:, :, :-2]).max((0, 1, 3))
        step[name] = across[16:80].max()
    # Measured: 0.009, 0.07 and 1.2 (zeros beyond a tile's border are far from what is there).
    assert step["blended"] < 0.1 * step["cut"]
    assert step["cut"] > 10 * step["whole"]


def test_tiles_are_streamed_too():
    clip = noise(9, 8, 96, 3)
    tiles = TileConfig(size=32, overlap=16, frames=16)
    short = dataclasses.replace(tiles, frames=2)
    latents = make_codec(NEAR, tiles).encode(clip)
    streamed = make_codec(NEAR, short)
    np.testing.assert_allclose(streamed.encode(clip), latents, atol=CLOSE)
    pixels = make_codec(NEAR, tiles).decode(latents)
    np.testing.assert_allclose(streamed.decode(latents), pixels, atol=CLOSE)


# Over a mesh.

SPREAD = dataclasses.replace(SMALL, mid_attention=False)


@pytest.mark.parametrize(
    "config, size", [(SMALL, (16, 8)), (SPREAD, (12, 16))], ids=["rows, attention", "columns"]
)
def test_clips_over_a_mesh_are_those_of_one_device(
    config: CausalAutoencoderConfig, size: tuple[int, int]
):
    """Clips over data, and over context the rows, or the columns where it divides those alone."""
    mesh = make_mesh(MeshConfig(2, 1, 4, 1))
    alone, spread = (make_codec(config, TileConfig(frames=2), mesh=m) for m in (None, mesh))
    clips = noise(2, 9, *size, 3)
    latents = alone.encode_many(clips)
    np.testing.assert_allclose(spread.encode_many(clips), latents, atol=CLOSE)
    for one in latents:
        np.testing.assert_allclose(spread.decode(one), alone.decode(one), atol=2 * CLOSE)


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
LINE = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(")


@pytest.mark.parametrize(("method", "size"), [("encode", (16, 8)), ("decode", (12, 16))])
def test_edges_go_to_the_neighbours_and_frames_stay(method: str, size: tuple[int, int]):
    mesh = make_mesh(MeshConfig(2, 1, 4, 1))
    codec = make_codec(SPREAD, mesh=mesh)
    unit = 1 if method == "encode" else 2
    channels = 3
    x = np.zeros((2, 5 if method == "encode" else 2, *(s // unit for s in size), channels))
    lowered = codec._step.lower(codec.params, None, x.astype(np.float32), method, True)
    found = Counter()
    for shape, kind in LINE.findall(lowered.compile().as_text()):
        found[kind] += 1
        sizes = [
            np.prod([int(n) for n in dims.split(",") if n])
            for dims in re.findall(r"\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", shape))
        ]
        # An edge of a row or column or two of a few frames, not a device's part of them.
        assert kind == "collective-permute" and max(sizes) <= 2 * 5 * max(size) * 4, (kind, shape)
    assert found["collective-permute"] > 0


# Refusals.


@pytest.mark.parametrize(
    "shape, said",
    [
        ((6, 8, 8, 3), r"6 frames of 8 x 8: tiny takes 1 \+ 4n frames .* Cut it to 5 of 8 x 8"),
        ((5, 7, 8, 3), r"multiples of 2. Cut it to 5 of 6 x 8"),
        ((5, 8, 8, 4), r"shape \(5, 8, 8, 4\): tiny takes \[t, h, w, 3\]"),
        ((0, 8, 8, 3), r"shape \(0, 8, 8, 3\)"),
        ((5, 8, 8), r"shape \(5, 8, 8\)"),
    ],
)
def test_clips_that_do_not_fit_are_refused(whole: VideoCodec, shape: tuple[int, ...], said: str):
    with pytest.raises(ValueError, match=said):
        whole.encode(np.zeros(shape, np.float32))


def test_whole_numbers_and_nothing_are_refused(whole: VideoCodec):
    with pytest.raises(ValueError, match=r"a clip of uint8: give floating point"):
        whole.encode(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"0 clips of shape \(1, 8, 8, 3\)"):
        whole.encode_many(np.zeros((0, 1, 8, 8, 3), np.float32))
    for shape in ((2, 4, 4, 5), (0, 4, 4, 3), (2, 4, 4)):
        with pytest.raises(ValueError, match=r"tiny takes \[t, h, w, 3\]"):
            whole.decode(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="give floating point"):
        whole.decode(np.zeros((1, 4, 4, 3), np.int32))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"frames": 0}, "frames is 0"),
        ({"size": 0}, "at most half of 0"),
        ({"size": 8, "overlap": 5}, "at most half"),
    ],
)
def test_tiles_that_cannot_be_are_refused(given: dict[str, int], said: str):
    with pytest.raises(ValueError, match=said):
        check_types(TileConfig(**given))
