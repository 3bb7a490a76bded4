"""The denoiser's inputs, from the fields that a test has, and gradients compared."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.model import ByteEncoderConfig
from dit_jax.types import DenoiserInputs


def byte_tokens(caption: str, max_bytes: int) -> np.ndarray:
    """A caption as the byte encoder reads it."""
    return ByteEncoderConfig(max_bytes=max_bytes).tokens(caption)


def struct(fields: dict[str, Any] | None = None, **more: Any) -> DenoiserInputs:
    """``DenoiserInputs`` with nothing dropped, for as many segments as a row has modulation groups."""
    given = {**(fields or {}), **more}
    given.setdefault("token_ids", jnp.zeros_like(given["segment_ids"]))
    given.setdefault("text", None)
    given.setdefault("text_segment_ids", None)
    given.setdefault("dropped", jnp.zeros(given["group_t"].shape))
    return DenoiserInputs(**given)


def assert_same(ours, theirs):
    """Losses and gradients within float32 rounding: sums of the same terms in another order."""
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    leaves, structure = jax.tree_util.tree_flatten_with_path(ours[1])
    assert structure == jax.tree.structure(theirs[1])
    for (path, x), y in zip(leaves, jax.tree.leaves(theirs[1]), strict=True):
        where, scale = jax.tree_util.keystr(path), np.abs(y).max()
        assert scale > 0, where
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale, err_msg=where)
