"""The data of a run, opened."""

from __future__ import annotations

from dit_jax.data import MovingShapes, RecordsConfig, RecordsSource, ShapesConfig
from dit_jax.types import Source


def make_source(config: ShapesConfig | RecordsConfig) -> Source:
    """Opens the data; raises ``ValueError`` where it is absent, foreign or empty."""
    if isinstance(config, ShapesConfig):
        return MovingShapes(config)
    return RecordsSource(config)
