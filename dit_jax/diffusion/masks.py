"""Noise caps and conditioning masks: which tokens of a segment condition it, and which are generated.

Every token has a noise cap s in [0, 1]. When its segment stands at noise level t, it stands at ::

    tau = min(t, s)                                                                             (1)

so that s = 0 is a clean conditioning token, and s = 1 a generated one. Training samples a conditioning
mask for each segment, by weight::

    s(f) = cap if MASKS[mask](f) else 1,   cap = 0 or uniform in [0, max_noise)                 (2)

so that one denoiser learns every mode of sampling. Restyling, where all tokens have one cap, needs no
mask of its own: all tokens then stand at one level, as under the mask ``none``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dit_jax.types import NonNegativeFloat, UnitInterval, require

Ints = Int[Array, "*b"]
Floats = Float[Array, "*b"]


class MaskSample(NamedTuple):
    """The random numbers of a segment from which its mask is computed; all of one shape."""

    mask: Ints  # index in MASKS
    frames: Ints  # n, the latent frames of the segment; no random number
    number: Ints  # uniform in 1 ... n - 1
    head: Ints  # of ``number`` frames, how many are at the start if some are at the end
    stride: Ints  # 2, 3 or 4
    keyframe: Ints
    other: Ints  # a frame that is not ``keyframe``; each pair is as likely
    share: Floats
    cap: Floats  # the noise cap of the conditioning tokens (2)


# ``mask(sample, f, chance)``: whether latent frame f conditions; ``chance`` is uniform by frame. A new
# mask is a function here and a weight in MaskConfig, both at the end: the order is that of the random
# choice.
MASKS: dict[str, Callable[[MaskSample, Ints, Floats], Bool[Array, "*b"]]] = {
    "none": lambda s, f, chance: f < 0,
    "first": lambda s, f, chance: f < 1,
    "head": lambda s, f, chance: f < s.number,
    "tail": lambda s, f, chance: f >= s.frames - s.number,
    # Two frames have no middle to generate.
    "ends": lambda s, f, chance: (
        (s.frames > 2) & ((f < s.head) | (f >= s.frames - jnp.maximum(s.number - s.head, 1)))
    ),
    "every": lambda s, f, chance: f % s.stride == 0,
    # One frame conditions, another does not, each of the rest does with probability ``share``, which is
    # uniform: so every number of frames is as likely, and of one number every choice.
    "keyframes": lambda s, f, chance: (f == s.keyframe) | (f != s.other) & (chance < s.share),
    "window": lambda s, f, chance: f < s.number,
}


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Relative weights of the conditioning masks, and the noise on conditioning tokens."""

    none: NonNegativeFloat = 0.6  # all frames are generated: text to video, restyling
    first: NonNegativeFloat = 0.1  # the first latent frame conditions: image to video
    head: NonNegativeFloat = 0.05  # the first frames, any number: extension forward
    tail: NonNegativeFloat = 0.05  # the last frames, any number: extension backward
    ends: NonNegativeFloat = 0.05  # some of both: connecting two clips, loops
    every: NonNegativeFloat = 0.05  # every 2nd, 3rd or 4th frame: interpolation
    keyframes: NonNegativeFloat = 0.05  # any frames, any number
    window: NonNegativeFloat = 0.05  # as head, and never without noise: windows of long clips
    noisy: UnitInterval = 0.5  # probability of noise on conditioning tokens, against drift
    max_noise: UnitInterval = 0.1  # the highest cap of (2)

    def __post_init__(self) -> None:
        require("masks.", self, ("weights", sum(self.weights) > 0, "above 0 for at least one mask"))

    @classmethod
    def only(cls, **weights: float) -> MaskConfig:
        """The masks that are named and no others: ``only(none=0.9, first=0.1)``."""
        return cls(**{**dict.fromkeys(MASKS, 0.0), **weights})  # type: ignore[arg-type]

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in MASKS)


def sample_mask(config: MaskConfig, key: jax.Array, frames: Int[Array, ""]) -> MaskSample:
    """Samples the mask of one segment."""
    mask_key, number_key, other_key, cap_key, noisy_key = jax.random.split(key, 5)
    mask = jax.random.categorical(mask_key, jnp.log(jnp.array(config.weights)))
    number = jax.random.randint(number_key, (), 1, jnp.maximum(frames, 2))
    # A mask reads one of the numbers that share a key; ``share`` is used together with ``keyframe``.
    keyframe = jax.random.randint(other_key, (), 0, jnp.maximum(frames, 1))
    cap = jax.random.uniform(cap_key, maxval=config.max_noise)
    noisy = jax.random.bernoulli(noisy_key, config.noisy) | (mask == list(MASKS).index("window"))
    return MaskSample(
        mask=mask,
        frames=frames,
        number=number,
        head=jax.random.randint(other_key, (), 1, jnp.maximum(number, 2)),
        stride=jax.random.randint(other_key, (), 2, 5),
        keyframe=keyframe,
        other=(keyframe + number) % jnp.maximum(frames, 1),
        share=jax.random.uniform(jax.random.fold_in(other_key, 1)),
        cap=jnp.where(noisy, cap, 0.0),
    )


def conditioning_mask(
    config: MaskConfig, sample: MaskSample, frame_ids: Ints, chance: Floats
) -> Bool[Array, "*b"]:
    """Whether each token conditions, by its latent frame and its segment's sample."""
    conditions = jnp.zeros(frame_ids.shape, bool)
    for index, (name, mask) in enumerate(MASKS.items()):
        if getattr(config, name):
            conditions |= (sample.mask == index) & mask(sample, frame_ids, chance)
    return conditions & (sample.frames > 1)  # A single frame is always generated.
