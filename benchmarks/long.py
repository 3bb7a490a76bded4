"""Long clips of moving shapes by windows: do they keep colour, shape and direction?

    python benchmarks/long.py --checkpoint runs/quickstart --clips 96

Clips of several times the trained length (the longest clip of the run's data) are made for held-out
prompts. A shape that moves as fast as in training leaves a small canvas long before the end, so the
clips go on from the first frames of a true scene whose shape crosses the canvas in just that time
(``held_out_scenes`` of that length); ``--given 0`` leaves these out, and then a shape may rest at the
edge. The judge looks at each clip whole, which is what is to be 90 % right, and at each of its parts of
the trained length for itself, which shows drift. It says what it finds in the true clips, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.data import ShapesConfig, caption, held_out_scenes
from dit_jax.data.shapes import render
from dit_jax.evaluate import prompt_following
from dit_jax.sampling import contact_sheet, write_png
from dit_jax.sampling.modes import decode_long, make_long, plan_windows, window_requests
from dit_jax.sampling.pipeline import load_run

WORDS = ("color", "shape", "direction", "size", "all")


def judged(clips: list[np.ndarray], scenes: list[Any], length: int) -> dict[str, Any]:
    """Fractions that are right: of whole clips, and of each part of ``length`` frames."""
    starts = range(0, len(clips[0]) - length + 1, length)
    parts = [prompt_following([clip[i : i + length] for clip in clips], scenes) for i in starts]
    return {"whole": prompt_following(clips, scenes), "parts": parts}


def told(name: str, found: dict[str, Any]) -> None:
    """Prints a line for whole clips and one for each part."""
    for i, row in enumerate([found["whole"], *found["parts"]]):
        what = f"part {i}" if i else "whole"
        print(f"{name:6} {what:7}", "  ".join(f"{word} {row[word]:.3f}" for word in WORDS))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Makes the clips and judges them."""
    asked = {"height": given.height, "width": given.width, "solver": given.solver}
    asked |= {"steps": given.steps, "cache_threshold": given.cache_threshold}
    asked |= {"cfg_scale": given.cfg_scale}
    asked = {name: value for name, value in asked.items() if value is not None}
    pipeline = load_run(given.checkpoint, codec=given.codec, **asked)
    config = pipeline.config
    source, made = config.data.source, config.sampling
    if not isinstance(source, ShapesConfig):
        raise SystemExit(f"{given.checkpoint!r} was not trained on moving shapes.")
    codec, space, trained_length = pipeline.codec, pipeline.space, max(source.frames)
    frames, head = given.times * trained_length, given.given
    window = given.window or trained_length
    windows = plan_windows(space, frames, window, given.history or None, head, head)

    scenes = held_out_scenes(given.clips, given.seed, frames, made.height, made.width)
    true = [render(scene) for scene in scenes]
    fps = source.fps / codec.strides[0]
    templates = pipeline.encode_text(
        [pipeline.request(caption(scene), given.seed + i) for i, scene in enumerate(scenes)]
    )
    clips = []
    for one in templates:
        one = dataclasses.replace(one, frames=windows[0].length, fps=fps)
        clips.append(window_requests(one, windows))
    heads = [space.encode(clip[: given.given]) for clip in true] if given.given else None
    found = make_long(
        pipeline.generator,
        pipeline.params,
        clips,
        windows,
        pipeline.mesh,
        given.noise,
        heads,
        progress=True,
    )
    videos = [np.concatenate(list(decode_long(codec, one, frames))) for one in found]
    if given.sheet:
        write_png(given.sheet, contact_sheet(videos[:12], 12, 2))
    report = {"truth": judged(true, scenes, trained_length)}
    report["made"] = judged(videos, scenes, trained_length)
    what = {
        "frames": frames,
        "windows": len(windows),
        "history": space.grid.frames(windows[-1].history),
    }
    return {**{k: str(v) for k, v in vars(given).items()}, **what, **report}


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run of moving shapes")
    parser.add_argument("--codec", help="folder of its autoencoder")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--times", type=int, default=4, help="the trained length")
    parser.add_argument("--height", type=int, default=40)
    parser.add_argument("--width", type=int, default=40)
    parser.add_argument("--window", type=int, help="frames; unset: the trained length")
    parser.add_argument("--history", type=int, help="frames; unset: about a third of a window")
    parser.add_argument("--noise", type=float, default=0.05, help="ceiling of the history")
    parser.add_argument("--given", type=int, default=3, help="frames of the true clip; 0: none")
    parser.add_argument("--steps", type=int, help="unset, as of others: as the run's config says")
    parser.add_argument("--solver")
    parser.add_argument("--cache-threshold", type=float)
    parser.add_argument("--cfg-scale", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="a PNG of some frames of twelve clips")
    parser.add_argument("--output", type=Path, help="a JSON file of everything")
    given = parser.parse_args()
    report = measure(given)
    print(f"{report['frames']} frames in {report['windows']} windows, history {report['history']}")
    for name in ("truth", "made"):
        told(name, report[name])
    if given.output:
        given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
