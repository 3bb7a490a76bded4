"""What a run may measure of its generated clips (``Run.evaluators``), if its data knows the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_jax.data import RecordsConfig, RecordsSource, ShapesConfig, crop, held_out_scenes
from dit_jax.evaluate.classifier import judge_classes
from dit_jax.evaluate.judge import prompt_following
from dit_jax.files import InputError
from dit_jax.sampling import Request
from dit_jax.sampling.media import mean_psnr
from dit_jax.training import ClipsEvaluator

Measure = Callable[[Sequence[np.ndarray]], Mapping[str, float]]


def _shown(config: Any) -> Any:
    """The config of the source that pictures and reports are about: of a mixture, one of its sets."""
    return getattr(config.data.source, "shown_set", config.data.source)


@dataclasses.dataclass(frozen=True)
class ShapeEvaluator(ClipsEvaluator):
    """The share of clips of moving shapes that show what their prompts say (``judge``)."""

    def measure(self, config: Any, requests: Sequence[Request], true: Any) -> Measure:
        if not isinstance(_shown(config), ShapesConfig):
            raise InputError("evaluators has a ShapeEvaluator, and the data are no moving shapes.")
        size = config.sampling.frames, config.sampling.height, config.sampling.width
        scenes = held_out_scenes(len(requests), config.seed, *size)  # Those of the requests.
        return lambda clips: prompt_following(clips, scenes)


@dataclasses.dataclass(frozen=True)
class RecordsEvaluator(ClipsEvaluator):
    """PSNR to the recorded clips of ``data.eval_split`` whose captions are the prompts."""

    def measure(self, config: Any, requests: Sequence[Request], true: Any) -> Measure:
        if isinstance(_shown(config), RecordsConfig) and config.data.eval_split is None:
            raise InputError("evaluators has a RecordsEvaluator: give data.eval_split, its clips.")
        if len(true) < len(requests):
            raise InputError(
                f"data.eval_split is {config.data.eval_split!r}, whose clips are latents: pixels "
                "cannot be compared with them. Take the RecordsEvaluator out of evaluators."
            )
        return lambda clips: {"psnr": mean_psnr(clips, true), "count": len(clips)}


@dataclasses.dataclass(frozen=True)
class ClassEvaluator(ClipsEvaluator):
    """How many images a small classifier takes for the class that was asked for, and the distance of
    its features of them to those of real images (``classifier``)."""

    split: str = "test"
    """Of the records, what the classifier is trained on; a fifth of it judges the classifier."""

    def measure(self, config: Any, requests: Sequence[Request], true: Any) -> Measure:
        source, size = _shown(config), (1, config.sampling.height, config.sampling.width, 3)
        if not isinstance(source, RecordsConfig) or source.label_key is None:
            raise InputError("evaluators has a ClassEvaluator: give data.source.label_key.")

        def images(split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
            """Pictures and labels, transformed as in training; evenly spaced if limited."""
            records = RecordsSource(dataclasses.replace(source, split=split))
            count = len(records) if limit is None else min(limit, len(records))
            samples = [records[i * len(records) // count] for i in range(count)]
            labels = np.array([s.get("segment_fields", {}).get("label", 0) for s in samples])
            videos = [crop(config.data.transform, s["video"]) for s in samples]
            return np.concatenate(videos), labels

        for split in (self.split, source.split):
            shape = crop(
                config.data.transform,
                RecordsSource(dataclasses.replace(source, split=split))[0]["video"],
            ).shape
            if shape != size or config.sampling.frames != 1:
                raise InputError(
                    f"evaluators' ClassEvaluator: generated images are {size}, and those of split "
                    f"{split!r} {shape}. Give pixels of one size (sampling.height, width, frames; "
                    "data.transform.crop), or leave it out."
                )
        labels = np.array([request.segment_fields["label"] for request in requests])

        def measure(clips: Sequence[np.ndarray]) -> Mapping[str, float]:
            real, _ = images(source.split, len(clips))
            return judge_classes(np.concatenate(clips), labels, *images(self.split), real)

        return measure
