"""TFDS builders in ArrayRecord format, read without TensorFlow.

``RecordsSource`` is the random-access source over one split of a builder that ``prepare`` wrote, or of
any with a suitable feature: a video tensor, or an image, which is a video of one frame. Encoded videos
and images are decoded with PyAV, because TFDS itself asks for TensorFlow, OpenCV or Pillow.

Opening reads the metadata and one record, however many shards there are: a shard is opened when one of
its records is read. What is wrong with a record is a ``BadRecord``, which names it; what is wrong with
the disk keeps its own type. TFRecord files and the Video feature of TFDS are not read: both need
TensorFlow.
"""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping
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

from dit_jax.data.transforms import take_caption
from dit_jax.files import InputError, MiB, as_path, explain, is_remote, read_bytes, refuse_if
from dit_jax.types import PositiveFloat, Sample

CODEC, CODEC_NAME = "codec", "codec_name"
"""Where a builder's metadata say which codec made its latents: its hash, and its name."""
TEXT_ENCODER, TEXT_ENCODER_NAME = "text_encoder", "text_encoder_name"
"""The same of the text encoder that made the states of captions."""
STATES = "text_states"
"""The feature that holds the states of captions."""
ENCODED_VIDEOS = "encoded_videos"
"""Where a builder's metadata say which of its features of bytes are encoded videos, and how."""
FRAMES_TAG = "FRAMES"
"""The tag of encoded videos that says how many frames they have; Matroska keeps tags in upper case."""
SIZES = ("frames", "height", "width", "caption bytes", "text states")
"""Columns of sizes-SPLIT.npy, int32, beside the shards: a row for each record, as it is stored."""
OPEN_SHARDS = 256
"""Shards that are open at once: each takes a file descriptor and the index of its records."""
FIRST_TRIES = 16
"""Records, spread over the split, of which one must be readable for a source to be opened."""
OURS = "tensorflow_datasets."
"""TFDS imports the classes of features by their names: no other module is imported for a data set."""
NO_STATES = np.zeros((0, 1), np.float32)
"""The states of a caption that is absent, or was dropped."""
LOCAL = "ArrayRecord reads local files: mount the bucket by gcsfuse, or copy it (docs/storage.md)"
STORE_AGAIN = "store them again by dit_jax.prepare.writing.write_records"
_NAME = re.compile(r"\w+(/[\w.\-]+)*(:[\d.*]+)?")
_MODULE = re.compile(re.escape(OURS) + r"[\w.]+")
_SHARD = re.compile(r".*-(\w+)\.array_record-(\d+)-of-\d+")
_ERRNO = {os.strerror(number): number for number in errno.errorcode}


@dataclass(frozen=True)
class RecordsConfig:
    """Which records to read, and how a record becomes a sample."""

    path: str
    """The directory of a builder (it holds dataset_info.json), or the TFDS name of a prepared one."""
    split: str = "train"
    """It may be sliced: "train[:90%]"."""
    video_key: str = "video"
    """A uint8 feature [t, h, w, c] or [h, w, c] (one frame), c 1 or 3; grey is repeated to three
    channels. A float feature of these shapes holds latents, with the frame rate of latent frames."""
    caption_key: str = "caption"
    caption_template: str | None = None
    """In place of ``caption_key``: a caption with features in braces, "a handwritten digit {label}"."""
    label_names: tuple[str, ...] = ()
    """Words for the values of the template's one feature; by default those of its ClassLabel."""
    text_states_key: str | None = None
    """A float feature [s, e]: the caption as a text encoder's states."""
    caption_mix: tuple[tuple[str, PositiveFloat], ...] = ()
    """Features of text and their weights, such as (("caption_descriptive", 0.95), ("caption", 0.05)):
    training chooses one of them for each sample in each epoch, among those that are not empty there.
    All else uses the caption above, or, if that is empty, the first of the mix that is not."""
    caption_mix_states: tuple[str, ...] = ()
    """With ``text_states_key``: the states of each caption of the mix, in its order."""
    label_key: str | None = None
    """An integer feature, the class: the segment field "label". Captions may be absent then."""
    fps_key: str | None = "fps"
    fps: PositiveFloat = 8.0
    """The frame rate if ``fps_key`` is None, or "fps" and absent."""
    data_dir: str | None = None
    """Where TFDS seeks a name; by default in its own place."""
    captioned: bool = True
    """If False, nothing that the records say of text is read, labels included, nor has to be there:
    every sample is as one whose caption was dropped."""

    def __post_init__(self) -> None:
        refuse_if(self._constraints())

    def _constraints(self) -> Iterator[tuple[bool, str]]:
        """What must not be true of the fields, and what to say if it is."""
        yield not self.path, "path is empty: give a builder's directory or the name of a data set"
        for name in ("path", "data_dir"):
            value = getattr(self, name)
            yield is_remote(value or ""), f"data.source.{name} is {value!r}, and {LOCAL}."
        template = f"caption_template={self.caption_template!r}"
        try:
            keys = self.template_keys
        except ValueError as error:
            yield True, f"{template} is no template ({error}): write a brace itself twice"
            return
        yield (
            self.caption_template is not None and not keys,
            f"{template} names no feature: put one in braces, as in 'a handwritten digit {{label}}'",
        )
        yield (
            bool(self.label_names) and len(keys) != 1,
            f"label_names with {template}: give a template with exactly one feature in braces",
        )
        names = [name for name, _ in self.caption_mix]
        yield (
            len(set(names)) < len(names),
            f"caption_mix={self.caption_mix}: name each feature once",
        )
        count = len(names) if self.text_states_key is not None else 0
        yield (
            len(self.caption_mix_states) != count,
            f"caption_mix_states={self.caption_mix_states}: with caption_mix of {len(names)} and "
            f"text_states_key {self.text_states_key!r} there are {count}, the states of each caption",
        )

    @property
    def template_keys(self) -> tuple[str, ...]:
        """Features that the template names, in order, each once."""
        fields = string.Formatter().parse(self.caption_template or "")
        return tuple(dict.fromkeys(field for _, field, _, _ in fields if field is not None))

    @property
    def text_keys(self) -> dict[str, tuple[str, ...]]:
        """Features of text and labels that are read, by the fields that name them."""
        if not self.captioned:
            return {}
        whole = self.caption_template is None and self.label_key is None
        return {
            "caption_template": self.template_keys,
            "caption_key": (self.caption_key,) if whole else (),
            "label_key": () if self.label_key is None else (self.label_key,),
            "caption_mix": tuple(name for name, _ in self.caption_mix),
            "caption_mix_states": self.caption_mix_states,
            "text_states_key": () if self.text_states_key is None else (self.text_states_key,),
        }

    @property
    def paths(self) -> tuple[str, ...]:
        """Fields that hold paths: ``path`` is the name of a TFDS data set unless it is a directory."""
        return ("path", "data_dir") if as_path(self.path).is_dir() else ("data_dir",)

    @property
    def record_sets(self) -> tuple[RecordsConfig, ...]:
        """All sets of records in this source's config."""
        return (self,)

    def open(self) -> RecordsSource:
        """The records. Raises ``InputError`` if they are absent, foreign or empty."""
        return RecordsSource(self)


class BadRecord(ValueError):
    """A record that cannot be read or is no sample; ``index`` is its own in the split, as it is sliced.

    Training leaves it out and counts it.
    """

    def __init__(self, where: str, index: int, reason: str) -> None:
        # Exceptions are pickled by these arguments.
        super().__init__(where, index, reason)
        self.index, self.reason, self._where = index, reason, where

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
            # A reader that failed once goes on failing: the next try opens the file anew.
            with self._lock:
                self._readers.pop(path, None)
            raise storage_error(error, path) or error from error

    def _reader(self, path: Path) -> Any:
        with self._lock:
            if path in self._readers:
                self._readers.move_to_end(path)
                return self._readers[path]
        # Opened outside the lock: on network storage it takes a while. No read-ahead: the order is
        # random.
        options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
        reader: Any = ArrayRecordReader(str(path), **options)
        with self._lock:
            self._readers[path] = reader
            # One that another thread reads from is closed when it has done so.
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader


class RecordsSource:
    """The random-access source over one split of a builder: deterministic, picklable (files are opened
    again) and usable from threads.

    A sample's video is uint8 [t, h, w, 3], or float32 [t, h, w, c] if it holds latents. Opening raises
    InputError for data that are absent, foreign, empty or no clips. Reading raises BadRecord for a
    record that cannot be used, and OSError for the errors of the disk.
    """

    def __init__(self, config: RecordsConfig) -> None:
        self.config = config
        self._open()
        # Proves that there is a record to read.
        errors: list[BadRecord] = []
        for index in np.unique(np.linspace(0, len(self) - 1, FIRST_TRIES).astype(int)).tolist():
            try:
                self[index]
                return
            except BadRecord as error:
                errors.append(error)
        raise InputError(f"{errors[0]} (and so are all of {len(errors)} records that were tried)")

    def _open(self) -> None:
        config = self.config
        builder = find_builder(config.path, config.data_dir)
        self._features = features = builder.info.features
        refuse_if(_faults(builder, config))
        metadata = builder.info.metadata or {}
        self._videos = set(metadata.get(ENCODED_VIDEOS) or ())
        # Images are handed over as they are encoded, also those that nobody asked for.
        self._images = {k for k in features if isinstance(features[k], tfds.features.Image)}
        self._decoders = {key: tfds.decode.SkipDecoding() for key in self._images}
        # Hashes of the codec that made the latents, and of the text encoder that made the states.
        self.codec: str | None = metadata.get(CODEC)
        self.text_encoder: str | None = metadata.get(TEXT_ENCODER)
        self.text_encoder_name: str | None = metadata.get(TEXT_ENCODER_NAME)
        self._has_fps = config.fps_key is not None and config.fps_key in features
        self._names = {
            key: config.label_names or tuple(getattr(features[key], "names", None) or ())
            for key in (config.template_keys if config.captioned else ())
        }
        self._repaired = False
        self._records = _Shards(builder.info.splits[config.split].file_instructions)
        self._lengths = {k: list(v.shard_lengths) for k, v in builder.info.splits.items()}

    @property
    def record_sets(self) -> tuple[RecordsSource, ...]:
        """All sets of records in this source."""
        return (self,)

    @functools.cached_property
    def sizes(self) -> np.ndarray | None:
        """int32 [n, 3]: frames, height and width of every record as it is stored; None if the builder
        does not say them."""
        if self.config.video_key != "video":  # The table is of that feature.
            return None
        parts, tables = [], {}
        try:
            for path, first, end in self._records.spans:
                match = _SHARD.fullmatch(path.name)
                assert match is not None
                lengths, number = self._lengths[match[1]], int(match[2])
                table = path.parent / f"sizes-{match[1]}.npy"
                if table not in tables:
                    tables[table] = np.load(table, mmap_mode="r")
                if tables[table].shape != (sum(lengths), len(SIZES)):
                    return None
                before = sum(lengths[:number])
                parts.append(tables[table][before + first : before + end, :3])
        except (OSError, ValueError):
            return None
        return np.concatenate(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self._open()

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """How messages name a record."""
        return f"record {index} of {self.config.path!r}"

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        try:
            return self._sample(self._records.read(index))
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"record {index} of {self.config.path!r} has features that cannot be decoded without "
                f"TensorFlow ({error}): {STORE_AGAIN}"
            ) from error
        except (OSError, MemoryError):
            raise
        # Damage may raise anything in the parsers of ArrayRecord, protobuf, zlib, TFDS and FFmpeg.
        except Exception as error:
            path, number = self._records.place(index)
            where = f"{self.config.path!r} (number {number} of {path.name})"
            raise BadRecord(where, index, explain(error)) from error

    def _sample(self, data: bytes) -> Sample:
        config, key = self.config, self.config.video_key
        # ArrayRecord gives no bytes of a file that was cut while it is open.
        record = (
            self._features.deserialize_example_np(data, decoders=self._decoders) if data else {}
        )
        keys = [key, *itertools.chain(*config.text_keys.values())]
        keys += [config.fps_key] if self._has_fps else []
        missing = [str(name) for name in keys if record.get(name) is None]
        _expect(not missing, f"it has no {', '.join(missing)}" if data else "the file was cut")
        video = record[key]
        if key in self._videos or key in self._images:
            video = (decode_video if key in self._videos else _decode_image)(video)
        sample: Sample = {
            "video": _finite(as_video(video, f"feature {key!r}"), key),
            "caption": "",
            "fps": float(record[config.fps_key]) if self._has_fps else config.fps,
        }
        _expect(0 < sample["fps"] < float("inf"), f"its frame rate is {sample['fps']}")
        if not config.captioned:
            sample["text_states"] = NO_STATES
            return sample
        if config.caption_template is not None:
            words = {key: self._word(key, record[key]) for key in config.template_keys}
            sample["caption"] = config.caption_template.format(**words)
        elif config.caption_key in self._features:
            sample["caption"] = self._text(record[config.caption_key])
        if config.text_states_key is not None:
            sample["text_states"] = _read_states(record, config.text_states_key)
        if config.label_key is not None:
            sample["segment_fields"] = {"label": int(record[config.label_key])}
        if config.caption_mix:
            names = [name for name, _ in config.caption_mix]
            sample["captions"] = captions = {name: self._text(record[name]) for name in names}
            if config.caption_mix_states:
                pairs = zip(names, config.caption_mix_states, strict=True)
                sample["captions_states"] = {n: _read_states(record, key) for n, key in pairs}
            first = next((name for name in names if captions[name]), None)
            if not sample["caption"] and first is not None:
                take_caption(sample, first)
        return sample

    def _word(self, key: str, value: Any) -> str:
        names = self._names[key]
        if not names:
            return self._text(value)
        _expect(
            0 <= int(value) < len(names),
            f"{key}={value} has no name among label_names, which has {len(names)}",
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
    path = Path(name).expanduser()
    try:
        if is_remote(name):
            why = LOCAL
        elif not path.is_dir():
            # NAMESPACE:NAME loads code of others, and NAME/a=1 passes arguments to a builder's code.
            _expect(_NAME.fullmatch(name) is not None, "it is no name")
            stem = naming.parse_builder_name_kwargs(name)[0].name
            for folder in file_utils.list_data_dirs(given_data_dir=data_dir):
                for file in Path(folder).expanduser().glob(f"{stem}/**/features.json"):
                    _check_classes(file.parent)
            builder = tfds.builder(name, try_gcs=False, data_dir=data_dir)
            if builder.is_prepared():
                return builder
            why = f"it is not prepared in {builder.data_dir}: run `tfds build {name} "
            why += "--file_format=array_record`, or give the right data_dir"
        elif (path / "dataset_info.json").is_file():
            _check_classes(path)
            return tfds.builder_from_directory(path)
        else:
            inside = ", ".join(sorted(str(p.parent) for p in path.glob("**/dataset_info.json")))
            why = "it has no dataset_info.json" + (f"; it holds {inside}" if inside else "")
            why += ": give the directory of a builder's version, such as name/1.0.0"
    except ImportError as error:
        why = f"it has features that need TensorFlow ({error}): {STORE_AGAIN}"
    except (InputError, OSError):
        raise
    # A name may be refused in several ways, and the parsers of metadata have errors of their own.
    except Exception as error:
        why = "it is neither a directory nor the name of a TFDS data set: check the spelling"
        if path.is_dir():
            why = f"its metadata cannot be read ({explain(error)}): write or copy it again"
    raise InputError(f"{name!r}: {why}")


def _check_classes(folder: Path) -> None:
    """Refuses a builder whose metadata name a class outside TFDS, which TFDS would import and so run.

    Names are in ``pythonClassName``, or in ``type`` in older files, at any depth; also in JSON within
    strings, which TFDS parses too.
    """
    for file in (folder / "features.json", folder / "dataset_info.json"):
        if not file.is_file():
            continue
        values: list[Any] = [read_bytes(file, 64 * MiB).decode(errors="replace")]
        classes: set[Any] = set()
        while values:
            value = values.pop()
            if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
                try:
                    values.append(json.loads(value))
                except RecursionError:
                    classes.add("nested too deeply to be read")
                except ValueError:
                    continue  # It is no JSON for TFDS, either.
            elif isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                values += value.values()
                names = (value.get(key) for key in ("pythonClassName", "python_class_name", "type"))
                classes |= {name for name in names if isinstance(name, str)}
        foreign = sorted(name for name in classes if not _MODULE.fullmatch(name))
        message = (
            f"{str(file)!r} has features of classes {foreign}, whose modules TFDS would import and so "
            f"run: only classes of {OURS[:-1]} are read. Store the data again with those."
        )
        refuse_if([(bool(foreign), message)])


def _faults(builder: Any, config: RecordsConfig) -> Iterator[tuple[bool, str]]:
    """What must not be true of a builder, and what to say if it is; in order."""
    path, features, splits = config.path, builder.info.features, builder.info.splits
    choices = ", ".join(f"{k} ({v.num_examples})" for k, v in splits.items()) or "none"
    # "train[:10%]+test" names two splits; what is in brackets TFDS reads itself.
    names = [name.strip() for name in re.sub(r"\[[^]]*\]", "", config.split).split("+")]
    absent = [name for name in names if name not in splits]
    named = ", ".join(map(repr, absent))
    yield bool(absent), f"split {named} is not in {path!r}: choose one of {choices}"
    keys = {"video_key": (config.video_key,), **config.text_keys}
    # The default frame rate stands in for the default key only: another key is meant to exist.
    keys["fps_key"] = () if config.fps_key in (None, "fps") else (config.fps_key,)
    for field, key in ((field, key) for field, names in keys.items() for key in names):
        yield (
            key not in features,
            f"{field}: no feature {key!r} in {path!r}; it has {', '.join(sorted(features))}: set "
            f"{field} to one of them",
        )
    yield (
        builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD,
        f"{path!r} is stored as {builder.info.file_format}, which needs TensorFlow to be read: convert "
        "it with `tfds convert_format --out_file_format=array_record`",
    )
    why = "no records"
    try:
        empty = not splits[config.split].file_instructions
    except Exception as error:  # TFDS parses the split, and its errors are of several types.
        empty, why = True, str(error)
    message = (
        f"split {config.split!r} of {path!r} is empty or malformed ({why}): choose of {choices}"
    )
    yield empty, message


def _expect(condition: bool, message: str) -> None:
    """Raises ``ValueError`` unless a record is sound; ``__getitem__`` makes it a ``BadRecord``."""
    if not condition:
        raise ValueError(message)


def _decode_image(data: bytes) -> np.ndarray:
    """Encoded png or jpeg to uint8 [1, h, w, 3]."""
    return _decode(data, True)


def decode_video(data: bytes) -> np.ndarray:
    """uint8 RGB ``[t, h, w, 3]`` of the bytes that ``prepare.encoded.encode_video`` makes."""
    return _decode(data, False)


def _decode(data: bytes, image: bool) -> np.ndarray:
    """Raises ``ValueError`` for damaged bytes: FFmpeg would fill the gaps with what it guesses."""
    frames: list[np.ndarray] = []
    try:
        with av.open(io.BytesIO(data), "r") as container:
            count = "1" if image else container.metadata.get(FRAMES_TAG)
            stream = container.streams.video[0]
            # The loader reads several records at once: more threads for each only take turns.
            stream.thread_type = "NONE"
            if image:  # Or the rest of a JPEG that was cut is grey.
                stream.codec_context.options = {"err_detect": "explode"}
            for frame in container.decode(stream):
                _expect(image or not frame.is_corrupt, f"encoded frame {len(frames)} is damaged")
                frames.append(frame.to_ndarray(format="rgb24" if image else None))
                if image:
                    break
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{len(data)} encoded bytes could not be decoded ({error})") from error
    _expect(str(len(frames)) == count, f"{len(frames)} of {count} encoded frames are there")
    return np.stack(frames)


def as_video(value: Any, where: str, latents: bool = True) -> np.ndarray:
    """uint8 [t, h, w, 3] of [t, h, w, c] or [h, w, c] with c 1 or 3, or, if they may be `latents`,
    float32 of any c; `where` starts the error."""
    video = np.asarray(value)
    if video.ndim == 3:
        video = video[None]
    whole = video.ndim == 4 and min(video.shape) > 0
    if latents and whole and jnp.issubdtype(video.dtype, jnp.floating):
        return video.astype(np.float32)
    other = ", or float latents," if latents else ""
    _expect(
        whole and video.shape[-1] in (1, 3) and video.dtype == np.uint8,
        f"{where} is {video.dtype} {list(np.shape(value))}: need uint8 [t, h, w, c] or [h, w, c] with "
        f"c of 1 or 3{other} and no axis empty; choose another feature or convert it",
    )
    return np.repeat(video, 3, axis=-1) if video.shape[-1] == 1 else video


def _finite(values: np.ndarray, key: str) -> np.ndarray:
    finite = values.dtype == np.uint8 or bool(np.isfinite(values).all())
    _expect(finite, f"feature {key!r} has numbers that are NaN or infinite")
    return values


def _read_states(record: Mapping[str, Any], key: str) -> np.ndarray:
    states = np.asarray(record[key], np.float32)
    _expect(states.ndim == 2, f"feature {key!r} is {list(states.shape)}: states are [s, e]")
    return _finite(states, key)
