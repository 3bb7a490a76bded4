"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from jaxtyping import Array, Float


def classifier_free(
    conditional: Float[Array, "b l p"],
    unconditional: Float[Array, "b l p"],
    cfg_scale: Float[Array, ""] | float,
) -> Float[Array, "b l p"]:
    """Extrapolates from the unconditional to the conditional velocity; scale 1 is unguided."""
    return unconditional + cfg_scale * (conditional - unconditional)
