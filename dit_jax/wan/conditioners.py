"""What Wan's image-to-video models read beside noise and text.

Two fields tell of the images that a clip begins with (and ends with, in one model):

image_latents  of tokens: the latents of a clip that has the given frames and is grey otherwise, behind
               a mask of four channels that is 1 for given frames
image_states   of segments: the states of the images as CLIP's image encoder makes them

Published, the latents are more channels of the convolution that embeds patches. A convolution of
channels side by side is a sum of two, so that here the second is a layer of its own: exact.

Guidance is over the text alone: a dropped segment, the "unconditional", still reads its images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dit_jax.files import refuse_if
from dit_jax.model import Conditioner, Conditioning, Field, ModelConfig, dense
from dit_jax.sampling.media import to_float
from dit_jax.sampling.request import Request, Space
from dit_jax.types import DenoiserInputs, FrameGrid, PositiveInt, Runtime

LATENTS, STATES = "image_latents", "image_states"
"""Names of the fields, in configs, requests and records."""
CLIP_TOKENS = 257
"""States of an image: 16 x 16 patches and the class token of a ViT-H/14 at 224 x 224."""


@dataclasses.dataclass(frozen=True)
class ImageLatents(Conditioner):
    """A mask and latents on the clip's own grid, added to the embedded patches."""

    channels: PositiveInt = 20  # 4 of the mask, 16 of the latents

    def field(self, model: ModelConfig) -> Field:
        return Field("token", (dataclasses.replace(model.patch, channels=self.channels).dim,))

    def build(self, name: str, model: ModelConfig, runtime: Runtime) -> nn.Module:
        return ImageLatentsEmbedding(name, model.dit.width, runtime)

    def with_images(
        self, name: str, request: Request, space: Space, images: Mapping[int, np.ndarray]
    ) -> Request:
        """The request with the field of these frames, uint8 ``[h, w, 3]``; the others are grey."""
        frames = space.grid.frames(request.frames)
        clip = np.zeros((frames, *next(iter(images.values())).shape), np.float32)
        given = np.zeros(frames, np.float32)
        for at, image in images.items():
            clip[at], given[at] = to_float(image), 1
        latents = np.asarray(space.codec.encode(clip), np.float32)  # [t, h, w, c]
        # Of each latent frame's four frames which are given; the first latent frame's is given or not.
        mask = FrameGrid(space.codec.strides[0]).per_token(given)[:, None, None]
        mask = np.broadcast_to(mask, (*latents.shape[:3], mask.shape[-1]))
        fields = {**request.pixel_fields, name: np.concatenate([mask, latents], -1)}
        return dataclasses.replace(request, pixel_fields=fields)


class ImageLatentsEmbedding(nn.Module):
    """A linear layer of each token's patch."""

    field: str
    width: int
    runtime: Runtime

    @nn.compact
    def __call__(self, inputs: DenoiserInputs) -> Conditioning:
        run, xavier = self.runtime, nn.initializers.xavier_uniform()
        linear = nn.Dense(
            self.width,
            use_bias=False,
            dtype=run.dtype,
            dot_general=run.dot_general,
            kernel_init=nn.with_logical_partitioning(xavier, ("patch", "embed")),
            name="embedding",
        )
        return Conditioning(tokens=linear(inputs.token_fields[self.field].astype(run.dtype)))


@dataclasses.dataclass(frozen=True)
class ImageStates(Conditioner):
    """States of CLIP's image encoder, to which every block attends with keys and values of its own
    (``dit.image_attention``)."""

    paths: ClassVar[tuple[str, ...]] = ("encoder",)

    tokens: PositiveInt = CLIP_TOKENS
    dim: PositiveInt = 1280
    positions: bool = False  # Whether a learned position is added to each (two images: 514 tokens).
    encoder: str | None = None  # Folder of the image encoder that makes them.

    def field(self, model: ModelConfig) -> Field:
        return Field("segment", (self.tokens, self.dim))

    def build(self, name: str, model: ModelConfig, runtime: Runtime) -> nn.Module:
        return ImageStatesEmbedding(name, self, model.dit.width, runtime)

    def with_images(
        self, name: str, request: Request, space: Space, images: Mapping[int, np.ndarray]
    ) -> Request:
        """The request with the states of these images, uint8 ``[h, w, 3]``, in the order of frames."""
        where = f"model.conditioners.{name}"
        unset = f"{where}.encoder is unset: convert the whole pipeline, or name the image encoder."
        refuse_if([(self.encoder is None, unset)])
        stack = np.stack([images[at] for at in sorted(images)])
        states = image_states(str(self.encoder), stack.shape, stack.tobytes())
        message = (
            f"{len(images)} images are {states.shape} states, and the model reads {self.tokens} x "
            f"{self.dim} ({where}): give the first frame, or the first and the last if there are "
            f"{2 * CLIP_TOKENS}."
        )
        refuse_if([(states.shape != (self.tokens, self.dim), message)])
        return dataclasses.replace(request, segment_fields={**request.segment_fields, name: states})


@functools.lru_cache(maxsize=64)
def image_states(encoder: str, shape: tuple[int, ...], pixels: bytes) -> np.ndarray:
    """The states ``[m, e]`` of uint8 images ``[n, h, w, 3]`` one behind the other. The encoder, which
    is large, is opened for this alone; the images of many prompts are often the same."""
    from dit_jax.wan.image_encoder import load_image_encoder

    states = load_image_encoder(encoder)(np.frombuffer(pixels, np.uint8).reshape(shape))
    return states.reshape(-1, states.shape[-1])


class ImageStatesEmbedding(nn.Module):
    """Norm, two linear layers with an exact GELU between, norm: states of the model's width."""

    field: str
    config: ImageStates
    width: int
    runtime: Runtime

    @nn.compact
    def __call__(self, inputs: DenoiserInputs) -> Conditioning:
        run, states = self.runtime, inputs.segment_fields[self.field]  # [b, n, m, e]
        b, n, m, e = states.shape
        whole = partial(nn.with_logical_partitioning, names=(None,))
        norm = partial(
            nn.LayerNorm,
            epsilon=1e-5,  # PyTorch's own, which published code leaves as it is
            dtype=jnp.float32,
            scale_init=whole(nn.initializers.ones_init()),
            bias_init=whole(nn.initializers.zeros_init()),
        )
        linear = partial(dense, dtype=run.dtype, dot_general=run.dot_general)
        x = states.astype(jnp.float32).reshape(b, n * m, e)
        if self.config.positions:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, None))
            # Flax types the boxed initial value; `param` returns it unboxed.
            positions: Any = self.param("positions", init, (m, e))
            x = x + jnp.tile(positions, (n, 1))
        x = norm(name="norm_in")(x).astype(run.dtype)
        x = nn.gelu(linear(e, ("text_states", "embed"), name="up")(x), approximate=False)
        x = norm(name="norm_out")(linear(self.width, ("embed", "text_out"), name="out")(x))
        x = run.constrain(x.astype(run.dtype), "batch", "text_tokens", "width")
        ids = jnp.repeat(jnp.arange(1, n + 1, dtype=jnp.int32), m)
        return Conditioning(image=(x, jnp.broadcast_to(ids, (b, n * m))))
