"""What every run of training has, whatever it trains."""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from typing import ClassVar

from dit_jax.checks import check_types
from dit_jax.parallel import MeshConfig
from dit_jax.training import CheckpointConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run tells while it goes."""

    every: int = 20
    """Steps from one line of scalars to the next."""
    draw_every: int = 1000
    """Steps from one grid of samples to the next; 0 draws none."""
    draw_count: int = 8
    """Clips in a grid."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.draw_every < 0 or self.draw_count < 1:
            raise ValueError(
                f"log.every {self.every} and draw_count {self.draw_count} are at least 1, draw_every "
                f"{self.draw_every} at least 0."
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of training: what the loop needs to know of it."""

    ROWS: ClassVar[str]
    """The dotted name of the field that says how many rows the global batch has."""

    output: str = "runs/default"
    """Directory of the run: checkpoints, logs and samples. A run found there is resumed."""
    steps: int = 1000
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        check_types(self)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: it is at least 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: it is at least 0, and below 2**32.")
        if self.rows % self.optimizer.accumulate:
            raise ValueError(
                f"{self.ROWS} {self.rows} does not divide into optimizer.accumulate "
                f"{self.optimizer.accumulate} parts: make rows a multiple of it."
            )

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return attrgetter(self.ROWS)(self)
