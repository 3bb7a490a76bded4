"""From a config and a topology to a plan: compile, read, report."""

from __future__ import annotations

from typing import Any

from dit_jax.config import Run, VideoRun
from dit_jax.parallel import make_mesh
from dit_jax.plan.analysis import analyse
from dit_jax.plan.hlo import parse
from dit_jax.plan.lowering import DoesNotFit, compile_step
from dit_jax.plan.report import Plan, make_plan
from dit_jax.plan.topologies import Topology


def plan_step(
    what: str,
    config: Run,
    name: str,
    topology: Topology,
    devices: list[Any],
    tokens: float | None = None,
    price: float | None = None,
) -> Plan:
    """The plan of one step (``lowering.STEPS``) of a config called ``name``.

    Raises:
        DoesNotFit: where the chips have too little memory.
        CompilerFailed: where the compiler cannot compile it otherwise.
        ValueError: where the mesh does not fill the topology, or the config does not go with it.
    """
    mesh = make_mesh(config.mesh, devices)
    program = compile_step(what, config, mesh)
    tally = analyse(parse(program.text), program.kernels, list(mesh.devices.flat), topology)
    coding = what in ("encode", "decode")
    labels = {
        "what": what,
        "config": name,
        "mesh": dict(mesh.shape),
        "remat": config.model.dit.remat if isinstance(config, VideoRun) else "none",
        "parts": getattr(config, "parts", 1) if coding else 1,
    }
    plan = make_plan(program, tally, topology, labels, tokens, price)
    if plan.peak_bytes > plan.capacity:
        # The compiler knows a little more memory than is published; a run needs some of its own.
        raise DoesNotFit(f"Used {plan.peak_bytes:.0f} of {plan.capacity:.0f} hbm")
    return plan
