"""Layers of a causal video autoencoder: they look at a frame and those before it, never ahead.

Every layer that looks back takes frames in any number of parts. With the collection ``cache`` mutable
it leaves there the frames that the next part looks back to, and where ``first`` is false it begins with
what was left; parts put together are the whole, exactly. A clip begins with zeros, and its first frame
is apart: where time is halved or doubled it stays one frame, and the others go in pairs (Yu et al.
2023, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", section 3.2; Wan 2025,
"Wan: Open and Advanced Large-Scale Video Generative Models", section 4.1).

Axis letters: b clips, t frames, h w pixels or latents, c channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn
from jaxtyping import Array, Float

from dit_jax.model import layers

NORM_EPS = 1e-8
"""Nothing beside usual activations; where all are 0 it bounds the gradient, at 1e4."""
CACHE = "cache"
"""The collection of frames that the next part of a clip looks back to."""
Frames = Float[Array, "b _ _ _ _"]


class Zeros(NamedTuple):
    """Zeros around clips."""

    frames: int
    """Before the first."""
    sides: tuple[int, int]
    """Before and after rows and columns."""


Convolve = Callable[[jax.Array, jax.Array, tuple[int, int, int], Zeros], jax.Array]
"""``convolve(x [b, t, h, w, i], kernel [t, h, w, i, o], strides, zeros)``."""


def _precision(dtype: Any) -> jax.lax.Precision:
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int, int], zeros: Zeros
) -> jax.Array:
    """One convolution over three axes, as accelerators have it."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        ((zeros.frames, 0), zeros.sides, zeros.sides),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision=_precision(x.dtype),
    )


def convolve_by_frames(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int, int], zeros: Zeros
) -> jax.Array:
    """The same, a sum of convolutions of frames: twice as fast on CPUs (jax 0.10.2), and nothing is
    computed of the zeros before a clip."""
    b, frames = x.shape[0], x.shape[1]
    taps, step = kernel.shape[0], strides[0]
    count = (zeros.frames + frames - taps) // step + 1
    total: Any = 0
    for tap in range(taps):
        # The first frame made of frames that are there.
        start = max(-((tap - zeros.frames) // step), 0)
        if start >= count:
            continue
        at = start * step + tap - zeros.frames
        part = x[:, at : at + (count - start - 1) * step + 1 : step]
        made = jax.lax.conv_general_dilated(
            rearrange(part, "b t h w c -> (b t) h w c"),
            kernel[tap],
            strides[1:],
            (zeros.sides, zeros.sides),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_precision(x.dtype),
        )
        made = rearrange(made, "(b t) h w c -> b t h w c", b=b)
        total += jnp.pad(made, ((0, 0), (start, 0), (0, 0), (0, 0), (0, 0)))
    return total


def _anywhere(x: jax.Array) -> jax.Array:
    return x


@dataclasses.dataclass(frozen=True)
class Computation:
    """How the layers compute, which their parameters do not know of."""

    dtype: Any = jnp.float32
    """Of activations; norms and softmax are float32."""
    convolve: Convolve = convolve
    constrain: Callable[[jax.Array], jax.Array] = _anywhere
    """Lays activations ``[b, t, h, w, c]`` out over a mesh."""
    gather: Callable[[jax.Array], jax.Array] = _anywhere
    """Makes a kernel whole, of which devices have parts, before it is used."""


def with_past(module: nn.Module, x: Frames, count: int, first: bool) -> tuple[Frames, int]:
    """``x`` after the ``count`` frames before it, and how many of these are zeros, left out: all
    of them before a clip's first part."""
    if not first:
        x = jnp.concatenate([module.get_variable(CACHE, "past"), x], 1)
    leave(module, x, count)
    return x, count if first else 0


def leave(module: nn.Module, frames: Frames, count: int) -> None:
    """Keeps the last ``count`` frames for the next part; zeros where there are fewer."""
    if module.is_mutable_collection(CACHE):
        last = frames[:, max(frames.shape[1] - count, 0) :]
        missing = count - last.shape[1]
        past = jnp.pad(last, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
        module.put_variable(CACHE, "past", past)


class Conv(nn.Module):
    """A convolution with a bias over ``size`` frames, rows and columns, looking back in time."""

    features: int
    size: tuple[int, int, int]
    compute: Computation
    strides: tuple[int, int, int] = (1, 1, 1)
    sides: tuple[int, int] | None = None
    """Zeros before and after rows and columns; half the size if not given."""
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        """All frames; with a size of one in time ``first`` does not matter."""
        zeros = 0
        if self.size[0] > 1:
            x, zeros = with_past(self, x, self.size[0] - 1, first)
        return self.convolved(x, zeros)

    def convolved(self, x: Frames, zeros: int) -> Frames:
        """Frames with those before them already there, after so many zeros."""
        axes = (None, None, None, "embed", "embed_out")
        kernel_init = nn.with_logical_partitioning(self.kernel_init, axes)
        bias_init = nn.with_logical_partitioning(self.bias_init, ("embed_vector",))
        kernel: Any = self.param("kernel", kernel_init, (*self.size, x.shape[-1], self.features))
        bias: Any = self.param("bias", bias_init, (self.features,))
        dtype, half = self.compute.dtype, self.size[1] // 2
        around = Zeros(zeros, (half, half) if self.sides is None else self.sides)
        kernel = self.compute.gather(kernel.astype(dtype))
        y = self.compute.convolve(x.astype(dtype), kernel, self.strides, around)
        return self.compute.constrain(y + bias.astype(dtype))


class PairsDown(Conv):
    """Halves time: the first frame stays, every two others become one, seen with the one before."""

    features: int = 0
    size: tuple[int, int, int] = (3, 1, 1)
    strides: tuple[int, int, int] = (2, 1, 1)
    compute: Computation = Computation()

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        if not first:
            return self.convolved(with_past(self, x, 1, False)[0], 0)
        leave(self, x, 1)
        # A lone first frame leaves the kernel unused but there.
        pairs = self.convolved(x if x.shape[1] > 1 else jnp.repeat(x, 3, 1), 0)
        return x if x.shape[1] == 1 else jnp.concatenate([x[:, :1].astype(pairs.dtype), pairs], 1)


class PairsUp(Conv):
    """Doubles time: the first frame stays, every other becomes two; the first is not looked back to."""

    features: int = 0
    size: tuple[int, int, int] = (3, 1, 1)
    compute: Computation = Computation()

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        head, rest = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
        rest, zeros = with_past(self, rest, 2, first)
        # A lone first frame leaves the kernel unused but there.
        alone = rest.shape[1] == 0
        both = self.convolved(head if alone else rest, zeros)
        pairs = rearrange(both[:, alone:], "b t h w (n c) -> b (t n) h w c", n=2)
        return jnp.concatenate([head.astype(pairs.dtype), pairs], 1)


RMSNorm = partial(layers.RMSNorm, "embed_vector", NORM_EPS)
"""Of each position by itself."""


class ResBlock(nn.Module):
    """Two convolutions after norms, and around them the input (projected where widths differ)."""

    features: int
    compute: Computation

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        size, compute = (3, 3, 3), self.compute
        y = nn.silu(RMSNorm(name="norm1")(x))
        y = Conv(self.features, size, compute, name="conv1")(y, first)
        y = nn.silu(RMSNorm(name="norm2")(y))
        y = Conv(self.features, size, compute, name="conv2")(y, first)
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1, 1), compute, name="shortcut")(x)
        return x + y


class FrameAttention(nn.Module):
    """One head of attention of every place to every place of its frame."""

    compute: Computation

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        b, _, h, _, c = x.shape
        y = RMSNorm(name="norm")(x)
        qkv = Conv(3 * c, (1, 1, 1), self.compute, name="qkv")(y)
        q, k, v = jnp.split(rearrange(qkv, "b t h w c -> (b t) (h w) c"), 3, -1)
        precision = _precision(self.compute.dtype)
        logits = jnp.einsum("bqc,bkc->bqk", q, k, precision=precision)
        weights = jax.nn.softmax(logits.astype(jnp.float32) / c**0.5).astype(v.dtype)
        y = jnp.einsum("bqk,bkc->bqc", weights, v, precision=precision)
        y = rearrange(y, "(b t) (h w) c -> b t h w c", b=b, h=h)
        return x + Conv(c, (1, 1, 1), self.compute, name="out")(self.compute.constrain(y))


class Down(nn.Module):
    """Half the rows and columns, then half the frames, as ``strides`` (in time, in space) say."""

    strides: tuple[int, int]
    compute: Computation

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        time, space = self.strides
        if space == 2:
            # Zeros after the last row and column alone, so that windows lie on the coarse grid.
            half = Conv(
                x.shape[-1], (1, 3, 3), self.compute, strides=(1, 2, 2), sides=(0, 1), name="space"
            )
            x = half(x)
        if time == 2:
            x = PairsDown(x.shape[-1], compute=self.compute, name="time")(x, first)
        return x


class Up(nn.Module):
    """Twice the frames, then twice the rows and columns and ``features`` channels."""

    strides: tuple[int, int]
    features: int
    compute: Computation

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        time, space = self.strides
        if time == 2:
            x = PairsUp(2 * x.shape[-1], compute=self.compute, name="time")(x, first)
        if space == 2:
            x = repeat(x, "b t h w c -> b t (h 2) (w 2) c")
        return Conv(self.features, (1, 3, 3), self.compute, name="space")(x)


def averaged_down(x: Frames, strides: tuple[int, int], features: int, first: bool) -> Frames:
    """A shortcut past ``Down``: positions become channels, and neighbouring channels are averaged (Chen
    et al. 2024, "Deep Compression Autoencoder", section 3.2). The first frame is paired with zeros."""
    n, p = strides
    if first:
        x = jnp.pad(x, ((0, 0), (n - 1, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (t n) (h p) (w q) c -> b t h w (c n p q)", n=n, p=p, q=p)
    return reduce(x, "b t h w (c g) -> b t h w c", "mean", c=features)


def repeated_up(x: Frames, strides: tuple[int, int], features: int, first: bool) -> Frames:
    """A shortcut past ``Up``, the transpose of the other: channels, repeated, become positions."""
    n, p = strides
    x = repeat(x, "b t h w c -> b t h w (c r)", r=features * n * p * p // x.shape[-1])
    x = rearrange(x, "b t h w (c n p q) -> b (t n) (h p) (w q) c", n=n, p=p, q=p)
    return x[:, n - 1 :] if first else x


class OwnPixels(nn.Module):
    """A linear projection of what each latent holds: the first frame's places alone, every later one's
    of ``strides`` frames, rows and columns."""

    features: int
    strides: tuple[int, int, int]
    compute: Computation

    @nn.compact
    def __call__(self, x: Frames, first: bool = True) -> Frames:
        t, p, q = self.strides
        x = rearrange(x, "b t (h p) (w q) c -> b t h w (p q c)", p=p, q=q)
        head, rest = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
        # A lone first frame leaves the other kernel unused but there.
        rest = rest if rest.shape[1] else jnp.repeat(head, t, 1)
        rest = rearrange(rest, "b (i t) h w c -> b i h w (t c)", t=t)
        made = Conv(self.features, (1, 1, 1), self.compute, name="rest")(rest)
        if not first:
            return made
        head = Conv(self.features, (1, 1, 1), self.compute, name="first")(head)
        return jnp.concatenate([head, made], 1) if x.shape[1] > 1 else head


class OwnLatent(nn.Module):
    """The transpose of ``OwnPixels``: every place of a latent's frames from that latent alone."""

    features: int
    strides: tuple[int, int, int]
    compute: Computation

    @nn.compact
    def __call__(self, z: Frames, first: bool = True) -> Frames:
        t, p, q = self.strides
        count = p * q * self.features
        head, rest = (z[:, :1], z[:, 1:]) if first else (z[:, :0], z)
        alone = rest.shape[1] == 0
        made = Conv(t * count, (1, 1, 1), self.compute, name="rest")(head if alone else rest)
        made = rearrange(made, "b i h w (t c) -> b (i t) h w c", t=t)
        if first:
            head = Conv(count, (1, 1, 1), self.compute, name="first")(head)
            made = head if alone else jnp.concatenate([head, made], 1)
        return rearrange(made, "b t h w (p q c) -> b t (h p) (w q) c", p=p, q=q)
