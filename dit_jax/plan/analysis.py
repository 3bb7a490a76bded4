"""What a compiled program does on one device: every instruction's cost, times how often it runs.

The program is walked as it is scheduled: bodies of loops count their trips, of a conditional the
dearest branch counts, kernels cost what ``plan.kernels`` found in the traced program.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from dit_jax.plan.collectives import Collective, Wiring, dcn_collective, ici_collective, wiring
from dit_jax.plan.costs import (
    COPIES,
    chained,
    fusion_contents,
    hbm_bytes,
    host_bytes,
    marks,
    matmul_flops,
)
from dit_jax.plan.hlo import HBM, Computation, Instruction, Module
from dit_jax.plan.kernels import Kernel, match
from dit_jax.plan.loops import trip_count
from dit_jax.plan.topologies import Topology


class Use(NamedTuple):
    """All executions of collectives of one kind, network and group size."""

    executions: float = 0.0
    asynchronous: float = 0.0
    """Those that computation can run beside."""
    logical: float = 0.0
    wire: float = 0.0
    seconds: float = 0.0


class KernelUse(NamedTuple):
    """All executions of one kernel."""

    executions: float = 0.0
    flops: float = 0.0
    hbm_bytes: float = 0.0


def _plus(a: Any, b: Any, times: float) -> Any:
    return type(a)(*(x + times * y for x, y in zip(a, b, strict=True)))


@dataclasses.dataclass
class Tally:
    """Sums over executed instructions, of one device."""

    flops: float = 0.0
    """Of matrix products outside kernels."""
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    op_seconds: float = 0.0
    """Each instruction at the larger of its flops and its bytes."""
    sync_seconds: float = 0.0
    """Of collectives that nothing can run beside."""
    wait_seconds: float = 0.0
    """Of collectives that something could run beside: what that something does not fill."""
    ring_up: float = 0.0
    """Seconds of permutations in one direction of a ring, and in the other: they can overlap."""
    ring_down: float = 0.0
    collectives: dict[tuple[str, str, int], Use] = dataclasses.field(default_factory=dict)
    kernels: dict[str, KernelUse] = dataclasses.field(default_factory=dict)
    warnings: set[str] = dataclasses.field(default_factory=set)

    @property
    def seconds(self) -> float:
        """As if nothing overlapped but what the schedule overlaps."""
        return self.op_seconds + self.sync_seconds + self.wait_seconds

    def add(self, other: Tally, times: float = 1.0) -> None:
        """Adds another tally so many times."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, dict):
                for key, use in theirs.items():
                    mine[key] = _plus(mine.get(key, type(use)()), use, times)
            elif isinstance(mine, set):
                mine |= theirs
            else:
                setattr(self, field.name, mine + times * theirs)

    def add_collective(self, one: Collective, asynchronous: bool) -> None:
        """Counts one execution."""
        key = (one.kind, one.network, one.group)
        use = Use(1.0, float(asynchronous), one.logical, one.wire, one.seconds)
        self.collectives[key] = _plus(self.collectives.get(key, Use()), use, 1.0)
        self.ring_up += one.seconds * (one.direction > 0)
        self.ring_down += one.seconds * (one.direction < 0)
        self.sync_seconds += 0.0 if asynchronous else one.seconds


class Speed(NamedTuple):
    """Peaks of one device."""

    flops: float
    hbm: float

    def seconds(self, flops: float, bytes: float) -> float:
        return max(flops / self.flops, bytes / self.hbm)


class Walker:
    """Tallies the computations of one module, each once."""

    def __init__(self, module: Module, wires: Wiring, kernels: list[Kernel]) -> None:
        chip = wires.topology.chip
        self._module = module
        self._wires = wires
        self._kernels = kernels
        self._speed = Speed(chip.flops / chip.devices, chip.hbm_bandwidth / chip.devices)
        self._done: dict[str, Tally] = {}

    def tally(self, name: str) -> Tally:
        """Of one execution of a computation."""
        if name not in self._done:
            self._done[name] = self._walk(self._module.computations[name])
        return self._done[name]

    def _walk(self, computation: Computation) -> Tally:
        total = Tally()
        begun: dict[str, tuple[float, float]] = {}
        for instruction in computation.values():
            code = instruction.opcode
            if code == "while":
                self._loop(total, instruction, computation)
            elif code == "conditional":
                self._branches(total, instruction)
            elif (called := instruction.called("to_apply", "calls")) and code in (
                "call",
                "async-start",
            ):
                inner = dataclasses.replace(self.tally(called))
                if code == "async-start":
                    begun[instruction.name] = (total.seconds, inner.sync_seconds)
                    inner.sync_seconds = 0.0
                    inner.collectives = {
                        key: use._replace(asynchronous=use.executions)
                        for key, use in inner.collectives.items()
                    }
                total.add(inner)
            elif code == "custom-call":
                self._custom(total, instruction, computation)
            elif code == "async-update":
                begun[instruction.name] = begun.pop(instruction.operands[0], (total.seconds, 0.0))
            elif code.endswith("-done"):
                self._finish(total, instruction.operands[0], begun)
            else:
                self._plain(total, instruction, computation, begun)
        return total

    def _loop(self, total: Tally, loop: Instruction, computation: Computation) -> None:
        trips = trip_count(self._module, loop, computation)
        if trips is None:
            total.warnings.add(f"trips of {loop.name} unknown: counted once")
        total.add(self.tally(loop.called("body") or ""), 1 if trips is None else trips)

    def _branches(self, total: Tally, instruction: Instruction) -> None:
        text = instruction.attributes.get("branch_computations", "")
        names = re.findall(r"%?([\w.\-]+)", text)
        names = names or [
            name
            for key in ("true_computation", "false_computation")
            if (name := instruction.called(key))
        ]
        total.add(max((self.tally(name) for name in names), key=lambda tally: tally.seconds))
        total.warnings.add(f"{instruction.name}: the dearest of {len(names)} branches counted")

    def _custom(self, total: Tally, instruction: Instruction, computation: Computation) -> None:
        # Other targets allocate, annotate or rename buffers.
        if instruction.attributes.get("custom_call_target") != '"tpu_custom_call"':
            return
        arrays = [computation[name].results[0] for name in instruction.operands]
        kernel = match(self._kernels, instruction, tuple(array.dims for array in arrays))
        every = (*arrays, *instruction.results)
        if kernel is None or len(kernel.block_bytes) != len(every):
            name = re.sub(r"(\.\d+)+$", "", instruction.name)
            declared = re.search(
                r'"cost_estimate":\{"flops":"?(\d+)',
                instruction.attributes.get("backend_config", ""),
            )
            flops = float(declared.group(1)) if declared else 0.0
            moved = sum(array.bytes for array in every if array.space == HBM)
            told = "its author's estimate" if declared else "no flops"
            total.warnings.add(f"kernel {name} is not in the traced program: {told} counted")
        else:
            name, flops = kernel.name, kernel.flops
            pairs = zip(every, kernel.block_bytes, strict=True)
            moved = sum(size for array, size in pairs if array.space == HBM)
        use = total.kernels.get(name, KernelUse())
        total.kernels[name] = _plus(use, KernelUse(1.0, flops, moved), 1.0)
        total.kernel_flops += flops
        total.hbm_bytes += moved
        total.op_seconds += self._speed.seconds(flops, moved)

    def _finish(self, total: Tally, name: str, begun: dict[str, tuple[float, float]]) -> None:
        """Waits for what was begun under this name, if it was."""
        if name in begun:
            start, seconds = begun.pop(name)
            total.wait_seconds += max(seconds - (total.seconds - start), 0.0)

    def _plain(
        self,
        total: Tally,
        instruction: Instruction,
        computation: Computation,
        begun: dict[str, tuple[float, float]],
    ) -> None:
        moved = hbm_bytes(instruction, computation, self._module)
        flops = matmul_flops(instruction, computation)
        if instruction.opcode == "fusion":
            contents = list(fusion_contents(self._module, instruction))
            flops = sum(matmul_flops(inner, around) for inner, around in contents)
            alone = self._fused(total, instruction, contents, begun)
        else:
            alone = self._collective(total, instruction, computation, begun)
        total.flops += flops
        total.hbm_bytes += moved
        total.host_bytes += host_bytes(instruction, computation)
        # Copies run beside computation, and a collective's bytes beside its wires.
        if instruction.opcode not in COPIES and not alone:
            total.op_seconds += self._speed.seconds(flops, moved)

    def _collective(
        self,
        total: Tally,
        instruction: Instruction,
        computation: Computation,
        begun: dict[str, tuple[float, float]],
    ) -> bool:
        """Counts the collective that an instruction is or begins; whether it is one."""
        if instruction.opcode in ("send", "recv"):
            one, warning = dcn_collective(instruction, self._wires), None
        elif instruction.collective:
            one, warning = ici_collective(instruction, computation, self._wires)
        else:
            return False
        asynchronous = instruction.opcode != instruction.collective
        if one is not None:
            total.add_collective(one, asynchronous)
            if asynchronous:
                begun[instruction.name] = (total.seconds, one.seconds)
        total.warnings |= {warning} if warning else set()
        return True

    def _fused(
        self,
        total: Tally,
        fusion: Instruction,
        contents: list[tuple[Instruction, Computation]],
        begun: dict[str, tuple[float, float]],
    ) -> bool:
        """Counts the collectives in a fusion; whether nothing can run beside one of them."""
        alone = False
        scatter = "AllReduceScatter" in fusion.attributes.get("backend_config", "")
        for inner, around in contents:
            if not inner.collective:
                continue
            chain = f"chain of channel {inner.attributes.get('channel_id')}"
            if chained(inner) and any(marks(end, "Done") for end in around.values()):
                self._finish(total, chain, begun)
            elif not chained(inner) or any(marks(end, "Start") for end in around.values()):
                kind = "reduce-scatter" if scatter and inner.collective == "all-reduce" else None
                one, warning = ici_collective(inner, around, self._wires, kind)
                total.add_collective(one, chained(inner))
                total.warnings |= {warning} if warning else set()
                if chained(inner):
                    begun[chain] = (total.seconds, one.seconds)
                else:
                    alone = True
        return alone


def analyse(module: Module, kernels: list[Kernel], devices: list[Any], topology: Topology) -> Tally:
    """What one device does in one execution of a program that was compiled for these devices."""
    return Walker(module, wiring(devices, topology), kernels).tally(module.entry)
