"""What an autoencoder of video is trained with: reconstruction, KL, features, a discriminator.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (section G) for
images, here of clips. All terms are of one step: the gradients of the autoencoder's terms do not reach
the discriminator, and its own do not reach the autoencoder.

Axis letters: b clips, t h w frames and pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dit_jax.codec.adversarial import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    last_layer_gradients,
    masked_mean,
)
from dit_jax.codec.causal_autoencoder import CausalAutoencoder
from dit_jax.codec.discriminator import Discriminator, DiscriminatorConfig
from dit_jax.codec.vgg import VGG, PerceptualNetwork
from dit_jax.types import Params, Totals

FROZEN = ("params/vgg/", "params/lpips/")


@dataclasses.dataclass(frozen=True)
class ReconstructionLossConfig:
    """Terms of the loss, each with its weight; pixels are in [-1, 1]."""

    paths: ClassVar[tuple[str, ...]] = ("vgg", "lpips")

    l1: float = 1.0
    l2: float = 0.0
    """Of squared differences: what PSNR measures."""
    kl: float = 1e-6
    """Of the divergence from a normal distribution, summed over a latent's channels and averaged over
    latents; for variational autoencoders."""
    perceptual: float = 0.0
    """Of the distance in VGG's features; needs ``vgg``."""
    vgg: str | None = None
    """torchvision's file of VGG-16 (vgg16-397923af.pth)."""
    lpips: str | None = None
    """The LPIPS package's linear weights for it (vgg.pth); without them features count alike."""
    adversarial: float = 0.0
    """Of the discriminator's judgement, beside the adaptive weight."""
    adversarial_start: int = 0
    """The step from which the discriminator counts; it is trained from the start."""
    adversarial_bound: float = 1e4
    """Of the adaptive weight."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def __post_init__(self) -> None:
        weights = ("l1", "l2", "kl", "perceptual", "adversarial", "adversarial_start")
        for name in (*weights, "adversarial_bound"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}: it is at least 0.")
        if self.l1 + self.l2 == 0:
            raise ValueError("loss.l1 and loss.l2 are both 0: nothing would be reconstructed.")
        if self.perceptual and self.vgg is None:
            raise ValueError(
                f"loss.perceptual is {self.perceptual} and loss.vgg is unset: give torchvision's file "
                "of VGG-16 (vgg16-397923af.pth), or set loss.perceptual to 0."
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
        config = self.model.config
        keys = jax.random.split(key)
        frame = jnp.zeros((1, 1, *config.stride[1:], config.channels))
        params = {"autoencoder": self.model.init(keys[0], frame, mutable="params")["params"]}
        if self.config.adversarial:
            made: Any = self._discriminator.init(keys[1], frame)
            params["discriminator"] = made["params"]
        if self.network is not None:
            frame = jnp.zeros((1, *[self.network.config.smallest] * 2, 3))
            # The values are the file's (load_frozen); these say the shapes and logical axes.
            vgg: Any = VGG(self.network.config).init(keys[0], frame)
            params["vgg"] = vgg["params"]
            weights = self.network.weights or ()
            params["lpips"] = {str(i): jnp.zeros(one.shape) for i, one in enumerate(weights)}
        return {"params": params}

    @staticmethod
    def trainable(path: str) -> bool:
        """Whether the parameter at a path is trained."""
        return not path.startswith(FROZEN)

    def load_frozen(self, shapes: Params, shardings: Params) -> Params:
        """The network's weights, as they were read, laid out over the mesh."""
        del shapes
        assert self.network is not None
        params = {"vgg": self.network.params["params"]}
        if self.network.weights:
            params["lpips"] = {str(i): one for i, one in enumerate(self.network.weights)}
        return jax.device_put(jax.tree.map(np.asarray, {"params": params}), shardings)

    def _network(self, frozen: Params) -> PerceptualNetwork | None:
        """The perceptual network with the step's arguments for its weights."""
        if self.network is None:
            return None
        frozen = jax.tree.map(self.model.compute.gather, frozen["params"])
        weights = [frozen["lpips"][str(i)] for i in range(len(self.network.weights or ()))]
        return dataclasses.replace(
            self.network, params={"params": frozen["vgg"]}, weights=weights or None
        )

    def __call__(
        self,
        params: Params,
        frozen: Params,
        video: Float[Array, "b t h w c"],
        mask: Bool[Array, "b t"],
        key: jax.Array,
        step: jax.Array,
    ) -> Totals:
        """``mask`` tells the frames that count; the noise of latents is drawn from ``key``."""
        of_model = {"params": params["params"]["autoencoder"]}
        network = self._network(frozen)
        encoded: Any = self.model.apply(of_model, video, method="encode")
        mean, logvar = encoded
        z, parts = mean, {}
        if logvar is not None:
            z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
            parts["kl"] = self._kl(mean, logvar, mask)
        features: Any = self.model.apply(of_model, z, method="features")

        def last(weights: Params) -> jax.Array:
            body = of_model["params"]["decoder"] | {"conv_out": weights}
            joined = {"params": of_model["params"] | {"decoder": body}}
            made: Any = self.model.apply(joined, features, method="head")
            return made

        weights = of_model["params"]["decoder"]["conv_out"]
        back = last(weights)
        reconstruction, named = self._reconstruction(network, video, back, mask)
        parts |= named
        total = reconstruction + self.config.kl * parts.get("kl", 0.0)
        if self.config.adversarial:
            judge = jax.tree.map(self.model.compute.gather, params["params"]["discriminator"])
            stopped = jax.lax.stop_gradient(judge)
            keep = self.config.discriminator.logit_mask(mask)

            def judged(clips: jax.Array) -> jax.Array:
                logits: Any = self._discriminator.apply({"params": stopped}, clips)
                return hinge_generator_loss(logits, keep)

            gradients = last_layer_gradients(
                lambda clips: self._reconstruction(network, video, clips, mask)[0],
                judged,
                last,
                weights,
            )
            parts["adaptive"] = adaptive_weight(*gradients, self.config.adversarial_bound)
            parts["generator"] = judged(back)
            parts["discriminator"] = self._of_discriminator(judge, video, back, keep)
            counts = jnp.where(step >= self.config.adversarial_start, self.config.adversarial, 0.0)
            total += counts * parts["adaptive"] * parts["generator"] + parts["discriminator"]
        count = jnp.float32(len(video))
        return Totals(total * count, count, {name: part * count for name, part in parts.items()})

    @property
    def _discriminator(self) -> Discriminator:
        return Discriminator(self.config.discriminator, self.model.compute.dtype)

    def _kl(self, mean: jax.Array, logvar: jax.Array, mask: jax.Array) -> jax.Array:
        time = self.model.config.stride[0]
        of_latent = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).sum(-1)
        return masked_mean(of_latent, mask[:, ::time])

    def _reconstruction(
        self,
        network: PerceptualNetwork | None,
        video: jax.Array,
        back: jax.Array,
        mask: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = {"l1": masked_mean(jnp.abs(back - video), mask)}
        parts["l2"] = masked_mean((back - video) ** 2, mask)
        total = self.config.l1 * parts["l1"] + self.config.l2 * parts["l2"]
        if network is not None:
            parts["perceptual"] = masked_mean(network(video, back), mask)
            total += self.config.perceptual * parts["perceptual"]
        return total, parts

    def _of_discriminator(
        self, judge: Params, video: jax.Array, back: jax.Array, keep: jax.Array
    ) -> jax.Array:
        real: Any = self._discriminator.apply({"params": judge}, video)
        fake: Any = self._discriminator.apply({"params": judge}, jax.lax.stop_gradient(back))
        return hinge_discriminator_loss(real, fake, keep)
