"""What the training loop knows of what it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dit_jax.data import RowStreams
from dit_jax.training.state import Filter, InitParams, LoadFrozen, everything
from dit_jax.training.step import LossFn
from dit_jax.types import Params


class Work(NamedTuple):
    """What a batch was worth, for throughput: counted on the host."""

    tokens: float
    """Tokens that are not padding."""
    capacity: float
    """Tokens that there was room for."""
    flops: float
    """Model flops of a train step on it: three times the forward pass, recomputation left out."""


class Task(NamedTuple):
    """A thing to train: what to initialise, the loss of a batch, what to draw and to report."""

    name: str
    init: InitParams
    loss: LossFn
    loader: Callable[[tuple[int, ...]], RowStreams[Any]]
    """``loader(rows)``: batches of this process's rows of the global batch."""
    rows: int
    """Rows of the global batch."""
    work: Callable[[Any], Work]
    draw: Callable[[Params, Path], None]
    """``draw(ema, path)`` writes a picture of what the model makes now; every process calls it."""
    report: Callable[[Params, Path], Mapping[str, float]]
    """``report(ema, directory)`` measures the finished model; empty where it cannot be measured."""
    trainable: Filter = everything
    """Which parameters of ``init`` are trained; the others are the loss's ``frozen``."""
    load_frozen: LoadFrozen | None = None
    """Where the frozen ones come from; None: they are what ``init`` draws."""
