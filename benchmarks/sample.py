"""Making clips: our sampler beside ``diffusers``, and what its options cost in quality.

    pip install -e . torch diffusers && python benchmarks/sample.py
    python benchmarks/sample.py --checkpoint runs/quickstart

Without a run, both sides make one clip at a time with a transformer of the same size and random weights
in float32: Euler steps, guidance, random text states, no autoencoder on either side. PyTorch's is
``WanTransformer3DModel`` with ``FlowMatchEulerDiscreteScheduler``, called as Wan's pipeline does (with
the text and without it, one after the other) and with both as one batch ("fused"); ours is what
``python -m dit_jax.sample`` runs. Sides are processes of their own and take turns, a clip each. Printed
are medians for a clip and a step, the first clip (with compilation) apart, and the ratio to the faster
of PyTorch's. That a second clip compiles nothing is asserted.

With a run of moving shapes, clips for its held-out prompts are made with several settings that take
turns: seconds a clip, how many prompts the judge finds followed, and how far the clips are from those
of the run's own settings. Among them, PyTorch's transformer of the run's width, depth and heads, random
weights, makes as many clips of as many tokens in batches of the same size, with the run's number of
Euler steps and guidance as one batch. The last lines name the fastest setting that follows as many
prompts, and how many times as fast it is as PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIZES = {"Ti": (192, 6, 4), "S": (384, 12, 6), "B": (768, 12, 12)}
"""Width, depth and heads."""
CHANNELS, TEXT_DIM, TEXT_TOKENS, CFG_SCALE = 16, 512, 64, 5.0
SIDES = ("torch", "torch fused", "ours")
SETTINGS = (
    "cfg_interval=0.3,1",
    "cfg_interval=0.6,1",
    "cache_threshold=0.08",
    "cache_threshold=0.12",
    "cache_threshold=0.2",
    "solver=unipc steps=16",
    "solver=unipc steps=12",
    "solver=unipc steps=8",
    "solver=dpmpp_2m steps=12",
    "steps=12",
    "cfg_interval=0.6,1 cache_threshold=0.12",
    "solver=unipc steps=12 cfg_interval=0.6,1",
    "solver=unipc steps=16 cfg_interval=0.6,1 cache_threshold=0.12",
)


@dataclasses.dataclass(frozen=True)
class Clips:
    """What PyTorch's side makes: its transformer, and clips ``[count, channels, *size]``."""

    width: int
    depth: int
    heads: int
    channels: int
    patch: tuple[int, int, int]
    size: tuple[int, int, int]
    text_dim: int
    text_tokens: int
    steps: int
    cfg_scale: float
    batch: int = 1
    count: int = 1

    @classmethod
    def of(cls, given: argparse.Namespace) -> Clips:
        """One clip of the size that the command line says."""
        size = given.frames, given.height, given.width
        text = TEXT_DIM, TEXT_TOKENS, given.steps, CFG_SCALE
        return cls(*SIZES[given.size], CHANNELS, (1, 2, 2), size, *text)


def torch_clips(what: Clips, fused: bool) -> Callable[[], int]:
    """A function that makes the clips and tells how many programs it compiled: none."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=what.patch,
        num_attention_heads=what.heads,
        attention_head_dim=what.width // what.heads,
        in_channels=what.channels,
        out_channels=what.channels,
        text_dim=what.text_dim,
        ffn_dim=4 * what.width,
        num_layers=what.depth,
    ).eval()
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}), flush=True)
    scheduler: Any = FlowMatchEulerDiscreteScheduler()

    @torch.inference_mode()
    def batch(count: int) -> None:
        text, empty = torch.randn(2, count, what.text_tokens, what.text_dim)
        scheduler.set_timesteps(what.steps)
        x = torch.randn(count, what.channels, *what.size)
        for t in scheduler.timesteps:
            if fused:
                both = torch.cat([text, empty])
                out = model(torch.cat([x, x]), t.expand(2 * count), both, return_dict=False)[0]
                conditional, without = out.chunk(2)
            else:
                conditional = model(x, t.expand(count), text, return_dict=False)[0]
                without = model(x, t.expand(count), empty, return_dict=False)[0]
            velocity = without + what.cfg_scale * (conditional - without)
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        assert torch.isfinite(x).all()

    def clips() -> int:
        for first in range(0, what.count, what.batch):
            batch(min(what.batch, what.count - first))
        return 0

    return clips


def our_clip(given: argparse.Namespace) -> Callable[[], int]:
    """The same for ours."""
    import jax
    import numpy as np
    from flax import linen as nn

    from dit_jax.diffusion import DiffusionConfig
    from dit_jax.model import DiTConfig, ModelConfig, PatchConfig, TextStatesConfig
    from dit_jax.parallel import MeshConfig, make_mesh
    from dit_jax.sampling import Generator, Request, SamplingConfig
    from dit_jax.sampling.sampler import make_latents
    from dit_jax.training.video_task import init_params, make_model

    compiled = [0]

    def count(event: str, duration_secs: float, **more: Any) -> None:
        del duration_secs, more
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    width, depth, heads = SIZES[given.size]
    config = ModelConfig(
        DiTConfig(width, depth, heads, modulation="shared"),
        PatchConfig(t=1, h=2, w=2, channels=CHANNELS),
        TextStatesConfig("random", TEXT_DIM, TEXT_TOKENS),
        dtype="float32",
    )
    mesh = make_mesh(MeshConfig())
    model = make_model(config, mesh)
    params = nn.unbox(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))
    print(json.dumps({"parameters": sum(p.size for p in jax.tree.leaves(params))}), flush=True)
    sampling = SamplingConfig(steps=given.steps, cfg_scale=CFG_SCALE, shift=1.0)
    generator = Generator(model, DiffusionConfig(), sampling)
    states = np.random.default_rng(0).normal(size=(TEXT_TOKENS - 1, TEXT_DIM)).astype(np.float32)
    seed = [0]

    def clip() -> int:
        before, seed[0] = compiled[0], seed[0] + 1
        size = given.frames, given.height, given.width
        request = Request("", *size, 24.0, seed[0], states)
        (row,) = make_latents(generator, params, [request], mesh)
        assert np.isfinite(row).all()
        return compiled[0] - before

    return clip


class Worker:
    """A side in a process of its own, which makes what it makes when it is told to."""

    def __init__(self, side: str, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", side, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        )
        self.parameters = self._answer()["parameters"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def make(self) -> dict[str, Any]:
        """Seconds, and programs that were compiled."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Waits for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work(given: argparse.Namespace) -> None:
    """The worker: makes a clip for every line of its input."""
    side = given.worker
    what = Clips(**json.loads(given.clips_of)) if given.clips_of else Clips.of(given)
    clip = our_clip(given) if side == "ours" else torch_clips(what, side == "torch fused")
    for _ in sys.stdin:
        start = time.perf_counter()
        compiled = clip()
        print(
            json.dumps({"seconds": time.perf_counter() - start, "compiled": compiled}), flush=True
        )


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Runs all sides in turn."""
    workers = {side: Worker(side, given.passed) for side in SIDES}
    found: dict[str, Any] = {
        side: {"parameters": worker.parameters, "clips": []} for side, worker in workers.items()
    }
    for turn in range(given.rounds + 1):
        for side, worker in workers.items():
            answer = worker.make()
            if turn:
                assert answer["compiled"] == 0, f"{side}: a later clip compiled {answer}"
                found[side]["clips"].append(answer["seconds"])
            else:
                found[side]["first"] = answer["seconds"]
    for side, worker in workers.items():
        worker.end()
        each = found[side]
        each["clip"] = statistics.median(each["clips"])
        each["step"] = each["clip"] / given.steps
        print(
            f"{side:12} {each['parameters'] / 1e6:6.1f} M  clip {each['clip']:7.2f} s  step "
            f"{each['step']:.3f} s  first clip (with compilation) {each['first']:.1f} s"
        )
    fastest = min(found["torch"]["clip"], found["torch fused"]["clip"])
    ratio = fastest / found["ours"]["clip"]
    print(f"PyTorch's faster way / ours: {ratio:.2f} (medians of {given.rounds} clips)")
    what = {name: getattr(given, name) for name in ("size", "steps", "frames", "height", "width")}
    return {"what": what, "sides": found, "ratio": ratio}


def parse_setting(text: str) -> dict[str, Any]:
    """``solver=unipc steps=12 cfg_interval=0.6,1`` as fields of ``SamplingConfig``."""
    found: dict[str, Any] = {}
    for part in text.split():
        name, _, value = part.partition("=")
        if name == "cfg_interval":
            low, high = value.split(",")
            found[name] = (float(low), float(high))
        else:
            found[name] = value if name == "solver" else json.loads(value)
    return found


def settings_table(given: argparse.Namespace) -> dict[str, Any]:
    """Makes a run's held-out clips with every setting, and judges them."""
    import jax
    import numpy as np

    from dit_jax.evaluate import ShapeEvaluator
    from dit_jax.sampling import Generator, make_clips, plain
    from dit_jax.sampling.media import mean_psnr
    from dit_jax.sampling.pipeline import load_run
    from dit_jax.training.video_task import eval_requests

    pipeline = load_run(given.checkpoint, codec=given.codec)
    config, mesh, params = pipeline.config, pipeline.mesh, pipeline.params
    requests, true = eval_requests(config, pipeline.codec, given.clips)
    measure = ShapeEvaluator().measure(config, requests, true)
    requests = pipeline.encode_text(requests)
    codec, model = pipeline.codec, pipeline.model
    table: list[dict[str, Any]] = []
    for text in ("", *(given.settings or SETTINGS)):
        sampling = dataclasses.replace(config.sampling, **parse_setting(text))
        one = Generator(model, config.diffusion, sampling)
        levels = one.levels(config.model.patch.num_tokens(*requests[0].size))
        row = {"setting": text or "the run's own", "steps": sampling.steps, "generator": one}
        table.append({**row, "runs": sum(one.plan(params, levels)), "seconds": []})

    def make(row: dict[str, Any]) -> list[np.ndarray]:
        clips = [plain(request) for request in requests]
        return make_clips(row["generator"], params, clips, mesh, decode=codec.decode)

    torch = Worker("torch fused", ["--clips-of", json.dumps(_same(config, requests))])
    torch.make()
    base: list[np.ndarray] = []
    for row in table:
        clips = make(row)
        base = base or clips
        row["measured"] = measure(clips)
        same = all((a == b).all() for a, b in zip(clips, base, strict=True))
        row["psnr to the run's own"] = None if same else float(mean_psnr(clips, base))
    theirs: list[float] = []
    for _ in range(given.rounds):
        theirs.append(torch.make()["seconds"] / len(requests))
        for row in table:
            start = time.perf_counter()
            make(row)
            row["seconds"].append((time.perf_counter() - start) / len(requests))
    torch.end()
    parameters = sum(p.size for p in jax.tree.leaves(params)), torch.parameters
    return _told(table, given.clips, statistics.median(theirs), parameters)


def _same(config: Any, requests: Sequence[Any]) -> dict[str, Any]:
    """``Clips`` for as many and as large clips as a run makes. A patch of PyTorch's holds as many
    frames everywhere, ours one at the beginning: it is given frames for as many tokens."""
    dit, patch, made, (t, h, w) = (
        config.model.dit,
        config.model.patch,
        config.sampling,
        requests[0].size,
    )
    tokens, *_ = patch.grid(t, h, w)
    what = Clips(
        width=dit.width,
        depth=dit.depth,
        heads=dit.heads,
        channels=patch.channels,
        patch=(patch.t, patch.h, patch.w),
        size=(tokens * patch.t, h, w),
        text_dim=config.model.text.width,
        text_tokens=config.model.text.max_tokens,
        steps=made.steps,
        cfg_scale=made.cfg_scale,
        batch=min(made.batch, len(requests)),
        count=len(requests),
    )
    return dataclasses.asdict(what)


def _told(
    table: list[dict[str, Any]], count: int, torch: float, parameters: tuple[int, int]
) -> dict[str, Any]:
    """Prints the table; what goes into the file."""
    key = "all" if "all" in table[0]["measured"] else "psnr"
    for row in table:
        del row["generator"]
        row["clip"] = statistics.median(row["seconds"])
        row["faster"] = table[0]["clip"] / row["clip"]
    print(f"{'setting':62} steps  run   {key:>6}   PSNR  s/clip  faster")
    for row in table:
        psnr = row["psnr to the run's own"]
        print(
            f"{row['setting']:62} {row['steps']:5} {row['runs']:4}  {row['measured'][key]:7.3f} "
            f"{'     =' if psnr is None else f'{psnr:6.1f}'}  {row['clip']:6.3f}  {row['faster']:6.2f}"
        )
    least = table[0]["measured"][key]
    best = max((r for r in table if r["measured"][key] >= least), key=lambda r: r["faster"])
    print(f"of {count} clips; as good and fastest: {best['setting']}, {best['faster']:.2f} times")
    sizes = [f"{number / 1e6:.1f} M" for number in parameters]
    print(
        f"PyTorch's fused transformer ({sizes[1]}, ours has {sizes[0]}): {torch:.3f} s/clip, "
        f"{torch / table[0]['clip']:.2f} times the run's own settings', "
        f"{torch / best['clip']:.2f} times the best's"
    )
    found = {"clips": count, "table": table, "best": best["setting"], "faster": best["faster"]}
    return {**found, "torch": torch, "parameters": parameters}


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", default="S", choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--frames", type=int, default=5, help="of latents")
    parser.add_argument("--height", type=int, default=32, help="of latents")
    parser.add_argument("--width", type=int, default=32, help="of latents")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", help="a run: the table of settings")
    parser.add_argument("--codec", help="folder of the run's autoencoder")
    parser.add_argument("--clips", type=int, default=96, help="for every setting")
    parser.add_argument("--settings", nargs="+", metavar='"NAME=VALUE ..."')
    parser.add_argument("--output", type=Path, help="a JSON file of everything")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--clips-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.passed = sys.argv[1:]
    if given.worker:
        work(given)
        return
    found = settings_table(given) if given.checkpoint else compare(given)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
