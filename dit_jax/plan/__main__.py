"""``python -m dit_jax.plan --config FILE --topology v5p:4x4x8``: what it takes, before renting it.

The real train step, or with ``--what sample`` one step of the solver, is compiled for TPUs that are not
there, and what the compiled program says of itself is printed (docs/plan.md tells how to read it).

Exit status: 0; 2, something given is wrong, or the compiler failed; 3, it does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dit_jax.config import Run, VideoRun, check_types, parse_config
from dit_jax.files import check_file, run_verb, write_whole
from dit_jax.plan import DoesNotFit, plan_step, render, render_sweep, render_trial, run_sweep
from dit_jax.plan.topologies import (
    Topology,
    parse_topology,
    prepare_environment,
    topology_devices,
)

PROG = "python -m dit_jax.plan"


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """Plans a step of a config on TPUs, with their compiler and without them.

    ``--config FILE`` and any field of the config by its dotted name can be given besides, as for
    ``python -m dit_jax.train``, such as ``--mesh.fsdp 64``.
    """

    topology: str
    """CHIP:SHAPE, such as v5p:4x4x8 or v6e:8x8: the chips of one slice."""
    slices: int = 1
    """Slices of that shape, joined by the data centre's network."""
    what: Literal["train", "sample", "encode", "decode"] = "train"
    """The train step; one step of the solver for one clip of the config's sampling size; or, of a
    codec's config, one part (``tiles.frames``) of encoding or decoding clips of ``data.crop``."""
    json: str | None = None
    """Also write the plan to this file as JSON; - prints it instead of the text."""
    sweep: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Try meshes and remat policies, and rank those that fit."""
    limit: int = 24
    """Combinations that a sweep compiles, at most."""
    tokens: float | None = None
    """Training tokens, for days and chip-hours."""
    price: float | None = None
    """USD for a chip-hour."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"--limit is {self.limit}: it is at least 1.")
        for name in ("tokens", "price"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} is {value}: it is above 0, or unset.")
            if value is not None and self.what != "train":
                raise ValueError(
                    f"--{name} is {value} and --what is {self.what}: training alone has a number of "
                    f"tokens and their cost. Leave --{name} out, or plan --what train."
                )
        if self.price is not None and self.tokens is None:
            raise ValueError(
                f"--price is {self.price} and --tokens is unset: what training costs needs both. Give "
                "--tokens, or leave --price out."
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Plans what the command line says; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    status = 0

    def work() -> None:
        nonlocal status
        given, rest = tyro.cli(PlanArguments, args=arguments, prog=PROG, return_unknown_args=True)
        check_types(given)
        if given.json not in (None, "-"):
            check_file(given.json, "--json")
        topology = parse_topology(given.topology, given.slices)
        config = parse_config(rest, PROG, "Plans a step of a config.", Run)
        prepare_environment()
        devices = topology_devices(topology)
        run = _sweep if given.sweep else _one
        try:
            status = run(given, config, _name(rest), topology, devices)
        except DoesNotFit as error:
            print(f"{PROG}: {error}", file=sys.stderr)
            status = 3

    return run_verb(PROG, work) or status


def _name(arguments: list[str]) -> str:
    """The config's file, from arguments that were found good."""
    text = " ".join(arguments).replace("--config=", "--config ").split()
    return Path(text[text.index("--config") + 1]).stem


def _one(
    given: PlanArguments, config: Run, name: str, topology: Topology, devices: list[Any]
) -> int:
    plan = plan_step(given.what, config, name, topology, devices, given.tokens, given.price)
    _write(given, plan.to_dict(), render(plan))
    return 0


def _sweep(
    given: PlanArguments, config: Run, name: str, topology: Topology, devices: list[Any]
) -> int:
    if not isinstance(config, VideoRun):
        raise ValueError(
            "--sweep is over meshes of models, and the config is a codec's: leave it out."
        )
    trials, left_out = run_sweep(
        given.what,
        config,
        name,
        topology,
        devices,
        given.limit,
        lambda trial, i, n: print(f"[{i}/{n}] {render_trial(trial)}", file=sys.stderr, flush=True),
        tokens=given.tokens,
        price=given.price,
    )
    if not trials:
        raise ValueError(
            f"no mesh of {topology.num_devices} devices divides data.packing.rows "
            f"{config.data.packing.rows} and row_tokens {config.data.packing.row_tokens}: change them, "
            "or the topology."
        )
    values = {"trials": [trial.to_dict() for trial in trials], "left_out": left_out}
    _write(given, values, render_sweep(trials, left_out))
    if trials[0].plan is not None:
        return 0
    return 2 if all(trial.refused for trial in trials) else 3


def _write(given: PlanArguments, values: dict[str, Any], text: str) -> None:
    encoded = json.dumps(values, indent=2)
    print(encoded if given.json == "-" else text)
    if given.json not in (None, "-"):
        write_whole(given.json, encoded + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
