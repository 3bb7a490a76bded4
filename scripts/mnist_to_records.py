"""Turn MNIST idx files into a TFDS builder of one-frame videos, padded to 32x32.

    python scripts/mnist_to_records.py --input mnist --output data

reads extra10k-*.gz as the split train and t10k-*.gz as test, and writes data/mnist_frames/1.0.0.
Captions are words: "a handwritten digit seven".
"""

import argparse
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.files import as_path
from dit_jax.prepare.writing import write_records

FILES = {"train": "extra10k", "test": "t10k"}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32
FPS = 8.0


def read_idx(path: Path) -> np.ndarray:
    """uint8 array of a gzipped idx file; ValueError where it is absent, damaged or another."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: --input must hold {path.name}")
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    # Two zero bytes, the type (8: unsigned byte), the number of axes, then each axis big-endian.
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is no idx file of bytes (it begins {data[:4]!r}): fetch it again")
    shape = np.frombuffer(data, ">u4", data[3], offset=4).astype(int)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if len(values) != shape.prod():
        raise ValueError(
            f"{path} holds {len(values)} values for shape {shape.tolist()}: fetch it again"
        )
    return values.reshape(shape)


def load(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 32, 32, 1] and labels [n] of one split; ValueError where they do not fit."""
    images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.shape != images.shape[:1] or max(images.shape[1:]) > SIDE:
        raise ValueError(
            f"{stem} of {folder} has images {images.shape} and labels {labels.shape}: need "
            f"[n, h, w] with h, w <= {SIDE}, and [n]"
        )
    if labels.max(initial=0) >= len(WORDS):
        raise ValueError(f"{stem} of {folder} has label {labels.max()}: need 0..9")
    pads = [((SIDE - n) // 2, SIDE - n - (SIDE - n) // 2) for n in images.shape[1:]]
    return np.pad(images, ((0, 0), *pads))[..., None], labels


def samples(images: np.ndarray, labels: np.ndarray) -> Iterator[dict[str, Any]]:
    """One-frame samples with a caption and the integer label."""
    for image, label in zip(images, labels.tolist(), strict=True):
        text = f"a handwritten digit {WORDS[label]}"
        yield {"video": image[None], "caption": text, "fps": FPS, "label": label}


def convert(source: Path, output: Path) -> Path:
    """Write the builder and return its directory; ValueError where input or output do not serve."""
    if not source.is_dir():
        raise ValueError(f"--input {source} is no directory: give the one with the idx files")
    return write_records(
        output,
        "mnist_frames",
        {split: samples(*load(source, stem)) for split, stem in FILES.items()},
        description="MNIST digits (CC BY-SA 3.0) as one-frame videos of 32x32 pixels.",
        labels=("label",),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="directory of the idx files")
    parser.add_argument("--output", type=as_path, required=True, help="directory for builders")
    args = parser.parse_args()
    try:
        print(convert(args.input, args.output))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
