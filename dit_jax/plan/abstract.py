"""The text-to-video task without data or devices: what a compiler needs to know of it.

Everything is shapes and shardings, so that a step can be compiled for a machine that is not there
(``python -m dit_jax.plan``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import VideoRun
from dit_jax.diffusion.solvers import SOLVERS
from dit_jax.model import TextStatesConfig, forward_flops
from dit_jax.parallel import batch_sharding, token_multiple
from dit_jax.sampling import Generator, Request, make_inputs
from dit_jax.training import abstract_params
from dit_jax.training.step import Filter, InitParams, LossFn, everything
from dit_jax.training.video_task import batch_loss, check_layout, init_params, make_model
from dit_jax.types import Batch, is_token_field


class AbstractTask(NamedTuple):
    """What the train step is made of, and what a batch is worth."""

    init: InitParams
    loss: LossFn
    batch: Any
    """Of ``jax.ShapeDtypeStruct`` with shardings."""
    tokens: float
    """Tokens of the global batch, no padding assumed."""
    flops: float
    """Model flops of a step on it: three times the forward pass, every row one segment."""
    trainable: Filter = everything


class AbstractStep(NamedTuple):
    """A jitted function, arguments for it without contents, and its model flops."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float


def abstract_array(
    shape: tuple[int, ...], dtype: Any, sharding: NamedSharding
) -> jax.ShapeDtypeStruct:
    """An array without contents, and how it lies on the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def abstract_batch(config: VideoRun, mesh: Mesh) -> Batch:
    """The shapes of a global batch, and how it lies on the mesh."""
    packing, model = config.data.packing, config.model
    b, l, s, n = packing.rows, packing.row_tokens, packing.row_text, packing.row_segments

    def field(*shape: int, dtype: Any = jnp.int32, tokens: bool = False) -> Any:
        return abstract_array((b, *shape), dtype, batch_sharding(mesh, 1 + len(shape), tokens))

    fields = {name: one.field(model) for name, one in model.conditioners.items()}
    if isinstance(model.text, TextStatesConfig):
        text = field(s, model.text.dim, dtype=jnp.float32)
    else:
        text = field(s)
    return Batch(
        tokens=field(l, model.patch.dim, dtype=jnp.float32, tokens=True),
        positions=field(l, 3, dtype=jnp.float32, tokens=True),
        segment_ids=field(l, tokens=True),
        frame_ids=field(l, tokens=True),
        token_ids=field(l, tokens=True),
        text=text,
        text_segment_ids=field(s),
        sample_ids=field(n, dtype=jnp.uint32),
        num_tokens=field(n),
        num_frames=field(n),
        token_fields={
            name: field(l, *one.shape, dtype=one.dtype, tokens=True)
            for name, one in fields.items()
            if one.of == "token"
        },
        segment_fields={
            "fps": field(n, dtype=jnp.float32),
            **{
                name: field(n, *one.shape, dtype=one.dtype)
                for name, one in fields.items()
                if one.of == "segment"
            },
        },
    )


def abstract_task(config: VideoRun, mesh: Mesh) -> AbstractTask:
    """The task of a config on a mesh; opens no data."""
    packing = config.data.packing
    check_layout(config, mesh)
    model = make_model(config.model, mesh, config.attention)
    flops = 3 * forward_flops(
        config.model,
        np.full(packing.rows, packing.row_tokens),
        np.full(packing.rows, packing.row_text),
    )
    return AbstractTask(
        init=partial(init_params, model),
        loss=partial(batch_loss, model, config.diffusion),
        batch=abstract_batch(config, mesh),
        tokens=float(packing.rows * packing.row_tokens),
        flops=float(flops.sum()),
    )


def abstract_denoise(config: VideoRun, mesh: Mesh, rows: int = 1) -> AbstractStep:
    """One step of the solver for ``rows`` clips of the size in ``config.sampling``, guided if it is."""
    made, model_config = config.sampling, config.model
    model = make_model(model_config, mesh, config.attention)
    generator = Generator(model, config.diffusion, made)
    states = None
    if isinstance(model_config.text, TextStatesConfig):
        states = np.zeros((model_config.text.max_tokens - 1, model_config.text.dim), np.float32)
    size = config.codec.latent_size(made.frames, made.height, made.width)
    fps = config.codec.latent_fps(made.fps)
    request = Request("any", *size, fps, 0, states)
    count = model_config.patch.num_tokens(*size)
    multiple = token_multiple(mesh, config.attention)
    length = -(-count // multiple) * multiple
    condition = make_inputs([request] * rows, model_config, length)
    tokens: dict[str, Any] = condition.token_fields
    segments: dict[str, Any] = condition.segment_fields
    for name, one in model_config.conditioners.items():
        kind = one.field(model_config)
        here, middle = (tokens, length) if kind.of == "token" else (segments, 1)
        here[name] = np.zeros((rows, middle, *kind.shape), kind.dtype)
    condition = jax.eval_shape(generator.prepare_fields, condition)

    def field(value: Any, along_tokens: bool, times: int = 1) -> jax.ShapeDtypeStruct:
        shape = (value.shape[0] * times, *value.shape[1:])
        # Two that are put together lie as each of them did.
        sharding = batch_sharding(mesh, value.ndim, along_tokens, rows=rows)
        return abstract_array(shape, value.dtype, sharding)

    placed = jax.tree.map(lambda flag, x: field(x, flag), is_token_field(condition), condition)
    guided = 2 if made.cfg_scale != 1 else 1
    letters = condition.text_segment_ids.shape[1]
    shapes, shardings = abstract_params(partial(init_params, model), mesh, over_context=False)
    params = jax.tree.map(
        lambda x, s: abstract_array(x.shape, x.dtype, s),
        jax.eval_shape(generator.cast, shapes),
        shardings,
    )
    encode = partial(model.apply, method="encode_text")
    read = jax.eval_shape(encode, shapes, condition.text, condition.text_segment_ids)
    text = field(read, False, guided)
    whole = NamedSharding(mesh, PartitionSpec())
    level, index = abstract_array((), jnp.float32, whole), abstract_array((), jnp.int32, whole)
    carry = jax.tree.map(
        lambda x: field(x, True) if x.ndim else level,
        jax.eval_shape(generator.begin, condition, level),
    )
    flops = forward_flops(model_config, np.array([count]), np.array([letters]), encode_text=False)
    flops = SOLVERS[made.solver].evaluations * flops.sum()
    arguments = (
        params,
        carry,
        placed,
        text,
        field(condition.text_segment_ids, False, guided),
        level,
        level,
        index,
    )
    return AbstractStep(generator.step, arguments, float(flops) * rows * guided)
