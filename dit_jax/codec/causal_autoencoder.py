"""A causal autoencoder of video: clips to latents of fewer frames, rows and columns, and back.

Residual convolutions over time and space at several resolutions, attention within frames in the middle,
a diagonal Gaussian over latents (or none); ``WAN`` is Wan 2.1's (Wan 2025, "Wan: Open and Advanced
Large-Scale Video Generative Models", section 4.1). Nothing looks ahead in time, and no norm takes
statistics over positions. With ``norm_groups`` every frame is by itself, and it is the image
autoencoder of Stable Diffusion (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent
Diffusion Models", sections 3.1 and G) as Diffusers' ``AutoencoderKL`` computes it.

With a stride of s in time, latent 0 holds frame 0, as an image's does, and latent i > 0 the frames
1 + s (i - 1) to s i: a clip has 1 + s n frames (Yu et al. 2023, "Language Model Beats Diffusion:
Tokenizer is Key to Visual Generation", section 3.2).

Clips are taken in any number of parts. With the collection ``cache`` mutable, every layer leaves there
the frames that it will look back to in the next part, and with ``first=False`` it begins with those:
parts put together are the whole, exactly. Before a clip are zeros.

Axis letters: b clips, t h w frames and pixels, i j k latents, c channels, z latent channels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn
from jaxtyping import Array, Float

from dit_jax.model import layers
from dit_jax.model.flops import traced_flops
from dit_jax.types import NonNegativeInt, Params, PositiveInt, require

Frames = Float[Array, "b _ _ _ _"]
CACHE = "cache"
LOGVAR_RANGE = (-30.0, 20.0)

# ---------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CausalAutoencoderConfig:
    """Sizes of the autoencoder; the defaults are Wan 2.1's, without its shift and scale."""

    channels: PositiveInt = 3
    latent_channels: PositiveInt = 16
    widths: tuple[int, ...] = (96, 192, 384, 384)
    """Channels at each resolution, from the finest."""
    strides: tuple[tuple[int, int], ...] = ((1, 2), (2, 2), (2, 2))
    """From each resolution to the next: 1, or 2 to halve, in time and in space."""
    layers: PositiveInt = 2
    """Residual blocks at each resolution (the decoder has one more)."""
    decoder_widths: tuple[int, ...] = ()
    """The decoder's channels if they are others, from the finest."""
    patch: PositiveInt = 1
    """Rows and columns of pixels that are taken together as channels before anything else."""
    shortcuts: bool = False
    """Whether every resolution is passed by without parameters too (Wan 2.2 has it): learns faster."""
    linear: bool = False
    """Whether latents are a linear projection of their own pixels, and pixels of their own latent, that
    the layers correct, from nothing on: principal components are learned at once. For small budgets."""
    norm_groups: NonNegativeInt = 0
    """0: layers look back in time. Else every frame is by itself, with group norms of so many groups:
    the image autoencoder of Stable Diffusion."""
    quant: bool = True
    """Whether a 1x1 convolution follows the encoder."""
    post_quant: bool = True
    """Whether a 1x1 convolution comes before the decoder."""
    mid_attention: bool = True
    variational: bool = True
    """Whether the encoder gives a mean and a variance, or a point."""
    shift: tuple[float, ...] = ()
    """Of each channel: latents are ``(z - shift) * scale``, about unit variance. None: 0 and 1."""
    scale: tuple[float, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations; auto is bfloat16 on accelerators and float32 on CPUs."""

    def __post_init__(self) -> None:
        widths, strides, z = self.widths, self.strides, self.latent_channels
        decoder, count = self.decoder_widths or widths, len(strides) + 1
        groups, pairs = self.norm_groups, all(set(pair) <= {1, 2} for pair in strides)

        def even(widths: tuple[int, ...]) -> bool:
            return len(widths) == count and all(w >= 2 and w % 2 == 0 for w in widths)

        fit, whole = even(widths) and even(decoder) and pairs, True
        if self.shortcuts and fit:
            # Shortcuts average or repeat channels, a whole number to each other one.
            down = zip((widths[0], *widths), widths, (*strides, (1, 1)), strict=False)
            up = zip(decoder[::-1], (decoder[-1], *decoder[::-1]), strides[::-1], strict=False)
            whole = not any(i * t * s * s % o for i, o, (t, s) in (*down, *up))
        divide = not groups or not any(w % groups for w in (*widths, *decoder))
        rule = f"an even width for each of the {count} resolutions"
        require(
            "autoencoder ",
            self,
            ("widths", even(widths), rule),
            ("decoder_widths", even(decoder), rule),
            ("widths", divide, f"multiples of the {groups} groups of norms"),
            ("norm_groups", not groups or self.stride[0] == 1, "0 with strides in time"),
            ("strides", pairs, "pairs for time and space of 1 or 2 (more by further resolutions)"),
            ("widths", whole, "multiples, each of the one before, unless shortcuts is unset"),
            ("shift", len(self.shift) in (0, z), f"empty, or {z} values"),
            ("scale", len(self.scale) in (0, z) and 0 not in self.scale, f"{z} values but 0"),
        )

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels in one latent."""
        time, space = (math.prod(pair[axis] for pair in self.strides) for axis in (0, 1))
        return time, space * self.patch, space * self.patch

    def computation(self, platform: str | None = None, **functions: Any) -> Computation:
        """How it computes on a platform: "cpu", "tpu", "gpu" (the one at hand)."""
        platform = platform or jax.default_backend()
        low = self.dtype == "bfloat16" or (self.dtype == "auto" and platform != "cpu")
        convolution = convolve_by_frames if platform == "cpu" else convolve
        return Computation(jnp.bfloat16 if low else jnp.float32, convolution, **functions)


WAN_SHIFT = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
WAN = CausalAutoencoderConfig(shift=WAN_SHIFT, scale=tuple(1 / std for std in WAN_STD))
SPACETIME_8 = CausalAutoencoderConfig(strides=((2, 2),) * 3)
SPACETIME_8_32 = CausalAutoencoderConfig(
    latent_channels=128, widths=(128, 256, 512, 512), strides=((2, 2),) * 3, patch=4
)
# ---------------------------------------------------------------------------------------------------
# Convolutions that look back
# ---------------------------------------------------------------------------------------------------

Triple = tuple[int, int, int]
Pair = tuple[int, int]


def _precision(dtype: Any) -> jax.lax.Precision:
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], before: int, sides: Pair
) -> jax.Array:
    """Convolves ``x [b, t, h, w, i]`` with ``kernel [t, h, w, i, o]`` after ``before`` frames of zeros,
    with ``sides`` zeros before and after rows and columns; or images with a kernel of none."""
    axes, padding = "DHW"[5 - x.ndim :], ((before, 0), sides, sides)[5 - x.ndim :]
    layout, exact = (f"N{axes}C", f"{axes}IO", f"N{axes}C"), _precision(x.dtype)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, precision=exact
    )


def convolve_by_frames(
    x: jax.Array, kernel: jax.Array, strides: Triple, before: int, sides: Pair
) -> jax.Array:
    """The same as a sum of convolutions of frames: twice as fast on CPUs (jax 0.10.2), and nothing is
    computed of the zeros before a clip."""
    b, frames, taps, step = *x.shape[:2], kernel.shape[0], strides[0]
    count = (before + frames - taps) // step + 1
    total: Any = 0
    for tap in range(taps):
        # The first output frame whose input at this tap is in the clip.
        start = max(-((tap - before) // step), 0)
        at = start * step + tap - before
        part = x[:, at : at + (count - start - 1) * step + 1 : step]
        if start < count:
            images = rearrange(part, "b t h w c -> (b t) h w c")
            out = convolve(images, kernel[tap], strides[1:], 0, sides)
            total += padded(rearrange(out, "(b t) h w c -> b t h w c", b=b), start)
    return total


def padded(x: Frames, frames: int) -> Frames:
    """``x`` after so many frames of zeros."""
    return jnp.pad(x, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))


@dataclasses.dataclass(frozen=True)
class Computation:
    """How the layers compute, which their parameters do not know of."""

    dtype: Any = jnp.float32
    """Of activations; norms and softmax are float32."""
    convolve: Callable[..., jax.Array] = convolve
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x
    """Shards activations ``[b, t, h, w, c]`` over a mesh."""
    gather: Callable[[jax.Array], jax.Array] = lambda x: x
    """Makes a kernel whole, of which devices have parts, before it is used."""


def with_past(module: nn.Module, x: Frames, count: int, first: bool) -> tuple[Frames, int]:
    """``x`` after the ``count`` frames before it, and how many of these are zeros, left out: all in a
    clip's first part. The last ``count`` are kept for the next part."""
    if not first:
        x = jnp.concatenate([module.get_variable(CACHE, "past"), x], 1)
    if module.is_mutable_collection(CACHE):
        last = x[:, max(x.shape[1] - count, 0) :]
        module.put_variable(CACHE, "past", padded(last, count - last.shape[1]))
    return x, count if first else 0


class Conv(nn.Module):
    """A convolution with a bias over ``size`` frames, rows and columns, looking back in time."""

    features: int
    size: Triple
    compute: Computation
    strides: Triple = (1, 1, 1)
    sides: Pair | None = None
    """Zeros before and after rows and columns; half the size if not given."""
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Frames, first: bool = True, before: int | None = None) -> Frames:
        """``before``: ``x`` has the frames before it already, after so many zeros that are left out."""
        if before is None:
            before = 0
            if self.size[0] > 1:
                x, before = with_past(self, x, self.size[0] - 1, first)
        axes = (None, None, None, "embed", "embed_out")
        kernel_init = nn.with_logical_partitioning(self.kernel_init, axes)
        bias_init = nn.with_logical_partitioning(self.bias_init, ("embed_vector",))
        kernel: Any = self.param("kernel", kernel_init, (*self.size, x.shape[-1], self.features))
        bias: Any = self.param("bias", bias_init, (self.features,))
        dtype, sides = self.compute.dtype, self.sides or (self.size[1] // 2,) * 2
        kernel = self.compute.gather(kernel.astype(dtype))
        y = self.compute.convolve(x.astype(dtype), kernel, self.strides, before, sides)
        return self.compute.constrain(y + bias.astype(dtype))


# ---------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------

# The epsilon is nothing beside usual activations; if all are 0 it bounds the gradient, at 1e4.
RMSNorm = functools.partial(layers.RMSNorm, "embed_vector", 1e-8)
# Of each frame. The variance (Wu & He 2018) is that of the centred values, as PyTorch's.
GroupNorm = functools.partial(
    nn.GroupNorm, epsilon=1e-6, use_fast_variance=False, reduction_axes=(-3, -2, -1)
)


class Layer(nn.Module):
    """What all layers know of the autoencoder, and what they are made of."""

    config: CausalAutoencoderConfig
    compute: Computation

    def conv(self, features: int, side: int, name: str, frames: int = 1, **settings: Any) -> Conv:
        """A convolution over so many frames (none but its own of autoencoders of images)."""
        frames = 1 if self.config.norm_groups else frames
        return Conv(features, (frames, side, side), self.compute, name=name, **settings)

    def activated(self, x: Frames, name: str) -> Frames:
        """SiLU of the norm."""
        return nn.silu(self.norm(x, name))

    def norm(self, x: Frames, name: str) -> Frames:
        groups = self.config.norm_groups
        return GroupNorm(groups, name=name)(x) if groups else RMSNorm(name=name)(x)


class ResBlock(Layer):
    """Two convolutions after norms, and around them the input (projected if widths differ)."""

    features: int

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        y = self.conv(self.features, 3, "conv1", 3)(self.activated(x, "norm1"), first)
        y = self.conv(self.features, 3, "conv2", 3)(self.activated(y, "norm2"), first)
        if x.shape[-1] != self.features:
            x = self.conv(self.features, 1, "shortcut")(x)
        return x + y


class FrameAttention(Layer):
    """One head of attention of every place to every place of its frame."""

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        b, _, h, _, c = x.shape
        y = self.norm(x, "norm")
        # Of one product, or of three, as published weights have them.
        linear = functools.partial(nn.Dense, precision="highest")
        if not self.config.norm_groups:
            linear = functools.partial(self.conv, side=1)
        names = ("q", "k", "v") if self.config.norm_groups else ("qkv",)
        products = [linear(3 * c // len(names), name=name)(y) for name in names]
        places = [rearrange(one, "b t h w c -> (b t) (h w) c") for one in products]
        q, k, v = places if len(places) > 1 else jnp.split(places[0], 3, -1)
        precision = _precision(self.compute.dtype)
        logits = jnp.einsum("bqc,bkc->bqk", q, k, precision=precision)
        weights = jax.nn.softmax(logits.astype(jnp.float32) / c**0.5).astype(v.dtype)
        y = jnp.einsum("bqk,bkc->bqc", weights, v, precision=precision)
        y = rearrange(y, "(b t) (h w) c -> b t h w c", b=b, h=h)
        return x + linear(c, name="out")(self.compute.constrain(y))


class Middle(Layer):
    """The coarsest resolution: a residual block, attention, a residual block."""

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        block = functools.partial(ResBlock, self.config, self.compute, x.shape[-1])
        x = block(name="resnet_0")(x, first)
        if self.config.mid_attention:
            x = FrameAttention(self.config, self.compute, name="attention")(x)
        return block(name="resnet_1")(x, first)


class Down(Layer):
    """Half the rows and columns, then half the frames: the first stays, every two others become one,
    seen with the one before."""

    strides: Pair

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        (time, space), c = self.strides, x.shape[-1]
        if space == 2:
            # Zeros after the last row and column alone, so that windows lie on the coarse grid.
            x = self.conv(c, 3, "space", strides=(1, 2, 2), sides=(0, 1))(x)
        if time == 1:
            return x
        seen, _ = with_past(self, x, 1, first)
        # A lone first frame leaves the kernel unused but there.
        alone = first and x.shape[1] == 1
        halve = self.conv(c, 1, "time", 3, strides=(2, 1, 1))
        pairs = halve(jnp.repeat(x, 3, 1) if alone else seen, before=0)
        if alone or not first:
            return x if alone else pairs
        return jnp.concatenate([x[:, :1].astype(pairs.dtype), pairs], 1)


class Up(Layer):
    """Twice the frames, of which the first stays and is not looked back to, then twice the rows and
    columns and ``features`` channels."""

    strides: Pair
    features: int

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        time, space = self.strides
        if time == 2:
            head, rest = x[:, : int(first)], x[:, int(first) :]
            rest, before = with_past(self, rest, 2, first)
            # A lone first frame leaves the kernel unused but there.
            alone = rest.shape[1] == 0
            both = self.conv(2 * x.shape[-1], 1, "time", 3)(head if alone else rest, before=before)
            pairs = rearrange(both[:, alone:], "b t h w (n c) -> b (t n) h w c", n=2)
            x = jnp.concatenate([head.astype(pairs.dtype), pairs], 1)
        if space == 2:
            x = repeat(x, "b t h w c -> b t (h 2) (w 2) c")
        return self.conv(self.features, 3, "space")(x)


def averaged_down(x: Frames, strides: Pair, features: int, first: bool) -> Frames:
    """A shortcut past ``Down``: positions become channels, and neighbouring channels are averaged (Chen
    et al. 2024, "Deep Compression Autoencoder", section 3.2). The first frame is paired with zeros."""
    n, p = strides
    if first:
        x = padded(x, n - 1)
    x = rearrange(x, "b (t n) (h p) (w q) c -> b t h w (c n p q)", n=n, p=p, q=p)
    return reduce(x, "b t h w (c g) -> b t h w c", "mean", c=features)


def repeated_up(x: Frames, strides: Pair, features: int, first: bool) -> Frames:
    """A shortcut past ``Up``, the transpose of the other: channels, repeated, become positions."""
    n, p = strides
    x = repeat(x, "b t h w c -> b t h w (c r)", r=features * n * p * p // x.shape[-1])
    x = rearrange(x, "b t h w (c n p q) -> b (t n) (h p) (w q) c", n=n, p=p, q=p)
    return x[:, n - 1 :] if first else x


class OwnPixels(Layer):
    """A linear projection of what each latent holds: the first frame's places alone, every later one's
    of a stride of frames, rows and columns."""

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        (t, p, q), features = self.config.stride, self.config.latent_channels
        x = rearrange(x, "b t (h p) (w q) c -> b t h w (p q c)", p=p, q=q)
        head, rest = x[:, : int(first)], x[:, int(first) :]
        # A lone first frame leaves the other kernel unused but there.
        rest = rest if rest.shape[1] else jnp.repeat(head, t, 1)
        out = self.conv(features, 1, "rest")(rearrange(rest, "b (i t) h w c -> b i h w (t c)", t=t))
        if not first:
            return out
        head = self.conv(features, 1, "first")(head)
        return jnp.concatenate([head, out], 1) if x.shape[1] > 1 else head


class OwnLatent(Layer):
    """The transpose of ``OwnPixels``, to patches of pixels: every place of a latent's frames from that
    latent alone."""

    @nn.compact
    def __call__(self, z: Frames, first: bool = True) -> Frames:
        (t, rows, columns), patch = self.config.stride, self.config.patch
        p, q = rows // patch, columns // patch
        count = rows * columns * self.config.channels
        head, rest = z[:, : int(first)], z[:, int(first) :]
        alone = rest.shape[1] == 0
        out = self.conv(t * count, 1, "rest")(head if alone else rest)
        out = rearrange(out, "b i h w (t c) -> b (i t) h w c", t=t)
        if first:
            head = self.conv(count, 1, "first")(head)
            out = head if alone else jnp.concatenate([head, out], 1)
        return rearrange(out, "b t h w (p q c) -> b t (h p) (w q) c", p=p, q=q)


# ---------------------------------------------------------------------------------------------------
# The autoencoder
# ---------------------------------------------------------------------------------------------------


def moments_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Biases of the moments: log-variances begin at -6, with less noise than latents."""
    del key
    return jnp.where(jnp.arange(shape[0]) < shape[0] // 2, 0.0, -6.0).astype(dtype)


def last_init(config: CausalAutoencoderConfig) -> nn.initializers.Initializer:
    """Of the last kernels: zeros if they correct what is linear."""
    return nn.initializers.zeros_init() if config.linear else nn.initializers.lecun_normal()


class Encoder(Layer):
    """Clips to the moments of their latents: the mean and, if it is variational, the log-variance."""

    @nn.compact
    def __call__(self, video: Frames, first: bool = True) -> Frames:
        config, compute, p = self.config, self.compute, self.config.patch
        x = rearrange(video, "b t (h p) (w q) c -> b t h w (c q p)", p=p, q=p)
        x = self.conv(config.widths[0], 3, "conv_in", 3)(x, first)
        for i, width in enumerate(config.widths):
            before, strides = x, (1, 1)
            for j in range(config.layers):
                x = ResBlock(config, compute, width, name=f"level_{i}_resnet_{j}")(x, first)
            if i < len(config.strides):
                strides = config.strides[i]
                x = Down(config, compute, strides, name=f"level_{i}_down")(x, first)
            if config.shortcuts:
                x = x + averaged_down(before, strides, width, first)
        x = Middle(config, compute, name="mid")(x, first)
        x = self.activated(x, "norm_out")
        moments = config.latent_channels * (2 if config.variational else 1)
        x = self.conv(moments, 3, "conv_out", 3)(x, first)
        if config.quant:
            bias: Any = moments_init if config.variational else nn.initializers.zeros_init()
            inits: Any = dict(kernel_init=last_init(config), bias_init=bias)
            x = self.conv(moments, 1, "quant", **inits)(x)
        x = x.astype(jnp.float32)
        if config.linear:
            own = OwnPixels(config, compute, name="linear")(video, first)
            x = x.at[..., : config.latent_channels].add(own)
        return x


class DecoderBody(Layer):
    """All of the decoder but its last convolution."""

    @nn.compact
    def __call__(self, z: Frames, first: bool = True) -> Frames:
        config, compute = self.config, self.compute
        widths, x = config.decoder_widths or config.widths, z
        if config.post_quant:
            x = self.conv(config.latent_channels, 1, "post_quant")(x)
        x = self.conv(widths[-1], 3, "conv_in", 3)(x, first)
        x = Middle(config, compute, name="mid")(x, first)
        for i, width in enumerate(reversed(widths)):
            before = x
            for j in range(config.layers + 1):
                x = ResBlock(config, compute, width, name=f"level_{i}_resnet_{j}")(x, first)
            if i < len(config.strides):
                strides = config.strides[-1 - i]
                features = width if config.shortcuts or config.norm_groups else width // 2
                x = Up(config, compute, strides, features, name=f"level_{i}_up")(x, first)
                if config.shortcuts:
                    x = x + repeated_up(before, strides, features, first)
        return self.activated(x, "norm_out")


class Decoder(Layer):
    """Latents (as the encoder gave them, not scaled) to clips."""

    def setup(self) -> None:
        config, features = self.config, self.config.channels * self.config.patch**2
        size = (1 if config.norm_groups else 3, 3, 3)
        self.conv_out = Conv(features, size, self.compute, kernel_init=last_init(config))
        self.body = DecoderBody(config, self.compute)
        if config.linear:
            self.linear = OwnLatent(config, self.compute)

    def features(self, z: Frames, first: bool = True) -> Frames:
        """The input of the last convolution; behind it, as channels, what is added to its output."""
        x = self.body(z, first)
        return jnp.concatenate([x, self.linear(z, first)], -1) if self.config.linear else x

    def head(self, x: Frames, first: bool = True) -> Frames:
        """The last convolution, and pixels out of patches."""
        p, own = self.config.patch, 0
        if self.config.linear:
            x, own = jnp.split(x, [x.shape[-1] - self.config.channels * p * p], -1)
        x = (self.conv_out(x, first) + own).astype(jnp.float32)
        return rearrange(x, "b t h w (c q p) -> b t (h p) (w q) c", p=p, q=p)


class CausalAutoencoder(nn.Module):
    """Both halves; ``encode`` and ``decode`` are the methods to apply. The first part of a clip has
    1 + s n frames or some latents, every other s n frames or some latents."""

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

    def decode(self, latents: Float[Array, "b i j k z"], first: bool = True) -> Frames:
        """Latents, not shifted or scaled, to pixels; about [-1, 1], not clipped."""
        return self.decoder.head(self.decoder.features(latents, first), first)

    def __call__(self, video: Float[Array, "b t h w c"]) -> Frames:
        return self.decode(self.encode(video)[0])


@functools.cache
def param_shapes(config: CausalAutoencoderConfig) -> Params:
    """The shapes of the parameters, under "params"."""
    model = CausalAutoencoder(config)
    frame = jnp.zeros((1, 1, *config.stride[1:], config.channels))
    return nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), frame, mutable="params")))


@functools.cache
def autoencoder_flops(
    config: CausalAutoencoderConfig, frames: int, height: int, width: int
) -> tuple[float, float]:
    """Flops of the products of encoding a clip of so many frames of pixels, and of decoding it."""
    model, params = CausalAutoencoder(config), param_shapes(config)
    encode, decode = (functools.partial(model.apply, method=m) for m in ("encode", "decode"))
    video = jax.ShapeDtypeStruct((1, frames, height, width, config.channels), jnp.float32)
    encoded, (latents, _) = jax.make_jaxpr(encode, return_shape=True)(params, video)
    return traced_flops(encoded), traced_flops(jax.make_jaxpr(decode)(params, latents))
