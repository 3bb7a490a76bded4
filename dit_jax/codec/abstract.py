"""The codec's task without data or devices, and its encoding and decoding of one part of a clip."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.codec.causal_autoencoder import CausalAutoencoder
from dit_jax.codec.crops import ClipBatch
from dit_jax.codec.flops import autoencoder_flops
from dit_jax.codec.run import CodecRun
from dit_jax.codec.sharding import clip_sharding, make_clip_constrain
from dit_jax.codec.train import batch_loss, make_loss
from dit_jax.codec.video_codec import part_step
from dit_jax.parallel import batch_sharding, platform
from dit_jax.types import FrameGrid


def abstract_array(shape: Any, dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """An array without contents, and how it lies on the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def abstract_codec_task(config: CodecRun, mesh: Mesh) -> dict[str, Any]:
    """The fields of ``plan``'s task of a codec's run on a mesh; opens no data. Tokens are latents."""
    crop, (time, space, _) = config.data.crop, config.model.stride
    loss = make_loss(config, mesh)
    shape = (crop.rows, crop.frames, crop.height, crop.width, 3)
    video: Any = abstract_array(shape, jnp.uint8, batch_sharding(mesh, 5, False))
    counts: Any = abstract_array((crop.rows,), jnp.int32, batch_sharding(mesh, 1, False))
    latents = FrameGrid(time).latents(crop.frames) * crop.height * crop.width // space**2
    flops = sum(autoencoder_flops(config.model, crop.frames, crop.height, crop.width))
    return dict(
        init=loss.init,
        loss=partial(batch_loss, loss),
        batch=ClipBatch(video, counts),
        tokens=float(crop.rows * latents),
        flops=3 * crop.rows * flops,
        trainable=loss.trainable,
    )


def abstract_codec_part(
    config: CodecRun, mesh: Mesh, what: Literal["encode", "decode"]
) -> tuple[Any, tuple[Any, ...], float]:
    """One part, not the first, of clips as large as ``data.crop``, which lie over the mesh whole: the
    jitted function, its arguments without contents, and its flops."""
    crop, model_config = config.data.crop, config.model
    time, space, _ = model_config.stride
    h, w = crop.height // space, crop.width // space
    frames = config.tiles.frames
    compute = model_config.computation(platform(mesh), constrain=make_clip_constrain(mesh)(h, w))
    model = CausalAutoencoder(model_config, compute)
    whole = NamedSharding(mesh, PartitionSpec())
    over = clip_sharding(mesh, crop.rows, h, w)
    frame = jnp.zeros((1, 1, space, space, model_config.channels))
    fresh: Any = jax.eval_shape(lambda: model.init(jax.random.key(0), frame, mutable="params"))
    params = jax.tree.map(lambda x: abstract_array(x.shape, x.dtype, whole), nn.unbox(fresh))
    if what == "encode":
        first = (crop.rows, 1, crop.height, crop.width, model_config.channels)
        part = (crop.rows, frames * time, *first[2:])
    else:
        first = (crop.rows, 1, h, w, model_config.latent_channels)
        part = (crop.rows, frames, *first[2:])

    def step(params: Any, cache: Any, x: jax.Array, first: bool = False) -> Any:
        return part_step(model, params, cache, x, what, first)

    begin = jax.ShapeDtypeStruct(first, jnp.float32)
    _, left = jax.eval_shape(partial(step, first=True), params, None, begin)
    cache = jax.tree.map(lambda x: abstract_array(x.shape, x.dtype, over), left)
    layouts = jax.tree.map(lambda _: over, left)
    jitted = jax.jit(step, donate_argnums=1, out_shardings=(over, layouts))
    given = abstract_array(part, jnp.float32, over)
    span = 1 + frames * time
    both = autoencoder_flops(model_config, span, crop.height, crop.width)
    one = autoencoder_flops(model_config, 1, crop.height, crop.width)
    at = 0 if what == "encode" else 1
    return jitted, (params, cache, given), crop.rows * (both[at] - one[at])
