"""How well a model of game characters does in every mode, against clips of characters it never saw.

    python benchmarks/sprites.py --checkpoint runs/sprites_modes --cases 96 --output runs/sprites_report

What characters do is a cycle of eight frames, of which every recorded clip begins anywhere
(``configs/sprites_modes.py``). The judge takes a clip for the recorded one that is nearest to it, from
whichever frame of its cycle on: *action* is the share of clips that are taken for what the prompt says
(of the nine things that this character does), *character* for whom it says (of the thirty that do
this), *both* among all 270. Where a clip's frames are determined by those that are given, their PSNR
to the true ones stands beside that of a simple guess. Prints a table, and writes ``modes.json`` and for
every mode a strip (PNG, one row a clip) and a GIF.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from mode_reports import STRENGTH, Found, Report, every_second, linear, maker_of, seams

from dit_jax.data import RecordsConfig, RecordsSource
from dit_jax.sampling import Generation, Request, Space, make_clips, plain
from dit_jax.sampling.media import mean_psnr, psnr
from dit_jax.sampling.modes import (
    connect,
    decode_long,
    extend,
    image_to_video,
    loop_clip,
    loop_text,
    make_long,
    plan_windows,
    restyle,
    window_requests,
)
from dit_jax.sampling.pipeline import load_run

FRAMES, NEW, GAP, TIMES = 8, 4, 2, 4
Clips = Sequence[np.ndarray]
Mode = tuple[list[Generation], Callable[[Clips], Found]]


class Truth:
    """The recorded clips of characters that training does not show, as a judge of others."""

    def __init__(self, samples: Sequence[dict]) -> None:
        self.clips = [sample["video"] for sample in samples]
        self.captions = [sample["caption"] for sample in samples]
        # "body 3, trousers 2, top 5, hair 1 walks facing left"
        parts = [caption.rsplit(" ", 3) for caption in self.captions]
        self.characters = np.array([part[0] for part in parts])
        self.actions = np.array([" ".join(part[1:]) for part in parts])
        pixels = np.stack(self.clips).astype(np.float32)
        # [clips, starts, frames, pixels]
        self._turned = np.stack([np.roll(pixels, -k, 1) for k in range(FRAMES)], 1)
        self._turned = self._turned.reshape(len(pixels), FRAMES, FRAMES, -1)

    def errors(self, made: Clips, frames: slice) -> np.ndarray:
        """Mean squared differences ``[made, clips]`` of some frames, from the best start."""
        x = np.stack(made)[:, frames].reshape(len(made), -1).astype(np.float32)
        y = self._turned[:, :, frames].reshape(len(self.clips) * FRAMES, -1)
        squares = np.square(x).sum(1)[:, None] - 2 * x @ y.T + np.square(y).sum(1)
        return squares.reshape(len(made), -1, FRAMES).min(2) / x.shape[1]

    def judge(self, made: Clips, asked: Sequence[int], frames: slice = slice(None)) -> Found:
        """The shares that are taken for the clips that were asked for, and their PSNR to these."""
        errors = self.errors(made, frames)
        action, character, both = [], [], []
        for row, i in zip(errors, asked, strict=True):
            own, same = self.characters == self.characters[i], self.actions == self.actions[i]
            action.append(np.where(own, row, np.inf).argmin() == i)
            character.append(np.where(same, row, np.inf).argmin() == i)
            both.append(row.argmin() == i)
        away = errors[np.arange(len(made)), asked]
        return {
            "action": float(np.mean(action)),
            "character": float(np.mean(character)),
            "both": float(np.mean(both)),
            "psnr": float(np.mean(10 * np.log10(255**2 / np.maximum(away, 1e-4)))),
        }

    def another(self, i: int) -> int:
        """The clip of the next character that does the same."""
        atemplate = np.flatnonzero(self.actions == self.actions[i])
        return int(atemplate[(atemplate.searchsorted(i) + 1) % len(atemplate)])


class Modes:
    """The generations of every mode for some of the clips, and how each is measured."""

    def __init__(self, space: Space, templates: Sequence[Request], truth: Truth, cases: list[int]):
        self.space, self.templates, self.truth, self.cases = space, templates, truth, cases
        self.true = [truth.clips[i] for i in cases]

    def all(self) -> dict[str, Mode]:
        return {
            "text": (self.generations(lambda s, template, _: plain(template)), self.judged),
            "image_to_video": self.from_images(),
            "extend_forward": self.extended(forward=NEW),
            "extend_backward": self.extended(backward=NEW),
            "connect": self.connected(),
            "loop_clip": self.closed(),
            "loop_text": self.looped(),
            "interpolate": self.interpolated(),
            "restyle": self.restyled(),
        }

    def generations(self, make: Callable[..., Generation]) -> list[Generation]:
        """``make(space, template, clip)`` of every case."""
        return [
            make(self.space, template, clip)
            for template, clip in zip(self.templates, self.true, strict=True)
        ]

    def judged(self, clips: Clips) -> Found:
        return self.truth.judge(clips, self.cases)

    def beside(self, clips: Clips, made: slice, guess: Callable[[np.ndarray], np.ndarray]) -> Found:
        """The PSNR of frames that are made, and of a guess at them."""
        true = [clip[made] for clip in self.true]
        return {
            "new_psnr": mean_psnr([clip[made] for clip in clips], true),
            "guess_psnr": mean_psnr([guess(clip) for clip in self.true], true),
        }

    def from_images(self) -> Mode:
        def measure(clips: Clips) -> Found:
            kept = min(psnr(a[0], b[0]) for a, b in zip(clips, self.true, strict=True))
            return {"kept_psnr_least": kept, **self.judged(clips)}

        return self.generations(
            lambda s, template, clip: image_to_video(s, template, {0: clip[0]})
        ), measure

    def extended(self, **new: int) -> Mode:
        """The guess is that the last frame given, or the first, stands still."""
        forward = "forward" in new
        known = slice(0, FRAMES - NEW) if forward else slice(NEW, None)
        made = slice(FRAMES - NEW, None) if forward else slice(0, NEW)

        def measure(clips: Clips) -> Found:
            still = FRAMES - NEW - 1 if forward else NEW
            guess = self.beside(clips, made, lambda clip: np.repeat(clip[still, None], NEW, 0))
            return {**guess, **self.truth.judge(clips, self.cases, made)}

        return self.generations(
            lambda s, template, clip: extend(s, template, clip[known], **new)
        ), measure

    def connected(self) -> Mode:
        """The guess is a linear blend of the frames at the joins."""
        first, second = slice(0, (FRAMES - GAP) // 2), slice((FRAMES + GAP) // 2, None)
        made = slice(first.stop, second.start)

        def blend(clip: np.ndarray) -> np.ndarray:
            share = (np.arange(1, GAP + 1) / (GAP + 1))[:, None, None, None]
            mixed = (1 - share) * clip[first.stop - 1] + share * clip[second.start]
            return np.rint(mixed).astype(np.uint8)

        out = self.generations(
            lambda s, template, clip: connect(s, template, clip[first], clip[second], GAP)
        )
        return out, lambda clips: self.beside(clips, made, blend)

    def closed(self) -> Mode:
        """Five frames are given, and what is made leads back to the first; the guess stands still."""
        count = FRAMES - NEW + 1

        def measure(clips: Clips) -> Found:
            made = slice(count, None)
            still = self.beside(clips, made, lambda x: np.repeat(x[count - 1, None], NEW - 1, 0))
            return {**still, **self.closeness(clips)}

        return self.generations(
            lambda s, template, clip: loop_clip(s, template, clip[:count], NEW - 1)
        ), measure

    def looped(self) -> Mode:
        def measure(clips: Clips) -> Found:
            return {**self.closeness(clips), **self.judged(clips)}

        return self.generations(lambda s, template, _: loop_text(s, template)), measure

    def closeness(self, clips: Clips) -> Found:
        """Of loops, and of the true ones: these have their largest step at the seam now and then."""
        true = {f"true_{name}": value for name, value in seams(self.true).items()}
        moved = [
            np.abs(np.diff(np.stack(x).astype(float), axis=1)).mean() for x in (clips, self.true)
        ]
        return {**seams(clips), **true, "motion_to_true": float(moved[0] / moved[1])}

    def interpolated(self) -> Mode:
        """Frames 1, 3 and 5, beside the mean of their neighbours."""

        def measure(clips: Clips) -> Found:
            made, true = ([x[1:-1:2] for x in y] for y in (clips, self.true))
            plainly = [linear(x[::2])[1::2] for x in self.true]
            return {"new_psnr": mean_psnr(made, true), "guess_psnr": mean_psnr(plainly, true)}

        return self.generations(every_second), measure

    def restyled(self) -> Mode:
        """The prompt says of another character that it does the same."""
        wanted = [self.truth.another(i) for i in self.cases]
        out = [
            restyle(
                self.space,
                dataclasses.replace(template, prompt=self.truth.captions[i]),
                clip,
                STRENGTH,
            )
            for template, i, clip in zip(self.templates, wanted, self.true, strict=True)
        ]
        return out, lambda clips: self.truth.judge(clips, wanted)


def long_clips(
    space: Space, templates: Sequence[Request], make: Callable[..., list[np.ndarray]]
) -> list[np.ndarray]:
    """Clips of four cycles, from text alone."""
    windows = plan_windows(space, TIMES * FRAMES, FRAMES)
    asked = [window_requests(template, windows) for template in templates]
    found = make(asked, windows)
    return [np.concatenate(list(decode_long(space.codec, x, TIMES * FRAMES))) for x in found]


def judged_long(truth: Truth, clips: Clips, cases: Sequence[int]) -> Found:
    """Each cycle for itself."""
    found: Found = {}
    for part in range(TIMES):
        cycle = slice(part * FRAMES, (part + 1) * FRAMES)
        for name, value in truth.judge([clip[cycle] for clip in clips], cases).items():
            found[f"{name}_{part + 1}"] = value
    return found


def main() -> None:
    """Makes and measures what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--cases", type=int, default=96)
    parser.add_argument("--modes", nargs="*", help="unset: all")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", default="runs/sprites_report")
    given = parser.parse_args()
    steps = {} if given.steps is None else {"steps": given.steps}
    pipeline = load_run(given.checkpoint, frames=FRAMES, **steps)
    config, mesh, params = pipeline.config, pipeline.mesh, pipeline.params
    source, made = config.data.source, config.sampling
    assert isinstance(source, RecordsConfig)
    held = RecordsSource(dataclasses.replace(source, split="test"))
    truth = Truth([dict(held[i]) for i in range(len(held))])
    cases = [i * len(held) // given.cases for i in range(given.cases)]
    space, generator = pipeline.space, pipeline.generator
    templates = [pipeline.request(truth.captions[i], seed=i) for i in cases]
    modes = Modes(space, templates, truth, cases)
    report = Report(given.output, given.cases, made.fps)
    for name, (generations, measure) in modes.all().items():
        if not given.modes or name in given.modes:
            maker, decode = maker_of(name, pipeline), pipeline.codec.decode
            clips = make_clips(maker, params, generations, mesh, True, decode)
            report.tell(name, clips, measure(clips))
    if not given.modes or "long" in given.modes:

        def make(asked: list[list[Request]], windows: list) -> list[np.ndarray]:
            return make_long(generator, params, asked, windows, mesh, progress=True)

        clips = long_clips(space, templates, make)
        report.tell("long", clips, judged_long(truth, clips, cases))


if __name__ == "__main__":
    main()
