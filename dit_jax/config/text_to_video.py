"""The run of a text-to-video model, or of one of classes and images."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dit_jax.codec.codec import TileConfig
from dit_jax.config.run import Run
from dit_jax.data import MixtureConfig, PackingConfig, RecordsConfig, ShapesConfig, TransformConfig
from dit_jax.diffusion import DiffusionConfig
from dit_jax.model import ClassLabelsConfig, ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.parallel import AttentionConfig
from dit_jax.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is packed."""

    source: ShapesConfig | RecordsConfig | MixtureConfig = ShapesConfig()
    packing: PackingConfig = PackingConfig()
    transform: TransformConfig = TransformConfig()
    bad_records: Literal["skip", "refuse"] = "skip"
    """What becomes of records that cannot be packed, read or trained on: they are left out, counted and
    named, or the run is refused before it begins (as far as the sizes in the data's metadata tell)."""
    max_bad_records: int = 1000
    """Records that may be left out in the middle of a run, besides those known before it."""


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """What turns pixels into the latents that the model makes, and back; none for models of pixels."""

    path: str | None = None
    """The folder of an autoencoder (``python -m dit_jax.convert`` says which). Pixels of the data are
    encoded by it as they are read, and what the model makes is decoded by it."""
    t: int = 1
    h: int = 1
    w: int = 1
    """Frames, rows and columns of pixels to one latent: 1 x 8 x 8 for Stable Diffusion's. The first
    frame has a latent of its own. Sizes in ``sampling`` count pixels."""
    hash: str | None = None
    """Of its weights. Filled in when a run begins, from the data or the folder; another codec is
    refused from then on."""
    tiles: TileConfig = TileConfig()
    """In what parts it takes clips: how much memory encoding and decoding need."""

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w) < 1:
            raise ValueError(
                f"codec.t, h, w = {self.t}, {self.h}, {self.w}: strides are at least 1."
            )

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of so many frames of so many pixels.

        Raises:
            ValueError: where the strides do not divide them.
        """
        if (frames - 1) % self.t or height % self.h or width % self.w:
            raise ValueError(
                f"{frames} frames of {height} x {width} pixels have no whole latents of {self.t} x "
                f"{self.h} x {self.w}: give 1 + {self.t}n frames and multiples of the others."
            )
        return 1 + (frames - 1) // self.t, height // self.h, width // self.w

    def latent_fps(self, fps: float) -> float:
        """Latent frames a second of clips with so many frames a second."""
        return fps / self.t


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """What makes states of captions, for a model that reads those (``model.text``)."""

    path: str | None = None
    """Its folder, as ``transformers`` stores T5 v1.1 or UMT5 (docs/text.md). Captions that come
    without states are encoded by it as they are read, and so are prompts."""
    hash: str | None = None
    """Of its weights. Filled in when a run begins, from the data or the folder; states of another
    encoder are refused from then on."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What a run measures when it is done, where its data has a judge or true clips."""

    prompts: int = 96
    """Clips made for it; 0 measures nothing."""
    records_split: str | None = None
    """For recorded data: the split whose captions are prompts and whose clips are the truth."""
    classifier_split: str | None = None
    """For images with labels: the split that a small classifier is trained on, which then judges what
    was made; a fifth of it is kept to judge the classifier by."""

    def __post_init__(self) -> None:
        if self.prompts < 0:
            raise ValueError(f"evaluation.prompts is {self.prompts}: it is at least 0.")


@dataclasses.dataclass(frozen=True)
class Config(Run):
    """A run of training: a text-to-video model, or one of classes and images."""

    ROWS = "data.packing.rows"

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig(patch=PatchConfig(t=2, h=8, w=8, channels=3))
    diffusion: DiffusionConfig = DiffusionConfig()
    attention: AttentionConfig = AttentionConfig()
    codec: CodecConfig = CodecConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.text.max_tokens > self.data.packing.row_text:
            raise ValueError(
                f"data.packing.row_text {self.data.packing.row_text} is smaller than one caption of "
                f"{self.model.text.max_tokens} tokens: raise it, or lower the limit in model.text."
            )
        drawn = self.sampling
        drawn.check(self.diffusion, self.model.patch.channels)
        try:
            self.model.patch.grid(*self.codec.latent_size(drawn.frames, drawn.height, drawn.width))
        except ValueError as error:
            raise ValueError(
                f"sampling.frames, height, width = {drawn.frames}, {drawn.height}, {drawn.width} do "
                f"not fit the model's patches: {error}"
            ) from error
        by = self.model.upscale
        if drawn.height % by or drawn.width % by:
            raise ValueError(
                f"sampling.height, width = {drawn.height}, {drawn.width} are not multiples of "
                f"model.upscale {by}: what is enlarged has whole rows and columns."
            )
        if isinstance(self.data.source, ShapesConfig):
            self._check_shapes(self.data.source)
        elif self.model.patch.channels != 3 and self.codec.path is None:
            if self.log.draw_every or self.evaluation.prompts:
                raise ValueError(
                    f"model.patch.channels is {self.model.patch.channels}: these are latents, which "
                    "cannot be drawn as pictures without codec.path. Give it, or set log.draw_every "
                    "and evaluation.prompts to 0."
                )
        if self.text_encoder.path and not isinstance(self.model.text, TextStatesConfig):
            raise ValueError(
                f"text_encoder.path is {self.text_encoder.path!r}, and the model reads no states "
                "(model.text): leave it out, or give the model a TextStatesConfig."
            )
        self._check_labels()

    def _check_labels(self) -> None:
        if self.diffusion.variance == "learned_range" and not self.model.learned_variance:
            raise ValueError(
                "diffusion.variance is 'learned_range', and the model has no second output for it: set "
                "model.learned_variance, or another variance."
            )
        source = self.data.source
        shown = source.shown_set if isinstance(source, MixtureConfig) else source
        labelled = isinstance(shown, RecordsConfig) and shown.label_key is not None
        if isinstance(self.model.text, ClassLabelsConfig) and not labelled:
            raise ValueError(
                "model.text are classes, and the data have no labels: give data.source.label_key, the "
                "feature of the records that holds the class."
            )
        if self.evaluation.classifier_split is not None and not labelled:
            raise ValueError(
                f"evaluation.classifier_split is {self.evaluation.classifier_split!r}, and the data "
                "have no labels: give data.source.label_key, or leave it unset."
            )

    def _check_shapes(self, source: ShapesConfig) -> None:
        if self.model.patch.channels != 3 and self.codec.path is None:
            raise ValueError(
                f"model.patch.channels is {self.model.patch.channels}: moving shapes have 3 (pixels). "
                "Give codec.path, a codec whose latents have so many."
            )
        clips = [(frames, h, w) for frames in source.frames for h, w in source.sizes]
        images = [(1, h, w) for h, w in source.image_sizes] if source.image_fraction else []
        limit = self.data.packing.row_tokens
        for clip in clips + images:
            count = self.model.patch.num_tokens(*self.codec.latent_size(*clip))
            if count > limit:
                raise ValueError(
                    f"data.packing.row_tokens {limit} is smaller than one clip: "
                    f"{clip[0]} x {clip[1]} x {clip[2]} has {count} tokens. Raise it to at least "
                    f"{count}, or use larger patches."
                )
