"""The data of a run, opened."""

from __future__ import annotations

from dit_jax.data import (
    MixedSource,
    MixtureConfig,
    MovingShapes,
    RecordsConfig,
    RecordsSource,
    ShapesConfig,
    open_mixture,
)
from dit_jax.types import Source


def make_source(config: ShapesConfig | RecordsConfig | MixtureConfig) -> Source:
    """Opens the data; raises ``ValueError`` where it is absent, foreign or empty, or its sets cannot be
    mixed."""
    if isinstance(config, ShapesConfig):
        return MovingShapes(config)
    if isinstance(config, MixtureConfig):
        return open_mixture(config)
    return RecordsSource(config)


def records_of(config: ShapesConfig | RecordsConfig | MixtureConfig) -> tuple[RecordsConfig, ...]:
    """The sets of records that are trained on: none, one or several."""
    if isinstance(config, ShapesConfig):
        return ()
    return config.sets if isinstance(config, MixtureConfig) else (config,)


def shown_source(
    config: ShapesConfig | RecordsConfig | MixtureConfig,
) -> ShapesConfig | RecordsConfig:
    """What pictures and reports are about: of a mixture, one of its sets."""
    return config.shown_set if isinstance(config, MixtureConfig) else config


def opened_records(source: Source) -> tuple[RecordsSource, ...]:
    """The sets of records in a source that was opened."""
    parts = source.parts if isinstance(source, MixedSource) else (source,)
    return tuple(part for part in parts if isinstance(part, RecordsSource))
