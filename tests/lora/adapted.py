"""Tiny runs of adapters, and what their steps give."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import training
from dit_jax.config import VideoRun, load_config, to_dict
from dit_jax.files import write_json
from dit_jax.lora import LoraConfig, LoraRun, lora_run
from dit_jax.parallel import MeshConfig, global_batch, local_rows, make_mesh
from dit_jax.training import CheckpointConfig, Checkpointer, HeldOutLoss, abstract_params
from dit_jax.training.video_task import init_params, make_model
from tests.runs import CONFIG, changed

RANK = 3


def base_config(output: Path, **changes: Any) -> VideoRun:
    changes = {"model.dit.depth": 2, "output": str(output), "log.draw_every": 0, **changes}
    changes["evaluators"] = (HeldOutLoss(),)
    return changed(load_config(str(CONFIG)), changes)


def save_base(config: VideoRun, seed: int = 0) -> VideoRun:
    """A run with random weights, of which no branch is zero."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = make_model(config.model, mesh)
    shapes, shardings = abstract_params(lambda key: init_params(model, key), mesh)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: 0.15 * rng.normal(size=x.shape).astype(x.dtype), shapes)
    with Checkpointer(Path(config.output), CheckpointConfig()) as checkpointer:
        checkpointer.save_weights(jax.device_put(params, shardings), to_dict(config))
    write_json(Path(config.output) / "config.json", to_dict(config))
    return config


def adapters_of(base: VideoRun, output: Path, **lora: Any) -> LoraRun:
    """A run of adapters of that base, short."""
    lora = {"rank": RANK, "alpha": 6.0, **lora}
    fields: Any = {"optimizer": dataclasses.replace(base.optimizer, learning_rate=2e-2)}
    fields |= {"checkpoint": CheckpointConfig(every=2), "log": base.log, "steps": 4}
    return lora_run(base.output, output=str(output), lora=LoraConfig(**lora), **fields)


class Steps:
    """The parts of a run that a loop puts together, on a mesh."""

    def __init__(self, config: Any, mesh: Any) -> None:
        config = config.with_hashes()
        self.task = task = config.build(mesh)
        optimizer = training.make_optimizer(config.optimizer, config.steps)
        parts = task.init, optimizer, mesh, task.trainable
        self.shapes, shardings = training.abstract_state(*parts)
        key = jax.random.key(config.seed)
        self.frozen = training.init_frozen(task.init, mesh, key, task.trainable, task.load_frozen)
        self.state = training.init_state(task.init, optimizer, shardings, key, task.trainable)
        self.step = training.make_step(
            task.loss, optimizer, config.optimizer, config.seed, shardings
        )
        rows = local_rows(mesh, config.rows)
        self.loader = task.loader(rows)
        self.next = lambda: global_batch(mesh, next(self.loader), rows, task.rows)

    def losses(self, count: int) -> list[float]:
        """Of so many steps, one after the other."""
        out = []
        for _ in range(count):
            self.state, metrics = self.step(self.state, self.next(), self.frozen)
            out.append(float(metrics["loss"]))
        return out


def random_adapter(config: LoraRun, seed: int = 1) -> Any:
    """An adapter of a run's layers, whose B is not zero; NumPy arrays."""
    from dit_jax.lora.adapters import adapter_of
    from dit_jax.lora.run import init_adapted
    from dit_jax.training.step import split

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = make_model(config.model, mesh)
    shapes, _ = abstract_params(lambda key: init_adapted(model, config.lora, key), mesh)
    rng = np.random.default_rng(seed)
    trained, _ = split(shapes, lambda path: path.endswith(("/lora_a", "/lora_b")))
    leaves = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), trained)
    return adapter_of(leaves, config.lora.scale)


def save_adapter(config: LoraRun, adapter: Any) -> None:
    """A run of adapters with those values."""
    from dit_jax.lora.__main__ import write_run
    from dit_jax.lora.adapters import as_params

    write_run(config.output, config, as_params(adapter))
