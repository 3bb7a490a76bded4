"""Add the states of a text encoder to the records of a TFDS builder, for models trained on those.

    python scripts/captions_to_states.py --input data/sprites/1.0.0 --encoder umt5-xxl --output data

writes data/sprites_states/1.0.0 with the same splits, clips and captions, and with the feature
text_states: bfloat16 [s, e], without padding. ENCODER is a folder of T5 v1.1 or UMT5 as
`transformers` stores them (docs/text.md). It is spread over all devices that there are. Latents pass
through as they are, if the builder says which codec made them.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dit_jax.data import RecordsConfig, RecordsSource
from dit_jax.files import as_path
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.prepare.captions import prefixed
from dit_jax.prepare.writing import StatesOf, write_records
from dit_jax.text.folders import load_text_encoder
from dit_jax.types import TextEncoder

CHUNK = 256
"""Records whose captions are encoded together."""


def encoded(source: RecordsSource, encoder: TextEncoder, prefix: str) -> Iterator[dict[str, Any]]:
    """The samples of a source in order, captions behind a prefix, with the states of these."""
    for start in range(0, len(source), CHUNK):
        samples: Any = [source[i] for i in range(start, min(start + CHUNK, len(source)))]
        samples = [{**one, "caption": prefixed(prefix, one["caption"])} for one in samples]
        captions = list(dict.fromkeys(sample["caption"] for sample in samples))
        states = dict(zip(captions, encoder.encode(captions), strict=True))
        for sample in samples:
            yield {**sample, "text_states": states[sample["caption"]]}


def latents_of(source: RecordsSource, path: str) -> tuple[int, str] | None:
    """Channels and codec of a builder's latents; None where it has pixels."""
    video = source[0]["video"]
    if video.dtype == np.uint8:
        return None
    if source.codec is None:
        raise ValueError(
            f"{path!r} has latents and does not say which codec made them: write it again by "
            "dit_jax.prepare.writing.write_records (latents), which says so"
        )
    return video.shape[-1], source.codec


def convert(args: argparse.Namespace) -> Path:
    """Write the builder and return its directory; ValueError where something does not serve."""
    given: dict[str, Any] = {"caption_key": args.caption_key, "label_key": args.label_key}
    given |= {"video_key": args.video_key, "data_dir": args.data_dir}
    if args.caption_template is not None:
        given["caption_template"] = args.caption_template
    sources = {
        split: RecordsSource(RecordsConfig(args.input, split, **given)) for split in args.splits
    }
    latents = latents_of(sources[args.splits[0]], args.input)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    encoder = load_text_encoder(args.encoder, max_tokens=args.max_tokens, mesh=mesh)
    # A builder's directory is that of a version, such as data/flowers/1.0.0.
    parts = [part for part in Path(args.input).parts if not re.fullmatch(r"\d+\.\d+\.\d+", part)]
    name = re.sub(r"[^a-z0-9_]+", "_", (args.name or parts[-1]).lower()) + "_states"
    with tqdm(total=sum(map(len, sources.values())), unit="clip", disable=None) as bar:

        def counted(split: str) -> Iterator[dict[str, Any]]:
            for sample in encoded(sources[split], encoder, args.prefix):
                bar.update()
                yield sample

        return write_records(
            args.output,
            name,
            {split: counted(split) for split in args.splits},
            description=f"{args.input} with states of captions by {encoder.name}.",
            labels=() if args.label_key is None else ("label",),
            latents=latents,
            text_states=StatesOf(encoder.dim, encoder.hash, encoder.name),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="name or directory of a TFDS builder")
    parser.add_argument("--encoder", required=True, help="folder of the text encoder")
    parser.add_argument("--output", type=as_path, required=True, help="directory for builders")
    parser.add_argument("--name", help="of the builder, before _states; the input's if not given")
    parser.add_argument("--splits", nargs="+", default=["train"])
    parser.add_argument("--video-key", default="video")
    parser.add_argument("--caption-key", default="caption")
    parser.add_argument("--caption-template", help="as data.source.caption_template")
    parser.add_argument("--prefix", default="", help="put before every caption: a trigger word")
    parser.add_argument("--label-key", help="class to keep, as label")
    parser.add_argument("--data-dir", help="where TFDS keeps the builder, if not in its own place")
    parser.add_argument("--max-tokens", type=int, default=512, help="where captions are cut")
    args = parser.parse_args()
    try:
        print(convert(args))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
