"""What a compiled program does on one device: every instruction's cost, times how often it runs.

The program is walked as it is scheduled: bodies of loops count their trips, of a conditional the
dearest branch counts, kernels cost what ``plan.kernels`` reads in the traced program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dit_jax.plan import costs
from dit_jax.plan.hlo import HBM, HOST, Computation, Instruction, Module, trip_count
from dit_jax.plan.kernels import Kernel, match
from dit_jax.plan.topologies import Topology

# Of collectives that nothing can run beside; of the others what the work beside them does not fill.
SYNC, WAIT = "sync_seconds", "wait_seconds"


class Tally(dict[Any, float]):
    """Sums over executed instructions, of one device, by these keys:

    - flops and kernel_flops, of matrix products outside and in kernels; hbm_bytes; host_bytes
    - op_seconds, each instruction at the larger of its flops and its bytes; SYNC; WAIT
    - ring_up, ring_down: seconds of permutations in each direction of a ring, which can overlap
    - (collectives, kind, network, group, SUM), (kernels, name, SUM): SUM is executions, seconds, ...
    - (warnings, text)
    """

    def __init__(self, values: Any = ()) -> None:
        super().__init__(values)
        # Asynchronous work by name: when it began, and how long it takes alone. It is no sum.
        self.under_way: dict[str, tuple[float, float]] = {}

    def __missing__(self, key: Any) -> float:
        return 0.0

    @property
    def seconds(self) -> float:
        """As if nothing overlapped but what the schedule overlaps."""
        return self["op_seconds"] + self[SYNC] + self[WAIT]

    def lines(self, what: str) -> dict[tuple[Any, ...], dict[str, float]]:
        """The sums of each of the collectives or the kernels."""
        out: dict[Any, dict[str, float]] = {}
        for key, value in self.items():
            if key[0] == what:
                out.setdefault(key[1:-1], {})[key[-1]] = value
        return dict(sorted(out.items()))

    def add(self, other: dict[Any, float], times: float = 1.0, under: tuple[Any, ...] = ()) -> None:
        """Adds other sums so many times, of a line ``under`` its key."""
        for key, value in other.items():
            self[(*under, key) if under else key] += times * value

    def add_collective(self, one: costs.Collective, name: str | None) -> None:
        """Counts one execution; with a ``name`` something can run beside it until it is finished."""
        sums = {"executions": 1.0, "asynchronous": float(name is not None)}
        sums |= {"logical_bytes": one.logical, "wire_bytes": one.wire, "seconds": one.seconds}
        self.add(sums, under=("collectives", one.kind, one.network, one.group))
        self["ring_up"] += one.seconds * (one.direction > 0)
        self["ring_down"] += one.seconds * (one.direction < 0)
        if one.warning:
            self["warnings", one.warning] = 1
        if name is None:
            self[SYNC] += one.seconds
        else:
            self.under_way[name] = (self.seconds, one.seconds)

    def finish(self, name: str) -> None:
        """Waits for what is under way by this name, if anything is."""
        if name in self.under_way:
            start, seconds = self.under_way.pop(name)
            self[WAIT] += max(seconds - (self.seconds - start), 0.0)


class Walker:
    """Tallies the computations of one module, each once."""

    def __init__(self, module: Module, kernels: list[Kernel], wires: tuple[Any, Topology]) -> None:
        self._module, self._kernels, self._wires = module, kernels, wires
        self._tallies: dict[str, Tally] = {}

    def tally(self, name: str) -> Tally:
        """Of one execution of a computation."""
        if name not in self._tallies:
            total = self._tallies[name] = Tally()
            computation = self._module.computations[name]
            for instruction in computation.values():
                self._add(total, instruction, computation)
        return self._tallies[name]

    def _add(self, total: Tally, instruction: Instruction, computation: Computation) -> None:
        code, name, attributes = instruction.opcode, instruction.name, instruction.attributes
        if code == "while":
            trips = trip_count(self._module, instruction, computation)
            if trips is None:
                total["warnings", f"trips of {name} unknown: counted once"] = 1
            total.add(self.tally(instruction.called("body")), 1 if trips is None else trips)
        elif code == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            branches = re.findall(r"[\w.\-]+", " ".join(attributes.get(key, "") for key in keys))
            total.add(max(map(self.tally, branches), key=lambda tally: tally.seconds))
            total["warnings", f"{name}: the dearest of {len(branches)} branches counted"] = 1
        elif code == "call":
            total.add(self.tally(instruction.called("to_apply", "calls")))
        elif code == "async-start":
            inner = Tally(self.tally(instruction.called("to_apply", "calls")))
            total.under_way[name] = (total.seconds, inner.pop(SYNC, 0.0))
            for key in [key for key in inner if key[-1] == "asynchronous"]:
                inner[key] = inner[*key[:-1], "executions"]
            total.add(inner)
        elif code == "async-update":
            start = total.seconds, 0.0
            total.under_way[name] = total.under_way.pop(instruction.operands[0], start)
        elif code.endswith("-done"):
            total.finish(instruction.operands[0])
        elif code != "custom-call":
            self._add_plain(total, instruction, computation)
        elif attributes.get("custom_call_target") == '"tpu_custom_call"':
            # Other targets allocate, annotate or rename buffers.
            self._add_kernel(total, instruction, computation)

    def _seconds(self, flops: float, moved: float) -> float:
        """Of an instruction at the published peaks of one device."""
        chip, n = self._wires[1].chip, self._wires[1].chip.devices
        return max(flops / (chip.flops / n), moved / (chip.hbm_bandwidth / n))

    def _add_kernel(self, total: Tally, instruction: Instruction, computation: Computation) -> None:
        operands = [computation[name].results[0] for name in instruction.operands]
        kernel = match(self._kernels, instruction, tuple(array.dims for array in operands))
        arrays = (*operands, *instruction.results)
        if kernel is None or len(kernel.block_bytes) != len(arrays):
            name = re.sub(r"(\.\d+)+$", "", instruction.name)
            kernel = Kernel(name, (), 0.0, tuple(array.bytes for array in arrays))
            total["warnings", f"kernel {name} is not in the traced program: no flops counted"] = 1
        pairs, flops = zip(arrays, kernel.block_bytes, strict=True), kernel.flops
        moved = sum(size for array, size in pairs if array.space == HBM)
        sums = {"executions": 1.0, "flops": flops, "hbm_bytes": moved}
        total.add(sums, under=("kernels", kernel.name))
        seconds = self._seconds(flops, moved)
        total.add({"kernel_flops": flops, "hbm_bytes": moved, "op_seconds": seconds})

    def _add_plain(self, total: Tally, instruction: Instruction, computation: Computation) -> None:
        code, contents = instruction.opcode, [(instruction, computation)]
        # Copies run beside computation, and a collective's bytes beside its wires.
        beside = code in costs.COPIES
        if code == "fusion":
            contents = list(costs.fusion_contents(self._module, instruction))
            scattered = "AllReduceScatter" in instruction.attributes.get("backend_config", "")
            beside = self._add_fused(total, contents, scattered)
        elif code in ("send", "recv") or instruction.collective:
            beside, one = True, costs.dcn_collective(instruction, self._wires[1])
            if instruction.collective:
                one = costs.ici_collective(instruction, computation, *self._wires, False)
            if one is not None:
                total.add_collective(one, None if code == one.kind else instruction.name)
        flops = sum(costs.matmul_flops(inner, around) for inner, around in contents)
        if code in costs.COPIES:
            size, spaces = costs.transfer(instruction, computation)
            moved, to_host = size * spaces.count(HBM), size * (HOST in spaces)
        else:
            moved, to_host = costs.hbm_bytes(instruction, computation, self._module), 0.0
        seconds = 0.0 if beside else self._seconds(flops, moved)
        total.add({"flops": flops, "hbm_bytes": moved})
        total.add({"host_bytes": to_host, "op_seconds": seconds})

    def _add_fused(
        self, total: Tally, contents: Iterable[tuple[Instruction, Computation]], scattered: bool
    ) -> bool:
        """Counts the collectives in a fusion; whether nothing can run beside one of them."""
        alone = False
        for inner, around in contents:
            if not inner.collective:
                continue
            chain, stages = None, {"Start"}
            if costs.chained(inner):
                chain = f"chain of channel {inner.attributes.get('channel_id')}"
                stages = {
                    s for s in ("Start", "Done") for i in around.values() if costs.marks(i, s)
                }
            if chain and "Done" in stages:
                total.finish(chain)
            elif stages:
                one = costs.ici_collective(inner, around, *self._wires, scattered)
                total.add_collective(one, chain)
                alone |= chain is None
        return alone


def analyse(module: Module, kernels: list[Kernel], devices: list[Any], topology: Topology) -> Tally:
    """What one device does in one execution of a program that was compiled for these devices."""
    wires = costs.coordinates(devices, topology), topology
    return Walker(module, kernels, wires).tally(module.entry)
