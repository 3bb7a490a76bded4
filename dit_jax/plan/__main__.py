"""``python -m dit_jax.plan --config FILE --topology v5p:4x4x8``: what it takes, before renting it.

The real train step, or with ``--what sample`` one step of the solver, is compiled for TPUs that are not
there, and what the compiled program says of itself is printed (docs/plan.md tells how to read it).

Exit status: 0; 2, something given is wrong, or the compiler failed; 3, it does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dit_jax.config import Run, VideoRun, check_types, parse_config
from dit_jax.files import check_file, refuse_if, run_verb, write_whole
from dit_jax.plan import DoesNotFit, plan_step, render, render_sweep, run_sweep
from dit_jax.plan.sweep import REFUSED
from dit_jax.plan.topologies import parse_topology, prepare_environment, topology_devices
from dit_jax.types import PositiveFloat, PositiveInt

PROG = "python -m dit_jax.plan"


@dataclasses.dataclass(frozen=True)
class PlanArguments:
    """Plans a step of a config on TPUs, with their compiler and without them.

    ``--config FILE`` and any field of the config by its dotted name can be given besides, as for
    ``python -m dit_jax.train``, such as ``--mesh.fsdp 64``.
    """

    topology: str
    """CHIP:SHAPE, such as v5p:4x4x8 or v6e:8x8: the chips of one slice."""
    slices: PositiveInt = 1
    """Slices of that shape, joined by the data centre's network."""
    what: Literal["train", "sample", "encode", "decode"] = "train"
    """The train step; one step of the solver for one clip of the config's sampling size; or, of a
    codec's config, one part (``tiles.frames``) of encoding or decoding clips of ``data.crop``."""
    json: str | None = None
    """Also write the plan to this file as JSON; - prints it instead of the text."""
    sweep: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Try meshes and remat policies, and rank those that fit."""
    limit: PositiveInt = 24
    """Combinations that a sweep compiles, at most."""
    tokens: PositiveFloat | None = None
    """Training tokens, for days and chip-hours."""
    price: PositiveFloat | None = None
    """USD for a chip-hour."""


def plan(arguments: list[str]) -> int:
    """Plans what the command line says; returns the exit status."""
    options, rest = tyro.cli(PlanArguments, args=arguments, prog=PROG, return_unknown_args=True)
    check_types(options)
    tokens, price, what = options.tokens, options.price, options.what
    untrained = f"and --what is {what}: leave it out, or plan --what train."
    alone = f"--price is {price} and --tokens is unset: give both, or leave --price out."
    costs = {name: n for name, n in (("tokens", tokens), ("price", price)) if n is not None}
    refuse_if((what != "train", f"--{name} is {n} {untrained}") for name, n in costs.items())
    refuse_if([(costs.keys() == {"price"}, alone)])
    if options.json not in (None, "-"):
        check_file(options.json, "--json")
    topology = parse_topology(options.topology, options.slices)
    config = parse_config(rest, PROG, "Plans a step of a config.", Run)
    prepare_environment()
    devices = topology_devices(topology)
    name = Path(re.findall(r"--config[=\0]([^\0]+)", "\0".join(rest))[-1]).stem
    status = 0
    if options.sweep:
        codec = "--sweep is over meshes of models, and the config is a codec's: leave it out."
        refuse_if([(not isinstance(config, VideoRun), codec)])
        assert isinstance(config, VideoRun)
        trials, left_out = run_sweep(
            what, config, name, topology, devices, options.limit, tokens=tokens, price=price
        )
        packing, n = config.data.packing, topology.num_devices
        sizes = f"data.packing.rows {packing.rows} and row_tokens {packing.row_tokens}"
        message = f"no mesh of {n} devices divides {sizes}: change them, or the topology."
        refuse_if([(not trials, message)])
        values, text = {"trials": trials, "left_out": left_out}, render_sweep(trials, left_out)
        if trials[0]["plan"] is None:
            status = 2 if all(one["reason"].startswith(REFUSED) for one in trials) else 3
    else:
        try:
            values = plan_step(what, config, name, topology, devices, tokens, price)
        except DoesNotFit as error:
            print(f"{PROG}: {error}", file=sys.stderr)
            return 3
        text = render(values)
    encoded = json.dumps(values, indent=2)
    print(encoded if options.json == "-" else text)
    if options.json not in (None, "-"):
        write_whole(options.json, encoded + "\n")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return run_verb(PROG, lambda: plan(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
