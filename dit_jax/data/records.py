"""TFDS builders in ArrayRecord format, written and read without TensorFlow.

`write_records` makes a builder directory that `tfds.data_source` and `tfds.builder_from_directory`
read; `RecordsSource` is the random-access source over one split of ours or of any builder with a
suitable feature: a video tensor, or an image, which is a video of one frame. Encoded image features
(png, jpeg) are decoded with PyAV, because TFDS itself asks for TensorFlow, OpenCV or Pillow.

It does not read TFRecord files or the Video feature of TFDS: both need TensorFlow.
"""

import io
import re
import string
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from av.error import FFmpegError

from dit_jax.types import Sample

VERSION = "1.0.0"


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

    Raises ValueError for values that contradict each other.
    """

    path: str
    split: str = "train"
    video_key: str = "video"
    caption_key: str = "caption"
    caption_template: str | None = None
    label_names: tuple[str, ...] = ()
    text_states_key: str | None = None
    fps_key: str | None = "fps"
    fps: float = 8.0
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty: give a builder's directory or the name of a data set")
        if not self.fps > 0:
            raise ValueError(f"fps={self.fps}: give a positive number of frames a second")
        if self.caption_template is not None and not self.template_keys:
            raise ValueError(
                f"caption_template={self.caption_template!r} names no feature: put one in braces, "
                "such as 'a handwritten digit {label}'"
            )
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


class RecordsSource:
    """The random-access source over one split of a builder.

    A sample is {"video": uint8 [t, h, w, 3], "caption": str, "fps": float}, the video float32
    [t, h, w, c] where it holds latents, with "text_states": float32 [s, e] where those are asked for;
    IndexError outside 0..len-1. Deterministic, picklable (files are opened again), usable from threads.

    Raises ValueError at construction, where the first record is read, too: for an absent or foreign
    directory, an absent or empty split, a missing feature, and a record that is no clip.
    """

    def __init__(self, config: RecordsConfig) -> None:
        self.config = config
        self._open()
        self[0]

    def _open(self) -> None:
        builder = _find_builder(self.config)
        _check_split(builder, self.config)
        features = builder.info.features
        _check_features(features, self.config)
        # Images are handed over as they are encoded, also those that nobody asked for.
        self._encoded = {k for k in features if isinstance(features[k], tfds.features.Image)}
        self._has_fps = self.config.fps_key is not None and self.config.fps_key in features
        self._names = {
            key: self.config.label_names or tuple(getattr(features[key], "names", None) or ())
            for key in self.config.template_keys
        }
        try:
            self._records = builder.as_data_source(
                split=self.config.split,
                decoders={key: tfds.decode.SkipDecoding() for key in self._encoded},
            )
        except NotImplementedError as error:
            raise ValueError(
                f"{self.config.path!r} is stored as {builder.info.file_format}, which needs "
                "TensorFlow to be read: prepare it with file_format='array_record', or convert it "
                "with `tfds convert_format --out_file_format=array_record`"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"split {self.config.split!r} of {self.config.path!r} is empty or malformed "
                f"({error}): choose another of {_split_sizes(builder)}"
            ) from error

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
            record = self._records[index]
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"record {index} of {self.config.path!r} has features that cannot be decoded without "
                f"TensorFlow ({error}): store them again, see dit_jax.data.records.write_records"
            ) from error
        key = self.config.video_key
        video = _decode_image(record[key]) if key in self._encoded else record[key]
        fps = float(record[self.config.fps_key]) if self._has_fps else self.config.fps
        where = f"feature {key!r} of record {index} of {self.config.path!r}"
        sample: Sample = {
            "video": _as_video(video, where),
            "caption": self._caption(record),
            "fps": fps,
        }
        if self.config.text_states_key is not None:
            sample["text_states"] = np.asarray(record[self.config.text_states_key], np.float32)
        return sample

    def _caption(self, record: Mapping[str, Any]) -> str:
        if self.config.caption_template is None:
            return _as_text(record[self.config.caption_key])
        words = {key: self._word(key, record[key]) for key in self.config.template_keys}
        return self.config.caption_template.format(**words)

    def _word(self, key: str, value: Any) -> str:
        names = self._names[key]
        if not names:
            return _as_text(value)
        if not 0 <= int(value) < len(names):
            raise ValueError(
                f"{key}={value} of {self.config.path!r} has no name among label_names, which has "
                f"{len(names)}: give a name for every value"
            )
        return names[int(value)]


def _find_builder(config: RecordsConfig) -> Any:
    """The read-only builder at a directory or of a name, or ValueError."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        if not (path / "dataset_info.json").is_file():
            inside = sorted(str(p.parent) for p in path.glob("**/dataset_info.json"))
            hint = f"; it holds {', '.join(inside)}" if inside else ""
            raise ValueError(
                f"{config.path!r} is not a TFDS builder, it has no dataset_info.json{hint}: give "
                "the directory of a version, such as name/1.0.0"
            )
        try:
            return tfds.builder_from_directory(path)
        except ImportError as error:
            raise ValueError(
                f"{config.path!r} has features that need TensorFlow ({error}): store it again, see "
                "dit_jax.data.records.write_records"
            ) from error
    try:
        builder = tfds.builder(config.path, try_gcs=False, data_dir=config.data_dir)
    # An absolute path or a name with odd characters is refused in several ways.
    except (tfds.core.DatasetNotFoundError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{config.path!r} is neither a directory nor the name of a TFDS data set: check the "
            "spelling, or write the builder first"
        ) from error
    if not builder.is_prepared():
        raise ValueError(
            f"data set {config.path!r} is not prepared in {builder.data_dir}: run "
            f"`tfds build {config.path} --file_format=array_record`, or give the right data_dir"
        )
    return builder


def _split_sizes(builder: Any) -> str:
    return ", ".join(f"{k} ({v.num_examples})" for k, v in builder.info.splits.items()) or "none"


def _check_split(builder: Any, config: RecordsConfig) -> None:
    # "train[:10%]+test" names two splits; what is in brackets TFDS reads itself.
    for name in re.sub(r"\[[^]]*\]", "", config.split).split("+"):
        if name.strip() not in builder.info.splits:
            raise ValueError(
                f"split {name.strip()!r} is not in {config.path!r}: choose one of "
                f"{_split_sizes(builder)}"
            )


def _check_features(features: Mapping[str, Any], config: RecordsConfig) -> None:
    needed = {"video_key": (config.video_key,), "caption_template": config.template_keys}
    if config.caption_template is None:
        needed["caption_key"] = (config.caption_key,)
    if config.text_states_key is not None:
        needed["text_states_key"] = (config.text_states_key,)
    # The default frame rate stands in for the default key only: another key is meant to exist.
    if config.fps_key not in (None, "fps"):
        needed["fps_key"] = (config.fps_key,)
    for field, keys in needed.items():
        for key in keys:
            if key not in features:
                raise ValueError(
                    f"{field}: no feature {key!r} in {config.path!r}; it has "
                    f"{', '.join(sorted(features))}: set {field} to one of them"
                )


def _decode_image(data: bytes) -> np.ndarray:
    """Encoded png or jpeg to uint8 [h, w, 3]; ValueError where it is none."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            # One small picture: starting threads costs more than decoding it.
            container.streams.video[0].thread_type = "NONE"
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(
            f"an image of {len(data)} bytes could not be decoded ({error}): the record is damaged"
        ) from error


def _as_video(value: Any, where: str, latents: bool = True) -> np.ndarray:
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


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


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
    ) -> None:
        # TFDS has a name for each class and this writer one for each builder.
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self._splits, self._labels, self._about = splits, tuple(labels), description
        self._video_encoding = encoding
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> Any:
        features = {
            "video": tfds.features.Tensor(
                shape=(None, None, None, 3), dtype=np.uint8, encoding=self._video_encoding
            ),
            "caption": tfds.features.Text(),
            "fps": tfds.features.Scalar(np.float32),
        }
        features |= {name: tfds.features.Scalar(np.int64) for name in self._labels}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._about,
            features=tfds.features.FeaturesDict(features),
            # Record i is the i-th sample: the writer's order is the order a user can check.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        i = -1
        for i, sample in enumerate(self._splits[split]):
            yield i, _checked(sample, self._labels, f"sample {i} of split {split!r}")
        if i < 0:
            raise ValueError(f"split {split!r} has no samples: give at least one, or leave it out")


def _checked(sample: Mapping[str, Any], labels: Sequence[str], where: str) -> dict[str, Any]:
    missing = [key for key in ("video", "caption", "fps", *labels) if key not in sample]
    if missing:
        raise ValueError(f"{where} lacks {missing}: it has {sorted(sample)}; add what is missing")
    if not isinstance(sample["caption"], str) or not float(sample["fps"]) > 0:
        raise ValueError(
            f"{where} has caption {sample['caption']!r} and fps {sample['fps']!r}: need a string "
            "and a positive number"
        )
    record = {"caption": sample["caption"], "fps": float(sample["fps"])}
    record |= {key: int(sample[key]) for key in labels}
    video = _as_video(sample["video"], f"video of {where}", latents=False)
    return {"video": video, **record}


def write_records(
    directory: str | Path,
    name: str,
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    description: str,
    labels: Sequence[str] = (),
    encoding: Literal["zlib", "bytes"] = "zlib",
) -> Path:
    """Write samples as the TFDS builder `directory/name/1.0.0` and return that path.

    `splits` maps split names to samples {"video": uint8 [t, h, w, 3], "caption": str, "fps": float}
    plus the integers named in `labels`; sizes and lengths may differ, order is kept. `encoding` of
    the videos: "zlib" is lossless compression, "bytes" is raw, larger and quicker to read.

    Raises ValueError for a bad name, an existing builder, a directory that cannot be written, an
    empty split and a sample that does not fit; nothing but empty directories is left behind then.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name={name!r}: use lower case letters, digits and _, a letter first")
    if reserved := {"video", "caption", "fps"} & set(labels):
        raise ValueError(f"labels hold {sorted(reserved)}, which every sample has: rename them")
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
    writer = _Writer(name, splits, labels, description, encoding, str(root))
    # TFDS makes a place for downloads, of which there are none: not beside the data.
    with tempfile.TemporaryDirectory() as downloads:
        writer.download_and_prepare(download_dir=downloads)
    return target
