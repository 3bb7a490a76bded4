"""What is done to a clip's frames before they become tokens: resized, cropped, mirrored.

Nothing by default: every clip keeps its size and aspect ratio. Image sets whose pictures are larger
than a row are shrunk, either all to one square (the shorter side resized, the centre cropped: the
framing of Dhariwal & Nichol 2021 and of DiT, with another filter), or to an area, each in its own
aspect ratio.
"""

from __future__ import annotations

import dataclasses
import math

import av
import numpy as np

from dit_jax.types import Sample


@dataclasses.dataclass(frozen=True)
class TransformConfig:
    """How frames are resized and cropped; latents are taken as they are."""

    crop: int | None = None
    """The shorter side is resized to so many pixels, and the square in the centre is kept."""
    max_area: int | None = None
    """In place of ``crop``: frames of more pixels are shrunk to so many, in their aspect ratio."""
    whole_patches: bool = False
    """Crop what is left over at the edges, where the model's patches do not divide a clip."""
    flip: bool = False
    """Mirror every second clip, left to right; drawn anew in every epoch."""

    def __post_init__(self) -> None:
        if self.crop is not None and self.max_area is not None:
            raise ValueError(
                f"transform.crop {self.crop} and max_area {self.max_area}: give one of them, a square "
                "or the aspect ratio of each picture."
            )
        for name in ("crop", "max_area"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"transform.{name} is {value}: it is at least 1, or unset.")


def resized(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames uint8 ``[t, h, w, 3]`` at another size: averaged over areas where both sides shrink,
    bicubic otherwise."""
    if video.shape[1:3] == (height, width):
        return video
    shrinks = height <= video.shape[1] and width <= video.shape[2]
    how = "AREA" if shrinks else "BICUBIC"
    frames = [av.VideoFrame.from_ndarray(np.ascontiguousarray(x), "rgb24") for x in video]
    return np.stack(
        [x.reformat(width, height, interpolation=how).to_ndarray(format="rgb24") for x in frames]
    )


def centre(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle ``[t, height, width, c]`` of frames at least so large."""
    top, left = (video.shape[1] - height) // 2, (video.shape[2] - width) // 2
    return video[:, top : top + height, left : left + width]


Size = tuple[int, int]


def resized_size(
    config: TransformConfig, height: int, width: int, multiple: Size
) -> tuple[Size, Size]:
    """The size that pictures of ``height`` x ``width`` pixels are resized to, and the size of the
    centre which is then kept.

    ``multiple`` is the pixels of a patch along rows and columns, for ``whole_patches``.

    Raises:
        ValueError: if ``whole_patches`` leaves nothing.
    """
    if config.crop is not None:
        scale = config.crop / min(height, width)
        size = (max(round(height * scale), config.crop), max(round(width * scale), config.crop))
        return size, (config.crop, config.crop)
    size = (height, width)
    if config.max_area is not None and height * width > config.max_area:
        scale = math.sqrt(config.max_area / (height * width))
        size = (max(int(height * scale), 1), max(int(width * scale), 1))
    if not config.whole_patches:
        return size, size
    whole = (size[0] // multiple[0] * multiple[0], size[1] // multiple[1] * multiple[1])
    if 0 in whole:
        raise ValueError(
            f"a picture of {size[0]} x {size[1]} pixels is smaller than one patch of "
            f"{multiple[0]} x {multiple[1]}: leave it out, or use smaller patches."
        )
    return size, whole


def resize(config: TransformConfig, video: np.ndarray, multiple: Size) -> np.ndarray:
    """A clip uint8 ``[t, h, w, 3]`` as the config has it; float latents come back as they are."""
    if video.dtype != np.uint8:
        return video
    size, kept = resized_size(config, video.shape[1], video.shape[2], multiple)
    video = resized(video, *size)
    return video if size == kept else centre(video, *kept)


def flip(sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample, or with probability 1/2 its mirror image. For pixels: a codec's latents of a mirrored
    clip are not the mirrored latents."""
    if rng.random() < 0.5:
        return sample
    mirrored = sample.copy()
    mirrored["video"] = sample["video"][:, :, ::-1]
    if "pixel_fields" in sample:
        mirrored["pixel_fields"] = {k: v[:, :, ::-1] for k, v in sample["pixel_fields"].items()}
    return mirrored
