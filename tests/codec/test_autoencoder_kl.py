"""The image autoencoder's counts, tiles and the codec around it, without other frameworks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.codec.causal_autoencoder import CausalAutoencoder, param_shapes
from dit_jax.codec.codec import ImageCodec, TileConfig, ramp, tile_starts, tiled
from tests.codecs import image_config, random_params, tiny_images

SMALL = tiny_images(4, 4, 8, 8)


@pytest.fixture(scope="module")
def codec():
    return ImageCodec("small", "0", SMALL, random_params(SMALL), TileConfig(size=4, overlap=2))


def test_stable_diffusions_autoencoder_has_its_parameters():
    shapes = param_shapes(image_config())
    # The count of sd-vae-ft-ema, both halves.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_a_clip_is_its_frames(codec):
    clip = np.random.default_rng(0).uniform(-1, 1, (3, 16, 24, 3)).astype(np.float32)
    latents = codec.encode(clip)
    assert latents.shape == (3, 2, 3, 4) and codec.strides == (1, 8, 8) and codec.channels == 4
    for i in range(3):
        one = codec.encode(clip[i : i + 1])
        np.testing.assert_allclose(latents[i : i + 1], one, atol=1e-5)  # batches sum otherwise
    assert codec.decode(latents).shape == clip.shape


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="multiples of the 32 groups"):
        image_config(block_out_channels=[128, 100])
    with pytest.raises(ValueError, match="scale is .0"):
        image_config(scaling_factor=0)
    with pytest.raises(ValueError, match="norm_groups is 2"):
        dataclasses.replace(SMALL, strides=((2, 2),) * 3)


@pytest.mark.parametrize(
    "size, tile, overlap", [(100, 32, 8), (64, 32, 16), (65, 64, 16), (5, 8, 4)]
)
def test_tiles_cover_a_side_and_their_weights_sum_to_one(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    total = np.zeros(size)
    covered = np.zeros(size)
    for i, start in enumerate(starts):
        weights = ramp(starts, i, min(tile, size), 1)
        total[start : start + len(weights)] += weights
        covered[start : start + len(weights)] += 1
    assert starts[0] == 0 and starts[-1] == max(size - tile, 0)
    assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))
    assert (total[covered <= 2] == pytest.approx(1)) and (total > 0).all()


@pytest.mark.parametrize("unit, scale", [(1, 8), (8, 1 / 8), (1, 1)])
def test_a_local_function_is_the_same_in_tiles(unit, scale):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 10 * unit, 23 * unit, 3)).astype(np.float32)
    sizes = set()

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
    found = tiled(lambda x: np.full_like(x, next(values)), image, 16, 4)
    row = found[0, 0, :, 0]
    np.testing.assert_allclose(row[:12], 0)
    np.testing.assert_allclose(row[12:16], [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(row[16:], 1)


def test_tiles_bound_the_memory(codec):
    """What the compiler needs beside inputs and parameters does not grow with the image."""

    def needed(side):
        model = CausalAutoencoder(SMALL, SMALL.computation())
        decode = jax.jit(lambda p, z: model.apply(p, z, method="decode"))
        compiled = decode.lower(codec.params, jnp.zeros((1, 1, side, side, 4))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tile, whole = needed(16), needed(64)
    print(f"temporary memory: {tile / 2**20:.1f} MiB a tile of 16, {whole / 2**20:.1f} whole of 64")
    assert whole > 10 * tile
    cut = ImageCodec("cut", "0", SMALL, codec.params, TileConfig(16, 4))
    assert cut.decode(np.zeros((1, 40, 40, 4), np.float32)).shape == (1, 320, 320, 3)
