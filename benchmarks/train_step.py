"""Our train step beside PyTorch's, on the same work, in one run.

    pip install -e . torch diffusers && python benchmarks/train_step.py

Both sides train a DiT of the same size (S/2 and B/4, 32 x 32 x 4 latents, batch 4) in float32:
forward, backward and AdamW; ours also clips, averages the parameters and checks that they are
finite, as training does. The PyTorch side is ``diffusers``' DiTTransformer2DModel with fused AdamW;
it embeds time and label in every block (39.8 and 147.6 M parameters), ours once for all blocks, and
ours adds QK-norm and rotary positions. Each side is a process of its own; the two take turns, a few
steps each, so that a change in the machine's speed meets both. Printed: the median and minimum
step, tokens a second, peak memory of the process, the first step (with compilation) apart, and the
ratios. Every process is started as ``--malloc`` says, both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIZES = {"S/2": (384, 12, 6, 2), "B/4": (768, 12, 12, 4)}
"""Width, depth, heads and patch size."""
BATCH, SIDE, CHANNELS = 4, 32, 4


def torch_step(size: str) -> tuple[Callable[[], float], float]:
    """A function that makes one step, and the seconds it took to prepare."""
    import torch
    from diffusers import DiTTransformer2DModel

    width, depth, heads, patch = SIZES[size]
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=depth,
        sample_size=SIDE,
        patch_size=patch,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    target, t = torch.randn_like(x), torch.randint(0, 1000, (BATCH,))
    labels = torch.zeros(BATCH, dtype=torch.long)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        out = model(x, timestep=t, class_labels=labels).sample
        loss = torch.nn.functional.mse_loss(out, target)
        loss.backward()
        optimizer.step()
        return loss.item()

    start = time.perf_counter()
    step()
    return step, time.perf_counter() - start


def jax_problem(size: str, scan: bool, dtype: str) -> tuple[Any, Any, Any]:
    """The same for ours: what initialises the parameters, their loss, and a batch."""
    import jax
    import jax.numpy as jnp

    from dit_jax.model import DiT, DiTConfig
    from dit_jax.parallel import MeshConfig, choose_attention, choose_dot_general, make_constrain
    from dit_jax.parallel import make_mesh as new_mesh
    from dit_jax.types import DenoiserInputs, Runtime, Totals

    width, depth, heads, patch = SIZES[size]
    mesh = new_mesh(MeshConfig())
    config = DiTConfig(width, depth, heads, scan=scan, cross_attention=False)
    dim, length = patch * patch * CHANNELS, (SIDE // patch) ** 2
    model = DiT(
        config,
        dim,
        Runtime(
            choose_attention(mesh),
            make_constrain(mesh),
            jnp.dtype(dtype),
            choose_dot_general(mesh),
            choose_dot_general(mesh),
        ),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(1), *[jnp.arange(SIDE // patch)] * 2), -1)
    batch = {
        "x": jax.random.normal(keys[0], (BATCH, length, dim)),
        "target": jax.random.normal(keys[1], (BATCH, length, dim)),
        "t": jax.random.uniform(keys[2], (BATCH, 1)),
        "positions": jnp.tile(grid.reshape(1, length, 3).astype(jnp.float32), (BATCH, 1, 1)),
        "ids": jnp.ones((BATCH, length), jnp.int32),
    }

    def inputs(b: dict[str, jax.Array]) -> DenoiserInputs:
        return DenoiserInputs(
            tokens=b["x"],
            positions=b["positions"],
            segment_ids=b["ids"],
            token_ids=jnp.zeros_like(b["ids"]),
            group_ids=jnp.zeros_like(b["ids"]),
            group_t=b["t"],
            text=None,
            text_segment_ids=b["ids"][:, :1],
            dropped=jnp.zeros_like(b["t"]),
        )

    def loss(
        params: object, frozen: object, b: dict[str, jax.Array], key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Totals]:
        del frozen, key, step
        mean = jnp.square(model.apply(params, inputs(b)) - b["target"]).mean()
        return mean, Totals(mean, jnp.ones(()), {})

    def init(key: jax.Array) -> object:
        return model.init(key, inputs({name: leaf[:1] for name, leaf in batch.items()}))

    return init, loss, batch


def jax_step(size: str, scan: bool, dtype: str) -> tuple[Callable[[], float], float]:
    """Our step, and the seconds that the first one took."""
    import jax

    from dit_jax.parallel import MeshConfig
    from dit_jax.parallel import make_mesh as new_mesh
    from dit_jax.training import (
        OptimizerConfig,
        abstract_state,
        init_state,
        make_optimizer,
        make_step,
    )

    init, loss, batch = jax_problem(size, scan, dtype)
    settings = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(settings, 1000)
    _, shardings = abstract_state(init, optimizer, new_mesh(MeshConfig()))
    state = init_state(init, optimizer, shardings, jax.random.key(1))
    function = make_step(loss, optimizer, settings, 0, shardings)

    def step() -> float:
        nonlocal state
        state, metrics = function(state, batch)
        return float(metrics["loss"])

    start = time.perf_counter()
    step()
    return step, time.perf_counter() - start


def work(side: str, size: str, scan: bool, dtype: str) -> None:
    """The worker: makes so many steps as each line of its input says."""
    step, prepared = torch_step(size) if side == "torch" else jax_step(size, scan, dtype)
    print(json.dumps({"prepared": prepared}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"times": times, "peak": peak}), flush=True)


def compare(size: str, rounds: int, steps: int, arguments: argparse.Namespace) -> None:
    """Runs both sides in turn and prints a row for each."""
    environment = dict(os.environ)
    if arguments.malloc == "huge":
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    workers, prepared = {}, {}
    for side in ("torch", "jax"):
        command = [sys.executable, __file__, "--worker", side, "--sizes", size]
        command += ["--dtype", arguments.dtype] + (["--scan"] if arguments.scan else [])
        workers[side] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        prepared[side] = json.loads(workers[side].stdout.readline())["prepared"]
    times: dict[str, list[float]] = {side: [] for side in workers}
    peak = {}
    for turn in range(rounds + 1):
        for side, worker in workers.items():
            worker.stdin.write(f"{steps}\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            peak[side] = answer["peak"]
            # The first turn warms up.
            times[side] += answer["times"] if turn else []
    for side, worker in workers.items():
        worker.stdin.close()
        worker.wait()
        tokens = BATCH * (SIDE // SIZES[size][3]) ** 2
        median = statistics.median(times[side])
        print(
            f"{size} {side:5}  step median {median:.3f} s, minimum {min(times[side]):.3f} s, "
            f"{tokens / median:6.0f} tokens/s, peak {peak[side]:.2f} GiB, first step (with "
            f"compilation) {prepared[side]:.1f} s"
        )
    ratio = statistics.median(times["torch"]) / statistics.median(times["jax"])
    fastest = min(times["torch"]) / min(times["jax"])
    print(f"{size} PyTorch / ours: {ratio:.2f} (medians), {fastest:.2f} (minima)")


def main() -> None:
    """Compares the sizes asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    parser.add_argument("--scan", action="store_true", help="loop over the layers, not unrolled")
    parser.add_argument("--dtype", default="float32", help="of our activations")
    parser.add_argument("--malloc", choices=["huge", "plain"], default="huge")
    parser.add_argument("--worker", choices=["torch", "jax"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.sizes[0], arguments.scan, arguments.dtype)
        return
    for size in arguments.sizes:
        compare(size, arguments.rounds, arguments.steps, arguments)


if __name__ == "__main__":
    main()
