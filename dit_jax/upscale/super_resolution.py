"""Super-resolution in measuring and sampling: clips that are enlarged by a model with ``LowRes``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.codec.codec import Codec
from dit_jax.config import VideoRun
from dit_jax.files import local_copy
from dit_jax.sampling import Edit, Request, check_request, to_float
from dit_jax.sampling.long_plan import LongArguments
from dit_jax.sampling.media import EXTENSIONS, mean_psnr, read_video
from dit_jax.sampling.requested import ModeArguments
from dit_jax.sampling.space import filled
from dit_jax.upscale.low_res import LEVEL, NAME, LowRes, factor_of
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


def read_clips(names: Sequence[str], read: Callable[[Path], Clip] = read_video) -> list[Clip]:
    """Clips of files, and of those in folders in the order of their names.

    Args:
        read: a file.

    Raises:
        ValueError: where there are none, or one cannot be read.
    """
    found = []
    for name in names:
        path = local_copy(name)
        if not path.is_dir():
            found.append(read(path))
            continue
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS)
        if not files:
            raise ValueError(
                f"{name!r} holds no files ending in {', '.join(EXTENSIONS)}: give the directory that "
                "samples were written to, or files."
            )
        found += map(read, files)
    return found


def check_given(config: VideoRun, files: Sequence[str], augmentation: float = 0.0) -> None:
    """Raises ``ValueError`` if a model that enlarges has no clips to enlarge, or another has some."""
    conditioner = config.model.conditioners.get(NAME)
    if isinstance(conditioner, LowRes):
        if not files:
            raise ValueError(
                f"the model enlarges clips {conditioner.factor} times: give some with --super-resolve."
            )
        if not 0 <= augmentation <= conditioner.augmentation:
            raise ValueError(
                f"--augmentation {augmentation}: it is at least 0, and at most what the model was "
                f"trained on, {conditioner.augmentation} (model.conditioners.{NAME}.augmentation)."
            )
    elif files or augmentation:
        raise ValueError(
            "the model does not enlarge clips: leave --super-resolve and --augmentation out, or give "
            "--checkpoint a run of super-resolution."
        )


def check_enlarges(mode: ModeArguments, long: LongArguments, sampling: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` where clips are to be enlarged and something else besides; ``sampling`` are
    the options of that name that are given."""
    if mode.source or mode.loop or long.long:
        raise ValueError(
            "--super-resolve enlarges clips and does nothing else to them: make the clip first, and "
            "enlarge what comes out."
        )
    sizes = {name: sampling.get(name) for name in ("height", "width", "frames", "fps")}
    for name, value in {**sizes, "duration": mode.duration}.items():
        if value is not None:
            raise ValueError(
                f"--{name} {value} and --super-resolve: size, length and rate are those of the clips. "
                "Leave it out."
            )


def each_clip(
    prompts: Sequence[str | int], clips: Sequence[Clip], num: int
) -> tuple[list[str | int], list[Clip]]:
    """Every clip ``num`` times, and a prompt for each of these.

    ``prompts`` are one for each clip or one for all, each ``num`` times, or none: the empty one.

    Raises:
        ValueError: for another number of them.
    """
    repeated = [clip for clip in clips for _ in range(num)]
    given = list(prompts) or [""] * num
    if len(given) == num:
        given = given * len(clips)
    if len(given) != len(repeated):
        raise ValueError(
            f"{len(given) // num} prompts for {len(clips)} clips of --super-resolve: give one for "
            "each, one for all, or none."
        )
    return given, repeated


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
        check_request(sized, config.model.patch)
        made.append(
            dataclasses.replace(
                sized,
                pixel_fields={NAME: seen_low(video, factor, codec)},
                segment_fields={NAME + LEVEL: np.float32(augmentation)},
            )
        )
    return made


def cut_again(requests: Sequence[Request], clips: Sequence[Clip]) -> list[Edit]:
    """What makes the requests of ``enlarging``, and leaves them the clips' own lengths."""

    def one(request: Request, count: int) -> Edit:
        return Edit((request,), lambda made: made[0][:count])

    return [one(made, len(video)) for made, (video, _) in zip(requests, clips, strict=True)]
