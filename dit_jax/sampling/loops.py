"""Loops of text alone: time is a circle, and the model, which knows lines, is asked about two cuts.

In every step the circle is cut in two places half a turn apart, and what the network says of either
line is averaged, each token's share the larger the further it lies from that cut. Over the steps the
cuts go round (as in Mobius, Bi et al. 2025, which has one), so that no frame stays next to one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dit_jax.types import DenoiserInputs

GOLDEN = 0.6180339887498949
"""Multiples of this, modulo 1, fill the circle evenly however many there are."""


def cycle(places: np.ndarray, loop: bool) -> tuple[float, float, float]:
    """(tokens along time, the first's time, what lies between two) of a loop; else zeros.

    Raises:
        ValueError: where they are not evenly spaced: no time would follow the last one.
    """
    if not loop:
        return 0.0, 0.0, 0.0
    clock = np.unique(places[:, 0])
    unit = float(clock[1] - clock[0]) if len(clock) > 1 else 1.0
    if not np.allclose(np.diff(clock), unit, rtol=1e-3):
        raise ValueError("the frames of a loop are unevenly spaced in time: leave out its times.")
    return float(len(clock)), float(clock[0]), unit


def turned(
    positions: Float[Array, "b l 3"], cycles: Float[Array, "b 3"], share: Float[Array, ""] | float
) -> tuple[Float[Array, "b l 3"], Float[Array, "b l 1"]]:
    """Positions where loops begin ``share`` of a turn later, in whole tokens, and how far each token
    then lies from the cut: sin^2, 1 in the middle. Of rows that are no loops, positions as they are.

    To roll the latents of a loop is to roll their times.
    """
    count, first, unit = (cycles[:, i : i + 1] for i in range(3))
    some, many = count > 0, jnp.maximum(count, 1)
    clock = positions[..., 0]
    number = jnp.round((clock - first) / jnp.where(some, unit, 1))
    number = jnp.mod(number - jnp.floor(jnp.mod(share, 1.0) * count), many)
    far = jnp.sin(jnp.pi * (number + 0.5) / many) ** 2
    rolled = positions.at[..., 0].set(jnp.where(some, first + unit * number, clock))
    return rolled, jnp.where(some, far, 1)[..., None]


def closed(
    evaluate: Callable[..., Array], cycles: Float[Array, "b 3"], index: Int[Array, ""]
) -> Callable[..., Array]:
    """The network of step ``index`` for rows of which some are loops: it is run on both cuts.

    Args:
        evaluate: of inputs ``[b, ...]`` or, with guidance, ``[2 b, ...]``.
    """

    def both(inputs: DenoiserInputs) -> Array:
        circles = jnp.concatenate([cycles] * (len(inputs.tokens) // len(cycles)))
        cuts = [turned(inputs.positions, circles, index * GOLDEN + half) for half in (0.0, 0.5)]
        doubled = jax.tree.map(lambda y: jnp.concatenate([y, y]), inputs)
        positions = jnp.concatenate([at for at, _ in cuts])
        output = evaluate(dataclasses.replace(doubled, positions=positions))
        far = [weight for _, weight in cuts]
        said = jnp.split(output, 2)
        return sum(w * y for w, y in zip(far, said, strict=True)) / (far[0] + far[1])

    return both
