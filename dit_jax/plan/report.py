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
from dit_jax.plan.abstract import STEPS
from dit_jax.plan.analysis import SYNC, Tally, analyse
from dit_jax.plan.collectives import DCN, ICI, PERMUTE
from dit_jax.plan.hlo import parse
from dit_jax.plan.kernels import find_kernels, traced_flops
from dit_jax.plan.lowering import DoesNotFit, compile_step
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
    resources = {
        "flops": (tally["flops"] + tally["kernel_flops"]) * chip.devices / chip.flops,
        "hbm": tally["hbm_bytes"] * chip.devices / chip.hbm_bandwidth,
        **networks,
        "host": tally["host_bytes"] * chip.devices / chip.host_bandwidth,
    }
    busiest = max(resources, key=lambda name: resources[name])
    roofline = resources[busiest]
    per_op = max(tally["op_seconds"] + tally[SYNC], roofline)
    scheduled = max(tally.seconds, per_op)
    times = {"roofline": roofline, "bound_by": busiest, "per_op": per_op, "scheduled": scheduled}
    return {**resources, **times}


def training_budget(
    tokens: float, step_tokens: float, step_seconds: float, chips: int, price: float | None
) -> dict[str, float | None]:
    """What training on so many tokens takes; ``price`` is USD for a chip-hour."""
    steps = tokens / step_tokens
    hours = steps * step_seconds / 3600
    cost = None if price is None else hours * chips * price
    spent = {"days": hours / 24, "chip_hours": hours * chips, "price": cost}
    return {"tokens": tokens, "steps": steps, **spent}


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
    seconds, flops = least_times(tally, topology), step.flops / topology.num_devices
    used, counted = compiled.memory_analysis(), compiled.cost_analysis() or {}
    memory = {
        "arguments": used.argument_size_in_bytes,
        "temporary": used.temp_size_in_bytes,
        "outputs": used.output_size_in_bytes,
        "aliased": used.alias_size_in_bytes,  # Outputs that take the place of arguments.
        "host": used.host_temp_size_in_bytes + used.host_argument_size_in_bytes,
    }
    peak = memory["arguments"] + memory["temporary"] + memory["outputs"] - memory["aliased"]
    if peak > topology.capacity:
        # The compiler knows a little more memory than is published; a run needs some of its own.
        raise DoesNotFit(f"Used {peak:.0f} of {topology.capacity:.0f} hbm")
    lines = [
        {"kind": kind, "network": network, "group": group, **sums}
        for (kind, network, group), sums in tally.lines("collectives").items()
    ]
    chips, chip = topology.num_chips, topology.chip
    return {
        "what": what,
        "config": name,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": chips,
        "devices": topology.num_devices,
        "mesh": dict(mesh.shape),
        "remat": config.model.dit.remat if isinstance(config, VideoRun) else "none",
        # Steps that one clip takes, if it is encoded or decoded in parts.
        "parts": getattr(config, "parts", 1) if what in ("encode", "decode") else 1,
        "parameters": step.parameters,
        "tokens": step.tokens,  # Over all devices.
        "state": step.state,
        "memory": memory,
        "peak_bytes": peak,
        "capacity": topology.capacity,
        "flops": {
            "model": flops,  # What the mathematics asks for.
            "compiled": tally["flops"] + tally["kernel_flops"],
            "kernels": tally["kernel_flops"],
            "traced": traced_flops(traced.jaxpr, mesh.size) / topology.num_devices,
            "compiler": counted.get("flops"),  # XLA's count: bodies of loops once, no kernels.
        },
        "hbm_bytes": tally["hbm_bytes"],
        "compiler_bytes": counted.get("bytes accessed"),
        "host_bytes": tally["host_bytes"],
        "wire_bytes": {
            network: sum(one["wire_bytes"] for one in lines if one["network"] == network)
            for network in (ICI, DCN)
        },
        "collectives": lines,
        "kernels": [{"name": k, **sums} for (k,), sums in tally.lines("kernels").items()],
        "seconds": seconds,
        # Model flops over what the chip could do in each of the times.
        "mfu": {k: flops / (chip.flops / chip.devices) / seconds[k] for k in TIMES if seconds[k]},
        "budget": tokens and training_budget(tokens, step.tokens, seconds["per_op"], chips, price),
        "compile_seconds": compile_seconds,
        "warnings": sorted(key[1] for key in tally if key[0] == "warnings"),
    }


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


def render(plan: Plan) -> str:
    """A plan as lines of text."""
    seconds, flops, whole = plan["seconds"], plan["flops"], plan["chips"] == plan["devices"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1) or "1"
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    device = "chip" if whole else f"device ({plan['devices']} in all)"
    host = line("; host {host:B}", **plan["memory"]) if plan["memory"]["host"] else ""
    moved = line("; to and from the host {host_bytes:B}", **plan) if plan["host_bytes"] else ""
    lines = [
        f"{plan['what']} step of {plan['config']} on {slices}{plan['topology']} ({plan['chips']} "
        f"chips), mesh {mesh}, remat {plan['remat']}; amounts are of one {device}",
        line(
            "model        {parameters:#} parameters, {tokens:,.0f} tokens a step over all", **plan
        ),
    ]
    if state := plan["state"]:
        parts = "parameters {params:B}, average {ema:B}, optimizer {optimizer:B}"
        lines.append(line("state        {0:B}: " + parts, sum(state.values()), **state))
    lines += [
        line("peak HBM     {peak_bytes:B} of {capacity:B}", **plan)
        + f" ({plan['peak_bytes'] / plan['capacity']:.0%}): "
        + line(
            "arguments {arguments:B}, temporary {temporary:B}, outputs {outputs:B}, ",
            **plan["memory"],
        )
        + line("of which in place {aliased:B}", **plan["memory"])
        + host,
        line(
            "flops        model {model:#}; compiled {compiled:#} ({0:.2f} x), kernels {kernels:#} of "
            "them; traced {traced:#}; XLA's count {compiler:#}",
            flops["compiled"] / flops["model"],
            **flops,
        ),
        line("HBM moved    {hbm_bytes:B} (XLA's count {compiler_bytes:B}){0}", moved, **plan),
    ]
    kernel = "  kernel     {name}: {executions:g} x, {flops:flop}, {hbm_bytes:B}"
    lines += [line(kernel, **one) for one in plan["kernels"]]
    lines.append(line("wires        ICI {ici:B}, DCN {dcn:B} sent", **plan["wire_bytes"]))
    collective = (
        "  {network}        {kind} among {group}: {executions:g} x ({asynchronous:g} asynchronous), "
        "{logical_bytes:B}, on the wire {wire_bytes:B}, {seconds:sec}"
    )
    lines += [line(collective, **one) for one in plan["collectives"]]
    shares = ", ".join(f"{name} {{{name}:sec}}" for name in RESOURCES)
    mfu = ", ".join(f"{name} {x:.1%}" for name, x in plan["mfu"].items())
    lines += [
        line("roofline     {roofline:sec} a step, bound by {bound_by} (" + shares + ")", **seconds),
        line(
            "per op       {per_op:sec} a step at least; with the waits for asynchronous ", **seconds
        )
        + line("collectives {scheduled:sec}", **seconds),
        f"MFU at most  {mfu}",
    ]
    if (parts := plan["parts"]) > 1:
        least = (parts * seconds[name] for name in ("roofline", "per_op"))
        text = "a clip       {} steps: at least {:sec} (roofline), {:sec} (per op)"
        lines.append(line(text, parts, *least))
    if budget := plan["budget"]:
        price = "" if budget["price"] is None else f", {budget['price']:,.0f} USD"
        text = "{tokens:#} tokens: {steps:,.0f} steps, at least {days:.3g} days, {chip_hours:,.0f}"
        lines.append(line("training     " + text + " chip-hours{0}", price, **budget))
    lines.append(f"compiled in  {plan['compile_seconds']:.0f} s")
    return "\n".join([*lines, *(f"warning      {warning}" for warning in plan["warnings"])])
