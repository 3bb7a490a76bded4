"""Cut a folder of videos into small tiles, as TFDS records that a codec learns from.

    python scripts/clips_to_tiles.py --input clips --output data --hold-out dog.mp4 bunny.mp4

writes data/tiles/1.0.0 with the splits train and test. A tile is a window of some frames and pixels of
a video, at its own size; from every video as many are taken, at random places. The videos that are held
out make the split test, and give nothing to train.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from dit_jax.files import as_path
from dit_jax.prepare.writing import write_records

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")


def read(path: Path, limit: int) -> tuple[np.ndarray, float]:
    """The first ``limit`` frames uint8 [t, h, w, 3] and their rate; ValueError where there are none."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            frames = []
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == limit:
                    break
            return np.stack(frames), float(stream.average_rate or 25)
    except (FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}): leave it out") from error


def tiles(paths: list[Path], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Windows of every video; those too small for one are named and left out."""
    for number, path in enumerate(paths):
        video, fps = read(path, given.limit)
        frames = 1 + (min(len(video), given.frames) - 1) // given.stride * given.stride
        size = (frames, given.tile, given.tile)
        if min(video.shape[1:3]) < given.tile:
            print(f"{path.name}: {video.shape[1]} x {video.shape[2]} is smaller than a tile")
            continue
        rng = np.random.default_rng((given.seed, number))
        for _ in range(given.count):
            t, y, x = (
                int(rng.integers(whole - part + 1))
                for whole, part in zip(video.shape[:3], size, strict=True)
            )
            window = video[t : t + size[0], y : y + size[1], x : x + size[2]]
            yield {"video": window, "caption": path.name, "fps": fps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="folder of videos")
    parser.add_argument("--output", type=as_path, required=True, help="directory for builders")
    parser.add_argument("--hold-out", nargs="+", required=True, help="videos for the split test")
    parser.add_argument("--tile", type=int, default=96, help="rows and columns of a tile")
    parser.add_argument("--frames", type=int, default=17, help="frames of a tile at most")
    parser.add_argument("--stride", type=int, default=4, help="frames are 1 + a multiple of it")
    parser.add_argument("--count", type=int, default=48, help="tiles of every video")
    parser.add_argument("--limit", type=int, default=240, help="frames read of every video")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        paths = sorted(path for path in given.input.iterdir() if path.suffix in SUFFIXES)
        missing = set(given.hold_out) - {path.name for path in paths}
        if missing:
            raise ValueError(f"--hold-out {sorted(missing)[0]!r} is not in {given.input}")
        held = [path for path in paths if path.name in given.hold_out]
        rest = [path for path in paths if path.name not in given.hold_out]
        splits = {"train": tiles(rest, given), "test": tiles(held, given)}
        print(write_records(given.output, "tiles", splits, description="Tiles of videos."))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
