"""Memory and seams of a codec that takes large clips in parts and tiles.

    python benchmarks/codec.py --codec runs/codec_clips/codec --video clip.mp4

Encodes and decodes some frames of a video, resized, with tiles and (where --whole is given) without,
each in a process of its own whose peak memory is read when it ends. Seams are the difference of the two
decodings of the same latents, in 8-bit levels: where tiles meet, and elsewhere.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np


def frames(path: str, count: int, height: int, width: int) -> np.ndarray:
    """The first frames of a video, resized: float32 [t, h, w, 3] in [-1, 1]."""
    found = []
    with av.open(path) as container:
        for frame in container.decode(video=0):
            found.append(frame.reformat(width, height, "rgb24").to_ndarray())
            if len(found) == count:
                break
    return np.stack(found).astype(np.float32) / 127.5 - 1


def one(given: argparse.Namespace, tile: int, out: str) -> None:
    """Measures in this process, and stores what was decoded."""
    from dit_jax.codec.codec import TileConfig
    from dit_jax.codec.folders import load_codec

    codec = load_codec(given.codec, TileConfig(tile, given.overlap, given.part))
    video = frames(given.video, given.frames, given.height, given.width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = time.perf_counter()
    latents = codec.encode(video)
    middle = time.perf_counter()
    if Path(out + ".latents.npy").exists():
        latents = np.load(out + ".latents.npy")
    else:
        np.save(out + ".latents.npy", latents)
    made = [np.rint(np.clip(x, -1, 1) * 127.5 + 127.5) for x in codec.decode_parts(latents)]
    np.save(out + f".{tile}.npy", np.concatenate(made).astype(np.uint8))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "tile": tile,
                "before_gib": before / 2**20,
                "peak_gib": peak / 2**20,
                "encode_s": middle - clock,
                "decode_s": time.perf_counter() - middle,
            }
        )
    )


def seams(given: argparse.Namespace, out: str) -> None:
    """Compares what tiles gave with the whole."""
    from dit_jax.codec.codec import tile_starts
    from dit_jax.codec.folders import load_codec

    stride = load_codec(given.codec).strides[1]
    large = max(given.height, given.width)
    tiled, whole = (np.load(f"{out}.{n}.npy").astype(np.int16) for n in (given.tile, large))
    difference = np.abs(tiled - whole).mean((0, 3))
    near = np.zeros(difference.shape, bool)
    for axis, side in enumerate(difference.shape):
        for start in tile_starts(side // stride, given.tile, given.overlap)[1:]:
            band = [slice(None), slice(None)]
            band[axis] = slice(start * stride, (start + given.overlap) * stride)
            near[tuple(band)] = True
    print(
        f"tiles against the whole, in 8-bit levels: {difference[near].mean():.3f} where they overlap, "
        f"elsewhere {difference[~near].mean():.3f}; largest {np.abs(tiled - whole).max()}"
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", required=True, help="folder of a codec")
    parser.add_argument("--video", required=True)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=1088)
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--tile", type=int, default=64, help="latents a side")
    parser.add_argument("--overlap", type=int, default=16)
    parser.add_argument("--part", type=int, default=1, help="latents in time of a part")
    parser.add_argument("--whole", action="store_true", help="without tiles too, and compare")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        one(given, given.only, given.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "made")
        tiles = [given.tile, max(given.height, given.width)] if given.whole else [given.tile]
        for tile in tiles:
            command = [sys.executable, *sys.argv, "--only", str(tile), "--out", out]
            subprocess.run(command, check=True)
        if given.whole:
            seams(given, out)


if __name__ == "__main__":
    main()
