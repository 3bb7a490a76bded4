"""The table of docs/scaling.md: rows of 32 k to 4 M tokens on 8 to 512 chips, by the planner.

    python benchmarks/scaling.py

The transformer of ``configs/video_1b3.py``, every layer attending to the whole row. A row is spread
over as many chips as leave each of them 32 k tokens at least; the other chips take rows of their own
(``mesh.fsdp``). Of the rematerialisation policies the first that fits is taken. Nothing runs: the
times are the least that the compiled programs allow. Each entry takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from dit_jax.config import VideoRun, load_config
from dit_jax.parallel import MeshConfig
from dit_jax.plan import DoesNotFit, Plan, plan_step
from dit_jax.plan.topologies import parse_topology, prepare_environment, topology_devices

CONFIG = "configs/video_1b3.py"
TOKENS = (2**15, 2**18, 2**20, 2**22)
TOPOLOGIES = ("v5p:2x2x2", "v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x8")
TOKENS_A_CHIP = 2**15
POLICIES = ("projections", "attention", "full")


def variant(config: VideoRun, tokens: int, chips: int, remat: Any) -> VideoRun:
    """The config with rows of so many tokens, spread over so many chips."""
    context = min(chips, max(1, tokens // TOKENS_A_CHIP))
    rows = chips // context
    packing = dataclasses.replace(config.data.packing, rows=rows, row_tokens=tokens)
    dit = dataclasses.replace(config.model.dit, remat=remat)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, packing=packing),
        model=dataclasses.replace(config.model, dit=dit),
        mesh=MeshConfig(data=1, fsdp=rows, context=context),
    )


def entry(config: VideoRun, tokens: int, name: str) -> Plan | None:
    """The plan with the first policy that fits; None if none does."""
    topology = parse_topology(name, 1)
    devices = topology_devices(topology)
    for remat in POLICIES:
        try:
            one = variant(config, tokens, len(devices), remat)
            return plan_step("train", one, "video_1b3", topology, devices)
        except DoesNotFit:
            continue
    return None


def line(tokens: int, name: str, plan: Plan | None) -> str:
    """A row of the table."""
    if plan is None:
        return f"| {tokens:,} | {name} | does not fit | | | | | |"
    mesh, seconds = plan["mesh"], plan["seconds"]
    return (
        f"| {tokens:,} | {name} ({plan['chips']}) | fsdp {mesh['fsdp']} x context {mesh['context']}, "
        f"{plan['remat']} | {plan['peak_bytes'] / 1e9:.1f} | "
        f"{seconds['roofline']:.3g} ({seconds['bound_by']}) | {seconds['per_op']:.3g} | "
        f"{sum(plan['wire_bytes'].values()) / 1e9:.3g} | {100 * plan['mfu']['per_op']:.0f} % |"
    )


def main() -> None:
    """Prints the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    given = parser.parse_args()
    prepare_environment()
    config = load_config(CONFIG)
    print(
        "| tokens a row | topology (chips) | mesh, remat | HBM GB | roofline s (bound by) | per-op s | "
        "wire GB | MFU at most |\n| --- | --- | --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for tokens in given.tokens:
        for name in given.topologies:
            print(line(tokens, name, entry(config, tokens, name)), flush=True)


if __name__ == "__main__":
    main()
