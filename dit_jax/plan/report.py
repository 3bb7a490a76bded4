"""A plan: what a compiled step takes of every resource, and the time that this makes at least.

Times are ceilings of speed, not forecasts: everything runs at the published peak and nothing stalls.
``roofline`` is the busiest resource alone, as if all work overlapped; ``per_op`` adds up the scheduled
instructions, each at its own busiest resource, and the collectives that nothing runs beside;
``scheduled`` adds what the asynchronous collectives make the schedule wait.
"""

from __future__ import annotations

import string
from typing import Any

from dit_jax.config import Run, VideoRun
from dit_jax.parallel import make_mesh
from dit_jax.plan.abstract import STEPS, DoesNotFit, compile_step
from dit_jax.plan.analysis import SYNC, Tally, analyse
from dit_jax.plan.costs import DCN, ICI, PERMUTE
from dit_jax.plan.hlo import parse
from dit_jax.plan.kernels import find_kernels, traced_flops
from dit_jax.plan.topologies import Topology

RESOURCES = ("flops", "hbm", "ici", "dcn", "host")
TIMES = ("roofline", "per_op", "scheduled")
Plan = dict[str, Any]  # What ``plan_step`` returns, as its JSON file has it.


def least_times(tally: Tally, topology: Topology) -> dict[str, Any]:
    """The seconds of each of RESOURCES and TIMES, and the resource that bounds the roofline."""
    chip, networks = topology.chip, {ICI: 0.0, DCN: 0.0}
    for (kind, network, _), sums in tally.lines("collectives").items():
        if kind != PERMUTE or network != ICI:
            networks[network] += sums["seconds"]
    # Permutations in both directions of a ring use different wires.
    networks[ICI] += max(tally["ring_up"], tally["ring_down"])
    flops = (tally["flops"] + tally["kernel_flops"]) * chip.devices / chip.flops
    hbm = tally["hbm_bytes"] * chip.devices / chip.hbm_bandwidth
    host = tally["host_bytes"] * chip.devices / chip.host_bandwidth
    resources = {"flops": flops, "hbm": hbm, **networks, "host": host}
    busiest = max(RESOURCES, key=lambda name: resources[name])
    per_op = max(tally["op_seconds"] + tally[SYNC], resources[busiest])
    bounds = {"roofline": resources[busiest], "bound_by": busiest, "per_op": per_op}
    return {**resources, **bounds, "scheduled": max(tally.seconds, per_op)}


def memory_use(used: Any) -> dict[str, float]:
    """Bytes as the compiler laid them out; ``aliased`` outputs take the place of arguments."""
    kinds = {"argument": "arguments", "temp": "temporary", "output": "outputs", "alias": "aliased"}
    sizes = {name: getattr(used, f"{kind}_size_in_bytes") for kind, name in kinds.items()}
    return {**sizes, "host": used.host_temp_size_in_bytes + used.host_argument_size_in_bytes}


def plan_step(
    what: str,
    config: Run,
    name: str,
    topology: Topology,
    devices: list[Any],
    tokens: float | None = None,
    price: float | None = None,
) -> Plan:
    """The plan of one step (``abstract.STEPS``) of a config called ``name``; amounts are of one device,
    in flops, bytes, seconds and USD.

    Raises ``DoesNotFit`` if the chips have too little memory, ``CompilerFailed`` if the compiler fails
    otherwise, and ``ValueError`` if the mesh does not fill the topology or the config.
    """
    mesh = make_mesh(config.mesh, devices)
    step = STEPS[what](config, mesh)
    traced, compiled, compile_seconds = compile_step(step)
    kernels = find_kernels(traced.jaxpr)
    tally = analyse(parse(compiled.as_text()), kernels, list(mesh.devices.flat), topology)
    memory, xla = memory_use(compiled.memory_analysis()), compiled.cost_analysis() or {}
    peak = memory["arguments"] + memory["temporary"] + memory["outputs"] - memory["aliased"]
    if peak > topology.capacity:
        # The compiler knows a little more memory than is published; a run needs some of its own.
        raise DoesNotFit(f"Used {peak:.0f} of {topology.capacity:.0f} hbm")

    seconds, chips, chip = least_times(tally, topology), topology.num_chips, topology.chip
    model, in_kernels = step.flops / topology.num_devices, tally["kernel_flops"]
    traced = traced_flops(traced.jaxpr, mesh.size) / topology.num_devices
    of_program = {"compiled": tally["flops"] + in_kernels, "kernels": in_kernels, "traced": traced}
    lines = [
        {"kind": kind, "network": network, "group": group, **sums}
        for (kind, network, group), sums in tally.lines("collectives").items()
    ]
    wires: dict[str, float] = {ICI: 0, DCN: 0}
    for one in lines:
        wires[one["network"]] += one["wire_bytes"]
    remat = config.model.dit.remat if isinstance(config, VideoRun) else "none"
    # Steps that one clip takes, if it is encoded or decoded in parts.
    parts = getattr(config, "parts", 1) if what in ("encode", "decode") else 1
    # Model flops over what the chip could do in each of the times.
    mfu = {k: model / (chip.flops / chip.devices) / seconds[k] for k in TIMES if seconds[k]}
    budget: dict[str, float | None] | None = None
    if tokens is not None:
        steps = tokens / step.tokens
        hours = steps * seconds["per_op"] / 3600
        cost = None if price is None else hours * chips * price
        budget = {"tokens": tokens, "steps": steps, "days": hours / 24}
        budget |= {"chip_hours": hours * chips, "price": cost}
    plan: Plan = {"what": what, "config": name}
    plan |= {"topology": topology.name, "slices": topology.slices}
    plan |= {"chips": chips, "devices": topology.num_devices, "mesh": dict(mesh.shape)}
    plan |= {"remat": remat, "parts": parts, "parameters": step.parameters, "tokens": step.tokens}
    plan |= {"state": step.state, "memory": memory}
    plan |= {"peak_bytes": peak, "capacity": topology.capacity}
    plan |= {"flops": {"model": model, **of_program, "compiler": xla.get("flops")}}
    plan |= {"hbm_bytes": tally["hbm_bytes"], "compiler_bytes": xla.get("bytes accessed")}
    plan |= {"host_bytes": tally["host_bytes"], "wire_bytes": wires, "collectives": lines}
    plan |= {"kernels": [{"name": k, **sums} for (k,), sums in tally.lines("kernels").items()]}
    plan |= {"seconds": seconds, "mfu": mfu, "budget": budget, "compile_seconds": compile_seconds}
    return plan | {"warnings": sorted(key[1] for key in tally if key[0] == "warnings")}


class Units(string.Formatter):
    """Formats ``{x:B}`` as bytes, ``{x:flop}`` and ``{x:#}`` as numbers, ``{x:sec}`` as seconds, with
    three digits and a prefix."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec not in ("B", "flop", "#", "sec"):
            return super().format_field(value, format_spec)
        if value is None:
            return "none"
        prefixes = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
        unit = format_spec.removeprefix("#")
        if format_spec == "sec":
            prefixes, unit = {"": 1.0, "m": 1e-3, "u": 1e-6}, "s"
        prefix = next((p for p, size in prefixes.items() if abs(value) >= size), "")
        return f"{value / prefixes.get(prefix, 1.0):.3g} {prefix}{unit}".rstrip()


line = Units().format

TEXT = """\
{what} step of {config} on {repeat}{topology} ({chips} chips), mesh {axes}, remat {remat}; amounts are \
of one {device}
model        {parameters:#} parameters, {tokens:,.0f} tokens a step over all{state_line}
peak HBM     {peak_bytes:B} of {capacity:B} ({share:.0%}): arguments {memory[arguments]:B}, temporary \
{memory[temporary]:B}, outputs {memory[outputs]:B}, of which in place {memory[aliased]:B}{on_host}
flops        model {flops[model]:#}; compiled {flops[compiled]:#} ({ratio:.2f} x), kernels \
{flops[kernels]:#} of them; traced {flops[traced]:#}; XLA's count {flops[compiler]:#}
HBM moved    {hbm_bytes:B} (XLA's count {compiler_bytes:B}){to_host}{kernel_lines}
wires        ICI {wire_bytes[ici]:B}, DCN {wire_bytes[dcn]:B} sent{collective_lines}
roofline     {seconds[roofline]:sec} a step, bound by {seconds[bound_by]} (flops {seconds[flops]:sec}, \
hbm {seconds[hbm]:sec}, ici {seconds[ici]:sec}, dcn {seconds[dcn]:sec}, host {seconds[host]:sec})
per op       {seconds[per_op]:sec} a step at least; with the waits for asynchronous collectives \
{seconds[scheduled]:sec}
MFU at most  {reached}{clip_line}{training_line}
compiled in  {compile_seconds:.0f} s{warning_lines}"""
STATE = """
state        {sum:B}: parameters {params:B}, average {ema:B}, optimizer {optimizer:B}"""
KERNEL = """
  kernel     {name}: {executions:g} x, {flops:flop}, {hbm_bytes:B}"""
COLLECTIVE = """
  {network}        {kind} among {group}: {executions:g} x ({asynchronous:g} asynchronous), \
{logical_bytes:B}, on the wire {wire_bytes:B}, {seconds:sec}"""
CLIP = """
a clip       {} steps: at least {:sec} (roofline), {:sec} (per op)"""
TRAINING = """
training     {tokens:#} tokens: {steps:,.0f} steps, at least {days:.3g} days, {chip_hours:,.0f} \
chip-hours{cost}"""


def render(plan: Plan) -> str:
    """A plan as lines of text."""
    state, parts, seconds, budget = (plan[k] for k in ("state", "parts", "seconds", "budget"))
    cost = line(", {price:,.0f} USD", **budget) if budget and budget["price"] is not None else ""
    least = (parts * seconds[name] for name in ("roofline", "per_op"))
    whole = plan["chips"] == plan["devices"]
    return line(
        TEXT,
        **plan,
        repeat=f"{plan['slices']} x " if plan["slices"] > 1 else "",
        axes=" x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1) or "1",
        device="chip" if whole else f"device ({plan['devices']} in all)",
        state_line=line(STATE, sum=sum(state.values()), **state) if state else "",
        share=plan["peak_bytes"] / plan["capacity"],
        on_host=line("; host {host:B}", **plan["memory"]) if plan["memory"]["host"] else "",
        ratio=plan["flops"]["compiled"] / plan["flops"]["model"],
        to_host=line("; to and from the host {:B}", moved) if (moved := plan["host_bytes"]) else "",
        kernel_lines="".join(line(KERNEL, **one) for one in plan["kernels"]),
        collective_lines="".join(line(COLLECTIVE, **one) for one in plan["collectives"]),
        reached=", ".join(f"{name} {x:.1%}" for name, x in plan["mfu"].items()),
        clip_line=line(CLIP, parts, *least) if parts > 1 else "",
        training_line=line(TRAINING, cost=cost, **budget) if budget else "",
        warning_lines="".join(f"\nwarning      {warning}" for warning in plan["warnings"]),
    )
