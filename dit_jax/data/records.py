"""TFDS builders in ArrayRecord format, read without TensorFlow.

`RecordsSource` is the random-access source over one split of a builder that `write_records` made, or of
any with a suitable feature: a video tensor, or an image, which is a video of one frame. Encoded videos
and encoded image features (png, jpeg) are decoded with PyAV, because TFDS itself asks for TensorFlow,
OpenCV or Pillow.

Opening reads the metadata and one record, however many shards there are: the number of records in each
is in dataset_info.json, and a shard is opened when one of its records is read. What is wrong with a
record is a `BadRecord`, which names it; what is wrong with the disk keeps its own type.

It does not read TFRecord files or the Video feature of TFDS: both need TensorFlow.
"""

import bisect
import collections
import errno
import functools
import io
import itertools
import json
import os
import re
import string
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from av.error import FFmpegError
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.utils import file_utils

from dit_jax.data.captions import take_caption
from dit_jax.files import InputError, MiB, as_path, explain, is_remote, read_bytes
from dit_jax.types import Sample

CODEC, CODEC_NAME = "codec", "codec_name"
"""Where a builder's metadata say which codec made its latents: its hash, and its name."""
STATES = "text_states"
"""The feature that holds the states of captions."""
ENCODED_VIDEOS = "encoded_videos"
"""Where a builder's metadata say which of its features of bytes are encoded videos, and how."""
SIZES = ("frames", "height", "width", "caption bytes", "text states")
"""Columns of sizes-SPLIT.npy, int32, beside the shards: a row for each record, as it is stored."""
OPEN_SHARDS = 256
"""Shards that are open at once: each takes a file descriptor and the index of its records."""
FIRST_TRIES = 16
"""Records, spread over the split, of which one must be readable for a source to be opened."""
OURS = "tensorflow_datasets."
"""TFDS imports the classes of features by their names: no other module is imported for a data set."""
FRAMES_TAG = "FRAMES"
"""The tag of encoded videos that says how many frames they have; Matroska keeps tags in upper case."""
_NAME = re.compile(r"\w+(/[\w.\-]+)*(:[\d.*]+)?")
_MODULE = re.compile(re.escape(OURS) + r"[\w.]+")
_ERRNO = {os.strerror(number): number for number in errno.errorcode}
NO_STATES = np.zeros((0, 1), np.float32)
"""Of a caption that is not there, as of one that was dropped."""
TEXT_ENCODER, TEXT_ENCODER_NAME = "text_encoder", "text_encoder_name"
"""The same of the text encoder that made the states of captions: its hash, and its name."""


@dataclass(frozen=True)
class RecordsConfig:
    """Which records to read, and how a record becomes a sample.

    `path` is the directory of a builder (it holds dataset_info.json) or the TFDS name of a prepared
    one, sought in `data_dir` (None: TFDS's own place). `split` may be sliced: "train[:90%]".

    `video_key` names a uint8 feature [t, h, w, c] or [h, w, c] (one frame), c 1 or 3; grey is
    repeated to three channels. A float feature of these shapes holds latents, with any c, and the
    frame rate is then that of latent frames.
    `text_states_key` names a float feature [s, e]: the caption as a text encoder's states.
    The caption is the text of `caption_key`, or, where `caption_template` is given, that template
    with features in braces, "a handwritten digit {label}"; `label_names` are the words for the
    values of its single feature (a ClassLabel's own names by default). `fps_key` names the frame
    rate; None, or a builder without "fps", gives `fps`.
    `caption_mix` are features of text and their weights, such as (("caption_descriptive", 0.95),
    ("caption", 0.05)): training draws one of them for each sample in each epoch, among those that are
    not empty there. All else (evaluation, drawings) uses the caption above, or, where that is empty,
    the first of the mix that is not. With `text_states_key`, `caption_mix_states` names the states of
    each caption of the mix, in its order.
    `label_key` names an integer feature, the class. A builder needs no captions then: without
    `caption_key` they are empty.
    Without `captioned` nothing that the records say of text is read, labels included, nor has to be
    there: every sample is as one whose caption was dropped.

    Raises ValueError for values that contradict each other.
    """

    path: str
    split: str = "train"
    video_key: str = "video"
    caption_key: str = "caption"
    caption_template: str | None = None
    label_names: tuple[str, ...] = ()
    text_states_key: str | None = None
    caption_mix: tuple[tuple[str, float], ...] = ()
    caption_mix_states: tuple[str, ...] = ()
    label_key: str | None = None
    fps_key: str | None = "fps"
    fps: float = 8.0
    data_dir: str | None = None
    captioned: bool = True

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty: give a builder's directory or the name of a data set")
        for name in ("path", "data_dir"):
            if is_remote(getattr(self, name) or ""):
                raise InputError(
                    f"data.source.{name} is {getattr(self, name)!r}, and ArrayRecord reads local "
                    "files: mount the bucket by gcsfuse, or copy the records to a local disk "
                    "(docs/storage.md)."
                )
        if not self.fps > 0:
            raise ValueError(f"fps={self.fps}: give a positive number of frames a second")
        if self.caption_template is not None and not self.template_keys:
            raise ValueError(
                f"caption_template={self.caption_template!r} names no feature: put one in braces, "
                "such as 'a handwritten digit {label}'"
            )
        _check_mix(self)
        if self.label_names and len(self.template_keys) != 1:
            raise ValueError(
                f"label_names with caption_template={self.caption_template!r}: names belong to the "
                "one feature of a template; give a template with exactly one feature in braces"
            )

    @property
    def template_keys(self) -> tuple[str, ...]:
        """Features that the template names, in order, each once."""
        if self.caption_template is None:
            return ()
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(self.caption_template)]
        except ValueError as error:
            raise ValueError(
                f"caption_template={self.caption_template!r} is no template ({error}): name "
                "features in braces, and write a brace itself twice"
            ) from error
        return tuple(dict.fromkeys(field for field in fields if field is not None))

    def open(self) -> "RecordsSource":
        """The records. Raises ``ValueError`` if they are absent, foreign or empty."""
        return RecordsSource(self)

    @property
    def paths(self) -> tuple[str, ...]:
        """Fields that hold paths: ``path`` is the name of a TFDS data set unless it is a directory."""
        return ("path", "data_dir") if as_path(self.path).is_dir() else ("data_dir",)


def _check_mix(config: RecordsConfig) -> None:
    mix = config.caption_mix
    names = [name for name, _ in mix]
    if any(not 0 < weight < float("inf") for _, weight in mix) or len(set(names)) < len(names):
        raise ValueError(
            f"caption_mix={mix}: name each feature once, with a weight above 0; leave out what is not "
            "to be drawn"
        )
    wanted = len(mix) if config.text_states_key is not None else 0
    if len(config.caption_mix_states) != wanted:
        raise ValueError(
            f"caption_mix_states={config.caption_mix_states}: with caption_mix of {len(mix)} and "
            f"text_states_key {config.text_states_key!r} there are {wanted}, the states of each caption"
        )


class BadRecord(ValueError):
    """A record that cannot be read or is no sample: damaged, of a wrong shape, or not finite.

    Training leaves it out and counts it.
    """

    def __init__(self, where: str, index: int, reason: str) -> None:
        super().__init__(where, index, reason)
        self.index = index
        """In the data set: of the split, as it is sliced."""
        self.reason = reason
        self._where = where

    def __str__(self) -> str:
        return f"record {self.index} of {self._where}: {self.reason}"


def storage_error(error: RuntimeError, path: Path) -> OSError | None:
    """The error of the disk behind one of ArrayRecord's, which are all RuntimeErrors; or None."""
    match = re.search(r"\w+\(\) failed: ([^;]+)", str(error))
    number = _ERRNO.get(match[1].strip()) if match else None
    # A shard that is missing from its directory will not come back by waiting.
    if number is None or number == errno.ENOENT and path.parent.is_dir():
        return None
    return OSError(number, os.strerror(number), str(path))


class _Shards:
    """The bytes of a split's records, by index."""

    def __init__(self, instructions: list[Any]) -> None:
        self._paths = [Path(one.filename) for one in instructions]
        self._skips = [one.skip for one in instructions]
        self._ends = list(itertools.accumulate(one.take for one in instructions))
        self._readers: collections.OrderedDict[Path, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def spans(self) -> list[tuple[Path, int, int]]:
        """The shards, and the first and the end of the records of each that are read."""
        takes = np.diff(self._ends, prepend=0).tolist()
        spans = zip(self._paths, self._skips, takes, strict=True)
        return [(path, skip, skip + take) for path, skip, take in spans]

    def place(self, index: int) -> tuple[Path, int]:
        """The shard of a record, and its number there."""
        shard = bisect.bisect_right(self._ends, index)
        before = self._ends[shard - 1] if shard else 0
        return self._paths[shard], self._skips[shard] + index - before

    def read(self, index: int) -> bytes:
        """Raises ArrayRecord's RuntimeError for a damaged record, OSError for the disk's errors."""
        path, number = self.place(index)
        try:
            return self._reader(path).read([number])[0]
        except RuntimeError as error:
            cause = storage_error(error, path)
            if cause is None:
                raise
            with self._lock:
                self._readers.pop(path, None)
            raise cause from error

    def _reader(self, path: Path) -> Any:
        with self._lock:
            if path in self._readers:
                self._readers.move_to_end(path)
                return self._readers[path]
        # Opened outside the lock: on network storage it takes a while.
        reader = ArrayRecordReader(
            str(path),
            options="readahead_buffer_size:0",
            file_reader_buffer_size=32768,
        )
        with self._lock:
            self._readers[path] = reader
            # One that another thread reads from is closed when it has done so.
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader


class RecordsSource:
    """The random-access source over one split of a builder.

    A sample is {"video": uint8 [t, h, w, 3], "caption": str, "fps": float}, the video float32
    [t, h, w, c] if it holds latents, with "text_states": float32 [s, e] and the segment field "label"
    if those are asked for; IndexError outside 0..len-1. Deterministic, picklable (files are opened
    again), usable from threads. Text that is not UTF-8 is read with U+FFFD, and said once.

    Raises InputError at construction, where a record is read, too: for an absent or foreign
    directory, an absent or empty split, a missing feature, and records that are no clips. Reading
    raises BadRecord for a record that cannot be used, and OSError for the errors of the disk.
    """

    def __init__(self, config: RecordsConfig) -> None:
        self.config = config
        self._open()
        self._read_one()

    def _open(self) -> None:
        builder = find_builder(self.config.path, self.config.data_dir)
        _check_split(builder, self.config)
        self._features = features = builder.info.features
        _check_features(features, self.config)
        metadata = builder.info.metadata or {}
        self._videos = set(metadata.get(ENCODED_VIDEOS) or ())
        # Images are handed over as they are encoded, also those that nobody asked for.
        self._images = {k for k in features if isinstance(features[k], tfds.features.Image)}
        self._decoders = {key: tfds.decode.SkipDecoding() for key in self._images}
        self._captioned = self.config.caption_key in features
        self.codec: str | None = metadata.get(CODEC)
        """The codec that made the latents, where the builder says so."""
        self.text_encoder: str | None = metadata.get(TEXT_ENCODER)
        """The hash of the text encoder that made the states of captions, where the builder says so."""
        self.text_encoder_name: str | None = metadata.get(TEXT_ENCODER_NAME)
        self._has_fps = self.config.fps_key is not None and self.config.fps_key in features
        self._names = {
            key: self.config.label_names or tuple(getattr(features[key], "names", None) or ())
            for key in (self.config.template_keys if self.config.captioned else ())
        }
        self._repaired = False
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise InputError(
                f"{self.config.path!r} is stored as {builder.info.file_format}, which needs "
                "TensorFlow to be read: prepare it with file_format='array_record', or convert it "
                "with `tfds convert_format --out_file_format=array_record`"
            )
        try:
            instructions = builder.info.splits[self.config.split].file_instructions
            if not instructions:
                raise ValueError("no records")
        except Exception as error:  # TFDS parses the split, and its errors are of several types.
            raise InputError(
                f"split {self.config.split!r} of {self.config.path!r} is empty or malformed "
                f"({error}): choose another of {_split_sizes(builder)}"
            ) from error
        self._records = _Shards(instructions)
        self._lengths = {
            split: list(info.shard_lengths) for split, info in builder.info.splits.items()
        }

    def _read_one(self) -> None:
        """Proves that there is a record to read."""
        tries = np.unique(np.linspace(0, len(self) - 1, FIRST_TRIES).astype(int)).tolist()
        errors: list[BadRecord] = []
        for index in tries:
            try:
                self[index]
                return
            except BadRecord as error:
                errors.append(error)
        raise InputError(f"{errors[0]} (and so are all of {len(tries)} records that were tried)")

    @functools.cached_property
    def sizes(self) -> np.ndarray | None:
        """int32 [n, 4]: frames, height and width of every record as it is stored, and its text.

        The last is the number of its states if the config reads "text_states", the bytes of its
        caption if it reads "caption" alone, and otherwise 0. None if the builder does not say sizes.
        """
        if self.config.video_key != "video":
            return None
        parts: list[np.ndarray] = []
        for folder, split, first, end in self._runs():
            try:
                rows = np.load(folder / f"sizes-{split}.npy", mmap_mode="r")
            except (OSError, ValueError):
                return None
            if rows.shape != (sum(self._lengths[split]), len(SIZES)):
                return None
            parts.append(rows[first:end])
        sizes = np.array(np.concatenate(parts)[:, :4])
        if self.config.captioned and self.config.text_states_key == STATES:
            sizes[:, 3] = np.concatenate(parts)[:, 4]
        elif not self._reads_caption:
            sizes[:, 3] = 0
        return sizes

    @property
    def _reads_caption(self) -> bool:
        config = self.config
        other = config.caption_template is not None or config.text_states_key is not None
        return config.captioned and config.caption_key == "caption" and not other

    def _runs(self) -> list[tuple[Path, str, int, int]]:
        """Directory, split, first record and end of every run of records of one split."""
        firsts: dict[str, tuple[str, int]] = {}
        for split, lengths in self._lengths.items():
            for index, before in enumerate(itertools.accumulate(lengths, initial=0)):
                firsts[f"-{split}.array_record-{index:05d}-of-{len(lengths):05d}"] = split, before
        runs: list[tuple[Path, str, int, int]] = []
        for path, first, end in self._records.spans:
            # NAME has no hyphens, and neither have names of splits.
            split, before = firsts[path.name[path.name.index("-") :]]
            first, end = before + first, before + end
            if runs and runs[-1][:2] == (path.parent, split) and runs[-1][3] == first:
                first = runs.pop()[2]
            runs.append((path.parent, split, first, end))
        return runs

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self._open()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} records")
        try:
            return self._sample(self._records.read(index))
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"record {index} of {self.config.path!r} has features that cannot be decoded without "
                f"TensorFlow ({error}): store them again, see dit_jax.prepare.writing.write_records"
            ) from error
        except (OSError, MemoryError):
            raise
        # Damage may raise anything in the parsers of ArrayRecord, protobuf, zlib, TFDS and FFmpeg.
        except Exception as error:
            path, number = self._records.place(index)
            where = f"{self.config.path!r} (number {number} of {path.name})"
            raise BadRecord(where, int(index), explain(error)) from error

    def _sample(self, data: bytes) -> Sample:
        if not data:  # What ArrayRecord gives of a file that was cut while it is open.
            raise ValueError("it is empty: the file was cut")
        record = self._features.deserialize_example_np(data, decoders=self._decoders)
        key = self.config.video_key
        if missing := [name for name in (key, *self._text_keys()) if record.get(name) is None]:
            raise ValueError(f"it has no {', '.join(missing)}")
        video = record[key]
        if key in self._videos:
            video = decode_video(video)
        elif key in self._images:
            video = _decode_image(video)
        sample: Sample = {
            "video": _finite(as_video(video, f"feature {key!r}"), key),
            "caption": self._caption(record) if self.config.captioned else "",
            "fps": float(record[self.config.fps_key]) if self._has_fps else self.config.fps,
        }
        if not 0 < sample["fps"] < float("inf"):
            raise ValueError(f"its frame rate is {sample['fps']}")
        if not self.config.captioned:
            sample["text_states"] = NO_STATES
            return sample
        if self.config.text_states_key is not None:
            sample["text_states"] = _read_states(record, self.config.text_states_key)
        if self.config.caption_mix:
            self._add_captions(sample, record)
        if self.config.label_key is not None:
            sample["segment_fields"] = {"label": int(record[self.config.label_key])}
        return sample

    def _text_keys(self) -> list[str]:
        keys = itertools.chain(*_of_text(self.config).values()) if self.config.captioned else ()
        return [*keys, *((self.config.fps_key or "",) if self._has_fps else ())]

    def _add_captions(self, sample: Sample, record: Mapping[str, Any]) -> None:
        names = [name for name, _ in self.config.caption_mix]
        sample["captions"] = {name: self._text(record[name]) for name in names}
        if self.config.caption_mix_states:
            keys = zip(names, self.config.caption_mix_states, strict=True)
            states = {name: _read_states(record, key) for name, key in keys}
            sample["captions_states"] = states
        first = next((name for name in names if sample["captions"][name]), None)
        if not sample["caption"] and first is not None:
            take_caption(sample, first)

    def _caption(self, record: Mapping[str, Any]) -> str:
        if self.config.caption_template is None:
            if not self._captioned:
                return ""
            return self._text(record[self.config.caption_key])
        words = {key: self._word(key, record[key]) for key in self.config.template_keys}
        return self.config.caption_template.format(**words)

    def _word(self, key: str, value: Any) -> str:
        names = self._names[key]
        if not names:
            return self._text(value)
        if not 0 <= int(value) < len(names):
            raise ValueError(
                f"{key}={value} of {self.config.path!r} has no name among label_names, which has "
                f"{len(names)}: give a name for every value"
            )
        return names[int(value)]

    def _text(self, value: Any) -> str:
        if not isinstance(value, bytes):
            return str(value)
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            if not self._repaired:
                self._repaired = True
                print(
                    f"a text of {self.config.path!r} is not UTF-8 ({explain(error)}): its bytes "
                    f"{value[:60]!r} are read with U+FFFD, and so are others like it.",
                    file=sys.stderr,
                )
            return value.decode(errors="replace")


def find_builder(name: str, data_dir: str | None = None) -> Any:
    """The read-only builder at a directory or of a name, sought in ``data_dir``; or InputError.

    No code of the data set's is run: a feature whose class is not one of TFDS's is refused.
    """
    if is_remote(name):
        raise InputError(
            f"{name!r}: ArrayRecord files are read from disks only. Mount the bucket (gcsfuse) and "
            "give the path there, or copy the data to a local disk (gcloud storage cp -r)."
        )
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "dataset_info.json").is_file():
            inside = sorted(str(p.parent) for p in path.glob("**/dataset_info.json"))
            hint = f"; it holds {', '.join(inside)}" if inside else ""
            raise InputError(
                f"{name!r} is not a TFDS builder, it has no dataset_info.json{hint}: give "
                "the directory of a version, such as name/1.0.0"
            )
        _check_classes(path)
        try:
            return tfds.builder_from_directory(path)
        except ImportError as error:
            raise InputError(
                f"{name!r} has features that need TensorFlow ({error}): store it again, see "
                "dit_jax.prepare.writing.write_records"
            ) from error
        except OSError:
            raise
        except (
            Exception
        ) as error:  # The parsers of JSON, protobuf and TFDS have errors of their own.
            raise InputError(
                f"{name!r} is not a TFDS builder, its metadata cannot be read ({explain(error)}): "
                "write or copy it again"
            ) from error
    try:
        # NAMESPACE:NAME loads code of others, and NAME/a=1 passes arguments to a builder's code.
        if not _NAME.fullmatch(name):
            raise ValueError("it is no name")
        stem = naming.parse_builder_name_kwargs(name)[0].name
        for folder in file_utils.list_data_dirs(given_data_dir=data_dir):
            for file in Path(folder).expanduser().glob(f"{stem}/**/features.json"):
                _check_classes(file.parent)
        builder = tfds.builder(name, try_gcs=False, data_dir=data_dir)
    except InputError:
        raise
    # A name may be refused in several ways.
    except (tfds.core.DatasetNotFoundError, ValueError, AttributeError) as error:
        raise InputError(
            f"{name!r} is neither a directory nor the name of a TFDS data set: check the "
            "spelling, or write the builder first"
        ) from error
    if not builder.is_prepared():
        raise InputError(
            f"data set {name!r} is not prepared in {builder.data_dir}: run "
            f"`tfds build {name} --file_format=array_record`, or give the right data_dir"
        )
    return builder


def _check_classes(folder: Path) -> None:
    """Refuses a builder whose metadata name a class outside TFDS, which TFDS would import.

    Names are in ``pythonClassName``, or in ``type`` in files of older versions, at any depth; also in
    JSON within strings, which TFDS parses too.
    """
    for file in ("features.json", "dataset_info.json"):
        if not (folder / file).is_file():
            continue
        values: list[Any] = [read_bytes(folder / file, 64 * MiB).decode(errors="replace")]
        while values:
            value = values.pop()
            if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
                try:
                    values.append(json.loads(value))
                except RecursionError as error:
                    raise InputError(f"{str(folder / file)!r} is nested too deeply") from error
                except ValueError:
                    continue  # It is no JSON for TFDS, either.
            elif isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                values += value.values()
                for key in ("pythonClassName", "python_class_name", "type"):
                    name = value.get(key)
                    if isinstance(name, str) and not _MODULE.fullmatch(name):
                        raise InputError(
                            f"{str(folder / file)!r} has a feature of class {name!r}, whose module "
                            f"TFDS would import and so run: only classes of {OURS[:-1]} are read. "
                            "Store the data set again with those."
                        )


def _split_sizes(builder: Any) -> str:
    return ", ".join(f"{k} ({v.num_examples})" for k, v in builder.info.splits.items()) or "none"


def _check_split(builder: Any, config: RecordsConfig) -> None:
    # "train[:10%]+test" names two splits; what is in brackets TFDS reads itself.
    for name in re.sub(r"\[[^]]*\]", "", config.split).split("+"):
        if name.strip() not in builder.info.splits:
            raise InputError(
                f"split {name.strip()!r} is not in {config.path!r}: choose one of "
                f"{_split_sizes(builder)}"
            )


def _check_features(features: Mapping[str, Any], config: RecordsConfig) -> None:
    needed: dict[str, tuple[str, ...]] = {"video_key": (config.video_key,)}
    if config.captioned:
        needed |= _of_text(config)
    # The default frame rate stands in for the default key only: another key is meant to exist.
    if config.fps_key not in (None, "fps"):
        needed["fps_key"] = (config.fps_key,)
    for field, keys in needed.items():
        for key in keys:
            if key not in features:
                raise InputError(
                    f"{field}: no feature {key!r} in {config.path!r}; it has "
                    f"{', '.join(sorted(features))}: set {field} to one of them"
                )


def _of_text(config: RecordsConfig) -> dict[str, tuple[str, ...]]:
    """Features of text and labels that are read, by the fields that name them."""
    needed = {"caption_template": config.template_keys}
    if config.caption_template is None and config.label_key is None:
        needed["caption_key"] = (config.caption_key,)
    if config.label_key is not None:
        needed["label_key"] = (config.label_key,)
    needed["caption_mix"] = tuple(name for name, _ in config.caption_mix)
    needed["caption_mix_states"] = config.caption_mix_states
    if config.text_states_key is not None:
        needed["text_states_key"] = (config.text_states_key,)
    return needed


def _decode_image(data: bytes) -> np.ndarray:
    """Encoded png or jpeg to uint8 [h, w, 3]; ValueError where it is none."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            # One small picture: starting threads costs more than decoding it.
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            # Or the rest of a JPEG that was cut is grey.
            stream.codec_context.options = {"err_detect": "explode"}
            return next(container.decode(stream)).to_ndarray(format="rgb24")
    except (FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(
            f"an image of {len(data)} bytes could not be decoded ({error}): the record is damaged"
        ) from error


def decode_video(data: bytes) -> np.ndarray:
    """uint8 RGB ``[t, h, w, 3]`` of the bytes that ``prepare.encoded.encode_video`` makes.

    Raises:
        ValueError: if they are damaged: FFmpeg would fill the gaps with what it guesses.
    """
    frames: list[np.ndarray] = []
    expected = None
    try:
        with av.open(io.BytesIO(data), "r") as container:
            expected = container.metadata.get(FRAMES_TAG)
            stream = container.streams.video[0]
            # The loader reads several clips at once: more threads for each only take turns.
            stream.thread_type = "NONE"
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise ValueError(f"frame {len(frames)} of an encoded video is damaged")
                frames.append(frame.to_ndarray())
    except (FFmpegError, IndexError) as error:
        raise ValueError(
            f"an encoded video of {len(data)} bytes could not be decoded ({error})"
        ) from error
    if str(len(frames)) != expected:
        raise ValueError(f"an encoded video has {len(frames)} frames of {expected}")
    return np.stack(frames)


def as_video(value: Any, where: str, latents: bool = True) -> np.ndarray:
    """uint8 [t, h, w, 3] of [t, h, w, c] or [h, w, c] with c 1 or 3, or, where they may be `latents`,
    float32 of any c; `where` starts the error."""
    video = np.asarray(value)
    if video.ndim == 3:
        video = video[None]
    whole = video.ndim == 4 and min(video.shape) > 0
    if latents and whole and jnp.issubdtype(video.dtype, jnp.floating):
        return video.astype(np.float32)
    if not whole or video.shape[-1] not in (1, 3) or video.dtype != np.uint8:
        other = ", or float latents," if latents else ""
        raise ValueError(
            f"{where} is {video.dtype} {list(np.shape(value))}: need uint8 [t, h, w, c] or "
            f"[h, w, c] with c of 1 or 3{other} and no axis empty; choose another feature or "
            "convert it"
        )
    return np.repeat(video, 3, axis=-1) if video.shape[-1] == 1 else video


def _finite(values: np.ndarray, key: str) -> np.ndarray:
    if values.dtype != np.uint8 and not np.isfinite(values).all():
        raise ValueError(f"feature {key!r} has numbers that are NaN or infinite")
    return values


def _read_states(record: Mapping[str, Any], key: str) -> np.ndarray:
    states = np.asarray(record[key], np.float32)
    if states.ndim != 2:
        raise ValueError(f"feature {key!r} is {list(states.shape)}: states are [s, e]")
    return _finite(states, key)
