"""What a run shows and is measured on: prompts or classes, and the truth where there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax.config import VideoRun
from dit_jax.data import (
    RecordsConfig,
    RecordsSource,
    ShapesConfig,
    caption,
    crop,
    held_out_scenes,
    open_source,
    render,
)
from dit_jax.evaluate import judge_classes, prompt_following
from dit_jax.model import ClassLabels, NoTextConfig
from dit_jax.sampling import Request, contact_sheet, grid, write_png
from dit_jax.sampling.media import mean_psnr
from dit_jax.types import Codec
from dit_jax.upscale.low_res import NAME, factor_of
from dit_jax.upscale.super_resolution import fidelity, low_of

FRAMES_SHOWN = 5
CLIPS_SHOWN = 24
IMAGES_SHOWN = 100
SHEET_SCALE = 3


class Cases:
    """Requests for a run's samples, and how well the clips made for them do."""

    def __init__(self, config: VideoRun, codec: Codec | None = None) -> None:
        self._config, self._codec = config, codec
        source = getattr(config.data.source, "shown_set", config.data.source)
        count = config.evaluation.prompts
        self._factor = factor_of(config.model)
        labels = config.model.conditioners.get("label")
        self._scenes: list[Any] = []
        self._true: list[np.ndarray] = []
        shown = max(count, config.log.draw_count)
        if isinstance(source, ShapesConfig):
            self.requests = self._of_shapes(source, shown)
        elif (
            isinstance(config.model.text, NoTextConfig)
            and isinstance(labels, ClassLabels)
            and self._factor == 1
        ):
            self.requests = self._of_classes(labels.classes, shown)
        else:
            self.requests = self._of_records(source, shown)
        if config.evaluation.classifier_split is not None and count:
            assert isinstance(source, RecordsConfig)
            self._check_judged(source, config.evaluation.classifier_split)

    def _check_judged(self, source: RecordsConfig, split: str) -> None:
        """Raises ``ValueError`` where what is made could not be compared with the real images."""
        made = self._config.sampling
        for name in (split, source.split):
            video = RecordsSource(dataclasses.replace(source, split=name))[0]["video"]
            if video.dtype == np.uint8:
                video = self._resized(video)
            if video.shape != (1, made.height, made.width, 3) or made.frames != 1:
                raise ValueError(
                    f"evaluation.classifier_split: made images are [{made.frames}, {made.height}, "
                    f"{made.width}, 3], and those of split {name!r} {list(video.shape)}. Give pixels "
                    "of one size (sampling.height, width; data.transform.crop), or unset it."
                )

    def _resized(self, video: np.ndarray) -> np.ndarray:
        """A recorded clip of pixels, as training transforms it."""
        return crop(self._config.data.transform, video)

    def _of_shapes(self, source: ShapesConfig, count: int) -> list[Request]:
        config, made = self._config, self._config.sampling
        self._scenes = held_out_scenes(count, config.seed, made.frames, made.height, made.width)
        codec = config.codec
        if self._factor > 1:
            self._true = [render(scene) for scene in self._scenes]
        return [
            Request(
                caption(s),
                *codec.latent_size(s.frames, s.height, s.width),
                codec.latent_fps(source.fps),
                seed=i,
                pixel_fields=self._low_res(self._true[i]) if self._true else {},
            )
            for i, s in enumerate(self._scenes)
        ]

    def _low_res(self, video: np.ndarray) -> dict[str, np.ndarray]:
        """The field of a super-resolution model; none for another."""
        if self._factor == 1:
            return {}
        return {NAME: low_of(video, self._factor, self._codec)}

    def _of_classes(self, classes: int, count: int) -> list[Request]:
        made = self._config.sampling
        size = self._config.codec.latent_size(made.frames, made.height, made.width)
        fps = self._config.codec.latent_fps(made.fps)
        fields = [{"label": i % classes} for i in range(count)]
        return [Request("", *size, fps, i, segment_fields=one) for i, one in enumerate(fields)]

    def _of_records(self, source: Any, count: int) -> list[Request]:
        split = self._config.evaluation.records_split
        if isinstance(source, RecordsConfig):
            held = RecordsSource(dataclasses.replace(source, split=split or source.split))
        else:  # of a user's own
            held = open_source(source)
        samples = [held[i] for i in range(min(len(held), count))]
        requests = []
        for i, sample in enumerate(samples):
            video, fps = sample["video"], sample["fps"]
            if video.dtype == np.uint8:
                fps = self._config.codec.latent_fps(fps)
                video = self._resized(video)
                t, h, w = self._config.codec.latent_size(*video.shape[:3])
            elif split:
                raise ValueError(
                    f"evaluation.records_split is {split!r}, whose clips are latents: pixels cannot be "
                    "compared with them. Unset it."
                )
            else:
                t, h, w = video.shape[:3]
            states = sample.get("text_states")
            requests.append(
                Request(
                    sample["caption"],
                    t,
                    h,
                    w,
                    fps,
                    i,
                    states,
                    segment_fields=sample.get("segment_fields", {}),
                    frame_fields=sample.get("frame_fields", {}),
                    pixel_fields=self._low_res(video),
                    time_stride=self._config.codec.t,
                )
            )
            if split:
                self._true.append(video)
        return requests

    def measure(self, clips: list[np.ndarray]) -> dict[str, float]:
        """The judge's verdict on moving shapes; the classifier's on images of classes; the distance to
        the truth of recorded clips, and of what is enlarged."""
        if self._factor > 1:
            return fidelity(clips, self._true[: len(clips)], self._factor)
        if self._scenes:
            return prompt_following(clips, self._scenes[: len(clips)])
        if self._config.evaluation.classifier_split is not None:
            return self._classify(clips)
        return {"psnr": mean_psnr(clips, self._true[: len(clips)]), "count": len(clips)}

    def _classify(self, clips: list[np.ndarray]) -> dict[str, float]:
        source = getattr(self._config.data.source, "shown_set", self._config.data.source)
        split = self._config.evaluation.classifier_split
        assert isinstance(source, RecordsConfig) and split is not None
        held, trained = (
            self._images(dataclasses.replace(source, split=name), limit)
            for name, limit in ((split, None), (source.split, len(clips)))
        )
        asked = self.requests[: len(clips)]
        labels = np.array([request.segment_fields["label"] for request in asked])
        return judge_classes(np.concatenate(clips), labels, *held, trained[0])

    def _images(self, source: RecordsConfig, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The pictures and labels of a split, transformed as training transforms them; evenly spaced
        ones, where there are more than ``limit``."""
        records = RecordsSource(source)
        count = len(records) if limit is None else min(limit, len(records))
        samples = [records[i * len(records) // count] for i in range(count)]
        pictures = [self._resized(s["video"])[0] for s in samples]
        return np.stack(pictures), np.array(
            [s.get("segment_fields", {}).get("label", 0) for s in samples]
        )

    @property
    def measurable(self) -> bool:
        judged = self._scenes or self._true or self._config.evaluation.classifier_split is not None
        return bool(judged) and self._config.evaluation.prompts > 0


def write_sheet(clips: Sequence[np.ndarray], path: Path) -> None:
    """Writes a picture of the first clips, once: rows of frames, or a square of still images."""
    if jax.process_index() != 0:
        return
    if all(len(clip) == 1 for clip in clips):
        columns = 10 if len(clips) >= 30 else None
        picture = grid(list(clips[:IMAGES_SHOWN]), columns)[0]
    else:
        picture = contact_sheet(clips[:CLIPS_SHOWN], FRAMES_SHOWN, SHEET_SCALE)
    write_png(path, picture)
