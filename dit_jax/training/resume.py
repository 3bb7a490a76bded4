"""Which stored runs a run can go on from, or begin with.

A resumed run must be made of the same (``FIXED``); what else changes is printed. A run that begins with
the averaged parameters of another (``checkpoint.initial``) must mean the same by them.

A video model may begin with an image model. Attention sees all tokens of a clip and rotary positions do
not turn at time 0, so the transformer's weights stay as they are, and the rest is inflated such that a
clip of one frame, which fills a patch repeated, stays what it was. The kernel that reads a patch reads
its first frame, and the one that writes it writes the image in every frame. (The mean of frames, as in
Carreira & Zisserman 2017, "Quo Vadis, Action Recognition?", section 2.4, would have less noise than the
network is told, for each copy has noise of its own.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Run, VideoRun, differences, stored_config
from dit_jax.files import refuse_if
from dit_jax.training.checkpoint import open_run
from dit_jax.training.step import TrainState, abstract_params, learning_rate
from dit_jax.training.video_task import init_params, make_model
from dit_jax.types import Params

# What a resumed run must have the same, but for fields that say where the data lies and how the same
# numbers are computed, and for data.packing: which samples share a row.
FIXED = ("model", "data", "seed", "optimizer.kind", "codec.hash", "text_encoder.hash")
MAY_CHANGE = ("path", "data_dir", "threads", "scan", "remat", "bad_records", "max_bad_records")
MAY_CHANGE += ("eval_split",)
# What a run that begins with another's parameters must have the same, but for how it is computed, what
# shapes tell, how fresh parameters are drawn and where captions are cut.
MEANING = ("model", "diffusion.prediction", "diffusion.path", "codec.hash", "text_encoder.hash")
MAY_DIFFER = ("scan", "remat", "dtype", "matmul", "mlp_dim", "time_std", "max_bytes", "max_tokens")


def _differences(
    config: Run, stored: Run, parts: tuple[str, ...], free: tuple[str, ...]
) -> Iterator[tuple[str, Any, Any]]:
    """The fields of ``parts`` in which two configs differ, but for those named ``free``."""
    for name, now, before in differences(config, stored):
        inside = any(f"{name}.".startswith(f"{part}.") for part in parts)
        if inside and name.split(".")[-1] not in free:
            yield name, now, before


def check_same_run(config: Run, stored: Run, directory: Path) -> None:
    """Raises ``InputError`` if the run in a directory cannot be resumed under this config."""
    refuse_if(
        (
            not name.startswith("data.packing."),
            f"{str(directory)!r} holds a run with {name} = {before!r}, and not {now!r}: give a new "
            "--output, or the config that the run was made with.",
        )
        for name, now, before in _differences(config, stored, FIXED, MAY_CHANGE)
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


def init_from(
    config: Run, fresh: TrainState, shapes: TrainState, shardings: TrainState
) -> TrainState:
    """The state that a new run begins with: a fresh one, but for the newest averaged parameters of
    ``checkpoint.initial`` if it names a run."""
    if config.checkpoint.initial is None:
        return fresh
    checkpointer, step = open_run(config.checkpoint.initial)
    where = checkpointer.path(step) / "config"
    inflated = check_same_meaning(config, checkpointer.config(step), where)
    read = partial(checkpointer.restore_ema, step)
    if "model.patch.t" in inflated:
        assert isinstance(config, VideoRun)
        read = partial(inflate, config, read)
    params = read(shapes.ema, shardings.ema)
    checkpointer.close()
    return dataclasses.replace(fresh, params=params, ema=jax.tree.map(jnp.copy, params))


def check_same_meaning(config: Run, values: dict[str, Any], where: Path) -> dict[str, str]:
    """Raises ``InputError`` if the parameters of the run whose stored config is ``values`` mean
    something else; returns how they are inflated (see ``inflation``)."""
    stored = stored_config(values, where, Run)
    inflated = inflation(config, stored)
    refuse_if(
        (
            name not in inflated,
            f"checkpoint.initial {config.checkpoint.initial!r} is a run with {name} = {before!r}, and "
            f"not {now!r}, under which its parameters mean something else: set {name} as there "
            f"({str(where.parents[2] / 'config.json')!r}), or begin with another run.",
        )
        for name, now, before in _differences(config, stored, MEANING, MAY_DIFFER)
    )
    if inflated and jax.process_index() == 0:
        text = "; ".join(inflated.values())
        print(f"checkpoint.initial {config.checkpoint.initial!r} is inflated: {text}", flush=True)
    return inflated


# ---------------------------------------------------------------------------------------------------
# From an image model to a video model
# ---------------------------------------------------------------------------------------------------


def inflation(config: Run, stored: Run) -> dict[str, str]:
    """The fields in which an image model ``stored`` may differ from the video model ``config`` that
    begins with it, and what is done about each."""
    if not isinstance(config, VideoRun) or not isinstance(stored, VideoRun):
        return {}
    now, before, initial = config.model, stored.model, config.checkpoint.initial
    patches = before.patch.t == 1 and now.patch.t > 1
    message = (
        f"checkpoint.initial {initial!r} is a run with model.patch.t 1, and not {now.patch.t}, of "
        f"diffusion.prediction {config.diffusion.prediction!r}, which says nothing of the noise of the "
        "frames that fill the first patch: set model.patch.t to 1, or take a model that predicts 'x0'."
    )
    refuse_if([(patches and config.diffusion.prediction != "x0", message)])
    out = {}
    if patches:
        out["model.patch.t"] = (
            f"patches of {now.patch.t} frames read their first, and write it in all"
        )
    if (before.dit.absolute_positions, now.dit.absolute_positions) == ("wh", "wht"):
        out["model.dit.absolute_positions"] = "features of time are 0 in the first frame"
    if stored.sampling.frames == 1 and before.patch.reference_fps != now.patch.reference_fps:
        out["model.patch.reference_fps"] = "still images do not know the unit of time"
    return out


def inflate(
    config: VideoRun, read: Callable[[Params, Params], Params], shapes: Params, shardings: Params
) -> Params:
    """The video model's parameters; ``read(shapes, shardings)`` reads those of an image model, whose
    patches have one frame."""
    frames, outputs = config.model.patch.t, 1 + config.model.learned_variance
    mesh = jax.tree.leaves(shardings)[0].mesh
    patch = dataclasses.replace(config.model.patch, t=1)
    image = make_model(dataclasses.replace(config.model, patch=patch), mesh)

    def fill(leaf: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.shape == target.shape:
            return leaf
        if leaf.ndim == 2 and leaf.shape[1] == target.shape[1]:
            # Reads [p, d]: the first frame, and zeros for the others.
            return jnp.pad(leaf, ((0, target.shape[0] - leaf.shape[0]), (0, 0)))
        # Writes [d, p] or [p]: all frames alike, within each output.
        each = leaf.reshape(*leaf.shape[:-1], outputs, 1, -1)
        return jnp.repeat(each, frames, -2).reshape(target.shape)

    # The axis of a patch's numbers is never sharded: the image's parameters lie as the video's.
    params = read(abstract_params(partial(init_params, image), mesh)[0], shardings)
    return jax.jit(lambda p: jax.tree.map(fill, p, shapes), out_shardings=shardings)(params)
