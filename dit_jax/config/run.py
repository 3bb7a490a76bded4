"""What every run of training has, whatever it trains."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from operator import attrgetter
from typing import Any, ClassVar

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


def check_choices(config: Any, name: str = "") -> None:
    """Raises ``ValueError`` for a field, however deep, whose value is none of its type's choices.

    Python checks no types, and a config file is Python; the command line is checked by ``tyro``.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        here = f"{name}.{field.name}" if name else field.name
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), 1, 0.5)
            raise ValueError(
                f"{here} is {value!r}: it is one of {', '.join(map(repr, choices))}."
                + (f" Perhaps {near[0]!r} was meant." if near else "")
            )
        if dataclasses.is_dataclass(value):
            check_choices(value, here)


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
        check_choices(self)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: it is at least 1.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: it is at least 0.")
        if self.rows % self.optimizer.accumulate:
            raise ValueError(
                f"{self.ROWS} {self.rows} does not divide into optimizer.accumulate "
                f"{self.optimizer.accumulate} parts: make rows a multiple of it."
            )

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return attrgetter(self.ROWS)(self)
