"""What an autoencoder of video is trained with: reconstruction, KL, features, a discriminator.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (section G) for
images, here of clips. All terms are of one step: the gradients of the autoencoder's terms do not reach
the discriminator D, and its own do not reach the autoencoder. With the reconstruction x̂ of x, the hinge
losses (Lim & Ye 2017, "Geometric GAN") and the adaptive weight (Esser et al. 2021, "Taming transformers
for high-resolution image synthesis", equation 7) at the decoder's last layer W::

    L     = l1 |x̂ - x| + l2 (x̂ - x)^2 + perceptual d(x̂, x) + kl KL + adversarial λ L_G + L_D      (1)
    L_G   = - mean D(x̂)                                                                          (2)
    L_D   = mean(relu(1 - D(x)) + relu(1 + D(x̂))) / 2                                            (3)
    λ     = min(|∇_W reconstruction| / (|∇_W L_G| + 1e-6), bound)                                (4)

Axis letters: b clips, t h w frames and pixels, i j k moments, rows and columns of logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from dit_jax.codec.causal_autoencoder import CausalAutoencoder, Decoder
from dit_jax.codec.vgg import VGG, PerceptualNetwork, conv
from dit_jax.model.layers import RMSNorm
from dit_jax.types import NonNegativeFloat, NonNegativeInt, Params, PositiveInt, Totals, require

Clips = Float[Array, "b t h w c"]
Logits = Float[Array, "b i j k"]
Mask = Bool[Array, "b t"]

# ---------------------------------------------------------------------------------------------------
# The discriminator
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator; the defaults are those of the 70 x 70 PatchGAN, and 3 frames deep."""

    width: PositiveInt = 64
    """Channels of the first layer; doubled in each next one, up to 8 times."""
    layers: PositiveInt = 3
    """Convolutions that halve height and width; two follow that do not."""
    kernel: PositiveInt = 4
    """Rows and columns of a kernel."""
    time_kernel: PositiveInt = 3
    """Frames of a kernel; 1 judges every frame alone."""
    time_layers: NonNegativeInt = 0
    """The last so many of ``layers`` halve time too: there is a logit for every 2**time_layers-th
    frame, from the first on. No frame goes unseen if a clip has 1 + n · 2**time_layers of them."""

    def __post_init__(self) -> None:
        skips = self.time_layers and self.time_kernel < 2
        require(
            "discriminator.",
            self,
            ("time_layers", self.time_layers <= self.layers, f"at most the {self.layers} layers"),
            ("time_kernel", not skips, "2 or more with time_layers, or frames are skipped"),
        )

    def logit_mask(self, mask: Bool[Array, "b t"]) -> Bool[Array, "b i"]:
        """Which moments of the logits count, of the frames that do (the first ones of each clip): logit
        i looks at frames up to i · 2**time_layers."""
        return mask[:, :: 2**self.time_layers]


class Discriminator(nn.Module):
    """Clips in [-1, 1] to a logit for every patch, float32, above 0 for what looks real.

    Isola et al. 2017, "Image-to-image translation with conditional adversarial networks" (PatchGAN,
    appendix 6.1.2), with convolutions over time too, which are causal: before the first frame stands
    the first again, so that an image is judged as a still clip, and frames that pad a clip at its end
    reach no logit of a valid frame. The norms are of one place each: statistics of a batch or a clip
    would let neighbours, padding and later frames in. Products are in ``dtype``.
    """

    config: DiscriminatorConfig = DiscriminatorConfig()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, clips: Clips) -> Logits:
        config, x = self.config, clips
        for i in range(config.layers + 1):
            down = 2 if i < config.layers else 1
            in_time = down if i >= config.layers - config.time_layers else 1
            x = self._conv(x, config.width * min(2**i, 8), (in_time, down, down), f"conv_{i}")
            if i:
                x = RMSNorm("embed_vector", name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return self._conv(x, 1, (1, 1, 1), "logits")[..., 0].astype(jnp.float32)

    def _conv(self, x: jax.Array, features: int, strides: Any, name: str) -> jax.Array:
        """Zeros around the frame, as many as give ceil(size / stride); the first frame before it."""
        size = (self.config.time_kernel, self.config.kernel, self.config.kernel)
        x = jnp.pad(x, ((0, 0), (size[0] - 1, 0), (0, 0), (0, 0), (0, 0)), mode="edge")
        around = jax.lax.padtype_to_pads(x.shape[2:4], size[1:], strides[1:], "SAME")
        settings: Any = dict(padding=[(0, 0), *around], strides=strides, name=name)
        return conv(features, size, self.dtype, nn.initializers.normal(0.02), **settings)(x)


def masked_mean(values: Float[Array, "b t *s"], mask: Mask) -> Float[Array, ""]:
    """The mean over what the mask leaves; 0 if that is nothing. What is left out may be NaN."""
    wide = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    kept = jnp.where(wide, values.astype(jnp.float32), 0)
    return kept.sum() / jnp.maximum(mask.sum() * (values.size // max(mask.size, 1)), 1)


def hinge_discriminator_loss(real: Logits, fake: Logits, mask: Mask) -> Float[Array, ""]:
    """Equation (3)."""
    return masked_mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + fake), mask) / 2


def hinge_generator_loss(fake: Logits, mask: Mask) -> Float[Array, ""]:
    """Equation (2)."""
    return -masked_mean(fake, mask)


def adaptive_weight(
    reconstruction: Params, adversarial: Params, bound: float = 1e4
) -> Float[Array, ""]:
    """Equation (4) of the gradients of both losses; no gradient flows through the weight."""
    ratio = optax.tree.norm(reconstruction) / (optax.tree.norm(adversarial) + 1e-6)
    return jax.lax.stop_gradient(jnp.minimum(ratio, bound))


def last_layer_gradients(losses: Sequence[Any], last_layer: Any, params: Params) -> list[Params]:
    """The gradients of losses of a clip for the parameters of the layer that makes it, of features that
    ``last_layer`` closes over: each loss is differentiated down to the clip and no further."""
    clips, back = jax.vjp(last_layer, params)
    return [back(jax.grad(loss)(clips))[0] for loss in losses]


# ---------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReconstructionLossConfig:
    """Terms of the loss, each with its weight; pixels are in [-1, 1]."""

    paths: ClassVar[tuple[str, ...]] = ("vgg", "lpips")

    l1: NonNegativeFloat = 1.0
    l2: NonNegativeFloat = 0.0
    """Of squared differences: what PSNR measures."""
    kl: NonNegativeFloat = 1e-6
    """Of the divergence from a normal distribution, summed over a latent's channels and averaged over
    latents; for variational autoencoders."""
    perceptual: NonNegativeFloat = 0.0
    """Of the distance in VGG's features; needs ``vgg``."""
    vgg: str | None = None
    """torchvision's file of VGG-16 (vgg16-397923af.pth)."""
    lpips: str | None = None
    """The LPIPS package's linear weights for it (vgg.pth); without them features count alike."""
    adversarial: NonNegativeFloat = 0.0
    """Of the discriminator's judgement, beside the adaptive weight."""
    adversarial_start: NonNegativeInt = 0
    """The step from which the discriminator counts; it is trained from the start."""
    adversarial_bound: NonNegativeFloat = 1e4
    """Of the adaptive weight."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def __post_init__(self) -> None:
        file = "torchvision's file of VGG-16 (vgg16-397923af.pth) if loss.perceptual is above 0"
        require(
            "loss.",
            self,
            ("l1", self.l1 + self.l2 > 0, "above 0 if loss.l2 is 0"),
            ("vgg", not self.perceptual or self.vgg is not None, file),
        )


@dataclasses.dataclass(frozen=True)
class ReconstructionLoss:
    """The loss of a batch of clips. Trained are the parameters of the autoencoder, under "autoencoder",
    and of the discriminator, if there is one, under "discriminator"; those of the perceptual loss's
    network are frozen, under "vgg" and "lpips"."""

    model: CausalAutoencoder
    config: ReconstructionLossConfig
    network: PerceptualNetwork | None = None

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters that carry their logical axes."""
        config, keys = self.model.config, jax.random.split(key)
        frame = jnp.zeros((1, 1, *config.stride[1:], config.channels))
        params = {"autoencoder": self.model.init(keys[0], frame, mutable="params")["params"]}
        if self.config.adversarial:
            params["discriminator"] = self._discriminator.init(keys[1], frame)["params"]
        if self.network is not None:
            # The values are the file's (load_frozen); these say the shapes and logical axes.
            frame = jnp.zeros((1, *[self.network.config.smallest] * 2, 3))
            params["vgg"] = VGG(self.network.config).init(keys[0], frame)["params"]
            weights = self.network.weights or ()
            params["lpips"] = {str(i): jnp.zeros(one.shape) for i, one in enumerate(weights)}
        return {"params": params}

    @staticmethod
    def trainable(path: str) -> bool:
        """Whether the parameter at a path is trained."""
        return not path.startswith(("params/vgg/", "params/lpips/"))

    def load_frozen(self, shapes: Params, shardings: Params) -> Params:
        """The network's weights, as they were read, laid out over the mesh."""
        assert self.network is not None
        params = {"vgg": self.network.params["params"]}
        if self.network.weights:
            params["lpips"] = {str(i): one for i, one in enumerate(self.network.weights)}
        return jax.device_put(jax.tree.map(np.asarray, {"params": params}), shardings)

    def __call__(
        self, params: Params, frozen: Params, video: Clips, mask: Mask, key: jax.Array, step: Any
    ) -> Totals:
        """``mask`` tells the frames that count; the noise of latents is drawn from ``key``."""
        apply: Any = self.model.apply
        gather, config = self.model.compute.gather, self.config
        network, autoencoder = self.network, params["params"]["autoencoder"]
        if network is not None:
            # With the step's arguments for its weights.
            weights = jax.tree.map(gather, frozen["params"])
            lpips = [weights["lpips"][str(i)] for i in range(len(network.weights or ()))]
            arguments: Any = {"params": {"params": weights["vgg"]}, "weights": lpips or None}
            network = dataclasses.replace(network, **arguments)
        mean, logvar = apply({"params": autoencoder}, video, method="encode")
        z, parts = mean, {}
        if logvar is not None:
            z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
            parts["kl"] = self._kl(mean, logvar, mask)
        decoder: Any = Decoder(self.model.config, self.model.compute)
        parameters = autoencoder["decoder"]
        features = decoder.apply({"params": parameters}, z, method="features")
        layer = parameters["conv_out"]

        def last(layer: Params) -> jax.Array:
            return decoder.apply(
                {"params": parameters | {"conv_out": layer}}, features, method="head"
            )

        back = last(layer)
        reconstruction, named = self._reconstruction(network, video, back, mask)
        parts |= named
        total = reconstruction + config.kl * parts.get("kl", 0.0)
        if config.adversarial:
            judge: Any = self._discriminator.apply
            learned = jax.tree.map(gather, params["params"]["discriminator"])
            stopped = jax.lax.stop_gradient(learned)
            keep = config.discriminator.logit_mask(mask)

            def generator(clips: jax.Array) -> jax.Array:
                return hinge_generator_loss(judge({"params": stopped}, clips), keep)

            losses = (lambda x: self._reconstruction(network, video, x, mask)[0], generator)
            of_loss, of_judge = last_layer_gradients(losses, last, layer)
            parts["adaptive"] = adaptive_weight(of_loss, of_judge, config.adversarial_bound)
            parts["generator"] = generator(back)
            real = judge({"params": learned}, video)
            fake = judge({"params": learned}, jax.lax.stop_gradient(back))
            parts["discriminator"] = hinge_discriminator_loss(real, fake, keep)
            counts = jnp.where(step >= config.adversarial_start, config.adversarial, 0.0)
            total += counts * parts["adaptive"] * parts["generator"] + parts["discriminator"]
        count = jnp.float32(len(video))
        return Totals(total * count, count, {name: part * count for name, part in parts.items()})

    @property
    def _discriminator(self) -> Any:
        return Discriminator(self.config.discriminator, self.model.compute.dtype)

    def _kl(self, mean: jax.Array, logvar: jax.Array, mask: jax.Array) -> jax.Array:
        of_latent = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).sum(-1)
        # A latent counts if the last frame that it holds does.
        return masked_mean(of_latent, mask[:, :: self.model.config.stride[0]])

    def _reconstruction(
        self, network: PerceptualNetwork | None, video: jax.Array, back: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = {"l1": masked_mean(jnp.abs(back - video), mask)}
        parts["l2"] = masked_mean((back - video) ** 2, mask)
        total = self.config.l1 * parts["l1"] + self.config.l2 * parts["l2"]
        if network is not None:
            parts["perceptual"] = masked_mean(network(video, back), mask)
            total += self.config.perceptual * parts["perceptual"]
        return total, parts
