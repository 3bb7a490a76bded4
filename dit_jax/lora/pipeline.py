"""Sampling with adapters: of a run that trained them, and of others that are named beside it.

They adapt the run's own model; of a model with an expert, those at ``expert=PATH`` adapt the expert.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.config import VideoRun
from dit_jax.files import check_exists, refuse_if
from dit_jax.lora import files
from dit_jax.lora.adapters import Adapter, LoraModel, as_params, join, merge, together
from dit_jax.lora.run import LoraRun, open_base, restore_adapter
from dit_jax.sampling.pipeline import Pipeline, check_finite, stored_run
from dit_jax.sampling.sampler import Experts
from dit_jax.types import Params

EXPERT = "expert="  # Before the path of an adapter.


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedPipeline(Pipeline):
    """A pipeline of a model with adapters; ``checkpointer`` is that of the base."""

    adapters: tuple[Adapter, ...] = ()
    of_expert: tuple[Adapter, ...] = ()
    merged: bool = True
    """Whether adapters are added to the weights, or computed beside them."""

    @cached_property
    def model(self) -> Any:
        model = super().model
        return model if self.merged else LoraModel(model.config, model.runtime)

    @cached_property
    def params(self) -> Params | Experts:
        parts = self.config, self.mesh, self.codec, self.checkpointer, self.step, self.over_context
        params = Pipeline(*parts).params
        if not isinstance(params, Experts):
            return self._adapt(params, self.adapters)
        own, expert = self._adapt(params.high, self.adapters), params.low
        return params._replace(high=own, low=self._adapt(expert, self.of_expert))

    def _adapt(self, params: Params, adapters: Sequence[Adapter]) -> Params:
        if self.merged:
            return merge(params, adapters)
        # Small beside the model, and whole on every device.
        whole = NamedSharding(self.mesh, PartitionSpec())
        return join(jax.device_put(as_params(together(adapters)), whole), params)


def open_adapted(
    config: VideoRun,
    mesh: Any,
    codec: Any,
    checkpointer: Any,
    step: int,
    over_context: bool,
    lora: Sequence[str],
    unmerged: bool,
) -> AdaptedPipeline:
    """The pipeline of a run, with its own adapters if it trained some and those at the paths ``lora``;
    reads and checks them, and not yet the base."""
    adapters: tuple[list[Adapter], list[Adapter]] = [], []  # Of the run's own model, of its expert.
    if isinstance(config, LoraRun):
        adapters[0].append(
            checked(restore_adapter(config, checkpointer, step, mesh), config.output)
        )
        checkpointer.close()
        checkpointer, step = open_base(config)
    for one in lora:
        path, weight = split_weight(one.removeprefix(EXPERT))
        of_expert = one.startswith(EXPERT)
        message = f"--lora {one!r}: the run has no expert (expert.path). Leave {EXPERT!r} out."
        refuse_if([(of_expert and config.expert.path is None, message)])
        adapter = open_adapter(path, config, mesh)
        adapters[of_expert].append(dataclasses.replace(adapter, scale=weight * adapter.scale))
    parts = config, mesh, codec, checkpointer, step, over_context
    return AdaptedPipeline(*parts, *map(tuple, adapters), not unmerged)


def split_weight(text: str) -> tuple[str, float]:
    """``PATH`` or ``PATH:0.8`` as a path and a weight, 1 if there is none."""
    path, _, last = text.rpartition(":")
    with contextlib.suppress(ValueError):
        weight = float(last)
        if path and abs(weight) < float("inf"):
            return path, weight
    return text, 1.0


def open_adapter(path: str, config: VideoRun, mesh: Any) -> Adapter:
    """The adapter of a run or a file for the model of a config; refused if it is of another."""
    place = check_exists(path, "--lora", "give a run that trained adapters, or a file of them")
    if not (place / "checkpoints").is_dir():
        adapter = files.read_adapter(place, config)
        files.check_adapter(adapter, config, mesh, repr(path))
        return checked(adapter, path)
    checkpointer, step, own = stored_run(place)
    message = f"--lora {path!r} is a {type(own).__name__}: give a run that trained adapters."
    refuse_if([(not isinstance(own, LoraRun), message)])
    assert isinstance(own, LoraRun)
    adapter = restore_adapter(own, checkpointer, step, mesh)
    checkpointer.close()
    files.check_adapter(adapter, config, mesh, repr(path))
    return checked(adapter, path)


def checked(adapter: Adapter, where: str) -> Adapter:
    """The adapter, whose values are finite."""
    check_finite(as_params(adapter), where)
    return adapter
