"""The denoiser's inputs, from the fields that a test has."""

from typing import Any

import jax.numpy as jnp

from dit_jax.types import DenoiserInputs


def struct(fields: dict[str, Any] | None = None, **more: Any) -> DenoiserInputs:
    """``DenoiserInputs`` with nothing dropped, for as many segments as a row has modulation groups."""
    given = {**(fields or {}), **more}
    given.setdefault("text", None)
    given.setdefault("text_segment_ids", None)
    given.setdefault("dropped", jnp.zeros(given["group_t"].shape))
    return DenoiserInputs(**given)
