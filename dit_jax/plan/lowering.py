"""The real steps, compiled for a topology: the train step and one step of the solver.

Nothing is initialised and no data is opened: state, batch and arguments are shapes with shardings. The
compiler is the one that TPUs run (libtpu's); what it refuses for want of memory raises ``DoesNotFit``,
and what it fails at otherwise ``CompilerFailed``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from dit_jax.config import Run, VideoRun
from dit_jax.plan.abstract import AbstractStep, AbstractTask, abstract_denoise, abstract_task
from dit_jax.plan.kernels import Kernel, find_kernels, traced_flops
from dit_jax.training import (
    abstract_params,
    abstract_state,
    make_optimizer,
    make_step,
    split,
)

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_USED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} (?:hbm|vmem)"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Scoped allocation with size {_SIZE} and limit {_SIZE} "),
)
_SPACE = re.compile(r"memory space (\w+)|(Vmem)Oom")
_KERNEL = re.compile(r"allocating on stack for %([\w-]+)")


def _first_line(message: str) -> str:
    """Of the compiler's, and the next where the first is but a heading."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no message"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


class CompilerFailed(ValueError):
    """The compiler cannot compile a program, for another reason than memory."""

    def __init__(self, message: str) -> None:
        """``message`` is the compiler's."""
        super().__init__(
            f"the compiler failed: {_first_line(message)}. Another mesh, model.dit.remat or "
            "attention.kernel makes another program."
        )


class DoesNotFit(ValueError):
    """The compiler found no way to keep a program within a chip's memory."""

    def __init__(self, message: str) -> None:
        """``message`` is the compiler's."""
        found = next((match for form in _USED if (match := form.search(message))), None)
        self.used = float(found.group(1)) * _UNITS[found.group(2)] if found else None
        self.capacity = float(found.group(3)) * _UNITS[found.group(4)] if found else None
        space = _SPACE.search(message)
        self.space = (space.group(1) or space.group(2)).lower() if space else "hbm"
        """hbm, or a kernel's own: vmem."""
        kernel = _KERNEL.search(message)
        name = kernel.group(1) if kernel else ""
        told = _first_line(message)
        if self.used and self.capacity and self.space == "hbm":
            told = f"the program needs {self.used / 1e9:.1f} of {self.capacity / 1e9:.1f} GB of HBM"
        elif self.used and self.capacity:
            used, capacity = self.used / 2**20, self.capacity / 2**20
            told = f"{name or 'a kernel'} needs {used:.4g} of {capacity:.4g} MiB of {self.space}"
        self.reason = f"does not fit: {told}"
        """Without the remedy."""
        super().__init__(f"{self.reason}. {_remedy(self.space, name)}")


def _remedy(space: str, kernel: str) -> str:
    if space == "hbm":
        return (
            "Spread it over more devices (mesh.fsdp, mesh.context); in training, recompute more "
            "(model.dit.remat), or split the batch (optimizer.accumulate) into parts whose rows still "
            "divide over mesh.data x mesh.fsdp."
        )
    if space != "vmem" or not kernel.startswith("splash"):
        return "More devices do not help: if it is attention's, try other attention.splash blocks."
    back = "" if "_fwd" in kernel else "_backward"
    return (
        "More devices do not help: make attention.splash's blocks smaller "
        f"(block_q{back}, block_kv{back}, block_kv{back}_compute)."
    )


class State(NamedTuple):
    """Bytes of what a run keeps from step to step, on one device."""

    params: float
    ema: float
    optimizer: float


class Memory(NamedTuple):
    """Bytes on one device, as the compiler laid them out."""

    arguments: float
    temporary: float
    outputs: float
    aliased: float
    """Outputs that take the place of arguments."""
    host: float
    """In the host's memory."""

    @property
    def peak(self) -> float:
        return self.arguments + self.temporary + self.outputs - self.aliased


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, and what was known of it before."""

    text: str
    """Optimized HLO."""
    kernels: list[Kernel]
    parameters: int
    state: State | None
    memory: Memory
    tokens: float
    model_flops: float
    traced_flops: float
    """Products in the traced program, over all devices."""
    compiler_flops: float | None
    """XLA's own cost analysis: bodies of loops once, kernels not at all."""
    compiler_bytes: float | None
    compile_seconds: float


def size(tree: Any) -> float:
    """Bytes of a tree of abstract, sharded arrays on one device."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


class _Step(NamedTuple):
    function: Any
    arguments: tuple[Any, ...]
    parameters: int
    state: State | None
    tokens: float
    flops: float


def _train_step(config: Any, mesh: Mesh) -> _Step:
    if hasattr(config, "abstract_task"):  # Another kind of run than a model's.
        task = AbstractTask(**config.abstract_task(mesh))
    else:
        task = abstract_task(_of_model(config, "train"), mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    shapes, shardings = abstract_state(task.init, optimizer, mesh, task.trainable)
    every = abstract_params(task.init, mesh)
    of_frozen = [split(one, task.trainable)[1] for one in every]
    state, frozen = (
        jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), *pair
        )
        for pair in ((shapes, shardings), of_frozen)
    )
    step = make_step(task.loss, optimizer, config.optimizer, config.seed, shardings)
    kept = State(size(state.params), size(state.ema), size(state.opt_state))
    return _Step(
        step, (state, task.batch, frozen), _count(state.params), kept, task.tokens, task.flops
    )


def _sampling_step(config: Run, mesh: Mesh) -> _Step:
    config = _of_model(config, "sample")
    step = abstract_denoise(config, mesh)
    made = config.sampling
    size = config.codec.latent_size(made.frames, made.height, made.width)
    tokens = config.model.patch.num_tokens(*size)
    params = _count(step.arguments[0])
    return _Step(step.function, step.arguments, params, None, float(tokens), step.flops)


def _of_model(config: Run, what: str) -> VideoRun:
    if not isinstance(config, VideoRun):
        raise ValueError(
            f"--what {what} is of models, and the config is a codec's: plan its --what train, encode "
            "or decode."
        )
    return config


def _codec_part(what: Literal["encode", "decode"], config: Any, mesh: Mesh) -> _Step:
    if not hasattr(config, "abstract_part"):
        raise ValueError(
            f"--what {what} is of codecs, and the config is a model's: give a codec's, such as "
            "configs/codec_wan.py."
        )
    step = AbstractStep(*config.abstract_part(mesh, what))
    crop, (_, space, _) = config.data.crop, config.model.stride
    latents = crop.rows * config.tiles.frames * (crop.height // space) * (crop.width // space)
    params = _count(step.arguments[0])
    return _Step(step.function, step.arguments, params, None, float(latents), step.flops)


STEPS = {
    "train": _train_step,
    "sample": _sampling_step,
    "encode": partial(_codec_part, "encode"),
    "decode": partial(_codec_part, "decode"),
}
"""What can be planned."""


def state_bytes(config: Run, mesh: Mesh) -> float:
    """What a run's state takes on one device, without compiling anything."""
    state = _train_step(config, mesh).state
    assert state is not None
    return sum(state)


def compile_step(what: str, config: Run, mesh: Mesh) -> Program:
    """Compiles one of ``STEPS`` for the devices of a mesh.

    Raises:
        DoesNotFit: where the chips have too little memory.
        CompilerFailed: where the compiler cannot compile it otherwise.
        ValueError: where the config does not go together with the mesh.
    """
    step = STEPS[what](config, mesh)
    clock = time.perf_counter()
    traced = step.function.trace(*step.arguments)
    try:
        compiled = traced.lower().compile()
    except Exception as error:
        # JAX tells kernels' errors by private classes of its own, and by this builtin.
        if not (type(error).__module__.startswith("jax") or isinstance(error, NotImplementedError)):
            raise
        refusal = DoesNotFit if "RESOURCE_EXHAUSTED" in str(error) else CompilerFailed
        raise refusal(str(error)) from error
    seconds = time.perf_counter() - clock
    used: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis() or {}
    return Program(
        text=compiled.as_text() or "",
        kernels=find_kernels(traced.jaxpr),
        parameters=step.parameters,
        state=step.state,
        memory=Memory(
            arguments=used.argument_size_in_bytes,
            temporary=used.temp_size_in_bytes,
            outputs=used.output_size_in_bytes,
            aliased=used.alias_size_in_bytes,
            host=used.host_temp_size_in_bytes + used.host_argument_size_in_bytes,
        ),
        tokens=step.tokens,
        model_flops=step.flops,
        traced_flops=traced_flops(traced.jaxpr, mesh.size),
        compiler_flops=costs.get("flops"),
        compiler_bytes=costs.get("bytes accessed"),
        compile_seconds=seconds,
    )
