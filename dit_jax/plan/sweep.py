"""Which mesh and which recomputation: sensible combinations are compiled, and those that fit ranked.

A mesh is sensible where rows divide over ``data x fsdp``, the tokens of a row over ``context`` and
heads over ``tensor``; ``data`` crosses slices. What a chip cannot hold is told apart from what a config
or the compiler refuses. Nothing but mesh and recomputation is varied: not the batch, not kernels.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any

from dit_jax.config import VideoRun
from dit_jax.model import DiTConfig
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.plan.lowering import DoesNotFit, state_bytes
from dit_jax.plan.planner import plan_step
from dit_jax.plan.report import Plan
from dit_jax.plan.topologies import Topology

MAX_TENSOR = 8
"""Wider, every layer's activations cross too many links to be worth trying."""
REFUSED = "refused: "


@dataclasses.dataclass(frozen=True)
class Trial:
    """One combination, and what came of it."""

    mesh: MeshConfig
    remat: str
    plan: Plan | None
    reason: str | None
    """Why there is no plan."""

    @property
    def refused(self) -> bool:
        """By the config or the compiler, not for want of memory."""
        return self.reason is not None and self.reason.startswith(REFUSED)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "mesh": dataclasses.asdict(self.mesh),
            "remat": self.remat,
            "plan": self.plan and self.plan.to_dict(),
            "reason": self.reason,
        }


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def meshes(config: VideoRun, what: str, topology: Topology) -> list[MeshConfig]:
    """The sensible meshes, those first that talk least: few tokens and heads spread, then ``fsdp``
    before ``data``, which keeps more state on a chip."""
    devices, slices = topology.num_devices, topology.slices
    packing, heads = config.data.packing, config.model.dit.heads
    guided = 2 if config.sampling.cfg_scale != 1 else 1
    rows = packing.rows // config.optimizer.accumulate if what == "train" else guided
    found = []
    for tensor in _divisors(min(heads, MAX_TENSOR)):
        for context in _divisors(devices):
            rest, left = divmod(devices, tensor * context)
            if left or heads % tensor or (what == "train" and packing.row_tokens % context):
                continue
            if rows % rest or rest % slices:
                continue
            for data in sorted({slices, rest}):
                found.append(MeshConfig(data, rest // data, context, tensor))
    return sorted(found, key=lambda m: (m.context * m.tensor, m.tensor, m.data))


def remat_policies() -> tuple[str, ...]:
    """The names that ``DiTConfig.remat`` may have, from least to most recomputed."""
    return typing.get_args(typing.get_type_hints(DiTConfig)["remat"])


def candidates(
    config: VideoRun, what: str, topology: Topology
) -> Iterator[tuple[MeshConfig, str, VideoRun]]:
    """Every combination, the same meshes together."""
    policies = remat_policies() if what == "train" else (config.model.dit.remat,)
    for mesh in meshes(config, what, topology):
        for remat in policies:
            dit = dataclasses.replace(config.model.dit, remat=remat)
            model = dataclasses.replace(config.model, dit=dit)
            yield mesh, remat, dataclasses.replace(config, mesh=mesh, model=model)


def state_alone(config: VideoRun, topology: Topology, devices: list[Any]) -> str | None:
    """Why a mesh cannot hold even what a run keeps from step to step, if it cannot: then nothing needs
    to be compiled."""
    held = state_bytes(config, make_mesh(config.mesh, devices))
    room = topology.chip.hbm_bytes / topology.chip.devices
    if held <= room:
        return None
    return f"does not fit: the state alone needs {held / 1e9:.3g} of {room / 1e9:.3g} GB of HBM"


def run_sweep(
    what: str,
    config: VideoRun,
    name: str,
    topology: Topology,
    devices: list[Any],
    limit: int,
    tell: Callable[[Trial, int, int], None] = lambda *_: None,
    **options: Any,
) -> tuple[list[Trial], int]:
    """Tries the first ``limit`` combinations: fastest first, then those that do not fit or are refused;
    and how many were left out. ``tell(trial, i, n)`` hears of each; ``options`` are ``plan_step``'s."""
    every = list(candidates(config, what, topology))
    tried: list[Trial] = []
    too_large: dict[MeshConfig, str | None] = {}
    for i, (mesh, remat, varied) in enumerate(every[:limit]):
        plan, reason = None, None
        try:
            if what == "train" and mesh not in too_large:
                too_large[mesh] = state_alone(varied, topology, devices)
            reason = too_large.get(mesh)
            if reason is None:
                plan = plan_step(what, varied, name, topology, devices, **options)
        except DoesNotFit as error:
            # Mesh and recomputation, which help with HBM, are what a sweep varies.
            reason = error.reason if error.space == "hbm" else str(error)
        except ValueError as error:
            reason = REFUSED + str(error)
        trial = Trial(mesh, remat, plan, reason)
        tried.append(trial)
        tell(trial, i + 1, min(limit, len(every)))
    tried.sort(key=lambda t: (t.plan is None, t.plan.seconds.per_op if t.plan else 0.0))
    return tried, max(len(every) - limit, 0)
