"""Whether adapters teach what the quickstart's model never saw, and what it keeps.

    python benchmarks/lora.py --checkpoint runs/quickstart_lora --base runs/quickstart

The shape evaluator judges clips for prompts of white shapes, a colour of no clip of the base's, and
for the prompts that the base is judged by: colour, shape and direction all right. A third of the white
prompts name a shape and a direction that no white clip showed together ("new"). ``--compare`` also
trains the base whole on the same data for as many steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import parallel, train
from dit_jax.config import VideoRun, read_config
from dit_jax.data import held_out_scenes
from dit_jax.data.shapes import NEVER_WHITE, Scene, caption
from dit_jax.evaluate.judge import prompt_following
from dit_jax.lora import LoraRun
from dit_jax.sampling.media import contact_sheet, write_png
from dit_jax.sampling.modes import plain
from dit_jax.sampling.pipeline import load_run

SEED = 0  # Of the scenes: as in the report of the quickstart.
KINDS = ("white", "old")


def scenes_of(kind: str, count: int, config: VideoRun) -> list[Scene]:
    """Scenes of the prompts: those of the quickstart's report, or the same in white."""
    size = config.sampling
    scenes = held_out_scenes(count, SEED, size.frames, size.height, size.width)
    return [dataclasses.replace(one, color="white") if kind == "white" else one for one in scenes]


def judged(run: str, count: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Shares of right clips for so many prompts of either kind, and the clips for white ones."""
    pipeline = load_run(run)
    scenes = {kind: scenes_of(kind, count, pipeline.config) for kind in KINDS}
    requests = [
        pipeline.request(caption(scene), seed)
        for kind in KINDS
        for seed, scene in enumerate(scenes[kind])
    ]
    clips = pipeline.sample([plain(one) for one in requests])
    white = list(zip(clips[:count], scenes["white"], strict=True))
    new = [(c, s) for c, s in white if (s.shape, s.direction) in NEVER_WHITE]
    pairs = {
        "white": white,
        "new": new,
        "old": list(zip(clips[count:], scenes["old"], strict=True)),
    }
    report: dict[str, Any] = {}
    for name, some in pairs.items():
        if some:
            shares = prompt_following([c for c, _ in some], [s for _, s in some])
            report[name] = {key: round(share, 4) for key, share in shares.items()}
    return report, clips[:count]


def trained(run: str) -> int:
    """How many parameters a run has trained."""
    pipeline: Any = load_run(run)
    if adapters := getattr(pipeline, "adapters", ()):
        return sum(x.size for one in adapters for pair in one.layers.values() for x in pair)
    return sum(x.size for x in jax.tree.leaves(pipeline.params))


def whole(config: LoraRun, output: str, learning_rate: float) -> VideoRun:
    """The run that trains all of the base on what the adapters were trained on."""
    names = [field.name for field in dataclasses.fields(VideoRun)]
    fields = {name: getattr(config, name) for name in names}
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    initial = dataclasses.replace(config.checkpoint, initial=config.base)
    fields |= {"output": output, "optimizer": optimizer, "checkpoint": initial}
    return VideoRun(**fields)


def main() -> None:
    """Prints, and writes, how many clips are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="runs/quickstart_lora")
    parser.add_argument("--base", default="runs/quickstart")
    parser.add_argument("--prompts", type=int, default=96, help="of each of the two kinds")
    parser.add_argument("--compare", help="where to train the base whole, for comparison")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of that")
    parser.add_argument("--output", help="a JSON file")
    parser.add_argument("--sheet", help="a PNG file: white prompts, the base's clips on the left")
    given = parser.parse_args()
    runs = {"base": given.base, "lora": given.checkpoint}
    seconds = {}
    if given.compare:
        config = read_config(Path(given.checkpoint) / "config.json")
        assert isinstance(config, LoraRun)
        wall, cpu = time.perf_counter(), time.process_time()
        train.train(whole(config, given.compare, given.learning_rate))
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        runs["whole"] = given.compare
    report: dict[str, Any] = {"seconds_of_whole": seconds}
    sheets = {}
    for name, run in runs.items():
        report[name], sheets[name] = judged(run, given.prompts)
        report[name]["parameters"] = trained(run)
        print(name, json.dumps(report[name]), flush=True)
    if given.output:
        Path(given.output).write_text(json.dumps(report, indent=2) + "\n")
    if given.sheet:
        # Twelve prompts are every pair of the report's, a third of them new to the adapters.
        both = [contact_sheet(sheets[name][:12], 5, 2) for name in ("base", "lora")]
        gap = np.full((len(both[0]), 8, 3), 255, np.uint8)
        write_png(given.sheet, np.concatenate([both[0], gap, both[1]], 1))


if __name__ == "__main__":
    parallel.tune_cpu()
    sys.exit(main())
