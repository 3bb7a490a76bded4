"""The image autoencoder of Stable Diffusion: images to latents an eighth as large, and back.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (sections 3.1 and
G), with the configuration and the computation of Diffusers' ``AutoencoderKL``; channels come last here.
Everything is float32 (products too, whatever the accelerator would round them to). It is not trained.

Axis letters: b images, h w pixels, i j latents, c channels.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn
from jaxtyping import Array, Float

from dit_jax.model.layers import dense
from dit_jax.types import require

Images = Float[Array, "b _ _ _"]
LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Sizes of the autoencoder; the defaults are Stable Diffusion's."""

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at each resolution, from the finest; each next one has half the rows and columns."""
    layers: int = 2
    """Residual blocks at each resolution (the decoder has one more)."""
    norm_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    """Whether a 1x1 convolution follows the encoder."""
    post_quant_conv: bool = True
    """Whether a 1x1 convolution comes before the decoder."""
    scale: float = 0.18215
    """Latents are ``(z - shift) * scale``, about unit variance."""
    shift: float = 0.0

    def __post_init__(self) -> None:
        groups = self.norm_groups
        whole = bool(self.widths) and all(width % groups == 0 for width in self.widths)
        require(
            "autoencoder ",
            self,
            ("widths", whole, f"multiples of the {groups} groups of its norms"),
            ("scale", self.scale != 0, "other than 0"),
        )

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels in one latent."""
        side = 2 ** (len(self.widths) - 1)
        return 1, side, side


def conv(features: int, size: int, name: str, **settings: Any) -> nn.Conv:
    """A convolution with a bias, whose kernel ``[h, w, in, out]`` carries logical axes."""
    init = nn.initializers.lecun_normal()
    return nn.Conv(
        features,
        (size, size),
        padding=settings.pop("padding", size // 2),
        precision="highest",
        kernel_init=nn.with_logical_partitioning(init, (None, None, "embed", "embed_out")),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed_vector",)),
        name=name,
        **settings,
    )


# The variance of group norm (Wu & He 2018) is that of the centred values, as PyTorch's.
norm = partial(
    nn.GroupNorm,
    epsilon=1e-6,
    use_fast_variance=False,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed_vector",)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed_vector",)),
)


class ResBlock(nn.Module):
    """Two convolutions after norms, and around them the input (projected if widths differ)."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Images) -> Images:
        y = conv(self.features, 3, "conv1")(nn.silu(norm(self.groups, name="norm1")(x)))
        y = conv(self.features, 3, "conv2")(nn.silu(norm(self.groups, name="norm2")(y)))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, "shortcut")(x)
        return x + y


class MidAttention(nn.Module):
    """One head of attention of every place to every place of the image."""

    groups: int

    @nn.compact
    def __call__(self, x: Images) -> Images:
        height, width, c = x.shape[1:]
        linear = partial(
            dense,
            axes=("embed", "embed_out"),
            dtype=jnp.float32,
            init=nn.initializers.lecun_normal(),
            precision="highest",
        )
        y = rearrange(norm(self.groups, name="norm")(x), "b h w c -> b (h w) c")
        q, k, v = (linear(c, name=name)(y) for name in ("q", "k", "v"))
        logits = jnp.einsum("bqc,bkc->bqk", q, k, precision="highest") / c**0.5
        y = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits), v, precision="highest")
        y = linear(c, name="out")(y)
        return x + rearrange(y, "b (h w) c -> b h w c", h=height, w=width)


class Middle(nn.Module):
    """The coarsest resolution: a residual block, attention, a residual block."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x: Images) -> Images:
        groups = self.config.norm_groups
        x = ResBlock(x.shape[-1], groups, name="resnet_0")(x)
        if self.config.mid_attention:
            x = MidAttention(groups, name="attention")(x)
        return ResBlock(x.shape[-1], groups, name="resnet_1")(x)


class Encoder(nn.Module):
    """Images to the moments of their latents, mean and log-variance one after the other."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x: Images) -> Images:
        config = self.config
        x = conv(config.widths[0], 3, "conv_in")(x)
        for i, width in enumerate(config.widths):
            for j in range(config.layers):
                x = ResBlock(width, config.norm_groups, name=f"level_{i}_resnet_{j}")(x)
            if i < len(config.widths) - 1:
                # Padded on the right and below alone, so that windows lie on the coarse grid.
                side = ((0, 1), (0, 1))
                x = conv(width, 3, f"level_{i}_down", strides=(2, 2), padding=side)(x)
        x = Middle(config, name="mid")(x)
        x = nn.silu(norm(config.norm_groups, name="norm_out")(x))
        x = conv(2 * config.latent_channels, 3, "conv_out")(x)
        return conv(2 * config.latent_channels, 1, "quant")(x) if config.quant_conv else x


class Decoder(nn.Module):
    """Latents (as the encoder gave them, not scaled) to images."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, z: Images) -> Images:
        config = self.config
        x = conv(config.latent_channels, 1, "post_quant")(z) if config.post_quant_conv else z
        x = conv(config.widths[-1], 3, "conv_in")(x)
        x = Middle(config, name="mid")(x)
        for i, width in enumerate(reversed(config.widths)):
            for j in range(config.layers + 1):
                x = ResBlock(width, config.norm_groups, name=f"level_{i}_resnet_{j}")(x)
            if i < len(config.widths) - 1:
                x = repeat(x, "b h w c -> b (h 2) (w 2) c")
                x = conv(width, 3, f"level_{i}_up")(x)
        x = nn.silu(norm(config.norm_groups, name="norm_out")(x))
        return conv(config.channels, 3, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """Both halves; ``encode`` and ``decode`` are the methods to apply."""

    config: AutoencoderKLConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b i j z"], Float[Array, "b i j z"]]:
        """Images in [-1, 1], whose sides are multiples of the stride, to mean and log-variance of their
        latents, not scaled."""
        mean, logvar = jnp.split(self.encoder(images), 2, -1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: Float[Array, "b i j z"]) -> Images:
        """Latents, not scaled, to images; about [-1, 1], not clipped."""
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "b h w c"]) -> Images:
        return self.decode(self.encode(images)[0])
