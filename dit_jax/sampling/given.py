"""What a request is given besides its text: clean latents, how free each is, and when it is shown.

Ceilings are told for latents and taken by tokens: a token is as free as the freest of its latents.
Those of its latents that are given all the same are *put back* after every step of the solver, at the
token's own noise level (Song et al. 2021, "Score-based generative modeling", section I.2), so that
patches of several frames, and masks finer than a patch, keep what was given too.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from dit_jax.model import PatchConfig, patchify, positions


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Clean latents, and the noise ceiling of each: 0 is given and held, 1 is free, and between them
    the latent is remade from so much noise.

    Raises:
        ValueError: where shapes do not agree, or a ceiling is outside [0, 1].
    """

    clean: np.ndarray
    """``[t, h, w, c]``, of the request's size; anything finite where the ceiling is 1."""
    ceilings: np.ndarray
    """``[t]``, or ``[t, h, w]`` for parts of a picture."""

    def __post_init__(self) -> None:
        shape, found = np.shape(self.clean), np.shape(self.ceilings)
        if len(shape) != 4 or found not in (shape[:1], shape[:3]):
            raise ValueError(
                f"given latents of shape {shape} with ceilings {found}: latents are [t, h, w, c], and "
                "ceilings [t] or [t, h, w] of the same."
            )
        if not np.isfinite(self.clean).all():
            raise ValueError(
                "given latents are NaN or infinite: give zeros where nothing is given."
            )
        low, high = np.min(self.ceilings), np.max(self.ceilings)
        if not (low >= 0 and high <= 1):
            raise ValueError(f"ceilings from {low} to {high}: they are in [0, 1] (0 is held).")

    @property
    def levels(self) -> np.ndarray:
        """The distinct ceilings."""
        return np.unique(self.ceilings)


class GivenTokens(NamedTuple):
    """The same, token by token."""

    clean: np.ndarray
    """``[l, p]``"""
    ceilings: np.ndarray
    """``[l]``"""
    known: np.ndarray
    """bool ``[l, p]``: the numbers that are given in tokens that are not held."""


def given_tokens(patch: PatchConfig, given: Given, loop: bool) -> GivenTokens:
    """What is given as tokens; of a loop, no token is a first frame's."""
    full = given.ceilings if np.ndim(given.ceilings) == 3 else given.ceilings[:, None, None]
    spread = np.broadcast_to(full[..., None], given.clean.shape).astype(np.float32)
    clean, each = (_patches(patch, x, loop) for x in (given.clean.astype(np.float32), spread))
    ceilings = each.max(-1)
    return GivenTokens(clean, ceilings, (each == 0) & (ceilings > 0)[:, None])


def _patches(patch: PatchConfig, video: np.ndarray, loop: bool) -> np.ndarray:
    if not loop:
        return patchify(patch, video)
    _, h, w = patch.grid(1, *video.shape[1:3])
    return patchify(patch, np.concatenate([video[:1], video]))[h * w :]


def places(
    patch: PatchConfig,
    size: tuple[int, int, int],
    fps: float,
    times: np.ndarray | None = None,
    loop: bool = False,
) -> np.ndarray:
    """Coordinates float32 ``[l, 3]`` of a clip's tokens.

    Args:
        size: latent frames, rows and columns.
        fps: latent frames a second.
        times: ``[t]`` when each latent frame is shown, in latent frames; 0, 1, 2, ... if not given.
            A token stands at the mean of those it holds.
        loop: no token holds a first frame: there are ``patch.t * n`` frames, the first at 1.

    Raises:
        ValueError: where the patch does not divide the clip, or there are not ``t`` times.
    """
    frames, height, width = size
    if loop and frames % patch.t:
        low = max(frames // patch.t, 1) * patch.t
        raise ValueError(
            f"a loop of {frames} frames: with temporal patches of {patch.t} it has {patch.t}n, the "
            f"nearest are {low} and {low + patch.t}."
        )
    if times is not None and np.shape(times) != (frames,):
        raise ValueError(
            f"times of shape {np.shape(times)} for {frames} latent frames: give one for each."
        )
    grid, frame_ids = positions(patch, frames + loop, height, width, fps)
    _, h, w = patch.grid(1, height, width)
    if times is not None:
        shown = np.asarray(times, np.float64)
        groups = shown if loop else shown[1:]
        middles = groups.reshape(-1, patch.t).mean(1)
        middles = middles if loop else np.concatenate([shown[:1], middles])
        clock = np.concatenate([np.zeros(int(loop)), middles])
        clock *= patch.reference_fps / (patch.t * fps)
        grid[:, 0] = clock[frame_ids]
    return grid[h * w :] if loop else grid
