"""Which cuts the preparation finds, and which it invents, on real clips joined at random points.

    pip install -e '.[prepare]' scenedetect-headless && python benchmarks/cuts.py --input DIR

All ordered pairs of the clips of a folder are joined, in five ways: anywhere; where either moves the
most; with a third one of 3 to 12 frames between them; with a flash within eight frames of the cut; and
with both panned fast up to the cut and from it on. Parts have 12 to 60 frames. A cut is found if one is
told within a frame of it; each other one that is told is invented. Frames are those that `examine`
looks at. The detectors of PySceneDetect are measured beside ours with ``--others``, in colour, at their
defaults but for the shortest shot, which is a frame.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from dit_jax.prepare.measuring import small_frame
from dit_jax.prepare.media import sampled
from dit_jax.prepare.shots import shot_cuts

CUTS = {"torchcodec__nasa_13013.mp4": [202], "ffmpeg-python__in.mp4": [180]}
"""Cuts within the clips, looked at frame by frame; the second is to black, which is not joined."""
WAYS = ("anywhere", "motion", "short", "flash", "pan")
HEIGHT, WIDTH = 72, 128


@dataclasses.dataclass(frozen=True)
class Shot:
    """A shot of a clip: uint8 [t, h, w] or [t, h, w, 3], and its mean change from frame to frame."""

    frames: np.ndarray
    changes: np.ndarray

    def part(self, rng: np.random.Generator, least: int, most: int, lively: str = "") -> np.ndarray:
        """Some frames of it; `lively`: their `end` or `start` is where it moves the most."""
        count = min(int(rng.integers(least, most + 1)), len(self.frames))
        starts = np.arange(len(self.frames) - count + 1)
        if lively:
            edges = starts + count if lively == "end" else starts + 4
            moving = [self.changes[max(edge - 3, 1) : edge].mean() for edge in edges]
            starts = starts[np.argsort(moving)[-max(len(starts) // 10, 1) :]]
        start = int(rng.choice(starts))
        return self.frames[start : start + count]


def read_shots(path: Path, colour: bool = False) -> list[Shot]:
    """The shots of a clip, in the size in which cuts are looked for."""
    frames = []
    for _, picture in sampled(path):
        frame = picture.pixels(HEIGHT, WIDTH) if colour else small_frame(picture)
        frames.append(cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA))
    edges = [0, *CUTS.get(path.name, []), len(frames)]
    shots = [np.stack(frames[start:stop]) for start, stop in itertools.pairwise(edges)]
    changes = [
        np.array([0.0, *(np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(shot))])
        for shot in shots
    ]
    return [Shot(*both) for both in zip(shots, changes, strict=True) if both[0].mean() > 16]


def flashed(rng: np.random.Generator, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Both, one or two frames near the cut between them brighter by 60 to 160 levels."""
    joined = np.concatenate([first, second])
    count, apart = int(rng.integers(1, 3)), int(rng.integers(2, 9))
    start = int(len(first) + apart if rng.integers(2) else len(first) - apart - count)
    bright = joined[start : start + count].astype(int) + rng.integers(60, 161)
    joined[start : start + count] = np.minimum(bright, 255)
    return joined


def panned(rng: np.random.Generator, frames: np.ndarray, last: bool) -> np.ndarray:
    """Three quarters of the height and width, moving at up to a tenth of it a frame at one end."""
    height, width = HEIGHT * 3 // 4, WIDTH * 3 // 4
    count = int(rng.integers(3, min(14, len(frames))))
    steps = np.arange(len(frames))
    steps = np.maximum(steps - len(frames) + count, 0) if last else np.minimum(steps, count)
    speeds = rng.uniform(2, 9) * rng.choice([-1, 1]), rng.uniform(-3, 3)
    places = []
    for speed, room in zip(speeds, (WIDTH - width, HEIGHT - height), strict=True):
        place = np.abs(room // 2 + steps * speed) % (2 * room)  # It turns back at the edges.
        places.append(np.minimum(place, 2 * room - place).astype(int))
    return np.stack(
        [f[y : y + height, x : x + width] for f, x, y in zip(frames, *places, strict=True)]
    )


def joins(
    clips: Mapping[str, Sequence[Shot]], seed: int = 0, ways: Sequence[str] = WAYS
) -> Iterator[tuple[str, str, np.ndarray, list[int]]]:
    """(way, names, frames, cuts) of all ordered pairs of clips, in each of the ways."""
    rng = np.random.default_rng(seed)

    def shot(name: str) -> Shot:
        return clips[name][int(rng.integers(len(clips[name])))]

    for one, other in itertools.permutations(sorted(clips), 2):
        between = rng.choice([name for name in clips if name not in (one, other)])
        for way in ways:
            names = f"{one}, {other}"
            lively = ("end", "start") if way == "motion" else ("", "")
            first, second = (
                shot(name).part(rng, 14, 60, where)
                for name, where in zip((one, other), lively, strict=True)
            )
            cuts = [len(first)]
            if way == "flash":
                frames = flashed(rng, first, second)
            elif way == "pan":
                frames = np.concatenate([panned(rng, first, True), panned(rng, second, False)])
            elif way == "short":
                middle = shot(between).part(rng, 3, 12)
                frames, names = np.concatenate([first, middle, second]), f"{names}; {between}"
                cuts.append(len(first) + len(middle))
            else:
                frames = np.concatenate([first, second])
            yield way, names, frames, cuts


def matched(expected: Sequence[int], found: Sequence[int]) -> tuple[int, int]:
    """(how many are found within a frame, how many others are told)."""
    left, right = list(found), 0
    for cut in expected:
        near = [one for one in left if abs(one - cut) <= 1]
        if near:
            right += 1
            left.remove(near[0])
    return right, len(left)


def others() -> dict[str, Callable[[np.ndarray], list[int]]]:
    """PySceneDetect's detectors."""
    from scenedetect import common, detectors

    def finder(*kinds: str) -> Callable[[np.ndarray], list[int]]:
        def find(frames: np.ndarray) -> list[int]:
            base, cuts = common.FrameTimecode(0, fps=25.0), set[int]()
            made = [getattr(detectors, kind)(min_scene_len=1) for kind in kinds]
            for i, frame in enumerate(frames):
                when, bgr = (
                    common.FrameTimecode(i, fps=base),
                    np.ascontiguousarray(frame[..., ::-1]),
                )
                cuts |= {cut.frame_num for one in made for cut in one.process_frame(when, bgr)}
            return sorted(cuts)

        return find

    kinds = ("ContentDetector", "AdaptiveDetector", "HistogramDetector", "HashDetector")
    pairs = [(kind,) for kind in kinds] + [("AdaptiveDetector", "HashDetector")]
    return {" + ".join(pair): finder(*pair) for pair in pairs}


def measure(name: str, find: Callable, clips: Mapping[str, Sequence[Shot]], seeds: int) -> None:
    """Prints recall and invented cuts by way."""
    totals = {way: np.zeros(4, int) for way in WAYS}
    begun = time.process_time()
    for way, _, frames, cuts in (one for seed in range(seeds) for one in joins(clips, seed)):
        totals[way] += (*matched(cuts, find(frames)), len(cuts), len(frames))
    print(f"{name}, {time.process_time() - begun:.1f} s of CPU")
    for way, (right, wrong, cuts, frames) in totals.items():
        print(f"  {way:9} {right / cuts:6.1%} of {cuts} found, {wrong} invented in {frames} frames")
    invented = sum(len(find(shot.frames)) for shots in clips.values() for shot in shots)
    print(f"  unjoined  {invented} invented")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--others", action="store_true", help="measure PySceneDetect, too")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    paths = [path for path in sorted(args.input.iterdir()) if path.suffix in (".mp4", ".mkv")]
    measure("ours", shot_cuts, {path.name: read_shots(path) for path in paths}, args.seeds)
    if args.others:
        clips = {path.name: read_shots(path, colour=True) for path in paths}
        for name, find in others().items():
            measure(name, find, clips, 1)


if __name__ == "__main__":
    main()
