"""Turn sprites.npz (walking, casting and slashing game characters) into a TFDS builder.

    python scripts/sprites_to_records.py --input sprites.npz --output data

writes data/sprites/1.0.0 with the splits train and test; test is the last 270 clips, 30 characters
that train never shows. The captions hold every label, so a caption determines its clip.

Every action returns to where it begins: its eight frames are a cycle. With --cycles each clip begins
at a frame of it that is drawn at random, as filmed clips do, and the builder is sprites_cycles.
"""

import argparse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.files import as_path
from dit_jax.prepare.writing import write_records

HELD_OUT = 270
FPS = 8.0
ACTIONS = ("casts", "walks", "slashes")
DIRECTIONS = ("left", "front", "right")
PARTS = ("body", "trousers", "top", "hair")
COUNTS = (len(ACTIONS) * len(DIRECTIONS), 7, 7, 7, 10)
LABELS = ("action", "direction", *PARTS)


def caption(labels: dict[str, int]) -> str:
    """Labels in words: "body 3, trousers 2, top 5, hair 1 walks facing left"."""
    parts = ", ".join(f"{part} {labels[part]}" for part in PARTS)
    return f"{parts} {ACTIONS[labels['action']]} facing {DIRECTIONS[labels['direction']]}"


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Clips uint8 [n, t, h, w, 3] and labels [n, 5] of the file; ValueError where it is another."""
    if not path.is_file():
        raise ValueError(f"--input {path} is not there: give the path of sprites.npz")
    try:
        with np.load(path) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--input {path} does not hold x and y ({error}): give sprites.npz"
        ) from error
    if x.ndim != 5 or x.dtype != np.uint8 or x.shape[-1] != 3 or y.shape != (len(x), len(COUNTS)):
        raise ValueError(
            f"--input {path} holds x {x.dtype} {x.shape} and y {y.shape}: need x uint8 "
            "[n, t, h, w, 3] and y [n, 5]"
        )
    if len(x) <= HELD_OUT:
        raise ValueError(f"--input {path} holds {len(x)} clips: need more than {HELD_OUT}")
    if (y < 0).any() or (y >= COUNTS).any():
        raise ValueError(
            f"--input {path} has labels up to {y.max(0).tolist()}: they must stay below {COUNTS}"
        )
    return x, y


def samples(x: np.ndarray, y: np.ndarray) -> Iterator[dict[str, Any]]:
    """Samples with a caption and the integer labels of `LABELS`."""
    for video, (motion, *parts) in zip(x, y.tolist(), strict=True):
        action, direction = divmod(motion, len(DIRECTIONS))
        labels = dict(zip(LABELS, (action, direction, *parts), strict=True))
        yield {"video": video, "caption": caption(labels), "fps": FPS, **labels}


def turned(x: np.ndarray) -> np.ndarray:
    """Every clip from another frame of its cycle on, the same ones in every call."""
    starts = np.random.default_rng(0).integers(x.shape[1], size=(len(x), 1))
    frames = (np.arange(x.shape[1]) + starts) % x.shape[1]
    return np.take_along_axis(x, frames[..., None, None, None], 1)


def convert(source: Path, output: Path, cycles: bool = False) -> Path:
    """Write the builder and return its directory; ValueError where input or output do not serve."""
    x, y = load(source)
    if cycles:
        x = turned(x)
    return write_records(
        output,
        "sprites_cycles" if cycles else "sprites",
        {
            "train": samples(x[:-HELD_OUT], y[:-HELD_OUT]),
            "test": samples(x[-HELD_OUT:], y[-HELD_OUT:]),
        },
        description="Sprites (Liberated Pixel Cup, CC BY-SA 3.0 / GPL-3); test: unseen characters.",
        labels=LABELS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="sprites.npz")
    parser.add_argument("--output", type=as_path, required=True, help="directory for builders")
    parser.add_argument("--cycles", action="store_true", help="begin anywhere in each cycle")
    args = parser.parse_args()
    try:
        print(convert(args.input, args.output, args.cycles))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
