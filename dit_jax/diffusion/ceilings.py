"""Noise ceilings: which tokens of a segment are given, and which are to be made.

Every token has a ceiling s in [0, 1]: 0 is given and held, 1 is free; when the segment stands at
noise level t, the token stands at tau = min(t, s). Training draws a pattern for each segment, so
that one denoiser learns every mode of sampling (diffusion forcing, Chen et al. 2024, with the
patterns of the modes instead of independent levels).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PATTERNS = ("free", "first", "head", "tail", "ends", "every")


@dataclasses.dataclass(frozen=True)
class CeilingConfig:
    """Relative weights of the patterns that training draws, and the noise on what is given."""

    free: float = 0.7
    """Everything is to be made: text to video."""
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
    noisy: float = 0.5
    """Probability that what is given carries noise itself."""
    max_noise: float = 0.1
    """Its ceiling is then drawn uniformly up to this."""

    def __post_init__(self) -> None:
        for name in PATTERNS:
            if getattr(self, name) < 0:
                raise ValueError(
                    f"ceilings.{name} is {getattr(self, name)}: weights are at least 0."
                )
        if sum(self.weights) <= 0:
            raise ValueError("every ceilings weight is 0: at least one pattern must be drawn.")
        for name in ("noisy", "max_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ceilings.{name} is {getattr(self, name)}: it is in [0, 1].")

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in PATTERNS)


def draw_pattern(
    config: CeilingConfig, key: jax.Array, num_frames: Int[Array, ""]
) -> tuple[Int[Array, "4"], Float[Array, ""]]:
    """Draws for one segment which latent frames are given, and their ceiling.

    Returns:
        ``(head, tail, stride, last)`` for ``held_frames``, and the ceiling of the given frames.
        A segment of one frame is always free; two frames have no middle for ``ends``.
    """
    which, count, other, level, noisy = jax.random.split(key, 5)
    pattern = jax.random.categorical(which, jnp.log(jnp.array(config.weights)))
    most = jnp.maximum(num_frames - 1, 1)
    given = jax.random.randint(count, (), 1, most + 1)
    # Of the ``given`` frames at most, ``ends`` puts a part at each end.
    part = jax.random.randint(other, (), 1, jnp.maximum(given, 2))
    stride = jax.random.randint(other, (), 2, 5)
    zero = jnp.zeros((), jnp.int32)
    head = jnp.select(
        [pattern == 1, pattern == 2, pattern == 4], [jnp.ones((), jnp.int32), given, part], zero
    )
    tail = jnp.select([pattern == 3, pattern == 4], [given, jnp.maximum(given - part, 1)], zero)
    stride = jnp.where(pattern == 5, stride, 0)
    alone = num_frames < jnp.where(pattern == 4, 3, 2)
    shape = jnp.where(alone, 0, jnp.stack([head, tail, stride, num_frames]))
    ceiling = jax.random.uniform(level, maxval=config.max_noise)
    return shape, jnp.where(jax.random.bernoulli(noisy, config.noisy), ceiling, 0.0)


def held_frames(frame_ids: Int[Array, "*b"], pattern: Int[Array, "*b 4"]) -> Bool[Array, "*b"]:
    """Whether each token's latent frame is given under its segment's drawn pattern."""
    head, tail, stride, frames = jnp.moveaxis(pattern, -1, 0)
    every = (stride > 0) & (frame_ids % jnp.maximum(stride, 1) == 0)
    return (frame_ids < head) | (frame_ids >= frames - tail) & (tail > 0) | every
