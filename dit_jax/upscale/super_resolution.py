"""Super-resolution in measuring and sampling: clips that are enlarged by a model with ``LowRes``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dit_jax.config import VideoRun
from dit_jax.files import InputError
from dit_jax.sampling import Generation, Request, to_float
from dit_jax.sampling.media import mean_psnr
from dit_jax.sampling.request import check_request, filled
from dit_jax.training import ClipsEvaluator
from dit_jax.types import Codec
from dit_jax.upscale.low_res import LEVEL, NAME, factor_of
from dit_jax.upscale.resizing import enlarge, shrink


def low_res_field(video: np.ndarray, factor: int, codec: Codec | None) -> np.ndarray:
    """A low-resolution clip uint8 ``[t, h, w, 3]`` as the model reads it: float pixels or latents of a
    clip with ``factor`` times as many rows and columns."""
    large = to_float(enlarge(video, factor))
    return large if codec is None else np.asarray(codec.encode(large), np.float32)


def fidelity(clips: Sequence[np.ndarray], true: Sequence[np.ndarray], factor: int) -> dict:
    """PSNR in dB (means over clips) of generated clips, of bicubic enlargement, and the gain."""
    bicubic = [enlarge(shrink(video, factor), factor) for video in true]
    ours, plain = mean_psnr(clips, true), mean_psnr(bicubic, true)
    return {"psnr": ours, "bicubic_psnr": plain, "gain": ours - plain, "count": len(true)}


@dataclasses.dataclass(frozen=True)
class SuperResolutionEvaluator(ClipsEvaluator):
    """PSNR of held-out clips that are enlarged, beside that of bicubic enlargement."""

    def measure(
        self, config: VideoRun, requests: Sequence[Request], true: Sequence[np.ndarray]
    ) -> Callable[[Sequence[np.ndarray]], dict]:
        factor = factor_of(config.model)
        if factor == 1 or len(true) < len(requests):
            raise InputError(
                "evaluators has a SuperResolutionEvaluator: give model.conditioners a LowRes, and "
                "data.eval_split clips of pixels."
            )
        return lambda clips: fidelity(clips, true, factor)


def enlarging(
    requests: Sequence[Request],
    clips: Sequence[tuple[np.ndarray, float]],
    config: VideoRun,
    codec: Codec | None,
    augmentation: float = 0.0,
) -> list[Generation]:
    """What generates clips (uint8 ``[t, h, w, 3]``, and their frames a second) at ``factor`` times
    their size, with their lengths and rates, by the prompt and seed of a request each; ``augmentation``
    is the noise level of the clips."""
    out, factor = [], factor_of(config.model)
    for request, (clip, fps) in zip(requests, clips, strict=True):
        # If the last frames do not fill a token, the last one is repeated, and cut off again.
        video = filled(clip, config.codec.t * config.model.patch.t)
        frames, height, width = video.shape[:3]
        t, h, w = config.codec.latent_size(frames, height * factor, width * factor)
        request = dataclasses.replace(
            request,
            frames=t,
            height=h,
            width=w,
            fps=config.codec.latent_fps(fps if frames > 1 else config.sampling.fps),
            pixel_fields={NAME: low_res_field(video, factor, codec)},
            segment_fields={NAME + LEVEL: np.float32(augmentation)},
        )
        check_request(request, config.model)
        out.append(Generation((request,), partial(_first, len(clip))))
    return out


def _first(frames: int, videos: Sequence[np.ndarray]) -> np.ndarray:
    return videos[0][:frames]
