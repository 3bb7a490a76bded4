"""A causal autoencoder of video: clips to latents of fewer frames, rows and columns, and back.

Residual convolutions over time and space at several resolutions, one attention layer within frames in
the middle, a diagonal Gaussian over latents (or none). Nothing looks ahead in time and no norm takes
statistics over positions, so that latent i depends on the frames up to its own last one, and latent 0
is that of the first frame as an image. The configuration ``WAN`` is Wan 2.1's (Wan 2025, "Wan: Open and
Advanced Large-Scale Video Generative Models", section 4.1), whose weights ``interop`` reads.

Which frames a latent holds: with a stride of s in time latent 0 holds frame 0, and latent i > 0 frames
1 + s (i - 1) to s i. A clip has 1 + s n frames.

Axis letters: b clips, t h w pixels, i j k latents, c channels, z latent channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from dit_jax.codec.autoencoder_kl import LOGVAR_RANGE
from dit_jax.codec.causal_layers import (
    Computation,
    Conv,
    Down,
    FrameAttention,
    OwnLatent,
    OwnPixels,
    ResBlock,
    RMSNorm,
    Up,
    averaged_down,
    convolve,
    convolve_by_frames,
    repeated_up,
)


@dataclasses.dataclass(frozen=True)
class CausalAutoencoderConfig:
    """Sizes of the autoencoder; the defaults are Wan 2.1's, without its shift and scale."""

    channels: int = 3
    latent_channels: int = 16
    widths: tuple[int, ...] = (96, 192, 384, 384)
    """Channels at each resolution, from the finest."""
    strides: tuple[tuple[int, int], ...] = ((1, 2), (2, 2), (2, 2))
    """From each resolution to the next: 1, or 2 to halve, in time and in space."""
    layers: int = 2
    """Residual blocks at each resolution (the decoder has one more)."""
    decoder_widths: tuple[int, ...] = ()
    """The decoder's channels where they are others, from the finest."""
    patch: int = 1
    """Rows and columns of pixels that are taken together as channels before anything else."""
    shortcuts: bool = False
    """Whether every resolution is passed by without parameters too (Wan 2.2 has it): learns faster."""
    linear: bool = False
    """Whether latents are a linear projection of their own pixels, and pixels of their own latent, that
    the layers correct, from nothing on: principal components are learned at once. For small budgets."""
    mid_attention: bool = True
    variational: bool = True
    """Whether the encoder gives a mean and a variance, or a point."""
    shift: tuple[float, ...] = ()
    """Of each channel: latents are ``(z - shift) * scale``, about unit variance. None: 0 and 1."""
    scale: tuple[float, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations; auto is bfloat16 on accelerators and float32 on CPUs."""

    def __post_init__(self) -> None:
        for name in ("channels", "latent_channels", "layers", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"autoencoder {name} is {getattr(self, name)}: it is at least 1.")
        for name in ("widths", "decoder_widths"):
            widths = getattr(self, name)
            if name == "decoder_widths" and not widths:
                continue
            if len(widths) != len(self.strides) + 1 or any(w < 2 or w % 2 for w in widths):
                raise ValueError(
                    f"autoencoder {name} {widths} with strides {self.strides}: give an even width for "
                    f"each of the {len(self.strides) + 1} resolutions."
                )
        if any(len(pair) != 2 or not set(pair) <= {1, 2} for pair in self.strides):
            raise ValueError(
                f"autoencoder strides {self.strides}: each is a pair for time and space of 1 or 2. "
                "More comes from more resolutions, or in space from a patch."
            )
        if self.shortcuts:
            self._check_shortcuts()
        for name in ("shift", "scale"):
            count = len(getattr(self, name))
            if count not in (0, self.latent_channels):
                raise ValueError(
                    f"autoencoder {name} has {count} values for {self.latent_channels} channels: "
                    "give one for each, or none."
                )
        if any(scale == 0 for scale in self.scale):
            raise ValueError("autoencoder scale is 0 for a channel: its latents would all be 0.")

    def _check_shortcuts(self) -> None:
        widths, strides = self.widths, (*self.strides, (1, 1))
        before = (widths[0], *widths)
        of_decoder = (self.decoder_widths or widths)[::-1]
        pairs = [(i * t * s * s, o) for i, o, (t, s) in zip(before, widths, strides, strict=False)]
        pairs += [
            (o * t * s * s, i)
            for i, o, (t, s) in zip(
                (of_decoder[0], *of_decoder), of_decoder, self.strides[::-1], strict=False
            )
        ]
        if any(many % few for many, few in pairs):
            raise ValueError(
                f"autoencoder widths {widths} and strides {self.strides} have no shortcuts, whose "
                "channels are averaged or repeated whole: make each width a multiple of the one "
                "before, or unset shortcuts."
            )

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels in one latent."""
        time = math.prod(pair[0] for pair in self.strides)
        space = math.prod(pair[1] for pair in self.strides) * self.patch
        return time, space, space

    def computation(self, platform: str | None = None, **given: Any) -> Computation:
        """How it computes on a platform: "cpu", "tpu", "gpu" (the one at hand)."""
        platform = platform or jax.default_backend()
        low = self.dtype == "bfloat16" or (self.dtype == "auto" and platform != "cpu")
        how = convolve_by_frames if platform == "cpu" else convolve
        return Computation(jnp.bfloat16 if low else jnp.float32, how, **given)


WAN_SHIFT = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
WAN = CausalAutoencoderConfig(shift=WAN_SHIFT, scale=tuple(1 / std for std in WAN_STD))
"""Wan 2.1's autoencoder: 4 x 8 x 8, 16 channels."""
SPACETIME_8 = CausalAutoencoderConfig(strides=((2, 2),) * 3)
"""8 x 8 x 8, 16 channels."""
SPACETIME_8_32 = CausalAutoencoderConfig(
    latent_channels=128, widths=(128, 256, 512, 512), strides=((2, 2),) * 3, patch=4
)
"""8 x 32 x 32, 128 channels."""


LOGVAR_BEGIN = -6.0


def begin_certain(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Biases of the moments: log-variances begin at ``LOGVAR_BEGIN``, with less noise than latents."""
    del key
    half = shape[0] // 2
    return jnp.where(jnp.arange(shape[0]) < half, 0.0, LOGVAR_BEGIN).astype(dtype)


def correction_init(config: CausalAutoencoderConfig) -> nn.initializers.Initializer:
    """Of the last kernels: nothing where they correct what is linear."""
    return nn.initializers.zeros_init() if config.linear else nn.initializers.lecun_normal()


class Middle(nn.Module):
    """The coarsest resolution: a residual block, attention, a residual block."""

    config: CausalAutoencoderConfig
    compute: Computation

    @nn.compact
    def __call__(
        self, x: Float[Array, "b i j k c"], first: bool = True
    ) -> Float[Array, "b i j k c"]:
        x = ResBlock(x.shape[-1], self.compute, name="resnet_0")(x, first)
        if self.config.mid_attention:
            x = FrameAttention(self.compute, name="attention")(x)
        return ResBlock(x.shape[-1], self.compute, name="resnet_1")(x, first)


class Encoder(nn.Module):
    """Clips to the moments of their latents, the mean and, if it is variational, the log-variance."""

    config: CausalAutoencoderConfig
    compute: Computation

    @nn.compact
    def __call__(
        self, video: Float[Array, "b t h w c"], first: bool = True
    ) -> Float[Array, "b _ _ _ m"]:
        config, compute = self.config, self.compute
        p = config.patch
        x = rearrange(video, "b t (h p) (w q) c -> b t h w (c q p)", p=p, q=p)
        x = Conv(config.widths[0], (3, 3, 3), compute, name="conv_in")(x, first)
        for i, width in enumerate(config.widths):
            before, strides = x, (1, 1)
            for j in range(config.layers):
                x = ResBlock(width, compute, name=f"level_{i}_resnet_{j}")(x, first)
            if i < len(config.strides):
                strides = config.strides[i]
                x = Down(strides, compute, name=f"level_{i}_down")(x, first)
            if config.shortcuts:
                x = x + averaged_down(before, strides, width, first)
        x = Middle(config, compute, name="mid")(x, first)
        x = nn.silu(RMSNorm(name="norm_out")(x))
        moments = config.latent_channels * (2 if config.variational else 1)
        x = Conv(moments, (3, 3, 3), compute, name="conv_out")(x, first)
        biases = begin_certain if config.variational else nn.initializers.zeros_init()
        quant = Conv(
            moments,
            (1, 1, 1),
            compute,
            bias_init=biases,
            kernel_init=correction_init(config),
            name="quant",
        )
        x = quant(x).astype(jnp.float32)
        if config.linear:
            own = OwnPixels(config.latent_channels, config.stride, compute, name="linear")
            x = x.at[..., : config.latent_channels].add(own(video, first))
        return x


class Decoder(nn.Module):
    """Latents (as the encoder gave them, not scaled) to clips."""

    config: CausalAutoencoderConfig
    compute: Computation

    def setup(self) -> None:
        config, compute = self.config, self.compute
        made = config.channels * config.patch**2
        self.conv_out = Conv(made, (3, 3, 3), compute, kernel_init=correction_init(config))
        self.body = DecoderBody(config, compute)
        if config.linear:
            time, rows, columns = config.stride
            strides = (time, rows // config.patch, columns // config.patch)
            self.linear = OwnLatent(made, strides, compute)

    def __call__(
        self, z: Float[Array, "b i j k z"], first: bool = True
    ) -> Float[Array, "b _ _ _ _"]:
        return self.head(self.features(z, first), first)

    def features(
        self, z: Float[Array, "b i j k z"], first: bool = True
    ) -> Float[Array, "b _ _ _ f"]:
        """What the last convolution is given; after it, as channels, what is added to what it gives."""
        x = self.body(z, first)
        return jnp.concatenate([x, self.linear(z, first)], -1) if self.config.linear else x

    def head(self, x: Float[Array, "b t h w f"], first: bool = True) -> Float[Array, "b _ _ _ _"]:
        """The last convolution, and pixels out of patches."""
        p = self.config.patch
        if self.config.linear:
            x, own = jnp.split(x, [x.shape[-1] - self.config.channels * p * p], -1)
            x = self.conv_out(x, first) + own
        else:
            x = self.conv_out(x, first)
        x = x.astype(jnp.float32)
        return rearrange(x, "b t h w (c q p) -> b t (h p) (w q) c", p=p, q=p)


class DecoderBody(nn.Module):
    """All of the decoder but its last convolution."""

    config: CausalAutoencoderConfig
    compute: Computation

    @nn.compact
    def __call__(
        self, z: Float[Array, "b i j k z"], first: bool = True
    ) -> Float[Array, "b _ _ _ f"]:
        config, compute = self.config, self.compute
        widths = config.decoder_widths or config.widths
        x = Conv(config.latent_channels, (1, 1, 1), compute, name="post_quant")(z)
        x = Conv(widths[-1], (3, 3, 3), compute, name="conv_in")(x, first)
        x = Middle(config, compute, name="mid")(x, first)
        for i, width in enumerate(reversed(widths)):
            before = x
            for j in range(config.layers + 1):
                x = ResBlock(width, compute, name=f"level_{i}_resnet_{j}")(x, first)
            if i < len(config.strides):
                strides = config.strides[-1 - i]
                made = width if config.shortcuts else width // 2
                x = Up(strides, made, compute, name=f"level_{i}_up")(x, first)
                if config.shortcuts:
                    x = x + repeated_up(before, strides, made, first)
        return nn.silu(RMSNorm(name="norm_out")(x))


class CausalAutoencoder(nn.Module):
    """Both halves; ``encode`` and ``decode`` are the methods to apply.

    With ``mutable=["cache"]`` they take a clip in parts: the first part with ``first=True``, 1 + s n
    frames or some latents, every other with ``first=False`` and the cache that the one before left,
    s n frames or some latents.
    """

    config: CausalAutoencoderConfig
    compute: Computation = Computation()

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.compute)
        self.decoder = Decoder(self.config, self.compute)

    def encode(
        self, video: Float[Array, "b t h w c"], first: bool = True
    ) -> tuple[Float[Array, "b i j k z"], Float[Array, "b i j k z"] | None]:
        """Pixels in [-1, 1] to mean and log-variance (None if not variational) of their latents, not
        shifted or scaled."""
        moments = self.encoder(video, first)
        if not self.config.variational:
            return moments, None
        mean, logvar = jnp.split(moments, 2, -1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(
        self, latents: Float[Array, "b i j k z"], first: bool = True
    ) -> Float[Array, "b _ _ _ _"]:
        """Latents, not shifted or scaled, to pixels; about [-1, 1], not clipped."""
        return self.decoder(latents, first)

    def features(self, latents: Float[Array, "b i j k z"]) -> Float[Array, "b _ _ _ f"]:
        """What the decoder's last convolution is given for a whole clip."""
        return self.decoder.features(latents)

    def head(self, features: Float[Array, "b t h w f"]) -> Float[Array, "b _ _ _ _"]:
        """The decoder's last convolution."""
        return self.decoder.head(features)

    def __call__(self, video: Float[Array, "b t h w c"]) -> Float[Array, "b _ _ _ _"]:
        return self.decode(self.encode(video)[0])
