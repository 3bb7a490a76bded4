"""Noise ceilings: which tokens of a segment are given, and which are to be made.

Every token has a ceiling s in [0, 1]: 0 is given and held, 1 is free; when the segment stands at
noise level t, the token stands at tau = min(t, s). Training draws a pattern for each segment, so
that one denoiser learns every mode of sampling (the patterns of the modes, where diffusion forcing,
Chen et al. 2024, has independent levels; those are a pattern here, too).

Restyling a clip, where all tokens have the strength for a ceiling, needs no pattern: all of them then
stand at one level, which is what ``free`` trains.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PATTERNS = (
    "free",
    "first",
    "head",
    "tail",
    "ends",
    "every",
    "keyframes",
    "window",
    "independent",
)
FREE, FIRST, HEAD, TAIL, ENDS, EVERY, KEYFRAMES, WINDOW, INDEPENDENT = range(len(PATTERNS))


@dataclasses.dataclass(frozen=True)
class CeilingConfig:
    """Relative weights of the patterns that training draws, and the noise on what is given."""

    free: float = 0.6
    """Everything is to be made: text to video; and restyling."""
    first: float = 0.1
    """The first latent frame is given: image to video."""
    head: float = 0.05
    """The first frames, any number: extension forward."""
    tail: float = 0.05
    """The last frames, any number: extension backward."""
    ends: float = 0.05
    """Some of both: connecting two clips, loops."""
    every: float = 0.05
    """Every 2nd, 3rd or 4th frame: interpolation."""
    keyframes: float = 0.05
    """Any frames, any number."""
    window: float = 0.05
    """The first frames, any number, and never without noise: the windows of long clips."""
    independent: float = 0.0
    """Nothing is given, and frames have noise levels of their own: diffusion forcing."""
    levels: int = 16
    """Levels that an ``independent`` segment has at most: frames so far apart share one. Each is a
    group of the batch, of every segment."""
    noisy: float = 0.5
    """Probability that what is given carries noise itself (against frozen motion and drift)."""
    max_noise: float = 0.1
    """Its ceiling is then drawn uniformly up to this."""

    def __post_init__(self) -> None:
        for name in PATTERNS:
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"ceilings.{name} is {getattr(self, name)}: weights are at least 0."
                )
        if not sum(self.weights) > 0:
            raise ValueError("every ceilings weight is 0: at least one pattern must be drawn.")
        for name in ("noisy", "max_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ceilings.{name} is {getattr(self, name)}: it is in [0, 1].")
        if self.levels < 2:
            raise ValueError(f"ceilings.levels is {self.levels}: it is at least 2 (16 is usual).")

    @classmethod
    def only(cls, **given: Any) -> CeilingConfig:
        """A config of the patterns that are named, and no others: ``only(free=0.9, first=0.1)``."""
        return cls(**{**dict.fromkeys(PATTERNS, 0.0), **given})

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in PATTERNS)

    @property
    def groups(self) -> int:
        """Conditioning groups of a segment: the free tokens share a noise level, and the given ones
        another; independent frames have as many as there are levels."""
        return self.levels if self.independent else 2


class Pattern(NamedTuple):
    """Which frames of a segment are given, each ``[...]``; see ``held_frames``."""

    head: Int[Array, "*b"]
    tail: Int[Array, "*b"]
    stride: Int[Array, "*b"]
    frames: Int[Array, "*b"]
    """Of the segment; 0 where nothing is given."""
    kept: Int[Array, "*b"]
    """A key frame, -1 where there are none."""
    spared: Int[Array, "*b"]
    """A frame that is none."""
    share: Float[Array, "*b"]
    """Probability of all others to be one."""
    independent: Bool[Array, "*b"]


def draw_pattern(
    config: CeilingConfig, key: jax.Array, num_frames: Int[Array, ""]
) -> tuple[Pattern, Float[Array, ""]]:
    """Draws for one segment which latent frames are given, and their ceiling.

    A segment of one frame is always free; two frames have no middle for ``ends``.
    """
    which, count, other, level, noisy = jax.random.split(key, 5)
    pattern = jax.random.categorical(which, jnp.log(jnp.array(config.weights)))
    most = jnp.maximum(num_frames - 1, 1)
    given = jax.random.randint(count, (), 1, most + 1)
    # Of the ``given`` frames at most, ``ends`` puts a part at each end.
    part = jax.random.randint(other, (), 1, jnp.maximum(given, 2))
    stride = jax.random.randint(other, (), 2, 5)
    # Two different frames, each pair as often.
    kept = jax.random.randint(other, (), 0, jnp.maximum(num_frames, 1))
    spared = (kept + given) % jnp.maximum(num_frames, 1)
    zero = jnp.zeros((), jnp.int32)
    head = jnp.select(
        [pattern == FIRST, (pattern == HEAD) | (pattern == WINDOW), pattern == ENDS],
        [jnp.ones((), jnp.int32), given, part],
        zero,
    )
    tail = jnp.select(
        [pattern == TAIL, pattern == ENDS], [given, jnp.maximum(given - part, 1)], zero
    )
    alone = num_frames < jnp.where(pattern == ENDS, 3, 2)

    def unless_alone(x: Int[Array, ""], otherwise: int = 0) -> Int[Array, ""]:
        return jnp.where(alone, otherwise, x)

    drawn = Pattern(
        head=unless_alone(head),
        tail=unless_alone(tail),
        stride=unless_alone(jnp.where(pattern == EVERY, stride, 0)),
        frames=unless_alone(num_frames),
        kept=unless_alone(jnp.where(pattern == KEYFRAMES, kept, -1), -1),
        spared=unless_alone(spared),
        share=jax.random.uniform(jax.random.fold_in(other, 1)),
        independent=pattern == INDEPENDENT,
    )
    ceiling = jax.random.uniform(level, maxval=config.max_noise)
    noised = jax.random.bernoulli(noisy, config.noisy) | (pattern == WINDOW)
    return drawn, jnp.where(noised, ceiling, 0.0)


def held_frames(
    frame_ids: Int[Array, "*b"], pattern: Pattern, chance: Float[Array, "*b"]
) -> Bool[Array, "*b"]:
    """Whether each token's latent frame is given under its segment's drawn pattern.

    ``chance`` is a number in [0, 1) of each frame's own. Of key frames one is given, another is not,
    and each of the rest is with the probability ``share``, which is uniform: so every number of them,
    from one to all but one, is as likely, and of one number every choice.
    """
    head, tail, frames = pattern.head, pattern.tail, pattern.frames
    every = (pattern.stride > 0) & (frame_ids % jnp.maximum(pattern.stride, 1) == 0)
    some = (frame_ids != pattern.spared) & (chance < pattern.share)
    key = (pattern.kept >= 0) & ((frame_ids == pattern.kept) | some)
    return (frame_ids < head) | (frame_ids >= frames - tail) & (tail > 0) | every | key
