"""A clean stop on SIGTERM and SIGINT: the loop finishes its step, saves, and ends."""

from __future__ import annotations

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Knows whether the run was asked to stop; all processes learn it at the same step.

    A second signal stops at once. With several processes JAX's own preemption service spreads a
    SIGTERM to all of them.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._several = jax.process_count() > 1
        if self._several:
            signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
        else:
            signal.signal(signal.SIGINT, self._note)
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; called by every process at every step."""
        if self._several and self.name is None:
            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "SIGTERM"
        return self.name is not None
