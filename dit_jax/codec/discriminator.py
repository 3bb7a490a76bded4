"""A discriminator of patches of clips, against which an autoencoder's decoder is trained.

Isola et al. 2017, "Image-to-image translation with conditional adversarial networks" (PatchGAN,
appendix 6.1.2), with convolutions over time too, as Esser et al. 2021, "Taming transformers for
high-resolution image synthesis" use it on images. It gives a logit for every patch, not one for a clip.

Time is causal: a logit sees its own frame and earlier ones, and before the first frame stands the
first again, so that an image is judged as a still clip. Frames that pad a clip at its end reach no
logit of a valid frame: ``DiscriminatorConfig.logit_mask`` tells which logits count, exactly.

The norms are of one place each (root mean square over channels). Batch statistics would make a clip's
logits depend on its neighbours and on padding, real and fake clips on which of them share a batch;
statistics over a clip (group norm) would let padding and later frames in.

Axis letters: b clips, t h w frames and pixels, i j k those of the logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from dit_jax.model.layers import RMSNorm

SLOPE = 0.2
"""Of the leaky ReLUs below 0."""
WIDEST = 8
"""Channels are doubled with every layer up to so many times ``width``."""


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator; the defaults are those of the 70 x 70 PatchGAN, and 3 frames deep."""

    width: int = 64
    """Channels of the first layer; doubled in each next one, up to 8 times."""
    layers: int = 3
    """Convolutions that halve height and width; two follow that do not."""
    kernel: int = 4
    """Rows and columns of a kernel."""
    time_kernel: int = 3
    """Frames of a kernel; 1 judges every frame alone."""
    time_layers: int = 0
    """The last so many of ``layers`` halve time too: there is a logit for every 2**time_layers-th
    frame, from the first on. No frame goes unseen if a clip has 1 + n · 2**time_layers of them."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "kernel", "time_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"discriminator {name} is {getattr(self, name)}: it is at least 1."
                )
        if not 0 <= self.time_layers <= self.layers:
            raise ValueError(
                f"discriminator time_layers is {self.time_layers}: it is between 0 and the "
                f"{self.layers} layers."
            )
        if self.time_layers and self.time_kernel < 2:
            raise ValueError(
                f"discriminator time_layers is {self.time_layers} with kernels of 1 frame, which "
                "would skip frames: give time_kernel 2 or more, or time_layers 0."
            )

    @property
    def time_stride(self) -> int:
        """Frames from one logit to the next."""
        return 2**self.time_layers

    def logit_mask(self, mask: Bool[Array, "b t"]) -> Bool[Array, "b i"]:
        """Which moments of the logits count, of the frames that do (the first ones of each clip).

        Logit i looks at frames up to i · time_stride, so it counts if that frame does, and what the
        frames behind hold changes none that counts.
        """
        return mask[:, :: self.time_stride]


class Discriminator(nn.Module):
    """Clips in [-1, 1] to logits, float32, above 0 for what looks real; any size from 1 x 1 x 1 up.

    Products are in ``dtype``.
    """

    config: DiscriminatorConfig = DiscriminatorConfig()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, clips: Float[Array, "b t h w c"]) -> Float[Array, "b i j k"]:
        config, x = self.config, clips
        for i in range(config.layers + 1):
            down = 2 if i < config.layers else 1
            in_time = down if i >= config.layers - config.time_layers else 1
            width = config.width * min(2**i, WIDEST)
            x = self._conv(x, width, (in_time, down, down), f"conv_{i}")
            if i:
                x = RMSNorm("embed_vector", name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, SLOPE)
        return self._conv(x, 1, (1, 1, 1), "logits")[..., 0].astype(jnp.float32)

    def _conv(
        self, x: jax.Array, features: int, strides: tuple[int, int, int], name: str
    ) -> jax.Array:
        """Zeros around the frame, as many as give ceil(size / stride); the first frame before it."""
        size = (self.config.time_kernel, self.config.kernel, self.config.kernel)
        x = jnp.pad(x, ((0, 0), (size[0] - 1, 0), (0, 0), (0, 0), (0, 0)), mode="edge")
        around = jax.lax.padtype_to_pads(x.shape[2:4], size[1:], strides[1:], "SAME")
        kernel, zeros = nn.initializers.normal(0.02), nn.initializers.zeros_init()
        axes = (None, None, None, "embed", "embed_out")
        convolution = nn.Conv(
            features,
            size,
            strides,
            padding=[(0, 0), *around],
            dtype=self.dtype,
            precision="highest" if self.dtype == jnp.float32 else None,
            kernel_init=nn.with_logical_partitioning(kernel, axes),
            bias_init=nn.with_logical_partitioning(zeros, ("embed_vector",)),
            name=name,
        )
        return convolution(x)
