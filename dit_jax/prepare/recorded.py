"""Videos of a TFDS builder as media: ``tfds:NAME_OR_BUILDER_DIR[:split]``, read without TensorFlow.

A record stands where a file does. Its path is ``tfds:`` and a ``RecordPlace`` as JSON, so that child
processes find it; its name is ``NAME/VERSION/SPLIT/NUMBER``. Which feature is the video and which the
caption is told from their types and names. TFDS is imported where a record is read, and not before.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Collection, Mapping
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


@dataclasses.dataclass(frozen=True)
class RecordPlace:
    """One record, and what is read of it."""

    path: str
    split: str
    video: str
    """The feature: uint8 ``[t, h, w, c]``, encoded video, or an image."""
    caption: str | None = None
    """The feature of text, or the template of labels (``{label}``)."""
    index: int = 0


def is_record(path: str | os.PathLike) -> bool:
    """Whether a path is of a record (or an input of records), and not of a file."""
    return os.fspath(path).startswith(PREFIX)


def parse_input(given: str) -> tuple[str, str]:
    """Builder and split of ``tfds:NAME_OR_BUILDER_DIR[:split]``; ``train`` where none is named."""
    parts = re.fullmatch(r"(.+?)(?::([A-Za-z_]\w*(?:\[[^\]]*\])?))?", given.removeprefix(PREFIX))
    message = (
        f"--input {given!r}: give tfds:NAME or tfds:DIRECTORY of a version, then perhaps :SPLIT."
    )
    refuse_if([(parts is None, message)])
    assert parts is not None
    return parts[1], parts[2] or "train"


def find_records(given: str) -> list[tuple[str, str, list[Any]]]:
    """Name, path and what tells of a change of every record of an input, in order."""
    from dit_jax.data.records import ENCODED_VIDEOS, find_builder

    path, split = parse_input(given)
    builder = find_builder(path)
    encoded = (builder.info.metadata or {}).get(ENCODED_VIDEOS) or ()
    video, caption = _features(builder.info.features, given, encoded)
    place = RecordPlace(path, split, video, caption)
    count = len(_source(place))
    stem = f"{builder.info.full_name}/{split}"
    splits = builder.info.splits.values()
    stamp = [(one.name, one.num_bytes, list(one.shard_lengths)) for one in splits]
    values, width = dataclasses.asdict(place), len(str(count - 1))
    texts = (json.dumps(values | {"index": index}) for index in range(count))
    return [(f"{stem}/{i:0{width}d}", PREFIX + text, stamp) for i, text in enumerate(texts)]


def _features(
    features: Mapping[str, Any], given: str, encoded: Collection[str] = ()
) -> tuple[str, str | None]:
    """The feature of the video, and that of the caption or its template."""
    ranks = {name: _rank(name, feature) for name, feature in features.items()}
    ranks |= {name: (0, name != "video") for name in encoded if name in features}
    videos = sorted((rank, name) for name, rank in ranks.items() if rank is not None)
    message = (
        f"--input {given!r} has the features {', '.join(sorted(features))}: none is a video or an "
        "image, uint8 [t, h, w, 1 or 3] or [h, w, 1 or 3]."
    )
    refuse_if([(not videos, message)])
    texts = [name for name, feature in features.items() if type(feature).__name__ == "Text"]
    texts = [name for name in texts if name not in encoded]
    captions = [name for name in CAPTIONS if name in texts]
    captions += sorted(name for name in texts if name not in (*CAPTIONS, *IDS))
    labels = [name for name, f in features.items() if getattr(f, "names", None)]
    return videos[0][1], [*captions, *(f"{{{name}}}" for name in sorted(labels)), None][0]


def _rank(name: str, feature: Any) -> tuple[int, bool] | None:
    """Videos stand before images, and either by their usual names; None where it is neither."""
    shape, kind = getattr(feature, "shape", None), getattr(feature, "np_dtype", None)
    if not isinstance(shape, tuple) or kind != np.uint8 or len(shape) not in (3, 4):
        return None
    if shape[-1] not in (1, 3):
        return None
    return 4 - len(shape), name not in ("video", "image")


def read_place(path: str) -> RecordPlace:
    """The place in the path of a record."""
    return RecordPlace(**json.loads(path.removeprefix(PREFIX)))


@functools.lru_cache(1)
def _opened(place: RecordPlace) -> Any:
    from dit_jax.data.records import RecordsConfig, RecordsSource

    caption = place.caption or ""
    template = caption if caption.startswith("{") else None
    captions: dict[str, Any] = {"caption_key": caption, "caption_template": template}
    captions["captioned"] = bool(caption)
    return RecordsSource(RecordsConfig(place.path, place.split, place.video, fps=FPS, **captions))


def _source(place: RecordPlace) -> Any:
    return _opened(dataclasses.replace(place, index=0))


@functools.lru_cache(1)
def read_record(path: str) -> tuple[np.ndarray, float, str]:
    """Frames uint8 ``[t, h, w, 3]``, their number a second, and the caption (or nothing).

    Refused: a record that cannot be decoded, or is no video.
    """
    place = read_place(path)
    try:
        sample = _source(place)[place.index]
    except (IndexError, ValueError) as error:
        raise Refused("cannot be decoded", str(error)) from error
    return sample["video"], sample["fps"], sample["caption"]
