"""The loss of an autoencoder: closed forms, masks to the bit, whose gradients reach whom."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.codec.causal_autoencoder import CausalAutoencoder, CausalAutoencoderConfig
from dit_jax.codec.reconstruction_loss import (
    Discriminator,
    DiscriminatorConfig,
    ReconstructionLoss,
    ReconstructionLossConfig,
)
from dit_jax.codec.vgg import VGG, PerceptualNetwork, VGGConfig
from dit_jax.config import check_types
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.training import (
    OptimizerConfig,
    abstract_state,
    init_frozen,
    init_state,
    make_optimizer,
    make_step,
)
from tests.codecs import noise, normal_params, random_params

CONFIG = CausalAutoencoderConfig(
    latent_channels=2, widths=(4, 4), strides=((2, 2),), layers=1, mid_attention=False
)
MODEL = CausalAutoencoder(CONFIG, CONFIG.computation())
JUDGED = ReconstructionLossConfig(
    l1=1.0,
    l2=0.5,
    kl=0.01,
    adversarial=0.5,
    adversarial_start=10,
    discriminator=DiscriminatorConfig(width=4, layers=1),
)
PLAIN = dataclasses.replace(JUDGED, adversarial=0.0)
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2])
VIDEO = noise(2, 5, 8, 8, 3)

CONSTANT = re.compile(r"\w+\[([\d,]*)\][^=\n]*constant\(")
"""The sizes of constants in optimized HLO."""


def params_of(config: ReconstructionLossConfig) -> Any:
    """Random parameters; the autoencoder's are the same for every loss."""
    params = {"autoencoder": random_params(CONFIG)["params"]}
    if config.adversarial:
        judge = Discriminator(config.discriminator)
        params |= {"discriminator": normal_params(judge, jnp.asarray(VIDEO), seed=1)["params"]}
    return {"params": params}


@functools.cache
def compiled(config: ReconstructionLossConfig) -> Any:
    loss = ReconstructionLoss(MODEL, config)

    def mean(params: Any, video: jax.Array, mask: jax.Array, step: jax.Array) -> Any:
        totals = loss(params, {}, video, mask, jax.random.key(0), step)
        return totals.loss / totals.weight, totals

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def run(
    config: ReconstructionLossConfig,
    video: np.ndarray = VIDEO,
    mask: np.ndarray = MASK,
    step: int = 20,
) -> tuple[float, dict[str, float], Any]:
    """The loss, its terms and the gradients."""
    given = params_of(config), jnp.asarray(video), jnp.asarray(mask), jnp.int32(step)
    (mean, totals), gradients = compiled(config)(*given)
    assert float(totals.weight) == len(video)
    parts = {name: float(part) / len(video) for name, part in totals.parts.items()}
    return float(mean), parts, gradients["params"]


def largest(tree: Any) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def assert_same(got: Any, expected: Any) -> None:
    """Up to the order of float32 sums."""
    scale = largest(expected)
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for a, b in leaves:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


# Closed forms.


def test_differences_are_means_over_the_frames_that_count():
    loss = ReconstructionLoss(MODEL, ReconstructionLossConfig(l1=2.0, l2=3.0))
    video = jnp.zeros((2, 5, 4, 4, 3))
    frames = jnp.array([[1, 1, 1, 1, 1], [2, 2, 4, 100, np.nan]], jnp.float32)
    back = jnp.broadcast_to(frames[:, :, None, None, None], video.shape)
    total, parts = loss._reconstruction(None, video, back, jnp.asarray(MASK))
    assert float(parts["l1"]) == pytest.approx((5 * 1 + 2 + 2 + 4) / 8)
    assert float(parts["l2"]) == pytest.approx((5 * 1 + 4 + 4 + 16) / 8)
    assert float(total) == pytest.approx(2 * 13 / 8 + 3 * 29 / 8)


def test_kl_is_that_of_gaussians_and_of_the_latents_that_count():
    loss = ReconstructionLoss(MODEL, ReconstructionLossConfig())
    shape = (2, 3, 4, 4, 2)
    zero = jnp.zeros(shape)
    assert float(loss._kl(zero, zero, jnp.asarray(MASK))) == 0
    mean = jnp.broadcast_to(jnp.array([1.0, -2.0]), shape)
    logvar = jnp.log(jnp.broadcast_to(jnp.array([4.0, 0.25]), shape))
    # KL(N(m, s²) || N(0, 1)) = (m² + s² - 1) / 2 - log s, summed over channels.
    one = (1 + 4 - 1) / 2 - np.log(2) + (4 + 0.25 - 1) / 2 + np.log(2)
    # The last latent of the second clip holds frames that do not count.
    mean = mean.at[1, 2].set(jnp.nan)
    assert float(loss._kl(mean, logvar, jnp.asarray(MASK))) == pytest.approx(one)


def test_the_total_is_the_terms_with_their_weights():
    total, parts, _ = run(JUDGED)
    assert set(parts) == {"l1", "l2", "kl", "adaptive", "generator", "discriminator"}
    expected = parts["l1"] + 0.5 * parts["l2"] + 0.01 * parts["kl"] + parts["discriminator"]
    expected += 0.5 * parts["adaptive"] * parts["generator"]
    assert total == pytest.approx(expected, rel=1e-5)


# Masks.


def test_frames_that_do_not_count_change_nothing():
    """Neither the loss nor its terms nor any gradient, the discriminator's among them."""
    other = VIDEO.copy()
    other[1, 3:] = noise(2, 8, 8, 3, seed=5)
    first, second = run(JUDGED), run(JUDGED, other)
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert first[1] == pytest.approx(second[1], rel=1e-5)
    assert_same(second[2], first[2])
    everything = run(JUDGED, other, np.ones_like(MASK))
    assert everything[0] != pytest.approx(first[0], rel=1e-4)


# Who learns from what.


def test_the_autoencoder_learns_nothing_from_the_discriminators_own_loss():
    """Before the discriminator counts, its gradients are those of a loss without it."""
    _, _, before = run(JUDGED, step=9)
    _, _, without = run(PLAIN, step=9)
    assert set(without) == {"autoencoder"}
    assert_same(before["autoencoder"], without["autoencoder"])
    _, _, after = run(JUDGED, step=10)
    changed = jax.tree.map(jnp.subtract, after["autoencoder"], without["autoencoder"])
    assert largest(changed) > 1e-3 * largest(without["autoencoder"])


def test_the_discriminator_learns_nothing_from_the_autoencoders_loss():
    """It learns from the start, and the same whatever weight the others have."""
    _, parts, before = run(JUDGED, step=0)
    _, _, after = run(JUDGED, step=20)
    assert largest(before["discriminator"]) > 0
    assert_same(after["discriminator"], before["discriminator"])

    def own(weights: Any) -> jax.Array:
        """The hinge loss by itself, of what the autoencoder makes."""
        apply = Discriminator(JUDGED.discriminator).apply
        params = params_of(JUDGED)["params"]["autoencoder"]
        encoded: Any = MODEL.apply({"params": params}, jnp.asarray(VIDEO), method="encode")
        drawn = encoded[0] + jnp.exp(encoded[1] / 2) * jax.random.normal(
            jax.random.key(0), encoded[0].shape
        )
        back: Any = MODEL.apply({"params": params}, drawn, method="decode")
        real, fake = (apply({"params": weights}, x) for x in (jnp.asarray(VIDEO), back))
        hinge = jax.nn.relu(1 - jnp.asarray(real)) + jax.nn.relu(1 + jnp.asarray(fake))
        counts = jnp.asarray(MASK)[:, :, None, None]
        return (hinge * counts).sum() / (counts.sum() * 16) / 2

    given = params_of(JUDGED)["params"]["discriminator"]
    value, gradients = jax.jit(jax.value_and_grad(own))(given)
    assert float(value) == pytest.approx(parts["discriminator"], rel=1e-5)
    assert_same(before["discriminator"], gradients)


def test_the_adaptive_weight_is_the_ratio_of_the_last_layers_gradients():
    """Against the gradients of each loss alone through the whole model."""
    _, parts, _ = run(JUDGED)
    # The KL is of the encoder alone.
    ours = run(PLAIN, step=9)[2]["autoencoder"]["decoder"]["conv_out"]
    given = params_of(JUDGED)["params"]

    def judged(weights: Any) -> jax.Array:
        decoder = given["autoencoder"]["decoder"] | {"conv_out": weights}
        variables = {"params": given["autoencoder"] | {"decoder": decoder}}
        encoded: Any = MODEL.apply(variables, jnp.asarray(VIDEO), method="encode")
        drawn = encoded[0] + jnp.exp(encoded[1] / 2) * jax.random.normal(
            jax.random.key(0), encoded[0].shape
        )
        back: Any = MODEL.apply(variables, drawn, method="decode")
        of_patches = {"params": given["discriminator"]}
        logits: Any = Discriminator(JUDGED.discriminator).apply(of_patches, back)
        counts = jnp.asarray(MASK)[:, :, None, None]
        return -(logits * counts).sum() / (counts.sum() * 16)

    theirs = jax.jit(jax.grad(judged))(given["autoencoder"]["decoder"]["conv_out"])

    def norm(tree: Any) -> float:
        return float(np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(tree))))

    assert parts["adaptive"] == pytest.approx(norm(ours) / (norm(theirs) + 1e-6), rel=1e-4)
    bounded = ReconstructionLoss(MODEL, dataclasses.replace(JUDGED, adversarial_bound=0.125))

    def adaptive(params: Any) -> jax.Array:
        video, mask = jnp.asarray(VIDEO), jnp.asarray(MASK)
        return bounded(params, {}, video, mask, jax.random.key(0), 20).parts["adaptive"]

    assert float(jax.jit(adaptive)(params_of(JUDGED))) == 0.125 * len(VIDEO)


# Refusals.


@pytest.mark.parametrize(
    "given, said",
    [
        ({"l1": -1.0}, "l1 is -1.0"),
        ({"l1": 0.0}, "l1 is 0.0"),
        ({"perceptual": 0.1}, "vgg is None"),
        ({"adversarial_start": -1}, "adversarial_start is -1"),
    ],
)
def test_weights_that_cannot_be_are_refused(given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        check_types(ReconstructionLossConfig(**given))


def test_the_networks_weights_are_arguments_of_the_compiled_step():
    """Constants would be in the program, in every checkpoint of the compiler, and on every device."""
    vgg = VGGConfig(widths=(32, 64), layers=(1, 2))
    params = VGG(vgg).init(jax.random.key(3), jnp.zeros((1, 8, 8, 3)))
    weights = (jnp.ones(32), jnp.ones(64))
    network = PerceptualNetwork(nn.unbox(params), weights, vgg)
    loss = ReconstructionLoss(MODEL, ReconstructionLossConfig(perceptual=1, vgg="x"), network)
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    settings = OptimizerConfig()
    optimizer = make_optimizer(settings, 2)
    shapes, shardings = abstract_state(loss.init, optimizer, mesh, loss.trainable)
    assert set(shapes.params["params"]) == {"autoencoder"}
    key = jax.random.key(0)
    frozen = init_frozen(loss.init, mesh, key, loss.trainable, loss.load_frozen)
    kernel = frozen["params"]["vgg"]["block_1_conv_1"]["kernel"]
    np.testing.assert_array_equal(kernel, network.params["params"]["block_1_conv_1"]["kernel"])
    assert not kernel.sharding.is_fully_replicated

    def of_batch(params: Any, frozen: Any, batch: Any, key: Any, step: Any) -> Any:
        totals = loss(params, frozen, *batch, key, step)
        return totals.loss, totals

    state = init_state(loss.init, optimizer, shardings, key, loss.trainable)
    batch = jax.device_put((VIDEO, MASK), NamedSharding(mesh, PartitionSpec()))
    step = make_step(of_batch, optimizer, settings, 0, shardings)
    compiled = step.lower(state, batch, frozen).compile()
    sizes = CONSTANT.findall(compiled.as_text())
    assert sizes and max(math.prod(int(n) for n in one.split(",") if n) for one in sizes) < 1000
    copy = jax.tree.map(jnp.copy, state)
    losses = [
        float(compiled(copied, batch, one)[1]["perceptual"])
        for copied, one in ((state, frozen), (copy, jax.tree.map(lambda x: 2 * x, frozen)))
    ]
    assert losses[0] != losses[1]
