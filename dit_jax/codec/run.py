"""The run of a codec: an autoencoder of video that is trained on windows of clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from jax.sharding import Mesh

from dit_jax.codec.causal_autoencoder import CausalAutoencoderConfig
from dit_jax.codec.codec import TileConfig
from dit_jax.codec.crops import CropConfig
from dit_jax.codec.measures import WINDOW
from dit_jax.codec.reconstruction_loss import ReconstructionLossConfig
from dit_jax.config import Run
from dit_jax.data import ShapesConfig
from dit_jax.training import Task
from dit_jax.types import FrameGrid, NonNegativeInt, PositiveInt

FOLDER = "codec"
"""Of the finished codec, in a run's output."""


@dataclasses.dataclass(frozen=True)
class CodecDataConfig:
    """What is trained on, and the windows cut out of it."""

    source: Any = ShapesConfig()
    crop: CropConfig = CropConfig(height=16, width=16)
    bad_records: Literal["skip", "refuse"] = "skip"
    """As in a model's run: clips smaller than a window, or that cannot be read, are left out."""
    max_bad_records: NonNegativeInt = 1000
    """Records that may be left out in the middle of a run, besides those known before it."""


@dataclasses.dataclass(frozen=True)
class CodecEvaluationConfig:
    """What a run measures when it is done: windows of held-out clips, and what comes back of them."""

    clips: NonNegativeInt = 96
    """Windows; 0 measures nothing."""
    records_split: str | None = None
    """For recorded data: the split they are cut out of; unset, that of the training data. Of moving
    shapes they are of those combinations that training never draws."""
    frames: PositiveInt | None = None
    """Frames of these windows, if they are others than in training."""
    statistics: PositiveInt = 256
    """Training windows over which the latents' mean and deviation are taken."""


@dataclasses.dataclass(frozen=True)
class CodecRun(Run):
    """A run of training: a causal autoencoder of video. When it is done, the folder ``codec`` in its
    output is what ``codec.path`` of other runs takes."""

    ROWS = "data.crop.rows"

    data: CodecDataConfig = CodecDataConfig()
    model: CausalAutoencoderConfig = CausalAutoencoderConfig()
    loss: ReconstructionLossConfig = ReconstructionLossConfig()
    evaluation: CodecEvaluationConfig = CodecEvaluationConfig()
    tiles: TileConfig = TileConfig()
    """In what parts the finished codec takes clips."""

    def build(self, mesh: Mesh) -> Task:
        from dit_jax.codec.train import build_codec  # It imports this module.

        return build_codec(self, mesh)

    def constraints(self) -> Iterator[tuple[bool, str]]:
        yield from super().constraints()
        crop, model, evaluation = self.data.crop, self.model, self.evaluation
        (time, space, _), size = model.stride, (crop.height, crop.width)
        name = f"data.crop.height, width = {crop.height}, {crop.width}"
        yield (
            any(side % space for side in size),
            f"{name}: give multiples of the model's stride in space, {space}.",
        )
        for field, frames in (
            ("data.crop.frames", crop.frames),
            ("evaluation.frames", evaluation.frames),
        ):
            yield (
                frames is not None and (frames - 1) % time > 0,
                f"{field} is {frames}: the model's stride in time is {time}, so give 1 + {time}n.",
            )
        yield (
            evaluation.clips > 0 and min(size) < WINDOW,
            f"{name}: SSIM, which is measured at the end, looks at windows of {WINDOW} x {WINDOW} "
            "pixels. Make them larger, or set evaluation.clips to 0.",
        )
        yield (
            evaluation.records_split is not None and isinstance(self.data.source, ShapesConfig),
            f"evaluation.records_split is {evaluation.records_split!r}, and the data are moving "
            "shapes, which have none: leave it unset.",
        )
        yield (
            bool(model.shift or model.scale),
            "model.shift and model.scale are measured when training ends: leave them empty.",
        )
        yield (model.channels != 3, f"model.channels is {model.channels}: clips have 3.")

    # What `plan` asks a run that is not a model's for.

    @property
    def parts(self) -> int:
        """Parts in which clips of ``data.crop`` are encoded or decoded."""
        latents = FrameGrid(self.model.stride[0]).latents(self.data.crop.frames)
        return -(-latents // self.tiles.frames)

    def abstract_task(self, mesh: Mesh) -> dict[str, Any]:
        """The fields of ``plan``'s task on a mesh; no data are opened."""
        from dit_jax.codec.train import abstract_codec_task  # It imports this module.

        return abstract_codec_task(self, mesh)

    def abstract_part(
        self, mesh: Mesh, what: Literal["encode", "decode"]
    ) -> tuple[Any, tuple[Any, ...], float]:
        """A jitted function that encodes or decodes one part of a clip, its arguments without contents,
        and its flops."""
        from dit_jax.codec.train import abstract_codec_part  # It imports this module.

        return abstract_codec_part(self, mesh, what)
