"""Sampling with adapters: of a run that trained them, and of others that are named beside it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.config import VideoRun, read_config
from dit_jax.files import as_path, check_exists, refuse_if
from dit_jax.lora import files
from dit_jax.lora.adapters import Adapter, LoraModel, as_params, join, merge, together
from dit_jax.lora.run import LoraRun, open_base, restore_adapter
from dit_jax.sampling.pipeline import Pipeline, check_finite, stored_run
from dit_jax.sampling.sampler import Experts
from dit_jax.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedPipeline(Pipeline):
    """A pipeline of a model with adapters; ``checkpointer`` is that of the base."""

    adapters: tuple[Adapter, ...] = ()
    merged: bool = True
    """Whether adapters are added to the weights, or computed beside them."""
    low: tuple[Adapter, ...] = ()
    """Those of the second expert, of a model that has two."""

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
        high, low = self._adapt(params.high, self.adapters), self._adapt(params.low, self.low)
        return params._replace(high=high, low=low)

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
    adapters, low = [], []
    if isinstance(config, LoraRun):
        adapters.append(checked(restore_adapter(config, checkpointer, step, mesh), config.output))
        checkpointer.close()
        checkpointer, step = open_base(config)
    for one in lora:
        path, weight = split_weight(one)
        adapter = open_adapter(path, config, mesh)
        adapter = dataclasses.replace(adapter, scale=weight * adapter.scale)
        (low if of_expert(path, config) else adapters).append(adapter)
    parts = config, mesh, codec, checkpointer, step, over_context
    return AdaptedPipeline(*parts, tuple(adapters), not unmerged, tuple(low))


def of_expert(path: str, config: VideoRun) -> bool:
    """Whether the adapter at a path is of the second expert, as the run that trained it says."""
    if (expert := config.expert.path) is None:
        return False
    place = as_path(path)
    message = (
        f"--lora {path!r} is a file, and the model has two experts: make a run of it (python -m "
        f"dit_jax.lora import) with the one that it adapts as --base, {config.output!r} or {expert!r}."
    )
    refuse_if([(not (place / "checkpoints").is_dir(), message)])
    return as_path(read_config(place / "config.json", LoraRun).base) == as_path(expert)


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
