"""The discriminator's sizes, what its logits see, masks to the bit, and the losses in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.codec.reconstruction_loss import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    last_layer_gradients,
    masked_mean,
)
from dit_jax.config import check_types
from tests.codecs import normal_params

SMALL = DiscriminatorConfig(width=4, layers=2)
SLOW = DiscriminatorConfig(width=4, layers=2, time_layers=1)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def made(config):
    model = Discriminator(config)
    return normal_params(model, jnp.zeros((1, 1, 4, 4, 3))), jax.jit(model.apply)


@pytest.fixture(scope="module")
def small():
    return made(SMALL)


@pytest.fixture(scope="module")
def slow():
    return made(SLOW)


def test_sizes_and_axes_are_patchgans():
    config = DiscriminatorConfig(time_kernel=1)
    init = Discriminator(config).init
    boxed = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))["params"]
    kernels = {
        name: layer["kernel"].value.shape for name, layer in boxed.items() if "kernel" in layer
    }
    assert kernels == {
        "conv_0": (1, 4, 4, 3, 64),
        "conv_1": (1, 4, 4, 64, 128),
        "conv_2": (1, 4, 4, 128, 256),
        "conv_3": (1, 4, 4, 256, 512),
        "logits": (1, 4, 4, 512, 1),
    }
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 5), (2, 8, 3), (5, 9, 16)])
def test_any_size_has_logits(size):
    t, h, w = size
    for config, moments in ((SMALL, t), (SLOW, -(-t // 2))):
        clips = jnp.zeros((2, *size, 3))
        logits, _ = jax.eval_shape(Discriminator(config).init_with_output, jax.random.key(0), clips)
        assert logits.shape == (2, moments, -(-h // 4), -(-w // 4))
        assert config.logit_mask(jnp.ones((2, t), bool)).shape == (2, moments)


def test_an_image_is_a_still_clip(small):
    params, logits = small
    image = noise(2, 1, 9, 8, 3)
    still = logits(params, jnp.repeat(image, 4, 1))
    np.testing.assert_allclose(still, np.repeat(logits(params, image), 4, 1), atol=1e-5)
    assert float(np.std(still)) > 0.01


@pytest.mark.parametrize("valid", [1, 2, 3, 4])
def test_padding_reaches_no_logit_that_counts(slow, valid):
    params, logits = slow
    clip = noise(1, 5, 8, 8, 3)
    padded = clip.at[:, valid:].set(7.0)
    counts = np.asarray(SLOW.logit_mask(jnp.arange(5)[None] < valid))[0]
    assert counts.tolist() == [2 * i < valid for i in range(3)]
    before, after = (np.asarray(logits(params, x))[0] for x in (clip, padded))
    np.testing.assert_array_equal(after[counts], before[counts])
    assert np.abs(after[~counts] - before[~counts]).min(initial=1) > 0


def test_every_frame_of_a_whole_clip_is_seen(slow):
    params, logits = slow
    gradient = jax.grad(lambda clip: logits(params, clip).sum())(noise(1, 5, 8, 8, 3))
    assert (np.abs(gradient).sum((0, 2, 3, 4)) > 0).all()


def test_neighbours_do_not_matter(small):
    params, logits = small
    clips = noise(3, 2, 8, 8, 3)
    alone = np.concatenate([logits(params, clip[None]) for clip in clips])
    np.testing.assert_allclose(logits(params, clips), alone, atol=1e-5)


def test_padding_changes_no_loss_and_no_gradient(slow):
    params, logits = slow
    mask = SLOW.logit_mask(jnp.array([[True] * 5, [True] + [False] * 4]))
    real, fake = noise(2, 5, 8, 8, 3), noise(2, 5, 8, 8, 3, seed=1)

    def losses(params, real, fake):
        seen = logits(params, real), logits(params, fake)
        return hinge_discriminator_loss(*seen, mask) + 2 * hinge_generator_loss(seen[1], mask)

    run = jax.jit(jax.value_and_grad(losses, argnums=(0, 2)))
    value, (of_params, of_fake) = run(params, real, fake)
    for leaf in jax.tree.leaves(of_params):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    assert np.abs(of_fake[0]).min() > 0 and np.abs(of_fake[1, :1]).max() > 0
    np.testing.assert_array_equal(of_fake[1, 1:], 0)
    others = (clips.at[1, 1:].set(9.0) for clips in (real, fake))
    again, (params_again, fake_again) = run(params, *others)
    assert again == value
    jax.tree.map(np.testing.assert_array_equal, (of_params, of_fake), (params_again, fake_again))


def test_the_losses_are_what_they_say():
    real = jnp.array([2.0, 0.5, -1.0, 0.0]).reshape(1, 1, 2, 2)
    fake = jnp.array([-3.0, 0.5, 0.0, -0.25]).reshape(1, 1, 2, 2)
    mask = jnp.ones((1, 1), bool)
    found = hinge_discriminator_loss(real, fake, mask)
    np.testing.assert_allclose(found, (0 + 0.5 + 2 + 1 + 0 + 1.5 + 1 + 0.75) / 8, rtol=1e-6)
    np.testing.assert_allclose(hinge_generator_loss(fake, mask), 2.75 / 4, rtol=1e-6)


def test_a_masked_mean_is_of_what_counts():
    values = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.array([[True, False, False], [True, True, False]])
    np.testing.assert_allclose(masked_mean(values, mask), (0 + 1 + 6 + 7 + 8 + 9) / 6)
    assert masked_mean(values, jnp.zeros((2, 3), bool)) == 0
    broken = jnp.where(mask[..., None], values, np.nan)
    value, gradient = jax.value_and_grad(masked_mean)(broken, mask)
    np.testing.assert_allclose(value, 31 / 6, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., 0], mask / 6, rtol=1e-6)


def test_the_adaptive_weight_makes_both_gradients_alike():
    reconstruction = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0])}
    adversarial = {"kernel": jnp.array([[0.0, 0.1]]), "bias": jnp.array([0.0])}
    np.testing.assert_allclose(adaptive_weight(reconstruction, adversarial), 50, rtol=1e-4)
    assert adaptive_weight(reconstruction, adversarial, bound=7.0) == 7
    nothing = jax.tree.map(jnp.zeros_like, adversarial)
    assert adaptive_weight(reconstruction, nothing) == 1e4
    assert adaptive_weight(nothing, nothing) == 0
    through = jax.grad(lambda x: adaptive_weight({"a": x}, adversarial))(jnp.ones(2))
    np.testing.assert_array_equal(through, 0)


def test_gradients_of_the_last_layer_are_those_of_the_losses():
    features, target = noise(1, 2, 3, 3, 4), noise(1, 2, 3, 3, 3, seed=1)
    params = {"kernel": noise(4, 3, seed=2), "bias": noise(3, seed=3)}

    def last_layer(params):
        return features @ params["kernel"] + params["bias"]

    losses = (lambda clips: jnp.abs(clips - target).mean(), lambda clips: jnp.sin(clips).mean())
    found = last_layer_gradients(losses, last_layer, params)
    for gradient, loss in zip(found, losses, strict=True):
        wanted = jax.grad(lambda params, loss=loss: loss(last_layer(params)))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), gradient, wanted)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"width": 0}, "width is 0"),
        ({"time_layers": 4}, "time_layers is 4"),
        ({"time_layers": 1, "time_kernel": 1}, "time_kernel is 1"),
    ],
)
def test_bad_configs_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        check_types(DiscriminatorConfig(**given))


def test_bfloat16_is_near(slow):
    params, logits = slow
    clip = noise(2, 3, 8, 8, 3)
    coarse = Discriminator(SLOW, jnp.bfloat16).apply(params, clip)
    fine = np.asarray(logits(params, clip))
    assert coarse.dtype == jnp.float32
    np.testing.assert_allclose(
        coarse, fine, atol=0.05 * np.abs(fine).max()
    )  # eight bits, four layers
