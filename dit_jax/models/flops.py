"""How many floating-point operations the model takes, counted from its shapes.

A multiplication and an addition count as two. Only what the mathematics asks for is counted:
attention within segments, no recomputation, no padding.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from dit_jax.models.text_to_video import ModelConfig


def forward_flops(
    config: ModelConfig,
    num_tokens: Int[np.ndarray, "*b"],
    num_text: Int[np.ndarray, "*b"],
) -> Float[np.ndarray, "*b"]:
    """Of one forward pass over segments of so many tokens, each with so many text tokens."""
    dit, text = config.dit, config.text
    tokens, letters = num_tokens.astype(np.float64), num_text.astype(np.float64)
    d, hidden = dit.width, dit.hidden
    per_token = 2 * d * (3 * d + d) + 4 * d * hidden
    block = per_token * tokens + 4 * d * tokens * tokens
    if dit.cross_attention:
        block += 2 * d * 2 * d * tokens + 2 * text.width * 2 * d * letters
        block += 4 * d * tokens * letters
    ends = 4 * config.patch.dim * d * tokens
    e = text.width
    encoder = text.depth * (24 * e * e * letters + 4 * e * letters * letters) + 2 * e * e * letters
    return dit.depth * block + ends + encoder
