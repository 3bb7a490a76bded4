"""Videos of a TFDS builder as media: ``tfds:NAME_OR_BUILDER_DIR[:split]``, read without TensorFlow.

A record stands where a file does. Its path is ``tfds:`` and JSON of where it is, so that child
processes find it; its name is ``NAME/VERSION/SPLIT/NUMBER``. Which feature is the video and which the
caption is told from their types and names. TFDS is imported where a record is read, and not before.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from dit_jax.files import refuse_if
from dit_jax.prepare.refusals import Refused

PREFIX = "tfds:"
CAPTIONS = ("caption", "text", "description", "title", "prompt", "caption_1")
IDS = ("id", "video_id", "key", "name", "path", "source", "file_name", "filename", "url", "licence")
"""Features of text that are no captions."""
FPS = 25.0
"""Of videos whose builder has no feature ``fps``."""


def is_record(path: str | os.PathLike) -> bool:
    """Whether a path is of a record (or an input of records), and not of a file."""
    return os.fspath(path).startswith(PREFIX)


def parse_input(given: str) -> tuple[str, str]:
    """Builder and split of ``tfds:NAME_OR_BUILDER_DIR[:split]``; ``train`` where none is named."""
    parts = re.fullmatch(r"(.+?)(?::([A-Za-z_]\w*(?:\[[^\]]*\])?))?", given.removeprefix(PREFIX))
    message = f"--input {given!r}: give tfds:NAME or tfds:DIRECTORY of a version, then :SPLIT."
    refuse_if([(parts is None, message)])
    assert parts is not None
    return parts[1], parts[2] or "train"


def find_records(given: str) -> Iterator[tuple[str, str, list[Any]]]:
    """Name, path and what tells of a change of every record of an input, in order."""
    from dit_jax.data.records import ENCODED_VIDEOS, find_builder

    path, split = parse_input(given)
    info = find_builder(path).info
    encoded = (info.metadata or {}).get(ENCODED_VIDEOS) or ()
    video, caption = find_features(info.features, given, encoded)
    place = {"path": path, "split": split, "video": video, "caption": caption}
    count = len(_open(**place))
    stamp = [(x.name, x.num_bytes, list(x.shard_lengths)) for x in info.splits.values()]
    for i in range(count):
        name = f"{info.full_name}/{split}/{i:0{len(str(count - 1))}d}"
        yield name, PREFIX + json.dumps(place | {"index": i}), stamp


def find_features(
    features: Mapping[str, Any], given: str, encoded: Collection[str] = ()
) -> tuple[str, str | None]:
    """The feature of the video, and that of the caption or a template of labels (``{label}``)."""
    videos, texts, labels = [], [], []
    for name, feature in features.items():
        shape, kind = getattr(feature, "shape", None), getattr(feature, "np_dtype", None)
        if name in encoded:
            videos.append((0, name != "video", name))
        elif isinstance(shape, tuple) and len(shape) in (3, 4) and kind == np.uint8:
            # Videos stand before images, and either by their usual names.
            if shape[-1] in (1, 3):
                videos.append((4 - len(shape), name not in ("video", "image"), name))
        elif type(feature).__name__ == "Text":
            texts.append(name)
        elif getattr(feature, "names", None):
            labels.append(f"{{{name}}}")
    message = f"--input {given!r} has the features {', '.join(sorted(features))}: none is a video, "
    refuse_if([(not videos, f"{message}uint8 [t, h, w, 1 or 3], or an image.")])
    captions = [name for name in CAPTIONS if name in texts]
    captions += sorted(name for name in texts if name not in (*CAPTIONS, *IDS)) + sorted(labels)
    return min(videos)[2], captions[0] if captions else None


@functools.lru_cache(1)
def _open(path: str, split: str, video: str, caption: str | None) -> Any:
    from dit_jax.data.records import RecordsConfig, RecordsSource

    texts: dict[str, Any] = {"captioned": caption is not None}
    if caption is not None:
        texts["caption_template" if caption.startswith("{") else "caption_key"] = caption
    return RecordsSource(RecordsConfig(path, split, video, fps=FPS, **texts))


@functools.lru_cache(1)
def read_record(path: str) -> tuple[np.ndarray, float, str]:
    """Frames uint8 ``[t, h, w, 3]``, their number a second, and the caption (or nothing).

    Refused: a record that cannot be decoded, or is no video.
    """
    place = json.loads(path.removeprefix(PREFIX))
    index = place.pop("index")
    try:
        sample = _open(**place)[index]
    except (IndexError, ValueError) as error:
        raise Refused("cannot be decoded", str(error)) from error
    return sample["video"], sample["fps"], sample["caption"]
