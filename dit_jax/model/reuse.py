"""Steps of a solver that run no blocks: what the blocks added at an earlier step is added again.

Neighbouring steps see nearly the same input, and what all blocks together add to it changes little
(TeaCache, Liu et al. 2024, arXiv 2411.19108). ``denoise_and_keep`` gives what they added, and
``denoise`` takes it as ``residual`` in their place: the patch embedding and the last layer alone run.
When, ``sampling.sampler`` plans, from ``first_modulation``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.model.blocks import RESIDUALS, Modulation
from dit_jax.model.dit import DiTConfig, TimeEmbedding
from dit_jax.model.text_to_video import TextToVideo
from dit_jax.types import DenoiserInputs, Params, unconstrained


def denoise_and_keep(
    model: TextToVideo, params: Params, inputs: DenoiserInputs
) -> tuple[Float[Array, "b l o"], Float[Array, "b l d"]]:
    """``TextToVideo.denoise``, and what the blocks added, in the dtype of activations."""
    made: Any = model.apply(params, inputs, method="denoise", mutable=[RESIDUALS])
    output, left = made
    return output, left[RESIDUALS]["dit"]["blocks"]


def first_modulation(
    config: DiTConfig, params: Params, t: Float[Array, "k"]
) -> Float[Array, "k m"]:
    """Shift and scale (1 added) of what enters the first block, ``m = 2 d``, at noise levels ``t`` and
    with no text: the part of that input which the level alone decides.

    ``params`` are those of ``DiT``, without boxes.
    """
    condition: Any = TimeEmbedding(config, unconstrained).apply({"params": params["time"]}, t[None])
    blocks = params["blocks"]
    first = blocks["layer_0"] if config.band is not None else blocks
    modulation = Modulation(config.width, 2)
    if config.modulation == "shared":
        made: Any = modulation.apply({"params": params["modulation"]}, condition)
        made = made + first["modulation_table"][0]
    else:
        own = jax.tree.map(lambda leaf: leaf[0], first["modulation"])
        made = modulation.apply({"params": own}, condition)
    shift, scale, *_ = jnp.split(made[0], 6, -1)
    return jnp.concatenate([shift, 1 + scale], -1)
