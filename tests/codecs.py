"""Tiny causal autoencoders with random weights, made without compiling their initialisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dit_jax import interop
from dit_jax.codec import folders
from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig, param_shapes
from dit_jax.codec.codec import TileConfig, VideoCodec

SMALL = CausalAutoencoderConfig(
    latent_channels=3,
    widths=(4, 4, 4),
    strides=((2, 2), (2, 1)),
    layers=1,
    shift=(0.1, -0.2, 0.0),
    scale=(0.5, 2.0, 1.0),
)
"""4 x 2 x 2 pixels to a latent."""


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Parameters of these shapes, none of which is zero."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        normal, kind = rng.normal(size=leaf.shape), path[-1].key
        if kind == "kernel":
            value = normal / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            value = {"scale": 1 + 0.1 * normal, "bias": 0.1 * normal}[kind]
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_params(config: CausalAutoencoderConfig, seed: int = 0) -> Any:
    return random_like(param_shapes(config), seed)


def normal_params(model: nn.Module, *inputs: Any, seed: int = 0) -> Any:
    """Normal parameters of deviation 0.3 of a model; its initialisers take long to compile."""
    rng = np.random.default_rng(seed)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes)


def make_codec(
    config: CausalAutoencoderConfig = SMALL, tiles: TileConfig | None = None, **more: Any
) -> VideoCodec:
    return VideoCodec("tiny", "hash", config, random_params(config), tiles or TileConfig(), **more)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def image_config(**settings: Any) -> CausalAutoencoderConfig:
    """Stable Diffusion's autoencoder, but for these settings of Diffusers'."""
    sizes = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    return folders.autoencoder_from_diffusers(sizes | settings)


def tiny_images(*widths: int, norm_groups: int = 2) -> CausalAutoencoderConfig:
    sizes = {"block_out_channels": list(widths), "layers_per_block": 1}
    return image_config(**sizes, norm_num_groups=norm_groups)


def write_images(folder: Path, config: CausalAutoencoderConfig) -> Path:
    """A folder of Diffusers' with random weights."""
    arrays = folders.autoencoder_map(config).export(random_params(config))
    interop.write_folder(folder, diffusers_config(config), arrays)
    return folder


def diffusers_config(config: CausalAutoencoderConfig) -> dict[str, Any]:
    """The ``config.json`` of an autoencoder, but for what is Diffusers' default."""
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scale[0],
        "shift_factor": config.shift[0] or None,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.post_quant,
        "use_quant_conv": config.quant,
    }
