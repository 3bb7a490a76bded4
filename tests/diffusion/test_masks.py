"""Conditioning masks: every one that training samples leaves something to generate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import check_types
from dit_jax.diffusion import MaskConfig
from dit_jax.diffusion.masks import MASKS, conditioning_mask, sample_mask

FRAMES = (1, 2, 4, 5, 9)
MOST = max(FRAMES)
NAMES = list(MASKS)
EQUAL = MaskConfig.only(**dict.fromkeys(MASKS, 1.0), noisy=0.4, max_noise=0.2)


@functools.partial(jax.jit, static_argnums=0)
def draw(config, keys, frames, chance):
    """Samples and masks ``[..., most frames]`` of clips of ``frames``."""
    frame_ids = jnp.broadcast_to(jnp.arange(chance.shape[-1], dtype=jnp.int32), chance.shape)
    sample = jax.vmap(lambda key, n: sample_mask(config, key, n))(keys, frames)
    by_frame = jax.tree.map(lambda x: x[:, None].repeat(chance.shape[-1], 1), sample)
    return sample, conditioning_mask(config, by_frame, frame_ids, chance)


@pytest.fixture(scope="module")
def samples_of():
    """``samples_of(name, frames)``: some 2000 samples of a mask for clips of so many frames, and its
    conditioning frames ``[2000, frames]``."""
    lengths = np.repeat(np.array(FRAMES, np.int32), 2000 * len(MASKS))
    chance = np.random.default_rng(5).random((len(lengths), MOST), np.float32)
    keys = jax.random.split(jax.random.key(0), len(lengths))
    sample, masks = jax.tree.map(np.asarray, draw(EQUAL, keys, lengths, chance))

    def select(name, frames):
        which = (sample.mask == NAMES.index(name)) & (lengths == frames)
        return jax.tree.map(lambda x: x[which], sample), masks[which, :frames]

    return select


def within(count: float, expected: float, total: int) -> bool:
    """Whether a count is within 4.5 standard deviations of a binomial's mean (1 in 10^5)."""
    p = expected / total
    return abs(count - expected) <= 4.5 * (total * p * (1 - p)) ** 0.5


def test_samples_are_those_of_the_first_edition():
    """Training resumes bit for bit: the same key gives the same mask and cap."""
    keys = jax.random.split(jax.random.key(0), 24)
    chance = jax.vmap(lambda key: jax.random.uniform(key, (7,)))(keys)
    config = MaskConfig.only(**dict.fromkeys(MASKS, 1.0))
    sample, masks = draw(config, keys, jnp.full(24, 7, jnp.int32), chance)
    shown = " ".join("".join("#" if f else "." for f in mask) for mask in masks)
    assert shown == (
        "....### ##.###. #.#.#.# #...#.. ....... ....... #...... #...#.. ....... ##....# ...#... "
        "#...... #.#.#.# ...#### .###### .....## ####..# #...... #...### ....##. ....... #...### "
        "#..#### #......"
    )
    caps = [0] * 4 + [61188, 0, 86069, 0, 88056, 93364, 0, 0, 0, 58602, 48082, 81993, 0, 50211]
    caps += [96405, 63097, 24342, 11325, 92125, 0]
    assert np.round(np.asarray(sample.cap) * 1e6).astype(int).tolist() == caps


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_conditions_as_it_says(samples_of, name):
    for frames in FRAMES:
        sample, masks = samples_of(name, frames)
        count = masks.sum(1)
        if name == "none" or frames == 1 or (name == "ends" and frames == 2):
            assert not masks.any()
            continue
        assert (count >= 1).all() and (count < frames).all(), frames
        edges = (np.diff(masks.astype(int), axis=1) != 0).sum(1)
        if name == "first":
            assert masks[:, 0].all() and (count == 1).all()
        elif name in ("head", "window"):
            assert masks[:, 0].all() and (edges == 1).all()
        elif name == "tail":
            assert masks[:, -1].all() and (edges == 1).all()
        elif name == "ends":
            assert masks[:, 0].all() and masks[:, -1].all() and (edges == 2).all()
        elif name == "every":
            for stride in (2, 3, 4):
                mine = sample.stride == stride
                assert (masks[mine] == (np.arange(frames) % stride == 0)).all()
                assert within(mine.sum(), len(mine) / 3, len(mine))


@pytest.mark.parametrize("name", ["head", "tail", "window", "keyframes"])
def test_any_number_of_frames_is_as_likely(samples_of, name):
    count = samples_of(name, 9)[1].sum(1)
    for number in range(1, 9):
        assert within((count == number).sum(), len(count) / 8, len(count))


def test_masks_are_chosen_by_their_relative_weights():
    weights = dict(none=0.3, first=0.2, head=0.1, tail=0.1, ends=0.1, every=0.1)
    weights |= dict(keyframes=0.05, window=0.05)
    keys, frames = jax.random.split(jax.random.key(0), 4000), jnp.int32(9)

    def masks(factor):
        config = MaskConfig.only(**{name: factor * weight for name, weight in weights.items()})
        return np.asarray(
            jax.jit(jax.vmap(lambda key: sample_mask(config, key, frames).mask))(keys)
        )

    mask = masks(1)
    for name, weight in weights.items():
        assert within((mask == NAMES.index(name)).sum(), weight * 4000, 4000), name
    assert np.array_equal(masks(2), mask)


@pytest.mark.parametrize(("name", "probability"), [("first", 0.4), ("window", 1.0)])
def test_caps_are_uniform_or_zero(samples_of, name, probability):
    caps = samples_of(name, 9)[0].cap
    assert (caps >= 0).all() and (caps < 0.2).all()
    noisy = caps[caps > 0]
    assert probability == 1 or within(len(noisy), probability * len(caps), len(caps))
    assert probability < 1 or len(noisy) > 0.99 * len(caps)
    counts = np.histogram(noisy, 4, (0, 0.2))[0]
    assert all(within(count, len(noisy) / 4, len(noisy)) for count in counts)


def test_weights_out_of_range_are_refused():
    for fields, message in (
        ({"head": -0.1}, "head is -0.1"),
        (dict.fromkeys(MASKS, 0.0), "weights"),
    ):
        with pytest.raises(ValueError, match=f"masks.{message}"):
            check_types(MaskConfig(**fields), "masks")
