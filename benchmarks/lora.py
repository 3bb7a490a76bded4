"""Whether adapters teach what the quickstart's model never saw, and what it keeps.

    python benchmarks/lora.py --checkpoint runs/quickstart_lora --base runs/quickstart

The shape evaluator judges clips for prompts of white shapes, a colour of no clip of the base's, and
those for the prompts that the base is judged by, which may be new to the adapters: colour, shape and
direction all right. ``--compare`` also trains the base whole on the same data for as many steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from dit_jax import parallel, train
from dit_jax.config import VideoRun, read_config
from dit_jax.data import held_out_scenes
from dit_jax.data.shapes import caption
from dit_jax.evaluate.judge import prompt_following
from dit_jax.lora import LoraRun
from dit_jax.sampling.modes import plain
from dit_jax.sampling.pipeline import load_run

SEED = 0  # Of the scenes: as in the report of the quickstart.


def judged(run: str, count: int, white: bool, **options: Any) -> dict[str, float]:
    """Shares of right clips for so many prompts."""
    pipeline = load_run(run, **options)
    size = pipeline.config.sampling
    scenes = held_out_scenes(count, SEED, size.frames, size.height, size.width)
    if white:
        scenes = [dataclasses.replace(one, color="white") for one in scenes]
    requests = [pipeline.request(caption(one), i) for i, one in enumerate(scenes)]
    clips = pipeline.sample([plain(one) for one in requests])
    return {name: round(x, 4) for name, x in prompt_following(clips, scenes).items()}


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
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--compare", help="where to train the base whole, for comparison")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of that")
    parser.add_argument("--output", help="a JSON file")
    given = parser.parse_args()
    runs = {"base": given.base, "lora": given.checkpoint}
    seconds = {}
    if given.compare:
        config = read_config(Path(given.checkpoint) / "config.json")
        assert isinstance(config, LoraRun)
        start = time.perf_counter()
        train.train(whole(config, given.compare, given.learning_rate))
        runs["whole"], seconds["whole"] = given.compare, time.perf_counter() - start
    report: dict[str, Any] = {"training_seconds": seconds}
    for name, run in runs.items():
        report[name] = {
            kind: judged(run, given.prompts, kind == "white") for kind in ("white", "old")
        }
        print(name, json.dumps(report[name]), flush=True)
    if given.output:
        Path(given.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parallel.tune_cpu()
    sys.exit(main())
