"""A run that trains adapters of another run's model.

The base is frozen: an argument of the compiled step, sharded, read straight into the dtype that it is
kept in. Optimizer, averages and checkpoints hold the adapters alone. A config takes its model, and all
that belongs to it, from the stored config of the base::

    lora_run("runs/base", output="runs/mine", data=..., lora=LoraConfig(rank=16), steps=500)
"""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from dit_jax.config import Run, VideoRun, differences, read_config, stored_config
from dit_jax.files import as_path, check_exists, refuse_if
from dit_jax.lora.adapters import (
    EIGHT_BITS,
    Adapter,
    LoraConfig,
    adapted,
    adapter_of,
    add_adapters,
    is_adapter,
    join,
    keep_base,
    read_as,
)
from dit_jax.training import Checkpointer, Evaluator, Task, abstract_params, open_run
from dit_jax.training.step import split
from dit_jax.training.video_task import batch_loss, build_text_to_video, init_params, make_model
from dit_jax.types import Params

TAKEN = ("model", "diffusion", "attention", "codec", "text_encoder", "sampling", "data")
TAKEN += ("expert",)
# What must be as in the base, but for how it is computed and where captions are cut.
SAME = ("model.", "diffusion.prediction", "diffusion.path.", "codec.hash", "text_encoder.hash")
MAY_DIFFER = ("scan", "remat", "dtype", "matmul", "max_bytes", "max_tokens")
DROPOUT = 0x10A  # Sets the random numbers of dropout apart from those of noise.


@dataclasses.dataclass(frozen=True)
class LoraRun(VideoRun):
    """A run of training: adapters of a frozen model."""

    paths: ClassVar[tuple[str, ...]] = ("output", "base")

    base: str = "runs/base"
    """Directory of the run whose averaged weights are adapted, trained here or converted."""
    # Of its checkpoint. Unset, the newest; a run stores which one that was.
    base_step: int | None = None
    lora: LoraConfig = LoraConfig()

    def with_hashes(self) -> LoraRun:
        config = super().with_hashes()
        assert isinstance(config, LoraRun)
        return dataclasses.replace(config, base_step=open_base(config)[1])

    def build(self, mesh: Mesh) -> Task:
        def make(*parts: Any) -> Any:
            return adapted(make_model(*parts), self.lora)

        checkpointer, step = open_base(self)
        model, kind = make(self.model, mesh, self.attention), self.lora.base_dtype
        init = partial(init_adapted, model, self.lora)
        jax.eval_shape(
            init, jax.random.key(0)
        )  # Layers and ranks are checked before data is opened.
        task = self.adapt(build_text_to_video(self, mesh, make), mesh)

        def load_frozen(shapes: Params, shardings: Params) -> Params:
            of_base, places = abstract_params(partial(init_params, model), mesh)
            params = checkpointer.restore_ema(step, read_as(of_base, kind), places)
            checkpointer.close()
            if kind not in EIGHT_BITS:
                return params
            keep = jax.jit(partial(keep_base, kind=kind), out_shardings=shardings)
            return keep(params)

        def of_joined(one: Evaluator) -> Evaluator:
            def evaluate(ema: Params, frozen: Params, *rest: Any) -> Any:
                return one.evaluate(join(ema, frozen), {}, *rest)

            return one._replace(evaluate=evaluate)

        def work(batch: Any) -> Any:
            # Of the three products of a linear layer the kernel's gradient is not made.
            whole = task.work(batch)
            return whole._replace(flops=whole.flops * 2 / 3)

        return task._replace(
            name="lora",
            work=work,
            load_frozen=load_frozen,
            evaluators=tuple(map(of_joined, task.evaluators)),
        )

    def adapt(self, task: Any, mesh: Mesh) -> Any:
        """The task of training the model, or what a plan knows of it, as one of training adapters."""
        model = adapted(make_model(self.model, mesh, self.attention), self.lora)

        def loss(params: Params, frozen: Params, batch: Any, key: jax.Array, step: Any) -> Any:
            # Dropout is of training alone: the model that is evaluated gets no such numbers.
            rngs = {"dropout": jax.random.fold_in(key, DROPOUT)}
            seen: Any = SimpleNamespace(config=model.config, apply=partial(model.apply, rngs=rngs))
            return batch_loss(seen, self.diffusion, join(params, frozen), {}, batch, key)

        init = partial(init_adapted, model, self.lora)
        return task._replace(init=init, loss=loss, trainable=is_adapter)


def init_adapted(model: Any, config: LoraConfig, key: jax.Array) -> Params:
    """Fresh parameters with adapters; the base is drawn only if nothing loads it."""
    base = keep_base(init_params(model, key), config.base_dtype)
    return add_adapters(base, config, key)


def lora_run(base: str, template: VideoRun | None = None, **fields: Any) -> LoraRun:
    """A run of adapters of the run ``base``, with the model, the data and all that belongs to them of
    its stored config (or of a ``template``), but for the ``fields`` that are given."""
    if template is None:
        # Not of a checkpoint, which cannot be opened before several processes have joined.
        hint = "give the output directory of a training run"
        where = check_exists(as_path(base) / "config.json", "base", hint)
        template = as_base(read_config(where, Run), base)
    taken = {name: getattr(template, name) for name in TAKEN}
    # Objects of a user's own modules are not stored.
    external = isinstance(taken["data"].source, dict) and "data" not in fields
    message = f"the data of {base!r} are of a module of your own: give data=DataConfig(...)."
    refuse_if([(external, message)])
    measured = (one for one in template.evaluators if not isinstance(one, dict))
    fields = {**taken, "evaluators": tuple(measured), **fields}
    return LoraRun(base=base, **fields)


def base_config(checkpointer: Checkpointer, step: int) -> VideoRun:
    """The stored config of a run that can be a base."""
    where = checkpointer.path(step)
    return as_base(stored_config(checkpointer.config(step), where / "config", Run), str(where))


def as_base(config: Run, where: str) -> VideoRun:
    """The config of a run that can be a base; refused if it cannot."""
    other = f"base {where!r} is a {type(config).__name__}: give a run of a video model."
    nested = f"base {where!r} holds adapters: merge them first (python -m dit_jax.lora merge)."
    refuse_if([(isinstance(config, LoraRun), nested), (not isinstance(config, VideoRun), other)])
    assert isinstance(config, VideoRun)
    return config


def open_base(config: LoraRun) -> tuple[Checkpointer, int]:
    """The checkpoints of the base and its step; refused if its model is another than the config's."""
    checkpointer, step = open_run(config.base, config.base_step)
    stored = base_config(checkpointer, step)
    refuse_if(
        (
            f"{name}.".startswith(SAME) and name.split(".")[-1] not in MAY_DIFFER,
            f"base {config.base!r} has {name} = {before!r}, and the config {now!r}: take the model "
            "from the base (lora_run), or give its run.",
        )
        for name, now, before in differences(config, stored)
    )
    return checkpointer, step


def restore_adapter(config: LoraRun, checkpointer: Checkpointer, step: int, mesh: Mesh) -> Adapter:
    """The averaged adapters of a checkpoint."""
    model = adapted(make_model(config.model, mesh, config.attention), config.lora)
    init = partial(init_adapted, model, config.lora)
    places = (split(one, is_adapter)[0] for one in abstract_params(init, mesh))
    return adapter_of(checkpointer.restore_ema(step, *places), config.lora.scale)
