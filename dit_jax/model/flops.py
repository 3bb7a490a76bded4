"""How many floating-point operations the model takes, counted from its shapes.

A multiplication and an addition count as two. Only what the mathematics asks for is counted:
attention within segments (and windows), one noise level a segment, no recomputation, no padding.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

from dit_jax.model.dit import TIME_FREQUENCIES, ModelConfig
from dit_jax.model.text import ByteEncoderConfig, TextStatesConfig


def forward_flops(
    config: ModelConfig,
    num_tokens: Int[np.ndarray, "*b"],
    num_text: Int[np.ndarray, "*b"],
    encode_text: bool = True,
) -> Float[np.ndarray, "*b"]:
    """Of one forward pass over segments of so many tokens, each with so many text tokens; without
    ``encode_text``, of the transformer alone, as a solver runs it."""
    dit, text = config.dit, config.text
    tokens, letters = num_tokens.astype(np.float64), num_text.astype(np.float64)
    d, hidden = dit.width, dit.hidden
    per_token = 2 * d * (3 * d + d) + 4 * d * hidden
    block = per_token * tokens + 4 * d * tokens * tokens
    if dit.cross_attention:
        block += 2 * d * 2 * d * tokens + 2 * config.text_width * 2 * d * letters
        block += 4 * d * tokens * letters
    fields = [one.field(config) for one in config.conditioners.values()]
    beside = sum(math.prod(field.shape) for field in fields if field.of == "token")
    ends = 2 * (config.patch.dim + beside + config.output_dim) * d * tokens
    # Once a segment: its noise level's embedding, the pooled text's, and the modulation.
    layers = dit.depth if dit.modulation == "layer" else 1
    condition = (TIME_FREQUENCIES + d) * d + dit.pooled_text * config.text_width * d
    ends = ends + 2 * (condition + (6 * layers + 2) * d * d) * (tokens > 0)
    unseen = 0.0
    if dit.window is not None:
        reach = np.minimum(dit.window, np.maximum(tokens - 1, 0))
        seen = tokens * (2 * reach + 1) - reach * (reach + 1)
        windowed = dit.depth - dit.depth // dit.global_every
        unseen = windowed * 4 * d * (tokens * tokens - seen)
    if isinstance(text, ByteEncoderConfig):
        e = text.width
        encoder = text.depth * (24 * e * e * letters + 4 * e * letters * letters)
        encoder += 2 * e * e * letters
    elif isinstance(text, TextStatesConfig):
        encoder = 2 * (text.dim + d) * d * letters
    else:
        encoder = 0.0
    return dit.depth * block - unseen + ends + (encoder if encode_text else 0.0)
