"""What preparation takes on the host beside decoding alone: clips a second, in turn, in one run.

    pip install -e '.[prepare]' && python benchmarks/prepare.py --input DIR --repeats 3

Plain decoding is FFmpeg's, through PyAV, of every frame; nothing is done with the frames. Examining
finds shots, measures, hashes and draws thumbnails of the same files; then their clips are read again,
as for records. All three are done by processes of one kind, as many, which are started anew each
time, and that time counts. Files that are refused are left out of all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from plain_decoding import decode

from dit_jax.preparation import ClipConfig, DecodingConfig, ExamineConfig, WorkersConfig, run
from dit_jax.preparation.listing import Item, find_media
from dit_jax.preparation.progress import Progress
from dit_jax.preparation.stages import Examined, examine_files, read_clips


def examine(items: Sequence[Item], config: ExamineConfig, workers: WorkersConfig) -> Examined:
    """Examines files into a folder that is soon removed."""
    examined = Examined(Path(tempfile.mkdtemp(dir=FOLDER.name)), config)
    examine_files(items, examined, workers, Progress(shown=False))
    return examined


def taken(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


FOLDER = tempfile.TemporaryDirectory()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
    print(f"{len(items)} files, {frames} frames, {len(kept)} clips, {args.processes} processes")
    ways = {
        "plain decoding": plain,
        "examine": lambda: examine(items, config, workers),
        "read clips": lambda: sum(1 for _ in read_clips(kept, DecodingConfig(), workers)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, work in ways.items():
            seconds[name].append(taken(work))
    base = statistics.median(seconds["plain decoding"])
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(
            f"{name}: {middle:.2f} s (of {min(found):.2f} to {max(found):.2f}), "
            f"{len(kept) / middle:.1f} clips/s, {frames / middle:.0f} frames/s, "
            f"{middle / base:.2f} of plain decoding"
        )


if __name__ == "__main__":
    main()
