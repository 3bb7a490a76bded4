"""The data of a run, opened."""

from __future__ import annotations

from typing import Any

from dit_jax.data import (
    MixedSource,
    MixtureConfig,
    RecordsConfig,
    RecordsSource,
)
from dit_jax.types import Source


def make_source(config: Any) -> Source:
    """Opens the data; raises ``ValueError`` where it is absent, foreign or empty, or its sets cannot be
    mixed."""
    return config.open() if hasattr(config, "open") else config


def records_of(config: Any) -> tuple[RecordsConfig, ...]:
    """The sets of records that are trained on: none, one or several."""
    if isinstance(config, MixtureConfig):
        return config.sets
    return (config,) if isinstance(config, RecordsConfig) else ()


def shown_source(config: Any) -> Any:
    """What pictures and reports are about: of a mixture, one of its sets."""
    return config.shown_set if isinstance(config, MixtureConfig) else config


def opened_records(source: Source) -> tuple[RecordsSource, ...]:
    """The sets of records in a source that was opened."""
    parts = source.parts if isinstance(source, MixedSource) else (source,)
    return tuple(part for part in parts if isinstance(part, RecordsSource))
