"""The causal autoencoder as a codec: parts and tiles against the whole, memory, meshes, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.codec import PixelCodec, TileConfig, VideoCodec
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


def test_pixels_are_their_own_latents():
    codec = PixelCodec()
    clip = np.linspace(-1, 1, 2 * 3 * 4 * 3, dtype=np.float32).reshape(2, 3, 4, 3)
    assert codec.encode(clip) is clip and codec.decode(clip) is clip
    for video, lengths in ((clip, [2]), (np.repeat(clip, 20, 0), [16, 16, 8])):
        parts = list(codec.decode_parts(video))
        assert [len(part) for part in parts] == lengths
        np.testing.assert_array_equal(np.concatenate(parts), video)
    assert (codec.strides, codec.channels) == ((1, 1, 1), 3)
    with pytest.raises(ValueError, match="give floating point"):
        codec.encode(np.zeros((1, 2, 2, 3), np.uint8))


@pytest.fixture(scope="module")
def by_one() -> VideoCodec:
    """Clips in parts of one latent."""
    return make_codec(tiles=TileConfig(frames=1))


def test_parts_of_clips_are_the_whole_and_each_clip_is_by_itself(by_one: VideoCodec):
    clips, whole = noise(2, 9, 8, 12, 3), make_codec(tiles=WHOLE)
    latents = whole.encode_many(clips)
    assert latents.shape == (2, 3, 4, 6, 3) and latents.dtype == np.float32
    for clip, expected in zip(clips, latents, strict=True):
        np.testing.assert_allclose(by_one.encode(clip), expected, atol=CLOSE)
        pixels = whole.decode(expected)
        assert pixels.shape == clip.shape and pixels.dtype == np.float32
        parts = list(by_one.decode_parts(expected))
        assert [len(part) for part in parts] == [1, 4, 4]
        np.testing.assert_allclose(np.concatenate(parts), pixels, atol=CLOSE)


class Known(VideoCodec):
    """With moments that are known, and latents for pixels."""

    def _parts(self, method: str, clips: np.ndarray) -> Iterator[np.ndarray]:
        size = 6 if self.config.variational else 3
        yield noise(1, 2, 4, 4, size, seed=3) if method == "encode" else clips


def test_latents_are_shifted_and_scaled_and_drawn_with_a_key():
    clip, key = noise(5, 8, 8, 3), jax.random.key(1)
    mean, logvar = np.split(noise(1, 2, 4, 4, 6, seed=3)[0], 2, -1)
    codec = Known("tiny", "hash", SMALL, {})
    drawn = mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(key, (1, *mean.shape)))[0]
    for found, wanted in ((codec.encode(clip), mean), (codec.encode(clip, key), drawn)):
        wanted = (wanted - np.array(SMALL.shift)) * np.array(SMALL.scale)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(codec.decode(codec.encode(clip)), mean, atol=1e-6)
    point = Known("tiny", "hash", dataclasses.replace(SMALL, variational=False), {})
    np.testing.assert_array_equal(point.encode(clip, key), point.encode(clip))


def test_memory_does_not_grow_with_the_length(by_one: VideoCodec):
    """One part is made at a time, and what layers look back to has a size that the length is not in."""
    parts, held = by_one.decode_parts(noise(12, 4, 6, 3)), []
    assert inspect.isgenerator(parts)
    for part in parts:
        assert part.shape[0] <= 4
        held.append(sum(leaf.nbytes for leaf in jax.live_arrays()))
    assert len(held) == 12 and len(set(held[1:])) == 1


def test_tiles_in_parts_are_the_whole_where_no_border_is_near():
    """That neighbours fade into each other tests of images hold."""
    tiles = TileConfig(size=32, overlap=12, frames=2)
    tiled, whole = make_codec(NEAR, tiles), make_codec(NEAR, TileConfig(size=64, frames=16))
    clip = noise(7, 8, 96, 3)
    expected, found = whole.encode(clip), tiled.encode(clip)
    # Tiles of 32 latents, from 0 and from 16: each is alone beyond their overlap, its border 16 off.
    for alone in (slice(0, 16), slice(32, 48)):
        np.testing.assert_allclose(found[:, :, alone], expected[:, :, alone], atol=CLOSE)
    assert 0 < np.abs(found - expected)[:, :, 16:32].max() < 0.5
    parts = list(tiled.decode_parts(expected))
    assert [len(part) for part in parts] == [3, 4]
    pixels, back = whole.decode(expected), np.concatenate(parts)
    for alone in (slice(0, 32), slice(64, 96)):
        np.testing.assert_allclose(back[:, :, alone], pixels[:, :, alone], atol=CLOSE)
    assert np.abs(back - pixels).mean() < 0.1 * np.abs(pixels).mean()


# Over a mesh.

SPREAD = dataclasses.replace(SMALL, widths=(4, 4), strides=((2, 2),), mid_attention=False)
MESH = MeshConfig(data=2, fsdp=1, context=2, tensor=1)


def over_mesh(config: CausalAutoencoderConfig) -> VideoCodec:
    mesh = make_mesh(MESH, jax.devices()[:4])
    return make_codec(config, TileConfig(frames=2), mesh=mesh)


@pytest.mark.parametrize(
    "config, size",
    [(dataclasses.replace(SPREAD, mid_attention=True), (8, 4)), (SPREAD, (6, 8))],
    ids=["rows, attention", "columns"],
)
def test_clips_over_a_mesh_are_those_of_one_device(config, size):
    """Clips over data, and over context the rows, or the columns where it divides those alone."""
    alone, spread = make_codec(config, TileConfig(frames=2)), over_mesh(config)
    clips = noise(2, 7, *size, 3)
    latents = alone.encode_many(clips)
    np.testing.assert_allclose(spread.encode_many(clips), latents, atol=CLOSE)
    for one in latents:
        np.testing.assert_allclose(spread.decode(one), alone.decode(one), atol=2 * CLOSE)


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
LINE = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(")


@pytest.mark.parametrize(
    ("method", "shape"), [("encode", (2, 3, 8, 4, 3)), ("decode", (2, 2, 3, 4, 3))]
)
def test_edges_go_to_the_neighbours_and_frames_stay(method: str, shape: tuple[int, ...]):
    """Those of rows and those of columns."""
    codec = over_mesh(SPREAD)
    lowered = codec._step.lower(codec.params, None, np.zeros(shape, np.float32), method, True)
    kinds: Counter[str] = Counter()
    for text, kind in LINE.findall(lowered.compile().as_text()):
        kinds[kind] += 1
        sizes = [
            np.prod([int(n) for n in dims.split(",") if n])
            for dims in re.findall(r"\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", text))
        ]
        # An edge of a row or column or two of a few frames, not a device's part of them.
        assert kind == "collective-permute" and max(sizes) <= 2 * 3 * 8 * 4, (kind, text)
    assert kinds["collective-permute"] > 0


@pytest.mark.parametrize(
    "method, shape, dtype, said",
    [
        ("encode", (6, 8, 8, 3), "f4", r"6 frames of 8 x 8: tiny takes 1 \+ 4n .* 5 of 8 x 8"),
        ("encode", (5, 7, 8, 3), "f4", r"multiples of 2. Cut it to 5 of 6 x 8"),
        ("encode", (5, 8, 8, 4), "f4", r"shape \(5, 8, 8, 4\): tiny takes \[t, h, w, 3\]"),
        ("encode", (0, 8, 8, 3), "f4", r"shape \(0, 8, 8, 3\)"),
        ("encode", (5, 8, 8), "f4", r"shape \(5, 8, 8\)"),
        ("encode", (1, 8, 8, 3), "u1", "a clip of uint8: give floating point"),
        ("encode_many", (0, 1, 8, 8, 3), "f4", r"0 clips of shape \(1, 8, 8, 3\)"),
        ("decode", (2, 4, 4, 5), "f4", r"tiny takes \[t, h, w, 3\]"),
        ("decode", (0, 4, 4, 3), "f4", r"tiny takes \[t, h, w, 3\]"),
        ("decode", (1, 4, 4, 3), "i4", "give floating point"),
    ],
)
def test_clips_that_do_not_fit_are_refused(by_one, method, shape, dtype, said):
    with pytest.raises(ValueError, match=said):
        getattr(by_one, method)(np.zeros(shape, dtype))


@pytest.mark.parametrize(
    "given, said",
    [({"frames": 0}, "frames is 0"), ({"size": 8, "overlap": 5}, "overlap is 5.* at most half")],
)
def test_tiles_that_cannot_be_are_refused(given: dict[str, int], said: str):
    with pytest.raises(ValueError, match=said):
        check_types(TileConfig(**given))
