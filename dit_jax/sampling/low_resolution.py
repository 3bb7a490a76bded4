"""What a model of super-resolution is given besides the noise, as tokens of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dit_jax.diffusion import PathConfig, interpolate, per_segment, token_noise
from dit_jax.model import ModelConfig, patchify

OF_LOW = 2**32 - 2
"""Sets the noise of what is given apart from that of tokens, whose indices are smaller."""


def low_tokens(
    clips: Sequence[np.ndarray | None], model: ModelConfig, row_tokens: int
) -> np.ndarray | None:
    """Clips ``[t, h, w, c]``, one a row, as float32 tokens ``[b, row_tokens, p]``; None for a model
    that is given none.

    Raises:
        ValueError: where clips are missing, or the model takes none.
    """
    given = [clip for clip in clips if clip is not None]
    if len(given) != (len(clips) if model.upscale > 1 else 0):
        raise ValueError(
            f"{len(given)} of {len(clips)} requests have a clip at low resolution, and model.upscale "
            f"is {model.upscale}: "
            + ("each needs one." if model.upscale > 1 else "leave them out.")
        )
    if not given:
        return None
    rows = np.zeros((len(given), row_tokens, model.patch.dim), np.float32)
    for row, clip in zip(rows, given, strict=True):
        tokens = patchify(model.patch, clip)
        row[: len(tokens)] = tokens
    return rows


def noised_low(
    path: PathConfig,
    augmentation: float,
    low: Float[Array, "b l p"],
    seeds: Int[Array, "b n"],
    segment_ids: Int[Array, "b l"],
    token_ids: Int[Array, "b l"],
) -> Float[Array, "b l p"]:
    """Tokens at the noise level ``augmentation``; the noise is of the seeds of their segments."""
    if augmentation == 0:
        return low

    def of_low(seed: Int[Array, ""]) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), OF_LOW)

    keys = jax.vmap(jax.vmap(of_low))(seeds)
    eps = token_noise(keys, segment_ids, token_ids, low.shape[-1])
    levels = per_segment(jnp.full(seeds.shape, augmentation), segment_ids)
    return interpolate(path, low, eps, levels)
