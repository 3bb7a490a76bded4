"""Super-resolution in measuring and sampling: clips that are enlarged by a model with ``LowRes``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dit_jax.config import VideoRun
from dit_jax.files import InputError
from dit_jax.sampling import Generation, Request, check_request, to_float
from dit_jax.sampling.media import mean_psnr
from dit_jax.sampling.request import filled
from dit_jax.training import ClipsEvaluator
from dit_jax.types import Codec
from dit_jax.upscale.low_res import LEVEL, NAME, factor_of
from dit_jax.upscale.resizing import enlarge, shrink

Clip = tuple[np.ndarray, float]
"""uint8 ``[t, h, w, 3]``, and its frames a second."""


def seen_low(video: np.ndarray, factor: int, codec: Codec | None) -> np.ndarray:
    """A clip uint8 ``[t, h, w, 3]`` of low resolution as the model is given it: float pixels or latents
    of a clip with ``factor`` times as many rows and columns."""
    large = to_float(enlarge(video, factor))
    return large if codec is None else np.asarray(codec.encode(large), np.float32)


def low_of(video: np.ndarray, factor: int, codec: Codec | None) -> np.ndarray:
    """The low-resolution field of a clip uint8 ``[t, h, w, 3]`` that the model shall generate."""
    return seen_low(shrink(video, factor), factor, codec)


def fidelity(clips: Sequence[np.ndarray], true: Sequence[np.ndarray], factor: int) -> dict:
    """PSNR in dB (means over clips) of what was made, of bicubic enlargement, and what is gained."""
    bicubic = [enlarge(shrink(video, factor), factor) for video in true]
    made, plain = mean_psnr(clips, true), mean_psnr(bicubic, true)
    return {"psnr": made, "bicubic_psnr": plain, "gain": made - plain, "count": len(true)}


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
    clips: Sequence[Clip],
    config: VideoRun,
    codec: Codec | None,
    augmentation: float = 0.0,
) -> list[Request]:
    """Requests for the clips at ``factor`` times their size, with their frames and rates.

    Where the last frames do not fill a token, the model is shown the last one again until they do
    (``cut_again`` takes these off).

    Raises:
        ValueError: where the model cannot make clips of such sizes.
    """
    made, factor = [], factor_of(config.model)
    stride = config.codec.t * config.model.patch.t
    for request, (video, fps) in zip(requests, clips, strict=True):
        video = filled(video, stride)
        frames, height, width = video.shape[:3]
        size = config.codec.latent_size(frames, height * factor, width * factor)
        rate = config.codec.latent_fps(fps if frames > 1 else config.sampling.fps)
        sized = dataclasses.replace(
            request, frames=size[0], height=size[1], width=size[2], fps=rate
        )
        made.append(
            dataclasses.replace(
                sized,
                pixel_fields={NAME: seen_low(video, factor, codec)},
                segment_fields={NAME + LEVEL: np.float32(augmentation)},
            )
        )
        check_request(made[-1], config.model)
    return made


def cut_again(requests: Sequence[Request], clips: Sequence[Clip]) -> list[Generation]:
    """What makes the requests of ``enlarging``, and leaves them the clips' own lengths."""

    def one(request: Request, count: int) -> Generation:
        return Generation((request,), lambda made: made[0][:count])

    return [one(made, len(video)) for made, (video, _) in zip(requests, clips, strict=True)]
