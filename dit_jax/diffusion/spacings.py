"""The noise levels that a solver visits: K + 1 of them, falling to 0.

Linear ones are shifted towards noise (Esser et al. 2024, eq. 23). Those of Karras et al. 2022 (eq. 5)
are even in (sigma / alpha)^(1/7). Trailing, leading and linspace are ways to choose indices of a
discrete chain (Lin et al. 2023, table 2); linspace is also how the code of DiT respaces its chain.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

from dit_jax.diffusion.paths import PathConfig, alphas_cumprod, time_of, vp_log_alpha
from dit_jax.diffusion.times import shift_time

Spacing = Literal["linear", "karras", "trailing", "leading", "linspace"]

RHO = 7.0
KARRAS_SMALLEST_T = 1e-3
"""The last level above 0 on a continuous path (vp)."""


def sigma_schedule(
    steps: int, shift: float = 1.0, last: float | None = None
) -> Float[np.ndarray, "k"]:
    """``steps + 1`` noise levels from 1 to 0, evenly spaced and then shifted towards noise.

    With ``last`` they are evenly spaced from 1 to it, and the last step goes from there to 0.

    Raises:
        ValueError: for no steps, or one step of which a last level above 0 is asked.
    """
    if steps < 1:
        raise ValueError(f"{steps} solver steps: at least 1 is needed (20 to 50 are usual).")
    if last is None:
        even = np.linspace(1.0, 0.0, steps + 1)
    elif steps == 1:
        raise ValueError(
            f"1 solver step goes from 1 to 0: it has no last level {last}; set it to None."
        )
    else:
        even = np.append(np.linspace(1.0, last, steps), 0.0)
    return np.asarray(shift_time(even, shift), np.float32)


def _karras(path: PathConfig, steps: int) -> Float[np.ndarray, "k"]:
    if path.discrete:
        kept = alphas_cumprod(path)[[0, -1]]
        ends = np.sqrt((1 - kept) / kept)
    else:
        ends = np.sqrt(np.expm1(-2 * vp_log_alpha(np.array([KARRAS_SMALLEST_T, 1.0]))))
    small, large = ends ** (1 / RHO)
    ratios = (large + np.linspace(0, 1, steps) * (small - large)) ** RHO
    levels = time_of(path, ratios)
    levels[0] = 1.0
    return levels


def _indices(spacing: Spacing, count: int, steps: int) -> np.ndarray:
    """Indices of a chain of ``count`` steps, falling."""
    if spacing == "trailing":
        return np.round(np.arange(steps) * -(count / steps) + count) - 1
    if spacing == "leading":
        return np.arange(steps)[::-1] * (count // steps)
    return np.round(np.linspace(count - 1, 0, steps))


def levels_of(
    path: PathConfig,
    spacing: Spacing,
    steps: int,
    shift: float = 1.0,
    last: float | None = None,
) -> Float[np.ndarray, "k"]:
    """``steps + 1`` noise levels in [0, 1], float32, falling to 0.

    The first is 1 but for leading ones. ``shift`` and ``last`` are of linear ones.

    Raises:
        ValueError: where the path has no such levels, with what it has.
    """
    if spacing == "linear":
        return sigma_schedule(steps, shift, last)
    check_spacing(path, spacing, shift, last)
    if spacing == "karras":
        levels = _karras(path, steps) if steps > 1 else np.ones(1)
    else:
        if not 1 <= steps <= path.timesteps:
            raise ValueError(
                f"{steps} solver steps of a chain of {path.timesteps}: at least 1, at most as many."
            )
        levels = (_indices(spacing, path.timesteps, steps) + 1) / path.timesteps
    return np.append(levels, 0.0).astype(np.float32)


def check_spacing(path: PathConfig, spacing: Spacing, shift: float, last: float | None) -> None:
    """Raises ``ValueError`` where the path has no such levels, with what it has."""
    if spacing == "linear":
        return
    if shift != 1 or last is not None:
        raise ValueError(
            f"sampling.spacing {spacing!r} takes no shift ({shift}) and no last_step ({last}): "
            "set shift to 1 and last_step to None, or spacing to 'linear'."
        )
    if spacing == "karras":
        if path.ends_in_noise:
            raise ValueError(
                f"sampling.spacing 'karras' divides by the signal left at t = 1, and path.kind "
                f"{path.kind!r} (zero_terminal_snr {path.zero_terminal_snr}) leaves none: use "
                "'linear', or 'trailing' for ddpm."
            )
    elif not path.discrete:
        raise ValueError(
            f"sampling.spacing {spacing!r} chooses indices of path.kind 'ddpm', and the path is "
            f"{path.kind!r}: use 'linear'."
        )
