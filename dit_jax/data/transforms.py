"""What is done to a sample before it becomes tokens: resized, cropped, mirrored, one caption chosen.

Nothing by default: every clip keeps its size and aspect ratio. The square crop is the framing of
Dhariwal & Nichol 2021 and of DiT, with another filter. Synthetic captions are mixed with those that
came with the data, which keeps a model from overfitting to the habits of a captioner (Betker et al.
2023, section 3: DALL-E 3 was trained on 95 % synthetic ones). Caption i of weight w_i is drawn with

    p_i = w_i / sum of the w_j of all captions that are not empty                                  (1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import av
import numpy as np

from dit_jax.files import refuse_if
from dit_jax.types import PositiveInt, Sample


@dataclasses.dataclass(frozen=True)
class TransformConfig:
    """How frames are resized and cropped; latents are taken as they are."""

    crop: PositiveInt | None = None
    """The shorter side is resized to so many pixels, and the square in the centre is kept."""
    flip: bool = False
    """Mirror every second clip, left to right; anew in every epoch."""


def resized(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames uint8 ``[t, h, w, 3]`` at another size: averaged over areas if both sides shrink, bicubic
    otherwise."""
    if video.shape[1:3] == (height, width):
        return video
    # Bicubic interpolation looks at four pixels a side: it would skip most of a picture that shrinks.
    how = "AREA" if height <= video.shape[1] and width <= video.shape[2] else "BICUBIC"
    frames = [av.VideoFrame.from_ndarray(np.ascontiguousarray(x), "rgb24") for x in video]
    frames = [x.reformat(width, height, interpolation=how) for x in frames]
    return np.stack([x.to_ndarray(format="rgb24") for x in frames])


def centre(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle ``[t, height, width, c]`` of frames at least so large."""
    top, left = (video.shape[1] - height) // 2, (video.shape[2] - width) // 2
    return video[:, top : top + height, left : left + width]


def crop(config: TransformConfig, video: np.ndarray) -> np.ndarray:
    """A clip uint8 ``[t, h, w, 3]`` as the config has it; float latents come back as they are."""
    if video.dtype != np.uint8 or config.crop is None:
        return video
    side, (height, width) = config.crop, video.shape[1:3]
    scale = side / min(height, width)
    # Rounding must not leave a side one pixel short of the square.
    video = resized(video, max(round(height * scale), side), max(round(width * scale), side))
    return centre(video, side, side)


def flip(sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample, or with probability 1/2 its mirror image. For pixels: a codec's latents of a mirrored
    clip are not the mirrored latents."""
    if rng.random() < 0.5:
        return sample
    mirrored: Sample = {**sample, "video": sample["video"][:, :, ::-1]}
    if "pixel_fields" in sample:
        mirrored["pixel_fields"] = {k: v[:, :, ::-1] for k, v in sample["pixel_fields"].items()}
    return mirrored


def choose_caption(
    sample: Sample, rng: np.random.Generator, mix: Sequence[tuple[str, float]]
) -> Sample:
    """The sample with one of its ``captions``, by equation (1) with the weights of ``mix``.

    A sample whose captions are all empty keeps the one that it has.
    """
    # One random number whatever the captions are, so that what is drawn next does not depend on them.
    point = rng.random()
    captions = sample.get("captions", {})
    choices = [(name, weight) for name, weight in mix if captions.get(name)]
    if not choices:
        return sample
    edges = np.cumsum([weight for _, weight in choices])
    chosen = int(np.searchsorted(edges, point * edges[-1], side="right"))
    # Rounding may put the point on the last edge.
    return with_caption(sample, choices[min(chosen, len(choices) - 1)][0])


def with_caption(sample: Sample, name: str) -> Sample:
    """The sample with one of its ``captions``, and that caption's states, as the one that is used."""
    caption, states = sample.get("captions", {})[name], sample.get("captions_states", {})
    out: Sample = {**sample, "caption": caption}
    if name in states:
        out["text_states"] = states[name]
    else:
        foreign = "text_states" in sample and caption != sample["caption"]
        message = (
            f"the caption {name!r} ({caption[:60]!r}) was drawn and has no text states: give states "
            "for each caption of the mix (captions_states), or draw none (data.source.caption_mix)."
        )
        refuse_if([(foreign, message)])
    return out
