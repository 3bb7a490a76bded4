"""The loss of an autoencoder: closed forms, the discriminator, masks, whose gradients reach whom."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.codec.causal_autoencoder import CausalAutoencoder, CausalAutoencoderConfig
from dit_jax.codec.reconstruction_loss import (
    Discriminator,
    DiscriminatorConfig,
    ReconstructionLoss,
    ReconstructionLossConfig,
    adaptive_weight,
    masked_mean,
)
from dit_jax.codec.vgg import VGG, PerceptualNetwork, VGGConfig
from dit_jax.config import check_types
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.training import init_frozen
from tests.codecs import noise, normal_params, random_params

CONFIG = CausalAutoencoderConfig(
    latent_channels=2, widths=(4, 4), strides=((2, 2),), layers=1, mid_attention=False
)
MODEL = CausalAutoencoder(CONFIG, CONFIG.computation())
JUDGE = DiscriminatorConfig(width=4, layers=1, time_layers=1)
JUDGED = ReconstructionLossConfig(
    l1=1.0,
    l2=0.5,
    kl=0.01,
    adversarial=0.5,
    adversarial_start=10,
    adversarial_bound=1.0,
    discriminator=JUDGE,
)
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2])
VIDEO = noise(2, 5, 8, 8, 3)


# The discriminator.

FLAT = DiscriminatorConfig(width=4, layers=2)
SLOW = DiscriminatorConfig(width=4, layers=2, time_layers=1)


@functools.cache
def judge(config: DiscriminatorConfig, dtype: Any = jnp.float32) -> Any:
    """The logits of clips, of the same random parameters for every dtype."""
    model = Discriminator(config, dtype)
    params = normal_params(model, jnp.zeros((1, 1, 4, 4, 3)))
    return functools.partial(jax.jit(model.apply), params)


def test_sizes_and_axes_are_patchgans():
    init = Discriminator(DiscriminatorConfig(time_kernel=1)).init
    boxed = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))["params"]
    kernels = {name: one["kernel"].value.shape for name, one in boxed.items() if "kernel" in one}
    assert kernels == {
        "conv_0": (1, 4, 4, 3, 64),
        "conv_1": (1, 4, 4, 64, 128),
        "conv_2": (1, 4, 4, 128, 256),
        "conv_3": (1, 4, 4, 256, 512),
        "logits": (1, 4, 4, 512, 1),
    }
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)


@pytest.mark.parametrize("config, moments", [(FLAT, 4), (SLOW, 2)])
def test_any_size_has_logits(config: DiscriminatorConfig, moments: int):
    clips = jnp.zeros((2, 4, 9, 5, 3))
    logits, _ = jax.eval_shape(Discriminator(config).init_with_output, jax.random.key(0), clips)
    assert logits.shape == (2, moments, 3, 2)
    assert config.logit_mask(jnp.ones((2, 4), bool)).shape == (2, moments)


def test_an_image_is_a_still_clip_and_neighbours_do_not_matter():
    images = noise(2, 1, 9, 8, 3)
    of_image = judge(FLAT)(images)[:1]
    still = judge(FLAT)(np.repeat(images[:1], 4, 1))
    np.testing.assert_allclose(still, np.repeat(of_image, 4, 1), atol=1e-5)
    assert float(np.std(still)) > 0.01


def test_a_frame_reaches_its_own_logit_and_later_ones_alone():
    """So padding after a clip reaches none that counts, and every frame of a whole clip is seen."""
    clips = np.repeat(noise(1, 5, 8, 8, 3), 6, 0)
    clips[np.arange(5), np.arange(5)] = 7.0
    logits = np.asarray(judge(SLOW)(clips))
    reached = (logits[:5] != logits[5]).any((2, 3))
    assert reached.tolist() == [[2 * i >= frame for i in range(3)] for frame in range(5)]
    counts = SLOW.logit_mask(jnp.arange(5) < jnp.arange(6)[:, None])
    assert counts.tolist() == [[2 * i < valid for i in range(3)] for valid in range(6)]


def test_bfloat16_is_near():
    clip = noise(2, 3, 8, 8, 3)
    fine, coarse = judge(SLOW)(clip), judge(SLOW, jnp.bfloat16)(clip)
    assert coarse.dtype == jnp.float32
    # Eight bits, four layers.
    np.testing.assert_allclose(coarse, fine, atol=0.05 * np.abs(fine).max())


# Closed forms.


def test_a_masked_mean_is_of_what_counts():
    values = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.array([[True, False, False], [True, True, False]])
    assert masked_mean(values, jnp.zeros((2, 3), bool)) == 0
    broken = jnp.where(mask[..., None], values, np.nan)
    value, gradient = jax.value_and_grad(masked_mean)(broken, mask)
    np.testing.assert_allclose(value, (0 + 1 + 6 + 7 + 8 + 9) / 6, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., 0], mask / 6, rtol=1e-6)


def test_the_adaptive_weight_makes_both_gradients_alike():
    reconstruction = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0])}
    adversarial = {"kernel": jnp.array([[0.0, 0.1]]), "bias": jnp.array([0.0])}
    np.testing.assert_allclose(adaptive_weight(reconstruction, adversarial), 50, rtol=1e-4)
    nothing = jax.tree.map(jnp.zeros_like, adversarial)
    assert adaptive_weight(reconstruction, nothing) == 1e4
    assert adaptive_weight(nothing, nothing) == 0
    through = jax.grad(lambda x: adaptive_weight({"a": x}, adversarial))(jnp.ones(2))
    np.testing.assert_array_equal(through, 0)


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
    loss, shape = ReconstructionLoss(MODEL, ReconstructionLossConfig()), (2, 3, 4, 4, 2)
    zero = jnp.zeros(shape)
    assert float(loss._kl(zero, zero, jnp.asarray(MASK))) == 0
    mean = jnp.broadcast_to(jnp.array([1.0, -2.0]), shape)
    logvar = jnp.log(jnp.broadcast_to(jnp.array([4.0, 0.25]), shape))
    # KL(N(m, s²) || N(0, 1)) = (m² + s² - 1) / 2 - log s, summed over channels.
    one = (1 + 4 - 1) / 2 - np.log(2) + (4 + 0.25 - 1) / 2 + np.log(2)
    # The last latent of the second clip holds frames that do not count.
    mean = mean.at[1, 2].set(jnp.nan)
    assert float(loss._kl(mean, logvar, jnp.asarray(MASK))) == pytest.approx(one)


# The total, of one compiled function.


@functools.cache
def params_of(weak: bool = False) -> Any:
    """Random parameters; those of a weak discriminator are a tenth."""
    judging = normal_params(Discriminator(JUDGE), jnp.asarray(VIDEO), seed=1)["params"]
    judging = jax.tree.map(lambda x: 0.1 * x if weak else x, judging)
    return {"params": {"autoencoder": random_params(CONFIG)["params"], "discriminator": judging}}


@functools.cache
def compiled() -> Any:
    loss = ReconstructionLoss(MODEL, JUDGED)

    def mean(params: Any, video: Any, mask: Any, step: Any) -> Any:
        totals = loss(params, {}, video, mask, jax.random.key(0), step)
        return totals.loss / totals.weight, totals

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def run(
    video: np.ndarray = VIDEO,
    mask: np.ndarray = MASK,
    step: int = 20,
    weak: bool = False,
) -> tuple[float, dict[str, float], Any]:
    """The loss, its terms and the gradients."""
    (mean, totals), gradients = compiled()(params_of(weak), video, mask, step)
    assert float(totals.weight) == len(video)
    parts = {name: float(part) / len(video) for name, part in totals.parts.items()}
    return float(mean), parts, gradients["params"]


def largest(tree: Any) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(tree))))


def assert_same(found: Any, expected: Any) -> None:
    """Up to the order of float32 sums."""
    scale = largest(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


def test_the_total_is_the_terms_with_their_weights():
    total, parts, _ = run()
    assert set(parts) == {"l1", "l2", "kl", "adaptive", "generator", "discriminator"}
    expected = parts["l1"] + 0.5 * parts["l2"] + 0.01 * parts["kl"] + parts["discriminator"]
    expected += 0.5 * parts["adaptive"] * parts["generator"]
    assert total == pytest.approx(expected, rel=1e-5)


def test_frames_that_do_not_count_change_nothing():
    """Neither the loss nor its terms nor any gradient, the discriminator's among them."""
    other = VIDEO.copy()
    other[1, 3:] = noise(2, 8, 8, 3, seed=5)
    first, second = run(), run(other)
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert first[1] == pytest.approx(second[1], rel=1e-5)
    assert_same(second[2], first[2])
    everything = run(other, np.ones_like(MASK))
    assert everything[0] != pytest.approx(first[0], rel=1e-4)


def test_the_autoencoder_learns_nothing_from_the_discriminators_own_loss():
    """Before the discriminator counts, the gradients are the same whichever it is."""
    before, without = (run(step=9, weak=weak)[2]["autoencoder"] for weak in (False, True))
    assert_same(before, without)
    changed = jax.tree.map(jnp.subtract, run(step=10)[2]["autoencoder"], before)
    assert largest(changed) > 1e-3 * largest(before)


def test_the_discriminator_learns_from_its_own_loss_alone():
    """From the start, and the same whatever weight the others have."""
    _, parts, before = run(step=0)
    assert_same(run()[2]["discriminator"], before["discriminator"])

    @jax.jit
    def reconstruct(params: Any) -> Any:
        mean, logvar = MODEL.apply(params, VIDEO, method="encode")
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(jax.random.key(0), mean.shape)
        return MODEL.apply(params, z, method="decode")

    params = params_of()["params"]
    back, counts = reconstruct({"params": params["autoencoder"]}), MASK[:, ::2, None, None]

    def own(weights: Any) -> Any:
        real, fake = (Discriminator(JUDGE).apply({"params": weights}, x) for x in (VIDEO, back))
        hinge: Any = jax.nn.relu(1 - jnp.asarray(real)) + jax.nn.relu(1 + jnp.asarray(fake))
        mean = lambda x: (x * counts).sum() / (counts.sum() * 16)  # noqa: E731
        return mean(hinge) / 2, -mean(jnp.asarray(fake))

    (value, generator), gradients = jax.jit(jax.value_and_grad(own, has_aux=True))(
        params["discriminator"]
    )
    assert float(value) == pytest.approx(parts["discriminator"], rel=1e-5)
    assert float(generator) == pytest.approx(parts["generator"], rel=1e-5)
    assert_same(before["discriminator"], gradients)


def test_the_adaptive_weight_is_the_ratio_of_the_last_layers_gradients():
    """Of those through the whole model: what the discriminator adds there is half the rest."""
    for weak in (False, True):
        _, parts, gradients = run(weak=weak)
        before, after = (
            one["autoencoder"]["decoder"]["conv_out"]
            for one in (run(step=9, weak=weak)[2], gradients)
        )
        # The KL is of the encoder alone.
        share = norm(jax.tree.map(jnp.subtract, after, before)) / norm(before)
        if weak:
            assert parts["adaptive"] == JUDGED.adversarial_bound and share < 0.9 * 0.5
        else:
            assert parts["adaptive"] < JUDGED.adversarial_bound
            assert share == pytest.approx(JUDGED.adversarial, rel=1e-4)


# The features' network.


def test_the_networks_weights_are_arguments_of_the_compiled_step():
    """Constants would be in the program, in every checkpoint of the compiler, and on every device."""
    vgg = VGGConfig(widths=(32, 64), layers=(1, 2))
    params = normal_params(VGG(vgg), jnp.zeros((1, 8, 8, 3)))
    network = PerceptualNetwork(params, (jnp.ones(32), jnp.ones(64)), vgg)
    loss = ReconstructionLoss(MODEL, ReconstructionLossConfig(perceptual=1, vgg="x"), network)
    shapes = jax.eval_shape(loss.init, jax.random.key(0))["params"]
    trained = {name for name in shapes if loss.trainable(f"params/{name}/a")}
    assert (set(shapes), trained) == ({"autoencoder", "vgg", "lpips"}, {"autoencoder"})
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    key = jax.random.key(0)
    frozen = init_frozen(loss.init, mesh, key, loss.trainable, loss.load_frozen)
    kernel = frozen["params"]["vgg"]["block_1_conv_1"]["kernel"]
    np.testing.assert_array_equal(kernel, params["params"]["block_1_conv_1"]["kernel"])
    assert not kernel.sharding.is_fully_replicated

    @jax.jit
    def distance(params: Any, frozen: Any, video: Any) -> Any:
        return loss(params, frozen, video, MASK, key, 0).parts["perceptual"]

    given = {"params": {"autoencoder": params_of()["params"]["autoencoder"]}}
    text = distance.lower(given, frozen, VIDEO).as_text()
    # Arrays that are not all of one value.
    sizes = re.findall(r"stablehlo.constant dense<[\"\[].*> : tensor<([\dx]+)x\w+>", text)
    assert max(math.prod(map(int, size.split("x"))) for size in [*sizes, "1"]) < 1000
    others = jax.tree.map(lambda x: 2 * x, frozen)
    assert distance(given, frozen, VIDEO) != distance(given, others, VIDEO)


@pytest.mark.parametrize(
    "kind, given, said",
    [
        (ReconstructionLossConfig, {"l1": -1.0}, "l1 is -1.0"),
        (ReconstructionLossConfig, {"l1": 0.0}, "l1 is 0.0"),
        (ReconstructionLossConfig, {"perceptual": 0.1}, "vgg is None"),
        (ReconstructionLossConfig, {"adversarial_start": -1}, "adversarial_start is -1"),
        (DiscriminatorConfig, {"width": 0}, "width is 0"),
        (DiscriminatorConfig, {"time_layers": 4}, "time_layers is 4"),
        (DiscriminatorConfig, {"time_layers": 1, "time_kernel": 1}, "time_kernel is 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: Any, given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        check_types(kind(**given))
