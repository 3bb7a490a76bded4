"""Steps compiled for a topology by the compiler that TPUs run (libtpu's), and what it refuses."""

from __future__ import annotations

import re
import time
from typing import Any

from dit_jax.plan.abstract import AbstractStep

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_USED = (
    rf"Used {_SIZE} of {_SIZE} (?:hbm|vmem)",
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"Scoped allocation with size {_SIZE} and limit {_SIZE} ",
)


def _first_line(message: str) -> str:
    """Of the compiler's, and the next if the first is but a heading."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no message"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


class CompilerFailed(ValueError):
    """The compiler, whose message it is, cannot compile a program, for another reason than memory."""

    def __init__(self, message: str) -> None:
        remedy = "Another mesh, model.dit.remat or attention.kernel makes another program."
        super().__init__(f"the compiler failed: {_first_line(message)}. {remedy}")


class DoesNotFit(ValueError):
    """The compiler, whose message it is, found no way to keep a program within a chip's memory, or a
    kernel's blocks within its own (vmem)."""

    def __init__(self, message: str) -> None:
        sizes = next(filter(None, (re.search(form, message) for form in _USED)), None)
        kernel = re.search(r"allocating on stack for %([\w-]+)", message)
        space = re.search(r"memory space (\w+)|(Vmem)Oom", message)
        self.space = (space.group(1) or space.group(2)).lower() if space else "hbm"
        reason = _first_line(message)
        if sizes:
            number, unit, limit, limit_unit = sizes.groups()
            used, capacity = float(number) * _UNITS[unit], float(limit) * _UNITS[limit_unit]
            reason = f"the program needs {used / 1e9:.1f} of {capacity / 1e9:.1f} GB of HBM"
            if self.space != "hbm":
                name, mib = kernel.group(1) if kernel else "a kernel", 2**20
                reason = (
                    f"{name} needs {used / mib:.4g} of {capacity / mib:.4g} MiB of {self.space}"
                )
        remedy = (
            "Spread it over more devices (mesh.fsdp, mesh.context); in training, recompute more "
            "(model.dit.remat), or split the batch (optimizer.accumulate) into parts whose rows still "
            "divide over mesh.data x mesh.fsdp."
        )
        if self.space != "hbm":
            blocks = "attention.splash blocks (of a dkv kernel the *_backward ones)"
            remedy = f"More devices do not help: if it is attention's, give smaller {blocks}."
        self.reason = f"does not fit: {reason}"  # Without the remedy.
        super().__init__(f"{self.reason}. {remedy}")


def compile_step(step: AbstractStep) -> tuple[Any, Any, float]:
    """The traced program of a step, the compiled one, and the seconds that this took."""
    start = time.perf_counter()
    traced = step.function.trace(*step.arguments)
    try:
        compiled = traced.lower().compile()
    except Exception as error:
        # JAX tells kernels' errors by private classes of its own, and by this builtin.
        if not (type(error).__module__.startswith("jax") or isinstance(error, NotImplementedError)):
            raise
        refusal = DoesNotFit if "RESOURCE_EXHAUSTED" in str(error) else CompilerFailed
        raise refusal(str(error)) from error
    return traced, compiled, time.perf_counter() - start
