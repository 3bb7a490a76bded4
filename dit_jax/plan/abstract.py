"""The steps that can be planned, as shapes and shardings without data or devices, and their compiling
for a topology by the compiler that TPUs run (libtpu's)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import Run, VideoRun
from dit_jax.diffusion.solvers import SOLVERS
from dit_jax.files import refuse_if
from dit_jax.model import ModelConfig, TextStatesConfig, forward_flops
from dit_jax.parallel import batch_sharding, token_multiple
from dit_jax.sampling import Generator, Request, make_inputs
from dit_jax.training import abstract_params, abstract_state, make_optimizer, make_step, split
from dit_jax.training.step import Filter, InitParams, LossFn, everything
from dit_jax.training.video_task import batch_loss, check_layout, init_params, make_model
from dit_jax.types import Batch, is_token_field


class AbstractTask(NamedTuple):
    """What the train step is made of, and what a batch is worth."""

    init: InitParams
    loss: LossFn
    batch: Any  # Of ``jax.ShapeDtypeStruct`` with shardings.
    tokens: float  # Of the global batch, no padding assumed.
    flops: float  # Model flops of a step: three times the forward pass, every row one segment.
    trainable: Filter = everything


class AbstractStep(NamedTuple):
    """A jitted function, and arguments for it without contents."""

    function: Any
    arguments: tuple[Any, ...]
    flops: float  # Model flops, over all devices.
    parameters: int
    tokens: float
    # Bytes of what a run keeps from step to step, on one device; None if nothing is trained.
    state: dict[str, float] | None = None


def _sharded(shapes: Any, shardings: Any) -> Any:
    """A tree of arrays without contents that know how they lie on the mesh."""
    one = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x, s: one(x.shape, x.dtype, sharding=s), shapes, shardings)


def _sharded_rows(mesh: Mesh, rows: Any, count: int | None = None) -> Any:
    """The same of a struct of rows; ``count`` is their number if it may be smaller than the mesh."""
    shard, flags = partial(batch_sharding, mesh, rows=count), is_token_field(rows)
    return _sharded(rows, jax.tree.map(lambda x, flag: shard(x.ndim, flag), rows, flags))


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _bytes(tree: Any) -> float:
    """Of a tree of abstract, sharded arrays in the memory of one device."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    shards = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in leaves)
    return float(sum(math.prod(shape) * size for shape, size in shards))


def _conditioner_fields(model: ModelConfig, b: int, l: int, n: int) -> tuple[Any, Any]:
    """The token fields and the segment fields that the model's conditioners read."""
    tokens, segments = {}, {}
    for name, conditioner in model.conditioners.items():
        kind = conditioner.field(model)
        fields, count = (tokens, l) if kind.of == "token" else (segments, n)
        fields[name] = jax.ShapeDtypeStruct((b, count, *kind.shape), kind.dtype)
    return tokens, segments


# --- Training ---


def abstract_batch(config: VideoRun, mesh: Mesh) -> Batch:
    """The shapes of a global batch, and how it lies on the mesh."""
    packing, model = config.data.packing, config.model
    b, l, s, n = packing.rows, packing.row_tokens, packing.row_text, packing.row_segments

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((b, *shape), dtype)

    real = partial(array, dtype=jnp.float32)
    text = real(s, model.text.dim) if isinstance(model.text, TextStatesConfig) else array(s)
    token_fields, segment_fields = _conditioner_fields(model, b, l, n)
    batch = Batch(
        tokens=real(l, model.patch.dim),
        positions=real(l, 3),
        segment_ids=array(l),
        frame_ids=array(l),
        token_ids=array(l),
        text=text,
        text_segment_ids=array(s),
        sample_ids=array(n, dtype=jnp.uint32),
        num_tokens=array(n),
        num_frames=array(n),
        token_fields=token_fields,
        segment_fields={"fps": real(n), **segment_fields},
    )
    return _sharded_rows(mesh, batch)


def abstract_task(config: VideoRun, mesh: Mesh) -> AbstractTask:
    """The task of a config on a mesh; opens no data."""
    packing = config.data.packing
    check_layout(config, mesh)
    model = make_model(config.model, mesh, config.attention)
    tokens, text = (np.full(packing.rows, n) for n in (packing.row_tokens, packing.row_text))
    return AbstractTask(
        init=partial(init_params, model),
        loss=partial(batch_loss, model, config.diffusion),
        batch=abstract_batch(config, mesh),
        tokens=float(packing.rows * packing.row_tokens),
        flops=float((3 * forward_flops(config.model, tokens, text)).sum()),
    )


def train_step(config: Any, mesh: Mesh) -> AbstractStep:
    """The step of ``dit_jax.train``; a run of another kind than a model's knows its own task."""
    if isinstance(config, VideoRun):
        task = abstract_task(config, mesh)
        if (adapt := getattr(config, "adapt", None)) is not None:
            # Kernels of a frozen base have no gradient, which is one product of three.
            task = adapt(task, mesh)._replace(flops=task.flops * 2 / 3)
    else:
        task = AbstractTask(**config.abstract_task(mesh))
    optimizer = make_optimizer(config.optimizer, config.steps)
    of_state = {"trainable": task.trainable, "config": config.optimizer}
    shapes, shardings = abstract_state(task.init, optimizer, mesh, **of_state)
    frozen = (split(one, task.trainable)[1] for one in abstract_params(task.init, mesh))
    state = _sharded(shapes, shardings)
    step = make_step(task.loss, optimizer, config.optimizer, config.seed, shardings)
    parts = {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}
    kept = {name: _bytes(tree) for name, tree in parts.items()}
    arguments = (state, task.batch, _sharded(*frozen))
    return AbstractStep(step, arguments, task.flops, _count(state.params), task.tokens, kept)


# --- Sampling, encoding and decoding ---


def abstract_denoise(config: Run, mesh: Mesh, rows: int = 1) -> AbstractStep:
    """One step of the solver for ``rows`` clips of the size in ``config.sampling``, guided if it is."""
    message = "--what sample is of models, and the config is a codec's: give a model's."
    refuse_if([(not isinstance(config, VideoRun), message)])
    assert isinstance(config, VideoRun)
    sampling, model_config, text = config.sampling, config.model, config.model.text
    model = make_model(model_config, mesh, config.attention)
    generator = Generator(model, config.diffusion, sampling)
    states = None
    if isinstance(text, TextStatesConfig):
        states = np.zeros((text.max_tokens - 1, text.dim), np.float32)
    size = config.codec.latent_size(sampling.frames, sampling.height, sampling.width)
    request = Request("any", *size, config.codec.latent_fps(sampling.fps), 0, states)
    count, multiple = model_config.patch.num_tokens(*size), token_multiple(mesh, config.attention)
    length = -(-count // multiple) * multiple
    inputs = make_inputs([request] * rows, model_config, length)
    tokens, segments = _conditioner_fields(model_config, rows, length, 1)
    inputs.token_fields.update(tokens)
    inputs.segment_fields.update(segments)
    inputs = jax.eval_shape(generator.prepare_fields, inputs)
    guided = 2 if sampling.cfg_scale != 1 else 1

    def texts(x: Any) -> jax.ShapeDtypeStruct:
        """Those of the prompts and of the empty ones; two that are put together lie as each did."""
        sharding = batch_sharding(mesh, x.ndim, False, rows=rows)
        return jax.ShapeDtypeStruct((guided * rows, *x.shape[1:]), x.dtype, sharding=sharding)

    shapes, shardings = abstract_params(partial(init_params, model), mesh, over_context=False)
    encode, ids = partial(model.apply, method="encode_text"), inputs.text_segment_ids
    whole = NamedSharding(mesh, PartitionSpec())
    level = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    carry = jax.eval_shape(generator.begin, inputs, level)
    over_tokens = partial(batch_sharding, mesh, tokens=True, rows=rows)
    arguments = (
        _sharded(jax.eval_shape(generator.cast, shapes), shardings),
        _sharded(carry, jax.tree.map(lambda x: over_tokens(x.ndim) if x.ndim else whole, carry)),
        _sharded_rows(mesh, inputs, rows),
        texts(jax.eval_shape(encode, shapes, inputs.text, ids)),
        texts(ids),
        *(level, level, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)),
    )
    letters = np.array([ids.shape[1]])
    flops = forward_flops(model_config, np.array([count]), letters, encode_text=False).sum()
    flops = float(SOLVERS[sampling.solver].evaluations * flops) * rows * guided
    return AbstractStep(generator.step, arguments, flops, _count(shapes), float(count))


def codec_part(what: str, config: Any, mesh: Mesh) -> AbstractStep:
    """One part (``tiles.frames``) of encoding or decoding clips as large as ``data.crop``."""
    message = f"--what {what} is of codecs, and the config is a model's: give a codec's."
    refuse_if([(not hasattr(config, "abstract_part"), message)])
    step, arguments, flops = config.abstract_part(mesh, what)
    crop, (_, space, _) = config.data.crop, config.model.stride
    latents = crop.rows * config.tiles.frames * (crop.height // space) * (crop.width // space)
    return AbstractStep(step, arguments, flops, _count(arguments[0]), float(latents))


STEPS: dict[str, Callable[[Any, Mesh], AbstractStep]] = {
    "train": train_step,
    "sample": abstract_denoise,
    "encode": partial(codec_part, "encode"),
    "decode": partial(codec_part, "decode"),
}
"""What can be planned."""


# --- Compiling ---

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_USED = (
    rf"Used {_SIZE} of {_SIZE} (?:hbm|vmem)",
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"Scoped allocation with size {_SIZE} and limit {_SIZE} ",
)


def _first_line(message: str) -> str:
    """Of the compiler's, and the next if the first is but a heading."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no message"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


class CompilerFailed(ValueError):
    """The compiler, whose message it is, cannot compile a program, for another reason than memory."""

    def __init__(self, message: str) -> None:
        remedy = "Another mesh, model.dit.remat or attention.kernel makes another program."
        super().__init__(f"the compiler failed: {_first_line(message)}. {remedy}")


class DoesNotFit(ValueError):
    """The compiler, whose message it is, found no way to keep a program within a chip's memory, or a
    kernel's blocks within its own (vmem)."""

    def __init__(self, message: str) -> None:
        sizes = next(filter(None, (re.search(form, message) for form in _USED)), None)
        kernel = re.search(r"allocating on stack for %([\w-]+)", message)
        space = re.search(r"memory space (\w+)|(Vmem)Oom", message)
        self.space = (space.group(1) or space.group(2)).lower() if space else "hbm"
        reason = _first_line(message)
        if sizes:
            number, unit, limit, limit_unit = sizes.groups()
            used, capacity = float(number) * _UNITS[unit], float(limit) * _UNITS[limit_unit]
            reason = f"the program needs {used / 1e9:.1f} of {capacity / 1e9:.1f} GB of HBM"
            if self.space != "hbm":
                name, mib = kernel.group(1) if kernel else "a kernel", 2**20
                amounts = f"{used / mib:.4g} of {capacity / mib:.4g} MiB"
                reason = f"{name} needs {amounts} of {self.space}"
        remedy = (
            "Spread it over more devices (mesh.fsdp, mesh.context); in training, recompute more "
            "(model.dit.remat), or split the batch (optimizer.accumulate) into parts whose rows still "
            "divide over mesh.data x mesh.fsdp."
        )
        if self.space != "hbm":
            blocks = "attention.splash blocks (of a dkv kernel the *_backward ones)"
            remedy = f"More devices do not help: if it is attention's, give smaller {blocks}."
        self.reason = f"does not fit: {reason}"  # Without the remedy.
        super().__init__(f"{self.reason}. {remedy}")


def compile_step(step: AbstractStep) -> tuple[Any, Any, float]:
    """The traced program of a step, the compiled one, and the seconds that this took."""
    start = time.perf_counter()
    traced = step.function.trace(*step.arguments)
    try:
        compiled = traced.lower().compile()
    except Exception as error:
        # JAX tells kernels' errors by private classes of its own, and by this builtin.
        if not (type(error).__module__.startswith("jax") or isinstance(error, NotImplementedError)):
            raise
        refusal = DoesNotFit if "RESOURCE_EXHAUSTED" in str(error) else CompilerFailed
        raise refusal(str(error)) from error
    return traced, compiled, time.perf_counter() - start
