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
    Spacing,
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
    spacing: Spacing = "linear"
    """Of the noise levels: trailing and linspace (DiT) pick indices of the discrete path."""
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
    cache_threshold: float = 0.0
    """Feature caching: steps reuse what the transformer's blocks added, until the noise level's part
    of the first block's input has changed by this share in all (docs/long.md). 0 is off, as loops
    always are: their positions turn."""
    batch: int = 32
    """Clips made at once."""

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
        )

    def check(self, diffusion: DiffusionConfig, channels: int) -> None:
        """Raises ``ValueError`` where a model so trained cannot be sampled so, with what it can."""
        path = diffusion.path
        if SOLVERS[self.solver].continuous and path.discrete:
            raise ValueError(
                f"sampling.solver {self.solver!r} follows a velocity, and path.kind 'ddpm' has none: "
                "use 'ddpm' or 'ddim' with eta for noise, or another solver for none."
            )
        if self.spacing != "linear":
            if self.shift not in (None, 1) or self.last_step is not None:
                raise ValueError(
                    f"sampling.spacing {self.spacing!r} takes no shift ({self.shift}) and no last_step "
                    f"({self.last_step}): set both to None, or spacing to 'linear'."
                )
            if not path.discrete or self.steps > path.timesteps:
                raise ValueError(
                    f"sampling.spacing {self.spacing!r} picks {self.steps} indices of path.kind 'ddpm',"
                    f" and the path is {path.kind!r} of {path.timesteps}: use 'linear', or fewer steps."
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
