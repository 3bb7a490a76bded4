"""The image autoencoder's counts, tiles and the codec around it, without other frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.codec.causal_autoencoder import CausalAutoencoder, param_shapes
from dit_jax.codec.codec import ImageCodec, TileConfig, ramp, tile_starts, tiled
from tests.codecs import image_config, noise, random_params, tiny_images

SMALL = tiny_images(4, 8)


@pytest.fixture(scope="module")
def codec():
    return ImageCodec("small", "0", SMALL, random_params(SMALL), TileConfig(size=16, overlap=4))


def test_stable_diffusions_autoencoder_has_its_parameters():
    config = image_config()
    # The count of sd-vae-ft-ema, both halves.
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config))) == 83_653_863
    assert config.stride == (1, 8, 8)


def test_a_clip_is_its_frames(codec):
    """Two frames of this size fit in a tile's area: a part of two, and one that is filled up."""
    clip = noise(3, 20, 24, 3)
    latents = codec.encode(clip)
    assert latents.shape == (3, 10, 12, 4) and codec.strides == (1, 2, 2) and codec.channels == 4
    for one, frame in zip(latents, clip, strict=True):
        np.testing.assert_allclose(one, codec.encode(frame[None])[0], atol=1e-5)
    assert codec.decode(latents).shape == clip.shape


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="multiples of the 32 groups"):
        image_config(block_out_channels=[128, 100])
    with pytest.raises(ValueError, match="scale is .0"):
        image_config(scaling_factor=0)


@pytest.mark.parametrize(
    "size, tile, overlap", [(100, 32, 8), (64, 32, 16), (65, 64, 16), (5, 8, 4)]
)
def test_tiles_cover_a_side_and_their_weights_sum_to_one(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    total, covered = np.zeros(size), np.zeros(size)
    for i, start in enumerate(starts):
        weights = ramp(starts, i, min(tile, size), 1)
        total[start : start + len(weights)] += weights
        covered[start : start + len(weights)] += 1
    assert starts[0] == 0 and starts[-1] == max(size - tile, 0)
    assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))
    assert (total[covered <= 2] == pytest.approx(1)) and (total > 0).all()


@pytest.mark.parametrize("unit, scale", [(1, 8), (8, 1 / 8), (1, 1)])
def test_a_local_function_is_the_same_in_tiles(unit, scale):
    images, sizes = noise(2, 10 * unit, 23 * unit, 3), set()

    def local(x):
        sizes.add(x.shape)
        if scale > 1:
            return 2 * x.repeat(scale, 1).repeat(scale, 2)
        return 2 * x[:, ::unit, ::unit]

    found = tiled(local, images, 8 * unit, 2 * unit, unit)
    np.testing.assert_allclose(found, local(images), rtol=1e-6)
    assert len(sizes - {images.shape}) == 1  # one compilation


def test_neighbours_fade_into_each_other():
    """Two tiles that disagree by a constant meet without a step larger than one of the ramp's."""
    values = iter([0.0, 1.0])
    image = np.zeros((1, 16, 28, 1), np.float32)
    row = tiled(lambda x: np.full_like(x, next(values)), image, 16, 4)[0, 0, :, 0]
    np.testing.assert_allclose(row[12:16], [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(row, [0] * 12 + [*row[12:16]] + [1] * 12)


def test_tiles_bound_the_memory(codec):
    """What the compiler needs beside inputs and parameters does not grow with the image."""

    config = tiny_images(4, 4, 8, 8)
    model = CausalAutoencoder(config, config.computation())
    decode = jax.jit(lambda params, z: model.apply(params, z, method="decode"))

    def needed(side):
        lowered = decode.lower(param_shapes(config), jnp.zeros((1, 1, side, side, 4)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert needed(64) > 10 * needed(16)
    assert codec.decode(np.zeros((1, 40, 40, 4), np.float32)).shape == (1, 80, 80, 3)
