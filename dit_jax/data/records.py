"""TFDS builders in ArrayRecord format, read without TensorFlow.

`RecordsSource` is the random-access source over one split of a builder that `write_records` made, or of
any with a suitable feature: a video tensor, or an image, which is a video of one frame. Encoded image
features (png, jpeg) are decoded with PyAV, because TFDS itself asks for TensorFlow, OpenCV or Pillow.

It does not read TFRecord files or the Video feature of TFDS: both need TensorFlow.
"""

import io
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from av.error import FFmpegError

from dit_jax.data.captions import take_caption
from dit_jax.files import InputError, is_remote
from dit_jax.types import Sample

CODEC, CODEC_NAME = "codec", "codec_name"
"""Where a builder's metadata say which codec made its latents: its hash, and its name."""
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


class RecordsSource:
    """The random-access source over one split of a builder.

    A sample is {"video": uint8 [t, h, w, 3], "caption": str, "fps": float}, the video float32
    [t, h, w, c] where it holds latents, with "text_states": float32 [s, e] and "label": int where those
    are asked for; IndexError outside 0..len-1. Deterministic, picklable (files are opened again),
    usable from threads.

    Raises ValueError at construction, where the first record is read, too: for an absent or foreign
    directory, an absent or empty split, a missing feature, and a record that is no clip.
    """

    def __init__(self, config: RecordsConfig) -> None:
        self.config = config
        self._open()
        self[0]

    def _open(self) -> None:
        builder = find_builder(self.config.path, self.config.data_dir)
        _check_split(builder, self.config)
        features = builder.info.features
        _check_features(features, self.config)
        # Images are handed over as they are encoded, also those that nobody asked for.
        self._encoded = {k for k in features if isinstance(features[k], tfds.features.Image)}
        self._captioned = self.config.caption_key in features
        metadata = builder.info.metadata or {}
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
            "video": as_video(video, where),
            "caption": self._caption(record) if self.config.captioned else "",
            "fps": fps,
        }
        if not self.config.captioned:
            sample["text_states"] = NO_STATES
            return sample
        if self.config.text_states_key is not None:
            sample["text_states"] = np.asarray(record[self.config.text_states_key], np.float32)
        if self.config.caption_mix:
            self._add_captions(sample, record)
        if self.config.label_key is not None:
            sample["label"] = int(record[self.config.label_key])
        return sample

    def _add_captions(self, sample: Sample, record: Mapping[str, Any]) -> None:
        names = [name for name, _ in self.config.caption_mix]
        sample["captions"] = {name: _as_text(record[name]) for name in names}
        if self.config.caption_mix_states:
            keys = zip(names, self.config.caption_mix_states, strict=True)
            states = {name: np.asarray(record[key], np.float32) for name, key in keys}
            sample["captions_states"] = states
        first = next((name for name in names if sample["captions"][name]), None)
        if not sample["caption"] and first is not None:
            take_caption(sample, first)

    def _caption(self, record: Mapping[str, Any]) -> str:
        if self.config.caption_template is None:
            if not self._captioned:
                return ""
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


def find_builder(name: str, data_dir: str | None = None) -> Any:
    """The read-only builder at a directory or of a name, sought in ``data_dir``; or ValueError."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "dataset_info.json").is_file():
            inside = sorted(str(p.parent) for p in path.glob("**/dataset_info.json"))
            hint = f"; it holds {', '.join(inside)}" if inside else ""
            raise ValueError(
                f"{name!r} is not a TFDS builder, it has no dataset_info.json{hint}: give "
                "the directory of a version, such as name/1.0.0"
            )
        try:
            return tfds.builder_from_directory(path)
        except ImportError as error:
            raise ValueError(
                f"{name!r} has features that need TensorFlow ({error}): store it again, see "
                "dit_jax.data.records.write_records"
            ) from error
    try:
        builder = tfds.builder(name, try_gcs=False, data_dir=data_dir)
    # An absolute path or a name with odd characters is refused in several ways.
    except (tfds.core.DatasetNotFoundError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{name!r} is neither a directory nor the name of a TFDS data set: check the "
            "spelling, or write the builder first"
        ) from error
    if not builder.is_prepared():
        raise ValueError(
            f"data set {name!r} is not prepared in {builder.data_dir}: run "
            f"`tfds build {name} --file_format=array_record`, or give the right data_dir"
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
    needed: dict[str, tuple[str, ...]] = {"video_key": (config.video_key,)}
    if config.captioned:
        needed |= _of_text(config)
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
            container.streams.video[0].thread_type = "NONE"
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(
            f"an image of {len(data)} bytes could not be decoded ({error}): the record is damaged"
        ) from error


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


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
