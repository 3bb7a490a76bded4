"""Which stored runs a run can go on from, or begin with: by their configs.

A run that is resumed must be made of the same (``FIXED``); what changes is printed. A run that begins
with the averaged parameters of another (``checkpoint.initial``) must mean the same by them.

A video model may begin with an image model (``Inflation``). The transformer has no layers of images or
of time: attention sees all tokens of a clip, so its weights go over as they are, and a clip of one
frame is what it was (rotary positions do not turn at time 0). What else a video needs is made so that
this stays true:

- Patches of several frames. The first frame of a clip stands alone, repeated to fill its patch. The
  kernel that reads a patch reads its first frame alone, with the image's weights, and the one that
  writes it writes the image's output in every frame (compare Carreira & Zisserman 2017, "Quo Vadis,
  Action Recognition?", section 2.4, who read the mean of frames: of copies with noise of their own that
  would be less noise than the network is told).
- Time among fixed positions: "wht" is "wh" and features of time that are 0 in the first frame.
- The timestep convention of positions, ``patch.reference_fps``, which a still image does not use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.config import Run, VideoRun, differences, stored_config
from dit_jax.files import InputError
from dit_jax.training.checkpoint import open_run
from dit_jax.training.step import TrainState, learning_rate
from dit_jax.types import Params

FIXED = ("model", "data", "seed", "optimizer.kind", "codec.hash", "text_encoder.hash")
"""What a run is made of: a resumed run must have the same."""
MAY_CHANGE = ("path", "data_dir", "threads", "scan", "remat", "bad_records", "max_bad_records")
MAY_CHANGE += ("eval_split",)
"""Fields in these that a resumed run may change all the same: where the data lies, and how the same
numbers are computed."""
PACKING = "data.packing."
"""So it may these: they decide which samples share a row, and not what is learnt from a sample."""
SAME_MEANING = (
    "model",
    "diffusion.prediction",
    "diffusion.path",
    "codec.hash",
    "text_encoder.hash",
)
"""What parameters mean: a run that begins with another's must have the same of it."""
MAY_DIFFER = ("scan", "remat", "dtype", "matmul", "mlp_dim", "time_std", "max_bytes", "max_tokens")
"""Fields in these that it may have otherwise: how the same is computed, what shapes tell, how fresh
parameters are drawn, and where captions are cut."""


def check_same_run(config: Run, stored: Run, directory: Path) -> None:
    """Raises ``ValueError`` if a run cannot be resumed under this config."""
    for name, now, before in differences(config, stored):
        fixed = any(f"{name}.".startswith(f"{part}.") for part in FIXED)
        free = name.split(".")[-1] in MAY_CHANGE or name.startswith(PACKING)
        if fixed and not free:
            raise InputError(
                f"{str(directory)!r} holds a run with {name} = {before!r}, and not {now!r}: give a new "
                "--output, or the config that the run was made with."
            )


def changes(config: Run, stored: Run, step: int) -> str:
    """What a resumed run does differently from here on, in words; empty if nothing."""
    lines = [
        f"  {name}: {now!r} (it was {before!r})"
        for name, now, before in differences(config, stored)
        if name.split(".")[-1] not in ("output", "path", "data_dir")
    ]
    rates = [float(np.asarray(learning_rate(c.optimizer, c.steps)(step))) for c in (config, stored)]
    if not np.isclose(*rates, rtol=1e-3):
        lines.append(f"  the learning rate at step {step}: {rates[0]:.3g} (it was {rates[1]:.3g})")
    return "resumed with changes:\n" + "\n".join(lines) if lines else ""


def check_same_meaning(config: Run, values: dict[str, Any], where: Path) -> Inflation | None:
    """How a run begins with the parameters of a run whose stored config is ``values``: as they are, or
    inflated. Raises ``ValueError`` if they would mean something else."""
    stored = stored_config(values, where, Run)
    inflated = inflation(config, stored)
    covered = inflated.fields if inflated else ()
    for name, now, before in differences(config, stored):
        same = any(f"{name}.".startswith(f"{part}.") for part in SAME_MEANING)
        if same and name.split(".")[-1] not in MAY_DIFFER and name not in covered:
            raise InputError(
                f"checkpoint.initial {config.checkpoint.initial!r} is a run with {name} = {before!r}, "
                f"and not {now!r}, under which its parameters mean something else: set {name} as there "
                f"({str(where.parents[2] / 'config.json')!r}), or begin with another run."
            )
    if inflated and jax.process_index() == 0:
        print(f"checkpoint.initial {config.checkpoint.initial!r} is {inflated}", flush=True)
    return inflated


def init_from(
    config: Run, fresh: TrainState, shapes: TrainState, shardings: TrainState
) -> TrainState:
    """The state that a new run begins with: the newest averaged parameters of ``checkpoint.initial``,
    if it names a run, in place of fresh ones."""
    if config.checkpoint.initial is None:
        return fresh
    checkpointer, step = open_run(config.checkpoint.initial)
    where = checkpointer.path(step) / "config"
    inflated = check_same_meaning(config, checkpointer.config(step), where)
    read = partial(checkpointer.restore_ema, step)
    if inflated:
        params = inflated.load(read, shapes.ema, shardings.ema)
    else:
        params = read(shapes.ema, shardings.ema)
    checkpointer.close()
    return dataclasses.replace(fresh, params=params, ema=jax.tree.map(jnp.copy, params))


PATCH_FRAMES, REFERENCE_FPS = "model.patch.t", "model.patch.reference_fps"
ABSOLUTE = "model.dit.absolute_positions"
READS = (["dit", "patch_embedding"], ["conditioners_low_res", "embedding"])
WRITES = (["dit", "final"],)
"""Layers that know how many frames a patch has, and the modules that they are of."""


@dataclasses.dataclass(frozen=True)
class Inflation:
    """How the parameters of an image model become those of a video model."""

    frames: int
    """Of a patch, if the image model's has one; 1 if that stays."""
    outputs: int
    """For each number of a patch: 2 with a learned variance."""
    fields: tuple[str, ...]
    """Of the config, by dotted names: in what the models differ."""

    def load(
        self, read: Callable[[Params, Params], Params], shapes: Params, shardings: Params
    ) -> Params:
        """The video model's parameters; ``read(shapes, shardings)`` reads the image model's."""

        def shape(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            axis, sizes = patch_axis(path), list(leaf.shape)
            if axis is not None:
                sizes[axis] //= self.frames
            return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)

        def sharding(path: Any, leaf: NamedSharding) -> NamedSharding:
            # An image's patch may not divide over the devices that a video's does.
            return leaf if patch_axis(path) is None else NamedSharding(leaf.mesh, PartitionSpec())

        def inflate(path: Any, leaf: jax.Array) -> jax.Array:
            axis = patch_axis(path)
            if axis is None:
                return leaf
            if axis == 0 and leaf.ndim == 2:  # Reads: [p, d] of the first frame, and zeros.
                return jnp.pad(leaf, ((0, (self.frames - 1) * leaf.shape[0]), (0, 0)))
            each = leaf.reshape(*leaf.shape[:-1], self.outputs, 1, -1)  # Writes: all frames alike.
            return jnp.repeat(each, self.frames, -2).reshape(*leaf.shape[:-1], -1)

        over = jax.tree_util.tree_map_with_path
        params = read(over(shape, shapes), over(sharding, shardings))
        return jax.jit(lambda p: over(inflate, p), out_shardings=shardings)(params)

    def __str__(self) -> str:
        how = {
            PATCH_FRAMES: f"patches of {self.frames} frames read their first frame and write it in all",
            ABSOLUTE: "positions have features of time that are 0 in the first frame",
            REFERENCE_FPS: "positions have another clock, which still images do not know",
        }
        return "inflated: " + "; ".join(how[name] for name in self.fields)


def patch_axis(path: Any) -> int | None:
    """The axis of a parameter that counts a patch's numbers, if it has one."""
    names = [entry.key for entry in path]
    if names[-3:-1] in READS:
        return 0 if names[-1] == "kernel" else None
    if names[-3:-1] in WRITES:
        return 1 if names[-1] == "kernel" else 0
    return None


def inflation(config: Run, stored: Run) -> Inflation | None:
    """What makes the parameters of a run ``stored`` those that ``config`` begins with; None if they go
    over as they are, or the models differ in what no inflation covers."""
    if not isinstance(config, VideoRun) or not isinstance(stored, VideoRun):
        return None
    now, before, fields = config.model, stored.model, []
    if before.patch.t == 1 and now.patch.t > 1:
        fields.append(PATCH_FRAMES)
        if config.diffusion.prediction != "x0":
            raise InputError(
                f"checkpoint.initial {config.checkpoint.initial!r} is a run with model.patch.t 1, and "
                f"not {now.patch.t}, of diffusion.prediction {config.diffusion.prediction!r}: the "
                "frames that fill the first patch have noise of their own, of which that model says "
                "nothing. Set model.patch.t to 1, or begin with a model that predicts 'x0'."
            )
    if (before.dit.absolute_positions, now.dit.absolute_positions) == ("wh", "wht"):
        fields.append(ABSOLUTE)
    if stored.sampling.frames == 1 and before.patch.reference_fps != now.patch.reference_fps:
        fields.append(REFERENCE_FPS)
    frames = now.patch.t if PATCH_FRAMES in fields else 1
    return Inflation(frames, 1 + now.learned_variance, tuple(fields)) if fields else None
