"""Turn a TFDS image set with labels into one of latents, for models that are trained on those.

    python scripts/images_to_latents.py --input imagenet2012 --codec CODEC --crop 256 --output data

writes data/imagenet2012_latents/1.0.0 with the split train. CODEC is the folder of an autoencoder that
`python -m dit_jax.convert` knows. A latent is the mean of what the codec says of the image, stored as
float16; --flip stores the mirror image of every image too, because latents cannot be mirrored later.
"""

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dit_jax.codec.codec import Codec
from dit_jax.codec.folders import load_codec
from dit_jax.data import RecordsConfig, RecordsSource, TransformConfig, crop
from dit_jax.data.records import centre, resized
from dit_jax.files import as_path
from dit_jax.prepare.writing import write_records
from dit_jax.sampling import to_float

BATCH = 32


def fitted(args: argparse.Namespace, video: np.ndarray, multiple: tuple[int, int]) -> np.ndarray:
    """Frames cropped to a square, or shrunk to an area; the rest that no whole patch has is cut off."""
    if args.crop is not None:
        video = crop(TransformConfig(args.crop), video)
    elif args.max_area is not None and (area := video.shape[1] * video.shape[2]) > args.max_area:
        scale = math.sqrt(args.max_area / area)
        video = resized(video, *(max(int(side * scale), 1) for side in video.shape[1:3]))
    whole = [side // part * part for side, part in zip(video.shape[1:3], multiple, strict=True)]
    if 0 in whole:
        raise ValueError(f"a picture of {video.shape[1:3]} pixels is smaller than {multiple}")
    return centre(video, *whole)


def pictures(
    source: RecordsSource, args: argparse.Namespace, multiple: tuple[int, int]
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Every image [1, h, w, 3] float in [-1, 1] and what else its record has."""
    for i in range(len(source)):
        sample: dict[str, Any] = dict(source[i])
        video = sample.pop("video")
        if video.dtype != np.uint8 or len(video) != 1:
            raise ValueError(f"record {i} has {video.dtype} {video.shape}: need images of uint8")
        image = to_float(fitted(args, video, multiple))
        for picture in (image, image[:, :, ::-1]) if args.flip else (image,):
            yield picture, sample


def encoded(
    found: Iterator[tuple[np.ndarray, dict[str, Any]]], codec: Codec
) -> Iterator[dict[str, Any]]:
    """Samples of latents, in order; neighbours of one size are encoded together."""
    waiting: list[tuple[np.ndarray, dict[str, Any]]] = []

    def flush() -> Iterator[dict[str, Any]]:
        if waiting:
            latents = codec.encode(np.concatenate([image for image, _ in waiting]))
            for latent, (_, rest) in zip(latents, waiting, strict=True):
                yield {"video": latent[None], **rest}
            waiting.clear()

    for image, rest in found:
        if len(waiting) == BATCH or (waiting and waiting[0][0].shape != image.shape):
            yield from flush()
        waiting.append((image, rest))
    yield from flush()


def convert(args: argparse.Namespace) -> Path:
    """Write the builder and return its directory; ValueError where something does not serve."""
    codec = load_codec(args.codec)
    sources = {
        split: RecordsSource(
            RecordsConfig(
                args.input,
                split,
                video_key=args.image_key,
                label_key=args.label_key,
                data_dir=args.data_dir,
            )
        )
        for split in args.splits
    }
    total = sum(map(len, sources.values())) * (2 if args.flip else 1)
    # What an autoencoder and a transformer with patches of 2 can both divide.
    multiple = (2 * codec.strides[1], 2 * codec.strides[2])
    # A builder's directory is that of a version, such as data/flowers/1.0.0.
    parts = [part for part in Path(args.input).parts if not re.fullmatch(r"\d+\.\d+\.\d+", part)]
    name = re.sub(r"[^a-z0-9_]+", "_", (args.name or parts[-1]).lower()) + "_latents"
    with tqdm(total=total, unit="image", disable=None) as bar:

        def counted(split: str) -> Iterator[dict[str, Any]]:
            found = pictures(sources[split], args, multiple)
            for sample in encoded(found, codec):
                bar.update()
                yield sample

        return write_records(
            args.output,
            name,
            {split: counted(split) for split in args.splits},
            description=f"Latents of {args.input} by {codec.name}.",
            labels=("label",),
            latents=(codec.channels, codec.hash),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="name or directory of a TFDS builder")
    parser.add_argument("--codec", required=True, help="folder of the autoencoder")
    parser.add_argument("--output", type=as_path, required=True, help="directory for builders")
    parser.add_argument("--name", help="of the builder, before _latents; the input's if not given")
    parser.add_argument("--splits", nargs="+", default=["train"])
    parser.add_argument("--image-key", default="image")
    parser.add_argument("--label-key", default="label")
    parser.add_argument("--data-dir", help="where TFDS keeps the builder, if not in its own place")
    parser.add_argument("--crop", type=int, help="shorter side to so many pixels, centre square")
    parser.add_argument("--max-area", type=int, help="or: at most so many pixels, any aspect ratio")
    parser.add_argument("--flip", action="store_true", help="mirror images too")
    args = parser.parse_args()
    try:
        print(convert(args))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
