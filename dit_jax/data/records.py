"""TFDS builders in ArrayRecord format, read without TensorFlow.

``RecordsSource`` is the random-access source over one split of a builder that ``prepare`` wrote, or of
any with a suitable feature: a video tensor, or an image, which is a video of one frame. Encoded videos
and images are decoded with PyAV, because TFDS itself asks for TensorFlow, OpenCV or Pillow. TFRecord
files and TFDS's Video feature are not read: both need TensorFlow.

Opening reads the metadata alone: a shard is opened when one of its records is read. What is wrong with
a record is a ``ValueError``, which names it; what is wrong with the disk keeps its own type. The shards
of a split lie one behind another, and a record's number in its shard is

    number = index + skip of the shard - records before the shard                                  (1)

The square crop is the framing of Dhariwal & Nichol 2021 and of DiT, with another filter. Synthetic
captions are mixed with those that came with the data, which keeps a model from overfitting to the
habits of a captioner (Betker et al. 2023, section 3: DALL-E 3 was trained on 95 % synthetic ones).
Caption i of weight w_i is drawn with

    p_i = w_i / sum of the w_j of all captions that are not empty                                  (2)
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import errno
import functools
import io
import itertools
import json
import os
import re
import string
from collections.abc import Sequence
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

from dit_jax.files import InputError, MiB, as_path, explain, is_remote, read_bytes, refuse_if
from dit_jax.types import PositiveFloat, PositiveInt, Sample

# Keys of a builder's metadata: hash and name of the codec that made its latents and of the text
# encoder that made the states of its captions; which of its features of bytes are encoded videos.
CODEC, CODEC_NAME = "codec", "codec_name"
TEXT_ENCODER, TEXT_ENCODER_NAME = "text_encoder", "text_encoder_name"
ENCODED_VIDEOS = "encoded_videos"
# Columns of sizes-SPLIT.npy, int32, beside the shards: a row for each record, as it is stored.
SIZES = ("frames", "height", "width", "caption bytes", "text states")
# Shards that are open at once: each takes a file descriptor and the index of its records.
OPEN_SHARDS = 256
# No read-ahead: the order is random.
READER: Any = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
LOCAL = "ArrayRecord reads local files: mount the bucket by gcsfuse, or copy it (docs/storage.md)"
ERRNO = {os.strerror(number): number for number in errno.errorcode}


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
        template, names = self.caption_template, [name for name, _ in self.caption_mix]
        try:
            keys, why = self.template_keys, "names no feature"
        except ValueError as error:
            keys, why = (), f"is no template ({error})"
        why = f"caption_template={template!r} {why}: put features in braces, as in 'a {{label}}'"
        unnamed, labels = template is not None and not keys, self.label_names
        states = len(names) if self.text_states_key is not None else 0
        mixed = f"caption_mix_states={self.caption_mix_states}: give {states}, the states of each "
        mixed += "caption of caption_mix if text_states_key is given, else none"
        remote = [one for one in (self.path, self.data_dir) if is_remote(one or "")]
        refuse_if(
            [
                (not self.path, "path is empty: give a builder's directory or a data set's name"),
                (bool(remote), f"{remote} is on Cloud Storage, and {LOCAL}"),
                (unnamed, why),
                (bool(labels) and len(keys) != 1, f"label_names need one feature, not {keys}"),
                (len(set(names)) < len(names), f"caption_mix={names}: name each feature once"),
                (len(self.caption_mix_states) != states, mixed),
            ]
        )

    @property
    def template_keys(self) -> tuple[str, ...]:
        """Features that the template names, in order, each once."""
        fields = string.Formatter().parse(self.caption_template or "")
        return tuple(dict.fromkeys(field for _, field, _, _ in fields if field is not None))

    @property
    def text_keys(self) -> tuple[str, ...]:
        """Features of text and labels that are read."""
        if not self.captioned:
            return ()
        mix = (name for name, _ in self.caption_mix)
        keys = [self.label_key, self.text_states_key, *self.template_keys, *mix]
        if self.caption_template is None and self.label_key is None:
            keys.append(self.caption_key)
        return tuple(filter(None, [*keys, *self.caption_mix_states]))

    @property
    def paths(self) -> tuple[str, ...]:
        """Fields that hold paths: ``path`` is the name of a TFDS data set unless it is a directory."""
        return ("path", "data_dir") if as_path(self.path).is_dir() else ("data_dir",)

    @property
    def record_sets(self) -> tuple[RecordsConfig, ...]:
        """The configs of all sets of records."""
        return (self,)

    def open(self) -> RecordsSource:
        """The records. Raises ``InputError`` if they are absent, foreign or empty."""
        return RecordsSource(self)


def storage_error(error: Exception, path: Path) -> Exception | None:
    """The disk's or the memory's error behind one that reading or writing records raised, or None."""
    # Those of ArrayRecord are all RuntimeErrors.
    if isinstance(error, OSError | MemoryError):
        return error
    match = re.search(r"\w+\(\) failed: ([^;]+)", str(error))
    number = ERRNO.get(match[1].strip()) if match else None
    # A shard that is missing from its directory will not come back by waiting.
    if number is None or number == errno.ENOENT and path.parent.is_dir():
        return None
    return OSError(number, os.strerror(number), str(path))


class RecordsSource:
    """The random-access source over one split of a builder: deterministic, picklable (files are opened
    again) and usable from threads.

    A sample's video is uint8 [t, h, w, 3], or float32 [t, h, w, c] if it holds latents. Opening raises
    InputError for data that are absent, foreign or empty. Reading raises ValueError for a record that
    cannot be used, and OSError for the errors of the disk.
    """

    def __init__(self, config: RecordsConfig) -> None:
        self.config = config
        info = find_builder(config.path, config.data_dir).info
        self.features, self._splits = info.features, info.splits
        self._shards = self._check(info)
        self._ends = list(itertools.accumulate(shard.take for shard in self._shards))
        # A reader that failed once goes on failing: the failures of a shard's are in the cache's key.
        self._failures: collections.Counter[Path] = collections.Counter()
        self._open_shard = functools.lru_cache(OPEN_SHARDS)(
            lambda path, failures: ArrayRecordReader(str(path), **READER)
        )

        metadata = info.metadata or {}
        # Hashes of the codec that made the latents, and of the text encoder that made the states.
        self.codec: str | None = metadata.get(CODEC)
        self.text_encoder: str | None = metadata.get(TEXT_ENCODER)
        self.text_encoder_name: str | None = metadata.get(TEXT_ENCODER_NAME)
        self._videos = set(metadata.get(ENCODED_VIDEOS) or ())
        # Images are handed over as they are encoded, also those that nobody asked for.
        images = (k for k, v in self.features.items() if isinstance(v, tfds.features.Image))
        self._decoders = {key: tfds.decode.SkipDecoding() for key in images}

    def _check(self, info: Any) -> list[Any]:
        """The shards that are read; ``InputError`` if the config does not fit the builder."""
        config, path = self.config, self.config.path
        keys = [config.video_key, *config.text_keys]
        # The default frame rate stands in for the default key only: another key is meant to exist.
        keys += [config.fps_key] if config.fps_key not in (None, "fps") else []
        absent = [key for key in keys if key not in info.features]
        has, form = ", ".join(sorted(info.features)), info.file_format
        try:
            shards, why = info.splits[config.split].file_instructions, "no records"
        except Exception as error:  # TFDS parses the split, and its errors are of several types.
            shards, why = [], explain(error)
        choices = ", ".join(f"{k} ({v.num_examples})" for k, v in info.splits.items())
        split = f"split {config.split!r} is not in {path!r} ({why}): choose of {choices}"
        convert = f"{path!r} is stored as {form}: convert it by `tfds convert_format "
        convert += "--out_file_format=array_record`"
        keys = f"no features {absent} in {path!r}: data.source may name {has}"
        foreign = form != tfds.core.FileFormat.ARRAY_RECORD
        refuse_if([(not shards, split), (bool(absent), keys), (foreign, convert)])
        return shards

    @functools.cached_property
    def sizes(self) -> np.ndarray | None:
        """int32 [n, 3]: frames, height and width of every record as it is stored; None if the builder
        does not say them."""
        if self.config.video_key != "video":  # The table is of that feature.
            return None
        parts = []
        load = functools.cache(lambda table: np.load(table, mmap_mode="r"))
        try:
            for shard in self._shards:
                path = Path(shard.filename)
                (split, number), *_ = re.findall(r".*-(\w+)\.array_record-(\d+)-of-\d+", path.name)
                lengths = self._splits[split].shard_lengths
                table = load(path.parent / f"sizes-{split}.npy")
                if table.shape != (sum(lengths), len(SIZES)):
                    return None
                start = sum(lengths[: int(number)]) + shard.skip
                parts.append(table[start : start + shard.take, :3])
        except (OSError, ValueError):
            return None
        return np.concatenate(parts)

    def __reduce__(self) -> Any:
        return RecordsSource, (self.config,)

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        """How messages name a record."""
        return f"record {index} of {self.config.path!r}"

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        place = bisect.bisect_right(self._ends, index)
        shard = self._shards[place]
        path, first = Path(shard.filename), self._ends[place] - shard.take
        number = index + shard.skip - first  # Equation (1).
        failures = self._failures[path]
        try:
            return self._sample(self._open_shard(path, failures).read([number])[0])
        # Damage may raise anything in the parsers of ArrayRecord, protobuf, zlib, TFDS and FFmpeg.
        except Exception as error:
            self._failures[path] = failures + isinstance(error, RuntimeError)
            reason = explain(error)
            if isinstance(error, ImportError | AttributeError):
                again = "store it again by dit_jax.prepare.writing.write_records"
                reason = f"it cannot be decoded without TensorFlow ({reason}): {again}"
            bad = ValueError(f"{self.name(index)} (number {number} of {path.name}): {reason}")
            raise storage_error(error, path) or bad from error

    def _sample(self, data: bytes) -> Sample:
        config, key = self.config, self.config.video_key
        # ArrayRecord gives no bytes of a file that was cut while it is open.
        refuse_if([(not data, "the file was cut")])
        record = self.features.deserialize_example_np(data, decoders=self._decoders)
        fps_key = config.fps_key if config.fps_key in self.features else None
        keys = [key, *config.text_keys, *filter(None, [fps_key])]
        missing = ", ".join(name for name in keys if record.get(name) is None)
        refuse_if([(bool(missing), f"it has no {missing}")])
        video = record[key]
        if key in self._videos or key in self._decoders:
            video = decode_video(video, image=key in self._decoders)
        video = as_video(video, f"feature {key!r}")
        fps = float(record[fps_key]) if fps_key else config.fps
        refuse_if([(not 0 < fps < float("inf"), f"its frame rate is {fps}")])
        sample: Sample = {"video": video, "caption": "", "fps": fps}
        if not config.captioned:
            sample["text_states"] = np.zeros((0, 1), np.float32)
            return sample
        if config.caption_template is not None:
            words = {key: self._word(key, record[key]) for key in config.template_keys}
            sample["caption"] = config.caption_template.format(**words)
        elif config.caption_key in self.features:
            sample["caption"] = _text(record[config.caption_key])
        if config.text_states_key is not None:
            sample["text_states"] = np.asarray(record[config.text_states_key], np.float32)
        if config.label_key is not None:
            sample["segment_fields"] = {"label": int(record[config.label_key])}
        if config.caption_mix:
            names = [name for name, _ in config.caption_mix]
            sample["captions"] = captions = {name: _text(record[name]) for name in names}
            states = [np.asarray(record[key], np.float32) for key in config.caption_mix_states]
            # None, or one for each.
            sample["captions_states"] = dict(zip(names, states, strict=False))
            first = next((name for name in names if captions[name]), None)
            if not sample["caption"] and first is not None:
                return with_caption(sample, first)
        return sample

    def _word(self, key: str, value: Any) -> str:
        """A value of the template, by name if its feature or the config has names."""
        names = self.config.label_names or getattr(self.features[key], "names", None)
        if not names:
            return _text(value)
        message = f"{key}={value} has no name among label_names, which has {len(names)}"
        refuse_if([(not 0 <= int(value) < len(names), message)])
        return names[int(value)]


def _text(value: Any) -> str:
    # What is not UTF-8 gets U+FFFD, rather than costing the record.
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def find_builder(name: str, data_dir: str | None = None) -> Any:
    """The read-only builder at a directory or of a name, sought in ``data_dir``; or ``InputError``.

    No code of the data set's is run: a feature whose class is not one of TFDS's is refused.
    """
    path, info = Path(name).expanduser(), "dataset_info.json"
    is_folder = path.is_dir()
    # NAMESPACE:NAME loads code of others, and NAME/a=1 passes arguments to a builder's code.
    pattern = r"\w+(/[\w.\-]+)*(:[\d.*]+)?"
    known = (path / info).is_file() if is_folder else bool(re.fullmatch(pattern, name))
    inside = [] if known else sorted(str(one.parent) for one in path.glob(f"**/{info}"))
    what = "is neither the name of a TFDS data set nor a builder's directory, such as name/1.0.0"
    what += f"; it holds {', '.join(inside)}" if inside else ""
    refuse_if([(is_remote(name), f"{name!r}: {LOCAL}"), (not known, f"{name!r} {what}")])
    try:
        if is_folder:
            _check_classes(path)
            return tfds.builder_from_directory(path)
        stem = naming.parse_builder_name_kwargs(name)[0].name
        for root in file_utils.list_data_dirs(given_data_dir=data_dir):
            for file in Path(root).expanduser().glob(f"{stem}/**/features.json"):
                _check_classes(file.parent)
        builder = tfds.builder(name, try_gcs=False, data_dir=data_dir)
    except OSError:
        raise
    # A name may be refused in several ways, and the parsers of metadata have errors of their own.
    except Exception as error:
        raise InputError(f"{name!r} {what} ({explain(error)})") from error
    message = f"{name!r} is not prepared in {builder.data_dir}: run `tfds build {name} "
    message += "--file_format=array_record`, or give the right data_dir"
    refuse_if([(not builder.is_prepared(), message)])
    return builder


def _check_classes(folder: Path) -> None:
    """Refuses a builder whose metadata name a class outside TFDS, which TFDS would import and so run.

    Names are in ``pythonClassName``, or in ``type`` in older files, at any depth; also in JSON within
    strings, which TFDS parses too.
    """
    classes: set[str] = set()

    def visit(value: dict[str, Any]) -> None:
        for key, item in value.items():
            for one in item if isinstance(item, list) else [item]:
                if key in ("pythonClassName", "python_class_name", "type") and isinstance(one, str):
                    classes.add(one)
                elif isinstance(one, str) and one.lstrip()[:1] in ("{", "["):
                    # What is no JSON here is none for TFDS, either.
                    with contextlib.suppress(json.JSONDecodeError):
                        json.loads(one, object_hook=visit)

    for file in (folder / "features.json", folder / "dataset_info.json"):
        if file.is_file():
            text = read_bytes(file, 64 * MiB).decode(errors="replace")
            json.loads(text, object_hook=visit)
    foreign = sorted(x for x in classes if not re.fullmatch(r"tensorflow_datasets\.[\w.]+", x))
    message = f"its features are of the classes {foreign}, and only those of TFDS itself are read"
    refuse_if([(bool(foreign), message)])


def decode_video(data: bytes, image: bool = False) -> np.ndarray:
    """uint8 RGB ``[t, h, w, 3]`` of what ``prepare.encoded.encode_video`` makes, or of a PNG or JPEG;
    ``ValueError`` if it is damaged."""
    frames: list[np.ndarray] = []
    try:
        with av.open(io.BytesIO(data), "r") as container:
            # Matroska's tag of ``prepare.encoded``.
            count = "1" if image else container.metadata.get("FRAMES")
            stream = container.streams.video[0]
            # The loader reads several records at once: more threads for each only take turns.
            stream.thread_type = "NONE"
            if image:  # Or the rest of a JPEG that was cut is grey.
                stream.codec_context.options = {"err_detect": "explode"}
            for frame in itertools.islice(container.decode(stream), 1 if image else None):
                # FFmpeg fills the gaps with what it guesses.
                damaged = frame.is_corrupt and not image
                refuse_if([(damaged, f"encoded frame {len(frames)} is damaged")])
                frames.append(frame.to_ndarray(format="rgb24" if image else None))
    # Some of FFmpeg's errors are OSErrors, and yet not the disk's.
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{len(data)} encoded bytes could not be decoded ({error})") from error
    refuse_if([(str(len(frames)) != count, f"{len(frames)} of {count} encoded frames are there")])
    return np.stack(frames)


def as_video(value: Any, where: str, latents: bool = True) -> np.ndarray:
    """uint8 [t, h, w, 3] of [t, h, w, c] or [h, w, c] with c 1 or 3, or, if they may be ``latents``,
    float32 of any c; ``where`` begins the error."""
    video = np.asarray(value)
    if video.ndim == 3:
        video = video[None]
    whole = video.ndim == 4 and min(video.shape) > 0
    if latents and whole and jnp.issubdtype(video.dtype, jnp.floating):
        return video.astype(np.float32)
    message = f"{where} is {video.dtype} {list(np.shape(value))}: need uint8 [t, h, w, c] or "
    message += (
        f"[h, w, c] with c of 1 or 3{', or float latents,' if latents else ''} and no axis empty"
    )
    sound = whole and video.shape[-1] in (1, 3) and video.dtype == np.uint8
    refuse_if([(not sound, message)])
    return np.repeat(video, 3, axis=-1) if video.shape[-1] == 1 else video


# ---------------------------------------------------------------------------------------------------
# What is done to a sample before it becomes tokens: nothing by default
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformConfig:
    """How frames are resized and cropped; latents are taken as they are."""

    crop: PositiveInt | None = None
    """The shorter side is resized to so many pixels, and the square in the centre is kept."""
    flip: bool = False
    """Mirror every second clip, left to right; anew in every epoch."""


def resized(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames uint8 ``[t, h, w, 3]`` at another size: averaged over areas if both sides shrink, bicubic
    otherwise."""
    if video.shape[1:3] == (height, width):
        return video
    # Bicubic interpolation looks at four pixels a side: it would skip most of a picture that shrinks.
    how = "AREA" if height <= video.shape[1] and width <= video.shape[2] else "BICUBIC"
    frames = [av.VideoFrame.from_ndarray(np.ascontiguousarray(x), "rgb24") for x in video]
    frames = [x.reformat(width, height, interpolation=how) for x in frames]
    return np.stack([x.to_ndarray(format="rgb24") for x in frames])


def centre(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle ``[t, height, width, c]`` of frames at least so large."""
    top, left = (video.shape[1] - height) // 2, (video.shape[2] - width) // 2
    return video[:, top : top + height, left : left + width]


def cover(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of frames uint8 ``[t, h, w, 3]``, scaled to cover ``height x width``."""
    h, w = video.shape[1:3]
    scale = max(height / h, width / w)
    # Rounding must not leave a side one pixel short.
    video = resized(video, max(round(h * scale), height), max(round(w * scale), width))
    return centre(video, height, width)


def crop(config: TransformConfig, video: np.ndarray) -> np.ndarray:
    """A clip uint8 ``[t, h, w, 3]`` as the config has it; float latents come back as they are."""
    if video.dtype != np.uint8 or config.crop is None:
        return video
    return cover(video, config.crop, config.crop)


def flip(sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample, or with probability 1/2 its mirror image. For pixels: a codec's latents of a mirrored
    clip are not the mirrored latents."""
    if rng.random() < 0.5:
        return sample
    mirrored: Sample = {**sample, "video": sample["video"][:, :, ::-1]}
    if "pixel_fields" in sample:
        mirrored["pixel_fields"] = {k: v[:, :, ::-1] for k, v in sample["pixel_fields"].items()}
    return mirrored


def choose_caption(
    sample: Sample, rng: np.random.Generator, mix: Sequence[tuple[str, float]]
) -> Sample:
    """The sample with one of its ``captions``, by equation (2) with the weights of ``mix``.

    A sample whose captions are all empty keeps the one that it has.
    """
    # One random number whatever the captions are, so that what is drawn next does not depend on them.
    point, captions = rng.random(), sample.get("captions", {})
    choices = [(name, weight) for name, weight in mix if captions.get(name)]
    if not choices:
        return sample
    edges = np.cumsum([weight for _, weight in choices])
    chosen = int(np.searchsorted(edges, point * edges[-1], side="right"))
    # Rounding may put the point on the last edge.
    return with_caption(sample, choices[min(chosen, len(choices) - 1)][0])


def with_caption(sample: Sample, name: str) -> Sample:
    """The sample with one of its ``captions``, and that caption's states, as the one that is used."""
    out: Sample = {**sample, "caption": sample.get("captions", {})[name]}
    states = sample.get("captions_states", {})
    return {**out, "text_states": states[name]} if name in states else out
