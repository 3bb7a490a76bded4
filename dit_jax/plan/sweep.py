"""Which mesh and which recomputation: sensible combinations are compiled, and those that fit ranked.

A mesh is sensible if rows divide over ``data x fsdp``, the tokens of a row over ``context`` and heads
over ``tensor``; ``data`` crosses slices. What a chip cannot hold is told apart from what a config or
the compiler refuses. Nothing but mesh and recomputation is varied: not the batch, not kernels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import typing
from collections.abc import Iterator
from typing import Any

from dit_jax.config import VideoRun
from dit_jax.model import DiTConfig
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.parallel.mesh import AXES
from dit_jax.plan.abstract import STEPS, DoesNotFit
from dit_jax.plan.report import line, plan_step
from dit_jax.plan.topologies import Topology

MAX_TENSOR = 8  # Wider, every layer's activations cross too many links to be worth trying.
REFUSED = "refused: "
# From least to most recomputed.
REMAT_POLICIES: tuple[Any, ...] = typing.get_args(typing.get_type_hints(DiTConfig)["remat"])


Trial = dict[str, Any]  # mesh, remat, and the plan or the reason why there is none, as in JSON.


def render_trial(trial: Trial) -> str:
    """One combination in a line."""
    mesh, plan = "x".join(str(trial["mesh"][axis]) for axis in AXES), trial["plan"]
    head = f"{mesh:>14}  {trial['remat']:<12}"
    if plan is None:
        return f"{head}  {trial['reason']}"
    per_op, bound = line("{per_op:sec}", **plan["seconds"]), plan["seconds"]["bound_by"]
    peak, sent = (line("{:B}", n) for n in (plan["peak_bytes"], sum(plan["wire_bytes"].values())))
    return f"{head}  {per_op:>9}  {plan['mfu']['per_op']:>6.1%}  {peak:>8}  {sent:>8}  {bound}"


def meshes(config: VideoRun, what: str, topology: Topology) -> list[MeshConfig]:
    """The sensible meshes, those first that talk least: few devices for tokens and heads, then ``fsdp``
    before ``data``, which keeps more state on a chip."""
    devices, slices = topology.num_devices, topology.slices
    packing, heads = config.data.packing, config.model.dit.heads
    guided = 2 if config.sampling.cfg_scale != 1 else 1
    rows = packing.rows // config.optimizer.accumulate if what == "train" else guided
    out = []
    for tensor, context in itertools.product(range(1, MAX_TENSOR + 1), range(1, devices + 1)):
        rest, left = divmod(devices, tensor * context)
        if left or heads % tensor or (what == "train" and packing.row_tokens % context):
            continue
        if rows % rest == 0 and rest % slices == 0:
            sizes = sorted({slices, rest})
            out += [MeshConfig(data, rest // data, context, tensor) for data in sizes]
    return sorted(out, key=lambda m: (m.context * m.tensor, m.tensor, m.data))


def candidates(
    config: VideoRun, what: str, topology: Topology
) -> Iterator[tuple[MeshConfig, str, VideoRun]]:
    """Every combination, the same meshes together."""
    for mesh in meshes(config, what, topology):
        for remat in REMAT_POLICIES if what == "train" else (config.model.dit.remat,):
            dit = dataclasses.replace(config.model.dit, remat=remat)
            model = dataclasses.replace(config.model, dit=dit)
            yield mesh, remat, dataclasses.replace(config, mesh=mesh, model=model)


def state_alone(config: VideoRun, topology: Topology, devices: list[Any]) -> str | None:
    """Why a mesh cannot hold even what a run keeps from step to step, so that nothing needs to be
    compiled; None if it can."""
    state = STEPS["train"](config, make_mesh(config.mesh, devices)).state or {}
    used, capacity = sum(state.values()), topology.capacity
    message = f"the state alone needs {used / 1e9:.3g} of {capacity / 1e9:.3g} GB of HBM"
    return f"does not fit: {message}" if used > capacity else None


def run_sweep(
    what: str,
    config: VideoRun,
    name: str,
    topology: Topology,
    devices: list[Any],
    limit: int,
    **budget: Any,
) -> tuple[list[Trial], int]:
    """The first ``limit`` combinations, each printed once it is tried, by time and last those that do
    not fit or are refused; and how many were left out."""
    every = list(candidates(config, what, topology))
    trials: list[Trial] = []
    too_large: dict[MeshConfig, str | None] = {}
    for mesh, remat, varied in every[:limit]:
        plan, reason = None, None
        try:
            if what == "train" and mesh not in too_large:
                too_large[mesh] = state_alone(varied, topology, devices)
            reason = too_large.get(mesh)
            if reason is None:
                plan = plan_step(what, varied, name, topology, devices, **budget)
        except DoesNotFit as error:
            # Mesh and recomputation, which help with HBM, are what a sweep varies.
            reason = error.reason if error.space == "hbm" else str(error)
        except ValueError as error:
            reason = REFUSED + str(error)
        sizes = dataclasses.asdict(mesh)
        trials.append({"mesh": sizes, "remat": remat, "plan": plan, "reason": reason})
        done = f"[{len(trials)}/{min(limit, len(every))}]"
        print(done, render_trial(trials[-1]), file=sys.stderr, flush=True)
    trials.sort(key=lambda t: t["plan"]["seconds"]["per_op"] if t["plan"] else math.inf)
    return trials, max(len(every) - limit, 0)


def render_sweep(trials: list[Trial], left_out: int) -> str:
    """A sweep as a table, the fastest that fits first."""
    header = f"{'x'.join(AXES)}  remat, per op, MFU at most, peak HBM, sent, bound by"
    lines = [header, *map(render_trial, trials)]
    if left_out:
        lines.append(f"{left_out} more combinations were not tried: raise --limit.")
    return "\n".join(lines)
