"""What the training loop knows of what it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dit_jax.data import RowStreams
from dit_jax.training.evaluators import Evaluator
from dit_jax.training.state import Filter, InitParams, LoadFrozen, everything
from dit_jax.training.step import LossFn


class Work(NamedTuple):
    """What a batch was worth, for throughput: counted on the host."""

    tokens: float
    """Tokens that are not padding."""
    capacity: float
    """Tokens that there was room for."""
    flops: float
    """Model flops of a train step on it: three times the forward pass, recomputation left out."""


class Task(NamedTuple):
    """A thing to train: what to initialise, the loss of a batch, its data, what to measure."""

    name: str
    init: InitParams
    loss: LossFn
    loader: Callable[[tuple[int, ...]], RowStreams[Any]]
    """``loader(rows)``: batches of this process's rows of the global batch."""
    rows: int
    """Rows of the global batch."""
    work: Callable[[Any], Work]
    evaluators: tuple[Evaluator, ...] = ()
    """What is measured and pictured when it is due."""
    trainable: Filter = everything
    """Which parameters of ``init`` are trained; the others are the loss's ``frozen``."""
    load_frozen: LoadFrozen | None = None
    """Where the frozen ones come from; None: they are what ``init`` draws."""
