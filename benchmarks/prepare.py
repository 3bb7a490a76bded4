"""What preparation takes on the host beside decoding alone, of the same files in one run.

    pip install -e '.[prepare]' && python benchmarks/prepare.py --input DIR --repeats 3

Plain decoding is FFmpeg's, through PyAV, of every frame in one thread; nothing is done with the frames.
Examining is all that is done to a file on the host before text and latents: probing, shots, filters,
hashes, thumbnails. Reading clips is what records and latents need of it then. First these three are
done in turn to each file in this process: CPU and wall seconds of all files together, the median of the
repeats for each file. Then each is done to all files by worker processes, which are started anew and
whose start counts: wall seconds and clips a second. Files that are refused and images are left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from plain_decoding import decode

from dit_jax.preparation import ClipConfig, DecodingConfig, ExamineConfig, WorkersConfig, run
from dit_jax.preparation import examine as examine_one
from dit_jax.preparation.examining import read_clip
from dit_jax.preparation.listing import Item, find_media
from dit_jax.preparation.progress import Progress
from dit_jax.preparation.stages import Examined, Kept, examine_files, read_clips

WAYS = ("plain decoding", "examine", "read clips")
FOLDER = tempfile.TemporaryDirectory()


def examine(items: Sequence[Item], config: ExamineConfig, workers: WorkersConfig) -> Examined:
    """Examines files into a folder that is soon removed."""
    examined = Examined(Path(tempfile.mkdtemp(dir=FOLDER.name)), config)
    examine_files(items, examined, workers, Progress(shown=False))
    return examined


def taken(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this process, and wall seconds, that it takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def file_by_file(
    items: Sequence[Item], kept: Sequence[Kept], config: ExamineConfig, repeats: int
) -> np.ndarray:
    """CPU and wall seconds ``[3, 2]`` of the ways, each over all files, in this process."""
    total = np.zeros((len(WAYS), 2))
    for item in items:
        clips = [one.clip for one in kept if one.item == item]
        ways = (
            lambda path=item.path: decode(path),
            lambda path=item.path: examine_one(path, config),
            lambda path=item.path, clips=clips: [read_clip(path, clip) for clip in clips],
        )
        found = [[taken(way) for way in ways] for _ in range(repeats)]
        total += np.median(np.array(found), axis=0)
    return total


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--area", type=int, default=256 * 256, help="pixels of a clip's frame")
    args = parser.parse_args()
    workers = WorkersConfig(count=args.processes)
    config = ExamineConfig(clips=ClipConfig(area=args.area))
    items = find_media(args.input).items
    examined = examine(items, config, workers)
    reports = {item: examined.report(item) for item in items}
    items = [i for i, r in reports.items() if r.probe is not None and r.probe.kind == "video"]
    kept = examined.kept(items)

    def plain() -> int:
        return sum(done.value for done in run(decode, [item.path for item in items], workers))

    frames = plain()
    examine_one(items[0].path, config)  # What is imported when it is first needed.
    print(f"{len(items)} files, {frames} frames, {len(kept)} clips")
    alone = file_by_file(items, kept, config, args.repeats)
    for name, (cpu, wall) in zip(WAYS, alone, strict=True):
        ratios = f"{cpu / alone[0, 0]:.2f} and {wall / alone[0, 1]:.2f} of plain decoding"
        print(f"{name}: {cpu:.2f} s of CPU, {wall:.2f} s; {ratios}")
    by_processes = (
        plain,
        lambda: examine(items, config, workers),
        lambda: sum(1 for _ in read_clips(kept, DecodingConfig(), workers)),
    )
    print(f"{args.processes} processes, their start included:")
    base = 0.0
    for name, work in zip(WAYS, by_processes, strict=True):
        middle = statistics.median(taken(work)[1] for _ in range(args.repeats))
        base = base or middle
        print(
            f"{name}: {middle:.2f} s, {len(kept) / middle:.1f} clips/s, "
            f"{frames / middle:.0f} frames/s, {middle / base:.2f} of plain decoding"
        )


if __name__ == "__main__":
    main()
