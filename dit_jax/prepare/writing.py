"""Writes samples as a TFDS builder in ArrayRecord format, without TensorFlow.

`tfds.data_source`, `tfds.builder_from_directory` and `RecordsSource` read it. Pixels are stored as
uint8 or as encoded video (`encoded.py`); latents as float16, states of captions as bfloat16, each with
what made them (codec, text encoder) in the metadata.

TFDS's own writer shuffles by way of temporary files and asks for TensorFlow from 1 GB on. This one
streams: a shard is closed when it is full, and what is in memory is one sample.

While it is written, a builder is the directory `1.0.0.incomplete`:

    journal/made_of               digest of what the records are made of: another one begins anew
    journal/sizes-SPLIT-00003.npy the sizes of a finished shard's records
    data/NAME-SPLIT.array_record-00003        a finished shard: there only with its sizes, and whole
    data/NAME-SPLIT.array_record-00004.part   the shard under way, which a new start begins anew

and `data` is moved to its place when it is complete. So a killed writer loses one shard at most.
"""

import contextlib
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.naming import ShardedFileTemplate

from dit_jax import files
from dit_jax.data.records import (
    CODEC,
    CODEC_NAME,
    ENCODED_VIDEOS,
    TEXT_ENCODER,
    TEXT_ENCODER_NAME,
    as_video,
    storage_error,
)
from dit_jax.files import MiB, refuse_if
from dit_jax.prepare.encoded import FORMAT, EncodedVideo, encode_video
from dit_jax.prepare.tables import encodable
from dit_jax.prepare.work import digest

VERSION = "1.0.0"
MARK = "prepared.json"
"""Beside the records of the verb: what they are made of, and which clips they lack."""
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
        kinds: Any = tfds.features
        if self.encoding == "video":
            # TFDS's Video feature needs TensorFlow. Text is bytes to TFDS, and it looks into none.
            video = kinds.Text(doc=f"uint8 [t, h, w, 3] as {FORMAT}")
        else:
            channels, dtype = (self.latents.channels, np.float16) if self.latents else (3, np.uint8)
            shape = (None, None, None, channels)
            video = kinds.Tensor(shape=shape, dtype=dtype, encoding=self.encoding)
        features = {"video": video, "caption": kinds.Text(), "fps": kinds.Scalar(np.float32)}
        features |= {name: kinds.Scalar(np.int64) for name in self.labels}
        features |= {name: kinds.Text() for name in self.texts}
        features |= {name: kinds.Scalar(np.float64) for name in self.numbers}
        if self.states is not None:
            # As plain bytes: a list of numbers would hold them as float32, and they do not compress.
            shape, dtype = (None, self.states.dim), ml_dtypes.bfloat16
            features[STATES] = kinds.Tensor(shape=shape, dtype=dtype, encoding="bytes")
        return kinds.FeaturesDict(features)

    def metadata(self) -> dict[str, Any]:
        codec, encoder = self.latents, self.states
        metadata: dict[str, Any] = {CODEC: codec.hash, CODEC_NAME: codec.name} if codec else {}
        metadata |= {TEXT_ENCODER: encoder.hash, TEXT_ENCODER_NAME: encoder.name} if encoder else {}
        metadata |= {ENCODED_VIDEOS: {"video": FORMAT}} if self.encoding == "video" else {}
        return {key: value for key, value in metadata.items() if value}

    def record(self, sample: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[int]]:
        """A sample as TFDS encodes it, and its sizes (`records.SIZES`)."""
        sample = {**sample.get("segment_fields", {}), **sample}
        texts, numbers = ("caption", *self.texts), ("fps", *self.numbers)
        missing = [k for k in ("video", *texts, *numbers, *self.labels) if k not in sample]
        refuse_if([(bool(missing), f"{where} lacks {missing}: it has {sorted(sample)}")])
        record: dict[str, Any] = {key: float(sample[key]) for key in numbers}
        fps, bad = record["fps"], [key for key in numbers if not np.isfinite(record[key])]
        bad += ["fps"] if not 0 < fps < LARGEST_FPS else []
        bad += [key for key in texts if not isinstance(sample[key], str)]
        need = "texts are strings, numbers finite, and fps is positive"
        refuse_if((True, f"{where} has {key} {sample[key]!r}: {need}") for key in bad)
        record |= {key: int(sample[key]) for key in self.labels}
        record |= {key: encodable(sample[key]) for key in texts}
        record["video"], shape = self._video(sample["video"], fps, f"video of {where}")
        if self.states is not None:
            states, what = np.asarray(sample.get(STATES)), f"{STATES} of {where}"
            floats = jnp.issubdtype(states.dtype, jnp.floating)
            sound = floats and states.shape[1:] == (self.states.dim,) and len(states)
            message = f"{what} is {states.dtype} {list(states.shape)}: those of "
            message += f"{self.states.name!r} are float [s, {self.states.dim}], at least one"
            refuse_if([(not sound, message)])
            record[STATES] = _finite(states, ml_dtypes.bfloat16, what)
        return record, [*shape, len(record["caption"].encode()), len(record.get(STATES, ()))]

    def _video(self, value: Any, fps: float, what: str) -> tuple[Any, tuple[int, ...]]:
        if isinstance(value, EncodedVideo):
            return value
        video = as_video(value, what, latents=self.latents is not None)
        if self.encoding == "video":
            return encode_video(video, fps)
        if self.latents is not None:
            channels, codec = self.latents.channels, self.latents.hash
            other = video.dtype == np.uint8 or video.shape[-1] != channels
            message = f"{what} is {video.dtype} with {video.shape[-1]} channels: latents of "
            refuse_if([(other, f"{message}{codec!r} are float with {channels}")])
            video = _finite(video, np.float16, what)
        return video, video.shape[:3]


def _finite(values: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    bad = not np.isfinite(stored.astype(np.float32)).all()
    refuse_if([(bad, f"{what} has a number that is not finite as {np.dtype(dtype).name}")])
    return stored


class _Split:
    """The shards of one split."""

    def __init__(self, folder: Path, name: str, split: str) -> None:
        self.name = split
        self._builder, self._journal, self._data = name, folder / "journal", folder / "data"
        # A writer that was killed while it named the shards has named some of them.
        for path in self._data.glob(f"{name}-{split}.array_record-[0-9]*-of-[0-9]*"):
            os.replace(path, path.with_name(path.name.rpartition("-of-")[0]))
        self.lengths = [*itertools.takewhile(bool, map(self._records, itertools.count()))]

    def _shard(self, index: int) -> Path:
        return self._data / f"{self._builder}-{self.name}.array_record-{index:05d}"

    def _rows(self, index: int) -> Path:
        return self._journal / f"sizes-{self.name}-{index:05d}.npy"

    def _records(self, index: int) -> int:
        """How many a finished shard has; 0 if it is not there, or not whole (a power failure)."""
        try:
            count = len(np.load(self._rows(index)))
            reader: Any = ArrayRecordReader(str(self._shard(index)))
            return count if reader.num_records() == count else 0
        except (OSError, ValueError, RuntimeError):
            return 0

    def write(self, samples: Samples, schema: _Schema, shard_bytes: int) -> None:
        """Writes what is not there yet."""
        start = sum(self.lengths)
        left = samples(start) if callable(samples) else itertools.islice(samples, start, None)
        records = self._serialized(left, schema, start)
        try:
            for first in records:
                self._write_shard(itertools.chain([first], records), shard_bytes)
        except RuntimeError as error:
            raise storage_error(error, self._data) or error from error
        message = f"split {self.name!r} has no samples: give at least one, or leave it out"
        refuse_if([(not self.lengths, message)])

    def _serialized(
        self, samples: Iterable[Mapping[str, Any]], schema: _Schema, start: int
    ) -> Iterator[tuple[bytes, list[int]]]:
        """What ArrayRecord stores of samples, and their sizes."""
        features, repaired = schema.features(), []
        serializer = ExampleSerializer(features.get_serialized_info())
        for index, sample in enumerate(samples, start):
            where = f"sample {index} of split {self.name!r}"
            record, sizes = schema.record(sample, where)
            texts = ("caption", *schema.texts)
            repaired += [where for key in texts if record[key] != sample[key]]
            example: Any = serializer.get_tf_example(features.encode_example(record))
            # In the order of names: a hash table's is another one in every process.
            yield example.SerializeToString(deterministic=True), sizes
        if repaired:
            what = f"{len(repaired)} texts had halves of surrogate pairs, which became U+FFFD"
            print(f"{what}: the first is of {repaired[0]}.", file=sys.stderr)

    def _write_shard(self, records: Iterator[tuple[bytes, list[int]]], most: int) -> None:
        """Writes records up to so many bytes; the shard has its name when it is whole."""
        index = len(self.lengths)
        shard = self._shard(index)
        part, rows, size = shard.with_name(f"{shard.name}.part"), [], 0
        # Records one by one, so that each is read without its neighbours.
        writer = ArrayRecordWriter(str(part), "group_size:1")
        try:
            for data, sizes in records:
                writer.write(data)
                rows.append(sizes)
                size += len(data)
                if size >= most:
                    break
            writer.close()  # An error of writing, such as a full disk, is not told before.
            with part.open("rb") as file:
                os.fsync(file.fileno())
            with files.atomic_path(self._rows(index)) as fresh:
                np.save(fresh, np.array(rows, np.int32))
            os.replace(part, shard)
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            part.unlink(missing_ok=True)
            raise
        self.lengths.append(len(rows))

    def finish(self) -> tfds.core.SplitInfo:
        """Gives the shards the names that TFDS seeks, and joins their sizes."""
        total, size = len(self.lengths), 0
        sizes = [np.load(self._rows(index)) for index in range(total)]
        np.save(self._data / f"sizes-{self.name}.npy", np.concatenate(sizes))
        for index in range(total):
            shard = self._shard(index)
            size += shard.stat().st_size
            os.replace(shard, shard.with_name(f"{shard.name}-of-{total:05d}"))
        names: dict[str, Any] = {"dataset_name": self._builder, "split": self.name}
        names |= {"data_dir": epath.Path(self._data), "filetype_suffix": "array_record"}
        template: Any = ShardedFileTemplate(**names)
        return tfds.core.SplitInfo(self.name, self.lengths, size, template)


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
    mark: Callable[[], Any] | None = None,
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
        mark: Gives what `prepared.json` beside the records says, when all are written. Records that are
            there are then replaced, and not refused.

    `InputError` for what was given wrong, samples included; `OSError` for a disk that is full.
    """
    names = ["video", "caption", "fps", STATES, *labels, *texts, *numbers]
    twice = sorted({key for key in names if names.count(key) > 1})
    target, encodings = Path(directory).expanduser() / name / VERSION, ("video", "zlib", "bytes")
    odd = not re.fullmatch(r"[a-z][a-z0-9_]*", name)
    remote = f"{os.fspath(directory)!r}: ArrayRecord files are written to disks only. Write to a "
    remote += "local directory and copy it, or mount the bucket (gcsfuse)"
    refuse_if(
        [
            (odd, f"name={name!r}: use lower case letters, digits and _, a letter first"),
            (bool(twice), f"labels, texts and numbers hold {twice} twice: rename them"),
            (not splits, "splits is empty: give at least one, such as {'train': samples}"),
            (encoding not in encodings, f"encoding={encoding!r} is unknown: use {encodings}"),
            (files.is_remote(directory), remote),
            (
                mark is None and target.exists(),
                f"{target} exists: remove it, or choose another directory or name",
            ),
        ]
    )
    files.check_writable(target.parent, "directory")
    codec = latents if isinstance(latents, LatentsOf | None) else LatentsOf(*latents)
    stored = "zlib" if codec is not None and encoding == "video" else encoding
    schema = _Schema(tuple(labels), tuple(texts), tuple(numbers), stored, codec, text_states)
    made_of = digest(resume, name, description, list(splits), schema, shard_bytes, FORMAT).encode()
    folder = target.with_name(f"{VERSION}.incomplete")
    journal, data = folder / "journal", folder / "data"
    folder.mkdir(exist_ok=True)
    with files.locked(folder):
        try:
            key = journal / "made_of"
            if resume is None or not key.exists() or key.read_bytes() != made_of:
                for part in (journal, data):
                    shutil.rmtree(part, ignore_errors=True)
            data.mkdir(exist_ok=True)
            for path in data.glob("*.part"):
                path.unlink()
            files.write_whole(key, made_of)
            parts = [_Split(folder, name, split) for split in splits]
            for part in parts:
                part.write(splits[part.name], schema, shard_bytes)
            info = tfds.core.DatasetInfo(
                builder=DatasetIdentity(name, tfds.core.Version(VERSION), str(data), __name__),
                description=description,
                features=schema.features(),
                metadata=tfds.core.MetadataDict(schema.metadata()),
                # Record i is the i-th sample: the writer's order is the order a user can check.
                disable_shuffling=True,
            )
            info.set_file_format("array_record")
            info.set_splits(tfds.core.SplitDict([one.finish() for one in parts]))
            info.write_to_directory(data)
            if mark is not None:
                files.write_json(data / MARK, mark())
                shutil.rmtree(target, ignore_errors=True)
            os.replace(data, target)
        except BaseException:
            if resume is None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    shutil.rmtree(folder)
    return target
