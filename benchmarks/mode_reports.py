"""What the benchmarks of modes share: what is measured of loops, and what is told of a mode."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit_jax.sampling import (
    Generation,
    Generator,
    Request,
    Space,
    contact_sheet,
    grid,
    write_png,
    write_video,
)
from dit_jax.sampling.media import upscale
from dit_jax.sampling.modes import interpolate
from dit_jax.sampling.pipeline import Pipeline

STRENGTH = 0.8
"""Of restyling."""
SETTINGS: dict[str, dict[str, float]] = {"restyle": {"cfg_scale": 3.0}}
"""Of sampling, where they are not the run's own."""
SHOWN = 8
Found = dict[str, float]


def steps(clip: np.ndarray) -> np.ndarray:
    """Root mean square difference of neighbouring frames, the last and the first included."""
    after = np.roll(clip.astype(np.float64), -1, 0)
    return np.sqrt(np.square(after - clip).mean((1, 2, 3)))


def seams(clips: Sequence[np.ndarray]) -> Found:
    """The seam of loops beside their largest inner step."""
    ratio = [(all_ := steps(x))[-1] / max(all_[:-1].max(), 1e-9) for x in clips]
    return {
        "seam_to_step": float(np.mean(ratio)),
        "no_larger": float(np.mean(np.array(ratio) <= 1)),
    }


def linear(clip: np.ndarray) -> np.ndarray:
    """Twice the frames by blending."""
    full = np.repeat(clip, 2, 0)[:-1].astype(np.float64)
    full[1::2] = (full[0:-1:2] + full[2::2]) / 2
    return np.rint(full).astype(np.uint8)


def every_second(space: Space, template: Request, clip: np.ndarray) -> Generation:
    """The frames between every second one of a clip."""
    return interpolate(space, dataclasses.replace(template, fps=template.fps / 2), clip[::2], 2)


class Report:
    """What is found of each mode: printed, and written to ``modes.json`` with a strip and a GIF of the
    first clips."""

    def __init__(self, directory: str, cases: int, fps: float) -> None:
        self._directory, self._fps = Path(directory), fps
        self._found: dict[str, int | Found] = {"cases": cases}
        self._directory.mkdir(parents=True, exist_ok=True)

    def tell(self, name: str, clips: Sequence[np.ndarray], found: Found) -> None:
        rounded = {key: round(value, 4) for key, value in found.items()}
        self._found[name] = rounded
        few = list(clips[:SHOWN])
        write_png(self._directory / f"{name}.png", contact_sheet(few, len(few[0]), 2))
        write_video(self._directory / f"{name}.gif", upscale(grid(few), 3), self._fps)
        print(f"{name:16}", "  ".join(f"{k} {v:g}" for k, v in rounded.items()), flush=True)
        text = json.dumps(self._found, indent=1)
        (self._directory / "modes.json").write_text(text + "\n")


def maker_of(name: str, pipeline: Pipeline) -> Generator:
    """The run's own generator, or one with the settings of a mode that has others."""
    if name not in SETTINGS:
        return pipeline.generator
    settings = dataclasses.replace(pipeline.config.sampling, **SETTINGS[name])
    return Generator(pipeline.model, pipeline.config.diffusion, settings)
