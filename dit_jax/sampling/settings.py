"""How clips are drawn from a trained model: the choice of a solver, its levels and guidance."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from dit_jax.diffusion import (
    SOLVERS,
    DiffusionConfig,
    GuidanceConfig,
    SolverConfig,
    check_solver,
    levels_of,
)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How clips are drawn from a trained model, and of what size unless said."""

    frames: int = 17
    height: int = 256
    width: int = 256
    fps: float = 24.0
    steps: int = 30
    solver: Literal["euler", "heun", "ddim", "ddpm", "sde", "dpmpp_2m", "unipc"] = "euler"
    """See ``diffusion.solvers``: sde follows velocities, the others any path."""
    eta: float = 0.0
    """Noise of ddim: 0 is none, 1 as much as ddpm."""
    sde_strength: float = 1.0
    """Noise of sde: its diffusion is this times sigma."""
    spacing: Literal["linear", "karras", "trailing", "leading", "linspace"] = "linear"
    """Of the noise levels: the last three choose indices of the discrete path (linspace as DiT)."""
    last_step: float | None = None
    """Level from which the last step of a linear spacing goes to 0 (0.04 for SiT's sde, before the
    shift). None: all steps are alike."""
    shift: float | None = None
    """Of the noise schedule towards noise. None: the shift that training used for such a size."""
    cfg_scale: float = 4.0
    """Guidance; 1 is none and halves the work."""
    cfg_channels: int | None = None
    """Guide only the first so many channels (DiT: 3 of 4). None: all."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at noise levels low < t <= high; outside, steps have half the work."""
    cfg_rescale: float = 0.0
    """Share in which the guided prediction keeps the deviation of the conditional (0.7 is usual)."""
    cfg_zero_star: bool = False
    """CFG-Zero*: the unconditional velocity is scaled by its projection on the conditional one."""
    cfg_zero_init: int = 0
    """CFG-Zero*: first steps in which nothing moves (euler and heun)."""
    cache_threshold: float = 0.0
    """Feature caching: steps reuse what the transformer's blocks added, until the noise level's part
    of the first block's input has changed by this share in all (docs/long.md). 0 is off, as loops
    always are: their positions turn."""
    batch: int = 32
    """Clips made at once."""
    augmentation: float = 0.0
    """Of super-resolution: what is given is noised to this level, as training did (up to
    diffusion.augmentation). 0 for clips as they were filmed; about 0.1 for what a model made."""

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}: it is at least 1.")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"sampling.fps is {self.fps}: it is above 0 and finite (24 is usual).")
        if self.shift is not None and not self.shift > 0:
            raise ValueError(f"sampling.shift is {self.shift}: it is above 0 (1 is none), or None.")
        if self.last_step is not None and not 0 < self.last_step < 1:
            raise ValueError(
                f"sampling.last_step is {self.last_step}: a level between 0 and 1, or None."
            )
        if self.last_step is not None and self.steps < 2:
            raise ValueError(
                f"sampling.last_step is {self.last_step} of 1 step: make more, or set it to None."
            )
        if not 0 <= self.cache_threshold < math.inf:
            raise ValueError(
                f"sampling.cache_threshold is {self.cache_threshold}: it is at least 0 (nothing is "
                "reused) and finite; 0.1 is moderate."
            )
        assert self.guidance and SolverConfig(eta=self.eta, strength=self.sde_strength)

    @property
    def guidance(self) -> GuidanceConfig:
        return GuidanceConfig(
            scale=self.cfg_scale,
            channels=self.cfg_channels,
            interval=self.cfg_interval,
            rescale=self.cfg_rescale,
            zero_star=self.cfg_zero_star,
            zero_init=self.cfg_zero_init,
        )

    def check(self, diffusion: DiffusionConfig, channels: int) -> None:
        """Raises ``ValueError`` where a model so trained cannot be sampled so, with what it can."""
        if not 0 <= self.augmentation <= diffusion.augmentation:
            raise ValueError(
                f"sampling.augmentation is {self.augmentation}: it is at least 0, and at most what the "
                f"model was trained on, diffusion.augmentation {diffusion.augmentation}."
            )
        path = diffusion.path
        check_solver(self.solver, path)
        levels_of(path, self.spacing, self.steps, self.shift or 1.0, self.last_step)
        if path.discrete and (self.cfg_zero_star or self.cfg_zero_init):
            raise ValueError(
                "sampling.cfg_zero_star and cfg_zero_init are of velocities, and path.kind 'ddpm' has "
                "none: set them to False and 0."
            )
        if self.cfg_zero_init and self.solver not in ("euler", "heun"):
            raise ValueError(
                f"sampling.cfg_zero_init is {self.cfg_zero_init} and the solver {self.solver!r}, whose "
                "steps move where the velocity is 0, or look back at it: take 'euler' or 'heun', or 0."
            )
        if self.cache_threshold and SOLVERS[self.solver].evaluations > 1:
            raise ValueError(
                f"sampling.cache_threshold is {self.cache_threshold} and the solver {self.solver!r}, "
                "whose step looks twice to see a difference: take 'euler', 'dpmpp_2m' or 'unipc', or 0."
            )
        if self.cfg_channels is not None and self.cfg_channels > channels:
            raise ValueError(
                f"sampling.cfg_channels is {self.cfg_channels}, and the model's patches have "
                f"{channels} channels: guide at most so many, or None for all."
            )
