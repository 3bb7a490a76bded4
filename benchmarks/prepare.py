"""What preparation takes on the host beside FFmpeg alone, of the same files in one run.

    pip install -e '.[prepare]' && python benchmarks/prepare.py --input DIR --repeats 3

Plain decoding is FFmpeg's, through PyAV, of every frame in one thread; nothing is done with the frames.
Decoding to pixels makes each frame RGB of the size of the file's clips, too, as ``ffmpeg -vf scale``
does: without it nobody has anything to train on. Examining is all that is done to a file on the host
before text and latents: probing, shots, filters, hashes, thumbnails. Reading clips is what latents and
captions need of it then. In one pass both are done, for records of pixels: clips are taken out of the
frames that are examined, and those that were not held are read. First these are done in turn to each
file in this process: CPU and wall seconds of all files together, the median of the repeats for each
file. Then each but the last is done to all files by worker processes, which are started anew and whose
start counts: wall seconds and clips a second. Files that are refused and images are left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from plain_decoding import decode, decode_to_pixels

from dit_jax.prepare.clips import ClipConfig
from dit_jax.prepare.examining import Clip, ExamineConfig, FileReport, read_clip
from dit_jax.prepare.examining import examine as examine_one
from dit_jax.prepare.listing import Item, find_media
from dit_jax.prepare.stages import Examined, Kept, examine_files, read_clips
from dit_jax.prepare.work import Progress
from dit_jax.prepare.workers import WorkersConfig, run

WAYS = ("plain decoding", "decoding to pixels", "examine", "read clips", "in one pass")
FOLDER = tempfile.TemporaryDirectory()


def examine(items: Sequence[Item], config: ExamineConfig, workers: WorkersConfig) -> Examined:
    """Examines files into a folder that is soon removed."""
    examined = Examined(Path(tempfile.mkdtemp(dir=FOLDER.name)), config, workers)
    examine_files(items, examined, Progress(shown=False))
    return examined


def taken(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this process, and wall seconds, that it takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def size_of(kept: Sequence[Kept], item: Item, report: FileReport) -> tuple[str, int, int]:
    """A file and the size in which its frames are drawn for clips; of one without clips, its own."""
    for one in kept:
        if one.item == item and one.clip.geometry is not None:
            return item.path, one.clip.geometry.scaled_height, one.clip.geometry.scaled_width
    assert report.probe is not None
    return item.path, report.probe.height, report.probe.width


def in_one_pass(path: str, clips: Sequence[Clip], config: ExamineConfig) -> None:
    """Examines a file, and reads those of its clips that were not held."""
    held = set()
    examine_one(path, config, lambda clip, frames: held.add(clip.start))
    for clip in clips:
        if clip.start not in held:
            read_clip(path, clip)


def file_by_file(
    sizes: Sequence[tuple[str, int, int]],
    kept: Sequence[Kept],
    config: ExamineConfig,
    repeats: int,
) -> np.ndarray:
    """CPU and wall seconds ``[5, 2]`` of the ways, each over all files, in this process."""
    total = np.zeros((len(WAYS), 2))
    for size in sizes:
        clips = [one.clip for one in kept if one.item.path == size[0]]
        ways = (
            lambda path=size[0]: decode(path),
            lambda size=size: decode_to_pixels(size),
            lambda path=size[0]: examine_one(path, config),
            lambda path=size[0], clips=clips: [read_clip(path, clip) for clip in clips],
            lambda path=size[0], clips=clips: in_one_pass(path, clips, config),
        )
        found = [[taken(way) for way in ways] for _ in range(repeats)]
        total += np.median(np.array(found), axis=0)
    return total


def told(seconds: Sequence[float], what: str, more: Callable[[float], str] = lambda _: "") -> None:
    """Prints a line for each way, beside both ways of decoding."""
    for name, each in zip(WAYS, seconds, strict=False):
        ratios = (
            f"{each / seconds[0]:.2f} of plain decoding, {each / seconds[1]:.2f} of that to pixels"
        )
        print(f"  {name:18} {each:6.2f} s of {what}, {ratios}{more(each)}")


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
    kept = list(examined.kept(items))
    sizes = [size_of(kept, item, reports[item]) for item in items]
    by_processes = (
        lambda: sum(done.value for done in run(decode, [path for path, *_ in sizes], workers)),
        lambda: sum(done.value for done in run(decode_to_pixels, sizes, workers)),
        lambda: examine(items, config, workers),
        lambda: sum(1 for _ in read_clips(kept, examined)),
    )
    frames = by_processes[0]()
    examine_one(items[0].path, config)  # What is imported when it is first needed.
    print(f"{len(items)} files, {frames} frames, {len(kept)} clips; in one process:")
    alone = file_by_file(sizes, kept, config, args.repeats)
    told(alone[:, 0].tolist(), "CPU")
    told(alone[:, 1].tolist(), "wall")
    print(f"{args.processes} processes, their start included:")
    wall = [statistics.median(taken(work)[1] for _ in range(args.repeats)) for work in by_processes]
    told(
        wall, "wall", lambda each: f", {len(kept) / each:.1f} clips/s, {frames / each:.0f} frames/s"
    )


if __name__ == "__main__":
    main()
