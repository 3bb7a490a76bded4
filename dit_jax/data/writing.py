"""Writes samples as a TFDS builder in ArrayRecord format, without TensorFlow.

`tfds.data_source`, `tfds.builder_from_directory` and `RecordsSource` read it. Pixels are stored as
uint8; latents as float16, states of captions as bfloat16, each with what made them (codec, text
encoder) in the metadata.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2

from dit_jax.data.records import CODEC, CODEC_NAME, TEXT_ENCODER, TEXT_ENCODER_NAME, as_video

VERSION = "1.0.0"
STATES = "text_states"
"""The feature that holds the states of captions."""


class StatesOf(NamedTuple):
    """A text encoder, as the records of its states say of it."""

    dim: int
    """Numbers of a state."""
    hash: str
    name: str


class LatentsOf(NamedTuple):
    """A codec, as the records of its latents say of it."""

    channels: int
    hash: str
    name: str = ""


class _Sorted(ExampleWriter):
    """Writes the features of a record in the order of their names, so that equal samples give equal
    bytes: TFDS's own order is that of a hash table, another one in every process."""

    def write(self, path: Any, examples: Iterable[Any]) -> Any:
        return super().write(path, ((key, _in_order(data)) for key, data in examples))


def _in_order(data: bytes) -> bytes:
    example: Any = tf_example_pb2
    return example.Example.FromString(data).SerializeToString(deterministic=True)


class _Writer(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of given samples; TFDS's own AdhocBuilder imports TensorFlow."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Iterable[Mapping[str, Any]]],
        labels: Sequence[str],
        description: str,
        encoding: str,
        data_dir: str,
        latents: LatentsOf | None,
        texts: Sequence[str],
        numbers: Sequence[str],
        states: StatesOf | None,
    ) -> None:
        # TFDS has a name for each class and this writer one for each builder.
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self._splits, self._labels, self._about = splits, tuple(labels), description
        self._video_encoding, self._latents = encoding, latents
        self._texts, self._numbers, self._states = tuple(texts), tuple(numbers), states
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> Any:
        channels, dtype, metadata = 3, np.uint8, {}
        if self._latents is not None:
            channels, dtype = self._latents.channels, np.float16
            metadata = {CODEC: self._latents.hash}
            if self._latents.name:
                metadata[CODEC_NAME] = self._latents.name
        features = {
            "video": tfds.features.Tensor(
                shape=(None, None, None, channels), dtype=dtype, encoding=self._video_encoding
            ),
            "caption": tfds.features.Text(),
            "fps": tfds.features.Scalar(np.float32),
        }
        features |= {name: tfds.features.Scalar(np.int64) for name in self._labels}
        features |= {name: tfds.features.Text() for name in self._texts}
        features |= {name: tfds.features.Scalar(np.float64) for name in self._numbers}
        if self._states is not None:
            metadata |= {TEXT_ENCODER: self._states.hash, TEXT_ENCODER_NAME: self._states.name}
            # As plain bytes: a list of numbers would hold them as float32, and they do not compress.
            features[STATES] = tfds.features.Tensor(
                shape=(None, self._states.dim), dtype=ml_dtypes.bfloat16, encoding="bytes"
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._about,
            metadata=tfds.core.MetadataDict(metadata),
            features=tfds.features.FeaturesDict(features),
            # Record i is the i-th sample: the writer's order is the order a user can check.
            disable_shuffling=True,
        )

    def _example_writer(self) -> ExampleWriter:
        return _Sorted(FileFormat.ARRAY_RECORD)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        i = -1
        for i, sample in enumerate(self._splits[split]):
            where = f"sample {i} of split {split!r}"
            fields = (self._labels, self._texts, self._numbers)
            record = _checked(sample, where, self._latents, *fields)
            if self._states is not None:
                record[STATES] = _checked_states(sample, where, self._states)
            yield i, record
        if i < 0:
            raise ValueError(f"split {split!r} has no samples: give at least one, or leave it out")


def _checked(
    sample: Mapping[str, Any],
    where: str,
    latents: LatentsOf | None,
    labels: Sequence[str],
    texts: Sequence[str],
    numbers: Sequence[str],
) -> dict[str, Any]:
    wanted = ("video", "caption", "fps", *labels, *texts, *numbers)
    missing = [key for key in wanted if key not in sample]
    if missing:
        raise ValueError(f"{where} lacks {missing}: it has {sorted(sample)}; add what is missing")
    if not isinstance(sample["caption"], str) or not float(sample["fps"]) > 0:
        raise ValueError(
            f"{where} has caption {sample['caption']!r} and fps {sample['fps']!r}: need a string "
            "and a positive number"
        )
    record = {"caption": sample["caption"], "fps": float(sample["fps"])}
    record |= {key: int(sample[key]) for key in labels}
    record |= {key: float(sample[key]) for key in numbers}
    for key in texts:
        if not isinstance(sample[key], str):
            raise ValueError(f"{where} has the {key} {sample[key]!r}: need a string, perhaps empty")
        record[key] = sample[key]
    video = as_video(sample["video"], f"video of {where}", latents=latents is not None)
    if latents is not None:
        if video.dtype == np.uint8 or video.shape[-1] != latents.channels:
            raise ValueError(
                f"video of {where} is {video.dtype} with {video.shape[-1]} channels: latents of "
                f"{latents.hash!r} are float with {latents.channels}"
            )
        video = video.astype(np.float16)
    return {"video": video, **record}


def _checked_states(sample: Mapping[str, Any], where: str, of: StatesOf) -> np.ndarray:
    """The states of a sample's caption, bfloat16; ``ValueError`` where they are none."""
    found = np.asarray(sample.get(STATES))
    floats = jnp.issubdtype(found.dtype, jnp.floating)
    if not floats or found.ndim != 2 or found.shape[1] != of.dim or not len(found):
        raise ValueError(
            f"{STATES} of {where} is {found.dtype} {list(found.shape)}: those of {of.name!r} are float "
            f"[s, {of.dim}], at least one"
        )
    if not np.isfinite(found.astype(np.float32)).all():
        raise ValueError(f"{STATES} of {where} has numbers that are NaN or infinite")
    return found.astype(ml_dtypes.bfloat16)


def write_records(
    directory: str | Path,
    name: str,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    description: str,
    labels: Sequence[str] = (),
    texts: Sequence[str] = (),
    numbers: Sequence[str] = (),
    encoding: Literal["zlib", "bytes"] = "zlib",
    latents: LatentsOf | tuple[int, str] | None = None,
    text_states: StatesOf | None = None,
) -> Path:
    """Writes samples as the TFDS builder `directory/name/1.0.0` and return that path.

    `splits` maps split names to samples {"video": uint8 [t, h, w, 3], "caption": str, "fps": float}
    plus the integers named in `labels`, the strings named in `texts` (further captions, which may be
    empty, and where they are from) and the floats named in `numbers`; sizes and lengths may differ,
    order is kept, and equal samples give equal files. `encoding` of the videos: "zlib" is lossless
    compression, "bytes" is raw, larger and quicker to read. `latents` says
    that the videos are latents (stored as float16): their channels, the codec's hash and its name.
    `text_states` says that samples have their captions' states, "text_states" float [s, e] (stored as
    bfloat16), and which encoder made them.

    Raises ValueError for a bad name, an existing builder, a directory that cannot be written, an
    empty split and a sample that does not fit; nothing but empty directories is left behind then.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name={name!r}: use lower case letters, digits and _, a letter first")
    names = ["video", "caption", "fps", STATES, *labels, *texts, *numbers]
    if reserved := {key for key in names if names.count(key) > 1}:
        given = {"labels": labels, "texts": texts, "numbers": numbers}
        what = next(name for name, keys in given.items() if reserved & set(keys))
        raise ValueError(f"{what} hold {sorted(reserved)}, which every sample has: rename them")
    if not splits:
        raise ValueError("splits is empty: give at least one, such as {'train': samples}")
    if encoding not in ("zlib", "bytes"):
        raise ValueError(f"encoding={encoding!r} is unknown: use 'zlib' or 'bytes'")
    root = Path(directory).expanduser()
    target = root / name / VERSION
    if target.exists():
        raise ValueError(f"{target} exists: remove it, or choose another directory or name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise ValueError(
            f"{str(directory)!r} cannot be written ({error}): choose a directory with write access"
        ) from error
    of = None if latents is None else LatentsOf(latents[0], latents[1], *latents[2:])
    fields = (texts, numbers, text_states)
    writer = _Writer(name, splits, labels, description, encoding, str(root), of, *fields)
    # TFDS makes a place for downloads, of which there are none: not beside the data.
    with tempfile.TemporaryDirectory() as downloads:
        writer.download_and_prepare(download_dir=downloads)
    return target
