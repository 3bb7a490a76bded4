"""How well a model of moving shapes does in every mode, by the truth and by the judge.

    python benchmarks/modes.py --checkpoint runs/modes --cases 96 --output runs/modes_report

For held-out scenes, whose clips are known: prints a table, and writes ``modes.json`` and for every mode
a strip (PNG, one row a clip) and a GIF. Lengths are for clips of 9 frames at the run's own size.
Restyling is with a strength of 0.8 and guidance of 3. A true loop of n tokens along time has its
largest step at the seam in one of n cases: 25 % for 9 frames in patches of 2.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from mode_reports import STRENGTH, Found, Report, every_second, linear, maker_of, seams, steps

from dit_jax.data import caption, held_out_scenes
from dit_jax.data.shapes import COLORS, Scene, render
from dit_jax.evaluate import centroids, prompt_following
from dit_jax.sampling import Generation, Request, Space, make_clips, plain
from dit_jax.sampling.media import mean_psnr, psnr
from dit_jax.sampling.modes import (
    blend,
    connect,
    extend,
    image_to_video,
    loop_clip,
    loop_text,
    restyle,
)
from dit_jax.sampling.pipeline import load_run

FRAMES, NEW = 9, 4
Measure = Callable[[Sequence[np.ndarray]], Found]
Mode = tuple[list[Generation], Measure]


def path_error(made: Sequence[np.ndarray], true: Sequence[np.ndarray], frames: slice) -> Found:
    """Centroids against the true ones: px over all frames, and px a frame that the error grows by."""
    off = [
        np.linalg.norm(centroids(a)[frames] - centroids(b)[frames], axis=1)
        for a, b in zip(made, true, strict=True)
    ]
    per_frame = [x.max() / len(x) if np.isfinite(x).all() else np.nan for x in off]
    return {
        "centroid_px": float(np.nanmean(np.concatenate(off))),
        "centroid_px_a_frame": float(np.nanmean(per_frame)),
        "within_1px_a_frame": float(np.mean(np.nan_to_num(per_frame, nan=9.0) <= 1)),
        "seen": float(np.mean([np.isfinite(x).all() for x in off])),
    }


def joins(clips: Sequence[np.ndarray], places: Sequence[int]) -> Found:
    """The steps at some places beside the largest of the others."""
    ratios = []
    for clip in clips:
        found = steps(clip)[:-1]
        others = np.delete(found, places)
        ratios.append(max(found[place] for place in places) / max(others.max(), 1e-9))
    return {
        "join_to_step": float(np.mean(ratios)),
        "smooth": float(np.mean(np.array(ratios) <= 1.5)),
    }


class Modes:
    """The generations of every mode for some scenes, and how each is measured."""

    def __init__(self, space: Space, templates: Sequence[Request], scenes: Sequence[Scene]) -> None:
        self.space, self.templates, self.scenes = space, templates, scenes
        self.true = [render(scene) for scene in scenes]

    def generations(self, make: Callable[..., Generation]) -> list[Generation]:
        """``make(space, template, clip)`` of every scene."""
        return [
            make(self.space, template, clip)
            for template, clip in zip(self.templates, self.true, strict=True)
        ]

    def all(self) -> dict[str, Mode]:
        return {
            "text": self.from_text(),
            "image_to_video": self.image_to_video(),
            "extend_forward": self.extended(forward=NEW),
            "extend_backward": self.extended(backward=NEW),
            "connect": self.connected(),
            "blend": self.blended(),
            "loop_clip": self.closed(),
            "loop_text": (self.generations(lambda s, template, _: loop_text(s, template)), seams),
            "interpolate": self.interpolated(),
            "restyle": self.restyled(),
            "wide_2_1": self.shaped(1, 2),
            "tall_1_2": self.shaped(2, 1),
        }

    def from_text(self) -> Mode:
        made = self.generations(lambda s, template, _: plain(template))
        return made, lambda clips: prompt_following(clips, self.scenes)

    def image_to_video(self) -> Mode:
        def measure(clips: Sequence[np.ndarray]) -> Found:
            kept = min(psnr(a[0], b[0]) for a, b in zip(clips, self.true, strict=True))
            return {"kept_psnr_least": kept, **prompt_following(clips, self.scenes)}

        return self.generations(
            lambda s, template, clip: image_to_video(s, template, {0: clip[0]})
        ), measure

    def extended(self, **new: int) -> Mode:
        forward = "forward" in new
        known = slice(0, FRAMES - NEW) if forward else slice(NEW, None)
        made = slice(FRAMES - NEW, None) if forward else slice(0, NEW)

        def measure(clips: Sequence[np.ndarray]) -> Found:
            return {**path_error(clips, self.true, made), **prompt_following(clips, self.scenes)}

        return self.generations(
            lambda s, template, clip: extend(s, template, clip[known], **new)
        ), measure

    def connected(self) -> Mode:
        """The beginning and the end of each clip, for which the truth is what was cut out."""

        def measure(clips: Sequence[np.ndarray]) -> Found:
            return {**joins(clips, [2, 5]), **path_error(clips, self.true, slice(3, 6))}

        return self.generations(
            lambda s, template, clip: connect(s, template, clip[:3], clip[6:], 3)
        ), measure

    def blended(self) -> Mode:
        """Every clip turns into the next scene's."""
        after = [*self.true[1:], self.true[0]]
        out = [
            blend(self.space, template, a, b, FRAMES)
            for template, a, b in zip(self.templates, self.true, after, strict=True)
        ]
        return out, lambda clips: joins(clips, [0, len(clips[0]) - 2])

    def closed(self) -> Mode:
        gap = 2 * self.space.stride - 1 if self.space.stride > 1 else 3
        made = self.generations(lambda s, template, clip: loop_clip(s, template, clip, gap, 3))
        return made, lambda clips: {**seams(clips), **joins(clips, [FRAMES - 1])}

    def interpolated(self) -> Mode:
        def measure(clips: Sequence[np.ndarray]) -> Found:
            made, true = ([x[1::2] for x in y] for y in (clips, self.true))
            plainly = [linear(x[::2])[1::2] for x in self.true]
            return {"new_psnr": mean_psnr(made, true), "guess_psnr": mean_psnr(plainly, true)}

        return self.generations(every_second), measure

    def restyled(self) -> Mode:
        """The prompt names the next colour of the palette."""
        colours = list(COLORS)
        wanted = [
            dataclasses.replace(s, color=colours[(colours.index(s.color) + 1) % len(colours)])
            for s in self.scenes
        ]
        out = [
            restyle(self.space, dataclasses.replace(template, prompt=caption(s)), clip, STRENGTH)
            for template, s, clip in zip(self.templates, wanted, self.true, strict=True)
        ]

        def measure(clips: Sequence[np.ndarray]) -> Found:
            path = path_error(clips, self.true, slice(None))
            return {**prompt_following(clips, wanted), **path}

        return out, measure

    def shaped(self, tall: int, wide: int) -> Mode:
        """Text alone, at an aspect ratio that was not trained, of about the run's area."""
        template = self.templates[0]
        down, across = self.space.multiple
        _, h, w = self.space.codec.strides
        side = max(template.height * h, template.width * w)
        short = max(round(0.75 * side / down) * down, 24)
        size = short * tall // across * across, short * wide // across * across
        scenes = held_out_scenes(len(self.scenes), 1, FRAMES, *size)
        out = [
            plain(
                dataclasses.replace(
                    one, prompt=caption(s), height=s.height // h, width=s.width // w
                )
            )
            for one, s in zip(self.templates, scenes, strict=True)
        ]
        return out, lambda clips: prompt_following(clips, scenes)


def main() -> None:
    """Makes and measures what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--codec")
    parser.add_argument("--cases", type=int, default=96)
    parser.add_argument("--modes", nargs="*", help="unset: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", default="runs/modes_report")
    given = parser.parse_args()
    steps = {} if given.steps is None else {"steps": given.steps}
    pipeline = load_run(given.checkpoint, codec=given.codec, frames=FRAMES, **steps)
    made = pipeline.config.sampling
    scenes = held_out_scenes(given.cases, given.seed, FRAMES, made.height, made.width)
    templates = [pipeline.request(caption(s), given.seed + i) for i, s in enumerate(scenes)]
    modes = Modes(pipeline.space, templates, scenes)
    report = Report(given.output, given.cases, made.fps)
    for name, (generations, measure) in modes.all().items():
        if given.modes and name not in given.modes:
            continue
        maker, decode = maker_of(name, pipeline), pipeline.codec.decode
        clips = make_clips(maker, pipeline.params, generations, pipeline.mesh, True, decode)
        report.tell(name, clips, measure(clips))


if __name__ == "__main__":
    main()
