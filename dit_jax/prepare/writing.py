"""Writes samples as a TFDS builder in ArrayRecord format, without TensorFlow.

`tfds.data_source`, `tfds.builder_from_directory` and `RecordsSource` read it. Pixels are stored as
uint8 or as encoded video (`encoded.py`); latents as float16, states of captions as bfloat16, each with
what made them (codec, text encoder) in the metadata.

TFDS's own writer shuffles by way of temporary files and asks for TensorFlow from 1 GB on. This one
streams: a shard is closed when it is full, and what is in memory is one sample.

While it is written, a builder is the directory `1.0.0.incomplete`:

    journal/made_of.json          what the records are made of: another key or setting begins anew
    journal/sizes-SPLIT-00003.npy the sizes of a finished shard's records
    data/NAME-SPLIT.array_record-00003        a finished shard: there only with its sizes, and whole
    data/NAME-SPLIT.array_record-00004.part   the shard under way, which a new start begins anew

and `data` is moved to its place when it is complete. So a killed writer loses one shard at most.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.naming import ShardedFileTemplate

from dit_jax.data.records import (
    CODEC,
    CODEC_NAME,
    ENCODED_VIDEOS,
    SIZES,
    TEXT_ENCODER,
    TEXT_ENCODER_NAME,
    as_video,
    storage_error,
)
from dit_jax.files import MiB, check_writable, is_remote, locked, refuse_if, write_json
from dit_jax.prepare.encoded import FORMAT, EncodedVideo, encode_video
from dit_jax.prepare.tables import encodable

VERSION = "1.0.0"
STATES = "text_states"
"""The feature that holds the states of captions."""
SHARD_BYTES = 256 * MiB
LARGEST_FPS = float(np.finfo(np.float32).max)
Encoding = Literal["video", "zlib", "bytes"]
Samples = Iterable[Mapping[str, Any]] | Callable[[int], Iterable[Mapping[str, Any]]]
"""Of a split: samples, or a function that gives them from the i-th record on."""


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


class _Schema(NamedTuple):
    """What a record holds."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    encoding: str
    latents: LatentsOf | None
    states: StatesOf | None

    def features(self) -> Any:
        channels, dtype = 3, np.uint8
        if self.latents is not None:
            channels, dtype = self.latents.channels, np.float16
        if self.encoding == "video":
            # Its Video feature needs TensorFlow. Text is bytes to TFDS, and it looks into none.
            video = tfds.features.Text(doc=f"uint8 [t, h, w, 3] as {FORMAT}")
        else:
            video = tfds.features.Tensor(
                shape=(None, None, None, channels), dtype=dtype, encoding=self.encoding
            )
        features = {
            "video": video,
            "caption": tfds.features.Text(),
            "fps": tfds.features.Scalar(np.float32),
        }
        features |= {name: tfds.features.Scalar(np.int64) for name in self.labels}
        features |= {name: tfds.features.Text() for name in self.texts}
        features |= {name: tfds.features.Scalar(np.float64) for name in self.numbers}
        if self.states is not None:
            # As plain bytes: a list of numbers would hold them as float32, and they do not compress.
            features[STATES] = tfds.features.Tensor(
                shape=(None, self.states.dim), dtype=ml_dtypes.bfloat16, encoding="bytes"
            )
        return tfds.features.FeaturesDict(features)

    def metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        if self.latents is not None:
            metadata[CODEC] = self.latents.hash
            if self.latents.name:
                metadata[CODEC_NAME] = self.latents.name
        if self.encoding == "video":
            metadata[ENCODED_VIDEOS] = {"video": FORMAT}
        if self.states is not None:
            metadata |= {TEXT_ENCODER: self.states.hash, TEXT_ENCODER_NAME: self.states.name}
        return metadata

    def record(self, sample: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[int]]:
        """A sample as TFDS encodes it, and its sizes (`records.SIZES`)."""
        sample = {**sample.get("segment_fields", {}), **sample}
        texts, numbers = ("caption", *self.texts), ("fps", *self.numbers)
        missing = [k for k in ("video", *texts, *numbers, *self.labels) if k not in sample]
        refuse_if([(bool(missing), f"{where} lacks {missing}: it has {sorted(sample)}")])
        values = {key: float(sample[key]) for key in numbers}
        sound = {
            key: 0 < x < LARGEST_FPS if key == "fps" else np.isfinite(x)
            for key, x in values.items()
        }
        need = "need a (positive) finite number"
        refuse_if((not sound[key], f"{where} has {key} {x}: {need}") for key, x in values.items())
        need = "need a string, perhaps empty"
        refuse_if(
            (not isinstance(sample[key], str), f"{where} has the {key} {sample[key]!r}: {need}")
            for key in texts
        )
        record: dict[str, Any] = {key: int(sample[key]) for key in self.labels} | values
        record |= {key: encodable(sample[key]) for key in texts}
        record["video"], shape = self._video(sample["video"], values["fps"], f"video of {where}")
        if self.states is not None:
            record[STATES] = self._states(np.asarray(sample.get(STATES)), f"{STATES} of {where}")
        return record, [*shape, len(record["caption"].encode()), len(record.get(STATES, ()))]

    def _video(self, value: Any, fps: float, what: str) -> tuple[Any, tuple[int, ...]]:
        if isinstance(value, EncodedVideo):
            refuse_if([(self.encoding != "video", f"{what} is encoded: give encoding='video'")])
            return value
        video = as_video(value, what, latents=self.latents is not None)
        shape = video.shape[:3]
        if self.latents is None:
            return (encode_video(video, fps).data if self.encoding == "video" else video), shape
        other = video.dtype == np.uint8 or video.shape[-1] != self.latents.channels
        message = (
            f"{what} is {video.dtype} with {video.shape[-1]} channels: latents of "
            f"{self.latents.hash!r} are float with {self.latents.channels}"
        )
        refuse_if([(other, message)])
        return _finite(video, np.float16, what), shape

    def _states(self, states: np.ndarray, what: str) -> np.ndarray:
        """The states of a sample's caption, bfloat16."""
        assert self.states is not None
        floats = jnp.issubdtype(states.dtype, jnp.floating)
        sound = floats and states.ndim == 2 and states.shape[1] == self.states.dim and len(states)
        message = (
            f"{what} is {states.dtype} {list(states.shape)}: those of {self.states.name!r} are "
            f"float [s, {self.states.dim}], at least one"
        )
        refuse_if([(not sound, message)])
        return _finite(states, ml_dtypes.bfloat16, what)


def _finite(values: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    bad = "is NaN or infinite" if not np.isfinite(values).all() else "overflows"
    message = f"{what} has numbers of which one {bad} as {np.dtype(dtype).name}"
    refuse_if([(not np.isfinite(stored.astype(np.float32)).all(), message)])
    return stored


class _Shard:
    """The shard under way."""

    def __init__(self, place: Path, sizes: Path) -> None:
        self.bytes = 0
        self._place, self._sizes = place, sizes
        self._part = place.with_name(place.name + ".part")
        # Records one by one, so that each is read without its neighbours.
        self._writer = ArrayRecordWriter(str(self._part), "group_size:1")
        self._rows: list[list[int]] = []

    def add(self, data: bytes, sizes: list[int]) -> None:
        self._writer.write(data)
        self.bytes += len(data)
        self._rows.append(sizes)

    def finish(self) -> int:
        """Moves the shard to its place; returns its records."""
        # An error of writing, such as a full disk, is not told before.
        self._writer.close()
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        fresh = self._sizes.with_suffix(".part")
        with fresh.open("wb") as file:
            np.save(file, np.array(self._rows, np.int32))
        os.replace(fresh, self._sizes)
        os.replace(self._part, self._place)
        return len(self._rows)

    def abandon(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._writer.close()
        self._part.unlink(missing_ok=True)


class _Split:
    """The shards of one split."""

    def __init__(self, folder: Path, name: str, split: str) -> None:
        self.name = split
        self._journal, self._data = folder / "journal", folder / "data"
        self._stem = f"{name}-{split}.array_record"
        # A writer that was killed while it named the shards has named some of them.
        for path in self._data.glob(f"{self._stem}-[0-9]*-of-[0-9]*"):
            os.replace(path, path.with_name(path.name.rpartition("-of-")[0]))
        self.lengths: list[int] = []
        while (count := self._records(len(self.lengths))) is not None:
            self.lengths.append(count)

    def _shard(self, index: int) -> Path:
        return self._data / f"{self._stem}-{index:05d}"

    def _rows(self, index: int) -> Path:
        return self._journal / f"sizes-{self.name}-{index:05d}.npy"

    def _records(self, index: int) -> int | None:
        """How many a finished shard has; None if it is not there, or not whole (a power failure)."""
        try:
            count = len(np.load(self._rows(index)))
            reader: Any = ArrayRecordReader(str(self._shard(index)))
            return count if reader.num_records() == count else None
        except (OSError, ValueError, RuntimeError):
            return None

    def write(self, samples: Samples, schema: _Schema, shard_bytes: int) -> None:
        """Writes what is not there yet."""
        features = schema.features()
        serializer = ExampleSerializer(features.get_serialized_info())
        start, shard = sum(self.lengths), None
        repaired: list[str] = []
        try:
            left = samples(start) if callable(samples) else itertools.islice(samples, start, None)
            if isinstance(samples, Sequence):  # What is not asked for is not computed.
                left = (samples[i] for i in range(start, len(samples)))
            for index, sample in enumerate(left, start):
                where = f"sample {index} of split {self.name!r}"
                record, sizes = schema.record(sample, where)
                texts = ("caption", *schema.texts)
                repaired += [where for key in texts if record[key] != sample[key]]
                example = serializer.get_tf_example(features.encode_example(record))
                # In the order of names: a hash table's is another one in every process.
                data = cast(Any, example).SerializeToString(deterministic=True)
                if shard is None:
                    count = len(self.lengths)
                    shard = _Shard(self._shard(count), self._rows(count))
                shard.add(data, sizes)
                if shard.bytes >= shard_bytes:
                    self.lengths.append(shard.finish())
                    shard = None
            if shard is not None:
                self.lengths.append(shard.finish())
                shard = None
        except RuntimeError as error:
            raise storage_error(error, self._data) or error from error
        finally:
            if shard is not None:
                shard.abandon()
        message = f"split {self.name!r} has no samples: give at least one, or leave it out"
        refuse_if([(not self.lengths, message)])
        if repaired:
            print(
                f"{len(repaired)} texts had halves of surrogate pairs, which became U+FFFD: the first "
                f"is of {repaired[0]}.",
                file=sys.stderr,
            )

    def finish(self) -> tfds.core.SplitInfo:
        """Gives the shards the names that TFDS seeks, and joins their sizes."""
        total, size = len(self.lengths), 0
        for index in range(total):
            size += self._shard(index).stat().st_size
            path = self._shard(index)
            os.replace(path, path.with_name(f"{path.name}-of-{total:05d}"))
        shape = (sum(self.lengths), len(SIZES))
        place = self._data / f"sizes-{self.name}.npy"
        # A memory map: the sizes of ten million records are 200 MB.
        rows = np.lib.format.open_memmap(place, mode="w+", dtype=np.int32, shape=shape)
        end = 0
        for index, length in enumerate(self.lengths):
            rows[end : end + length] = np.load(self._rows(index))
            end += length
        rows.flush()
        return tfds.core.SplitInfo(
            name=self.name,
            shard_lengths=self.lengths,
            num_bytes=size,
            filename_template=ShardedFileTemplate(
                data_dir=epath.Path(self._data),
                dataset_name=self._stem.rpartition(f"-{self.name}.")[0],
                split=self.name,
                filetype_suffix="array_record",
            ),
        )


def write_records(
    directory: str | Path,
    name: str,
    splits: Mapping[str, Samples],
    *,
    description: str,
    labels: Sequence[str] = (),
    texts: Sequence[str] = (),
    numbers: Sequence[str] = (),
    encoding: Encoding = "zlib",
    latents: LatentsOf | tuple[int, str] | None = None,
    text_states: StatesOf | None = None,
    shard_bytes: int = SHARD_BYTES,
    resume: str | None = None,
) -> Path:
    """Writes samples as the TFDS builder `directory/name/1.0.0` and returns that path.

    Args:
        splits: By name, samples {"video": uint8 [t, h, w, 3], "caption": str, "fps": float} plus the
            integers named in `labels`, the strings named in `texts` and the floats named in `numbers`.
            Sizes and lengths may differ, order is kept, equal samples give equal files, and half a
            surrogate pair in a text becomes U+FFFD.
        encoding: Of the videos: "video" is H.264 of high quality (`encoded.py`; a sample's video may be
            an `EncodedVideo` then), "zlib" is lossless compression, "bytes" is raw.
        latents: The codec of which the videos are latents (stored as float16, never as "video").
        text_states: The encoder of the samples' "text_states", float [s, e] (stored as bfloat16).
        shard_bytes: A shard is closed at this size.
        resume: What the samples are made of. Shards that a failed or killed call with the same string
            and settings finished are kept: their samples are skipped (a split that is a function from
            the first record to samples is called with their number), and the result is the same bytes.
            Without it, nothing but empty directories is left of a call that fails.

    `InputError` for what was given wrong, samples included; `OSError` for a disk that is full.
    """
    names = ["video", "caption", "fps", STATES, *labels, *texts, *numbers]
    twice = sorted({key for key in names if names.count(key) > 1})
    encodings = ("video", "zlib", "bytes")
    target = Path(directory).expanduser() / name / VERSION
    refuse_if(
        [
            (
                not re.fullmatch(r"[a-z][a-z0-9_]*", name),
                f"name={name!r}: use lower case letters, digits and _, a letter first",
            ),
            (bool(twice), f"labels, texts and numbers hold {twice} twice: rename them"),
            (not splits, "splits is empty: give at least one, such as {'train': samples}"),
            (encoding not in encodings, f"encoding={encoding!r} is unknown: use {encodings}"),
            (shard_bytes < 1, f"shard_bytes={shard_bytes}: give a positive number"),
            (
                is_remote(directory),
                f"{os.fspath(directory)!r}: ArrayRecord files are written to disks only. Write to a "
                "local directory and copy it, or mount the bucket (gcsfuse)",
            ),
            (target.exists(), f"{target} exists: remove it, or choose another directory or name"),
        ]
    )
    check_writable(target.parent, "directory")
    if latents is not None:
        latents = LatentsOf(latents[0], latents[1], *latents[2:])
        encoding = "zlib" if encoding == "video" else encoding
    schema = _Schema(tuple(labels), tuple(texts), tuple(numbers), encoding, latents, text_states)
    folder = target.with_name(f"{VERSION}.incomplete")
    folder.mkdir(exist_ok=True)
    with locked(folder):
        try:
            made_of = [resume, name, description, list(splits), schema, shard_bytes, FORMAT]
            _begin(folder, json.loads(json.dumps(made_of)), resume is not None)
            parts = [_Split(folder, name, split) for split in splits]
            for part in parts:
                part.write(splits[part.name], schema, shard_bytes)
            _describe(folder / "data", name, description, schema, [one.finish() for one in parts])
            os.replace(folder / "data", target)
        except BaseException:
            if resume is None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    shutil.rmtree(folder)
    return target


def _begin(folder: Path, made_of: list[Any], resumes: bool) -> None:
    """Keeps what an earlier call left in the folder if it made the same, and else removes it."""
    place = folder / "journal" / "made_of.json"
    try:
        same = resumes and json.loads(place.read_bytes()) == made_of
    except (OSError, ValueError):
        same = False
    if not same:
        for part in ("journal", "data"):
            shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "data").mkdir(exist_ok=True)
    for path in (folder / "data").glob("*.part"):
        path.unlink()
    write_json(place, made_of)


def _describe(
    folder: Path, name: str, description: str, schema: _Schema, splits: Sequence[Any]
) -> None:
    """Writes TFDS's metadata beside the shards."""
    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(name, tfds.core.Version(VERSION), str(folder), __name__),
        description=description,
        features=schema.features(),
        metadata=tfds.core.MetadataDict(schema.metadata()),
        # Record i is the i-th sample: the writer's order is the order a user can check.
        disable_shuffling=True,
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)
