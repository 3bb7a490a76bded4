"""Plans as text for people; ``Plan.to_dict`` is for programs."""

from __future__ import annotations

from dit_jax.parallel import MeshConfig
from dit_jax.parallel.mesh import AXES
from dit_jax.plan.report import Plan
from dit_jax.plan.sweep import Trial


def _count(value: float | None, unit: str = "") -> str:
    if value is None:
        return "none"
    prefixes = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    prefix, size = next(((p, s) for p, s in prefixes if abs(value) >= s), ("", 1.0))
    return f"{value / size:.3g} {prefix}{unit}".rstrip()


def _seconds(value: float) -> str:
    scales = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
    size, unit = next(((s, u) for s, u in scales if value >= s), (1.0, "s"))
    return f"{value / size:.3g} {unit}"


def _memory(plan: Plan) -> list[str]:
    memory, lines = plan.memory, []
    if plan.state is not None:
        state = plan.state
        lines.append(
            f"state        {_count(sum(state), 'B')}: parameters {_count(state.params, 'B')}, average "
            f"{_count(state.ema, 'B')}, optimizer {_count(state.optimizer, 'B')}"
        )
    host = f"; host {_count(memory.host, 'B')}" if memory.host else ""
    lines.append(
        f"peak HBM     {_count(plan.peak_bytes, 'B')} of {_count(plan.capacity, 'B')} "
        f"({plan.peak_bytes / plan.capacity:.0%}): arguments {_count(memory.arguments, 'B')}, "
        f"temporary {_count(memory.temporary, 'B')}, outputs {_count(memory.outputs, 'B')}, "
        f"of which in place {_count(memory.aliased, 'B')}{host}"
    )
    return lines


def _work(plan: Plan) -> list[str]:
    flops = plan.flops
    host = f"; to and from the host {_count(plan.host_bytes, 'B')}" if plan.host_bytes else ""
    lines = [
        f"flops        model {_count(flops.model)}; compiled {_count(flops.compiled)} "
        f"({flops.compiled / flops.model:.2f} x), kernels {_count(flops.kernels)} of them; traced "
        f"{_count(flops.traced)}; XLA's count {_count(flops.compiler)}",
        f"HBM moved    {_count(plan.hbm_bytes, 'B')} (XLA's count {_count(plan.compiler_bytes, 'B')})"
        + host,
    ]
    for kernel in plan.kernels:
        lines.append(
            f"  kernel     {kernel.name}: {kernel.executions:g} x, {_count(kernel.flops, 'flop')}, "
            f"{_count(kernel.hbm_bytes, 'B')}"
        )
    wires = ", ".join(f"{net.upper()} {_count(size, 'B')}" for net, size in plan.wire_bytes.items())
    lines.append(f"wires        {wires} sent")
    for one in plan.collectives:
        lines.append(
            f"  {one.network}        {one.kind} among {one.group}: {one.executions:g} x "
            f"({one.asynchronous:g} asynchronous), {_count(one.logical_bytes, 'B')}, on the wire "
            f"{_count(one.wire_bytes, 'B')}, {_seconds(one.seconds)}"
        )
    return lines


def render(plan: Plan) -> str:
    """A plan as lines of text; amounts are of one device."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1"
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    device = "chip" if plan.chips == plan.devices else f"device ({plan.devices} in all)"
    seconds = plan.seconds
    parts = ("flops", "hbm", "ici", "dcn", "host")
    shares = ", ".join(f"{name} {_seconds(getattr(seconds, name))}" for name in parts)
    lines = [
        f"{plan.what} step of {plan.config} on {slices}{plan.topology} ({plan.chips} chips), mesh "
        f"{mesh}, remat {plan.remat}; amounts are of one {device}",
        f"model        {_count(plan.parameters)} parameters, {plan.tokens:,.0f} tokens a step over all",
        *_memory(plan),
        *_work(plan),
        f"roofline     {_seconds(seconds.roofline)} a step, bound by {seconds.bound_by} ({shares})",
        f"per op       {_seconds(seconds.per_op)} a step at least; with the waits for asynchronous "
        f"collectives {_seconds(seconds.scheduled)}",
        "MFU at most  " + ", ".join(f"{n} {x:.1%}" for n, x in plan.mfu.items()),
    ]
    if plan.parts > 1:
        each = (seconds.roofline, seconds.per_op)
        least = " (roofline), ".join(_seconds(plan.parts * one) for one in each)
        lines.append(f"a clip       {plan.parts} steps: at least {least} (per op)")
    if plan.budget is not None:
        total = plan.budget
        price = "" if total.price is None else f", {total.price:,.0f} USD"
        lines.append(
            f"training     {_count(total.tokens)} tokens: {total.steps:,.0f} steps, at least "
            f"{total.days:.3g} days, {total.chip_hours:,.0f} chip-hours{price}"
        )
    lines.append(f"compiled in  {plan.compile_seconds:.0f} s")
    lines += [f"warning      {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def _mesh(mesh: MeshConfig) -> str:
    return "x".join(f"{getattr(mesh, axis)}" for axis in AXES)


def render_trial(trial: Trial) -> str:
    """One combination of a sweep in a line."""
    head = f"{_mesh(trial.mesh):>14}  {trial.remat:<12}"
    if trial.plan is None:
        return f"{head}  {trial.reason}"
    plan = trial.plan
    return (
        f"{head}  {_seconds(plan.seconds.per_op):>9}  {plan.mfu['per_op']:>6.1%}  "
        f"{_count(plan.peak_bytes, 'B'):>8}  {_count(sum(plan.wire_bytes.values()), 'B'):>8}  "
        f"{plan.seconds.bound_by}"
    )


def render_sweep(trials: list[Trial], left_out: int) -> str:
    """A sweep as a table, the fastest that fits first."""
    header = f"{'x'.join(AXES)}  remat, per op, MFU at most, peak HBM, sent, bound by"
    lines = [header, *map(render_trial, trials)]
    if left_out:
        lines.append(f"{left_out} more combinations were not tried: raise --limit.")
    return "\n".join(lines)
