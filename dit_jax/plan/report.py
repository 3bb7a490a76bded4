"""A plan: what a compiled step takes of every resource, and the time that this makes at least.

Times are ceilings of speed, not forecasts: everything runs at the published peak and nothing stalls.
``roofline`` is the busiest resource alone, as if all work overlapped; ``per_op`` adds up the scheduled
instructions, each at its own busiest resource, and the collectives that nothing runs beside;
``scheduled`` adds what the asynchronous collectives make the schedule wait.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dit_jax.plan.analysis import Tally
from dit_jax.plan.collectives import DCN, ICI
from dit_jax.plan.lowering import Memory, Program, State
from dit_jax.plan.topologies import Topology

PERMUTE = "collective-permute"


@dataclasses.dataclass(frozen=True)
class CollectiveLine:
    """All collectives of one kind, network and group size in a step, on one device."""

    kind: str
    network: str
    group: int
    executions: float
    asynchronous: float
    logical_bytes: float
    wire_bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class KernelLine:
    """All executions of one kernel in a step, on one device."""

    name: str
    executions: float
    flops: float
    hbm_bytes: float


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one step, on one device."""

    model: float
    """What the mathematics asks for (``model.forward_flops``)."""
    compiled: float
    """Products that the compiled program executes, recomputation and kernels included."""
    kernels: float
    """The part of them in Pallas kernels."""
    traced: float
    """Products in the traced program, over the devices: beside ``compiled`` a check of both."""
    compiler: float | None
    """XLA's own count: bodies of loops once, kernels not at all."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Least times of a step."""

    flops: float
    hbm: float
    ici: float
    dcn: float
    host: float
    roofline: float
    bound_by: str
    per_op: float
    scheduled: float


@dataclasses.dataclass(frozen=True)
class Budget:
    """What it takes to train on so many tokens, at the per-op time."""

    tokens: float
    steps: float
    days: float
    chip_hours: float
    price: float | None
    """USD."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is reported of one config on one topology. Amounts are of one device."""

    what: str
    config: str
    topology: str
    slices: int
    chips: int
    devices: int
    mesh: dict[str, int]
    remat: str
    parts: int
    """Steps that one clip takes, where it is encoded or decoded in parts."""
    parameters: int
    tokens: float
    """Of a step, over all devices."""
    state: State | None
    memory: Memory
    peak_bytes: float
    capacity: float
    flops: Flops
    hbm_bytes: float
    compiler_bytes: float | None
    host_bytes: float
    wire_bytes: dict[str, float]
    collectives: tuple[CollectiveLine, ...]
    kernels: tuple[KernelLine, ...]
    seconds: Seconds
    mfu: dict[str, float]
    """Model flops over what the chips could do in each of the times."""
    budget: Budget | None
    compile_seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = dataclasses.asdict(self)
        values["state"] = self.state and self.state._asdict()
        values["memory"] = self.memory._asdict()
        return values


def times(tally: Tally, topology: Topology) -> Seconds:
    """The least times of what was tallied."""
    chip = topology.chip
    networks = {ICI: 0.0, DCN: 0.0}
    for (kind, network, _), use in tally.collectives.items():
        if kind != PERMUTE or network != ICI:
            networks[network] += use.seconds
    # Permutations in both directions of a ring use different wires.
    networks[ICI] += max(tally.ring_up, tally.ring_down)
    resources = {
        "flops": (tally.flops + tally.kernel_flops) * chip.devices / chip.flops,
        "hbm": tally.hbm_bytes * chip.devices / chip.hbm_bandwidth,
        "ici": networks[ICI],
        "dcn": networks[DCN],
        "host": tally.host_bytes * chip.devices / chip.host_bandwidth,
    }
    busiest = max(resources, key=lambda name: resources[name])
    roofline = resources[busiest]
    per_op = max(tally.op_seconds + tally.sync_seconds, roofline)
    return Seconds(
        **resources,
        roofline=roofline,
        bound_by=busiest,
        per_op=per_op,
        scheduled=max(tally.seconds, per_op),
    )


def budget(
    tokens: float, step_tokens: float, step_seconds: float, chips: int, price: float | None
) -> Budget:
    """Days and chip-hours of training on so many tokens; ``price`` is USD for a chip-hour."""
    steps = tokens / step_tokens
    hours = steps * step_seconds / 3600
    cost = None if price is None else hours * chips * price
    return Budget(tokens, steps, hours / 24, hours * chips, cost)


def make_plan(
    program: Program,
    tally: Tally,
    topology: Topology,
    labels: dict[str, Any],
    tokens: float | None = None,
    price: float | None = None,
) -> Plan:
    """Puts a plan together; ``labels`` are what, config, mesh and remat."""
    devices = topology.num_devices
    seconds = times(tally, topology)
    model = program.model_flops / devices
    peak = topology.chip.flops / topology.chip.devices
    collectives = tuple(
        CollectiveLine(*key, *use) for key, use in sorted(tally.collectives.items())
    )
    reached = {n: getattr(seconds, n) for n in ("roofline", "per_op", "scheduled")}
    return Plan(
        **labels,
        topology=topology.name,
        slices=topology.slices,
        chips=topology.num_chips,
        devices=devices,
        parameters=program.parameters,
        tokens=program.tokens,
        state=program.state,
        memory=program.memory,
        peak_bytes=program.memory.peak,
        capacity=topology.chip.hbm_bytes / topology.chip.devices,
        flops=Flops(
            model=model,
            compiled=tally.flops + tally.kernel_flops,
            kernels=tally.kernel_flops,
            traced=program.traced_flops / devices,
            compiler=program.compiler_flops,
        ),
        hbm_bytes=tally.hbm_bytes,
        compiler_bytes=program.compiler_bytes,
        host_bytes=tally.host_bytes,
        wire_bytes={
            network: sum(line.wire_bytes for line in collectives if line.network == network)
            for network in (ICI, DCN)
        },
        collectives=collectives,
        kernels=tuple(KernelLine(name, *use) for name, use in sorted(tally.kernels.items())),
        seconds=seconds,
        mfu={name: model / peak / value for name, value in reached.items() if value},
        budget=budget(tokens, program.tokens, seconds.per_op, topology.num_chips, price)
        if tokens
        else None,
        compile_seconds=program.compile_seconds,
        warnings=tuple(sorted(tally.warnings)),
    )
