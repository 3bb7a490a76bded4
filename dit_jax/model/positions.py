"""Three-dimensional rotary position embedding.

Rotary embedding (Su et al. 2021, "RoFormer", eq. 34) along time, height and width: the pairs of
a head are shared out among the three axes, and each pair is turned by an angle proportional to
the token's coordinate on its axis. Queries and keys then meet through differences of
coordinates alone, so sizes and lengths never trained on have positions too.

A pair is element ``i`` of the first half and element ``i`` of the second half of a head.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head that turn with (t, h, w); even, and 44, 42, 42 for 128."""
    if head_dim % 2 or head_dim < 6:
        raise ValueError(
            f"head dimension {head_dim}: rotary embedding needs an even number of at least 6, a pair "
            "for each of t, h and w. Change width or heads."
        )
    side = head_dim // 6 * 2
    return head_dim - 2 * side, side, side


def frequencies(head_dim: int, theta: float) -> Float[np.ndarray, "3 f"]:
    """Angle per unit of each coordinate for every pair, ``f = head_dim / 2``; one row per axis.

    ``theta`` is (nearly) the ratio of the longest wavelength to the shortest, which is 2 pi units.
    """
    rows = np.zeros((3, head_dim // 2), np.float32)
    start = 0
    for axis, dim in enumerate(axis_dims(head_dim)):
        pairs = dim // 2
        rows[axis, start : start + pairs] = theta ** (-np.arange(pairs) / pairs)
        start += pairs
    return rows


def sincos_features(
    positions: Float[Array, "b l 3"], width: int, theta: float
) -> Float[Array, "b l d"]:
    """Sines and cosines of the coordinates, float32, a third of ``width`` for each of t, h and w.

    The fixed embedding of Vaswani et al. 2017 (section 3.5), as DiT adds it to its patches; what
    does not divide by six stays zero.
    """
    pairs = width // 6
    rates = theta ** (-np.arange(pairs, dtype=np.float32) / pairs)
    angles = (positions[..., None] * rates).reshape(*positions.shape[:2], 3 * pairs)
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return jnp.pad(features, ((0, 0), (0, 0), (0, width - 6 * pairs)))


def grid_features(
    positions: Float[Array, "b l 3"], width: int, theta: float
) -> Float[Array, "b l d"]:
    """Sines and cosines of the column and then of the row, float32, half of ``width`` for each.

    The fixed embedding of MAE (He et al. 2022, section A.1) and of DiT; time does not enter.
    """
    pairs = width // 4
    rates = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    angles = positions[..., [2, 1], None] * rates.astype(np.float32)
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return features.reshape(*positions.shape[:2], width)


def grid_time_features(
    positions: Float[Array, "b l 3"], width: int, theta: float
) -> Float[Array, "b l d"]:
    """``grid_features``, and sines and cosines of time less those of time 0, float32.

    The first frame of a clip is placed as ``grid_features`` places an image.
    """
    pairs = width // 2
    rates = theta ** (-np.arange(pairs, dtype=np.float32) / pairs)
    angles = positions[..., :1] * rates
    of_time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles) - 1], -1)
    return grid_features(positions, width, theta) + of_time


def rotary_angles(
    positions: Float[Array, "b l 3"], head_dim: int, theta: float
) -> tuple[Float[Array, "b l f"], Float[Array, "b l f"]]:
    """Cosine and sine, float32, of every token's angles; made once for all layers."""
    angles = jnp.einsum("blx,xf->blf", positions, frequencies(head_dim, theta), precision="highest")
    # XLA would compute both again wherever they are used, in every layer for every head (for CPUs it
    # drops barriers before it fuses); the result of a product it keeps.
    one = np.eye(angles.shape[-1], dtype=np.float32)
    cos, sin = (jnp.matmul(f(angles), one, precision="highest") for f in (jnp.cos, jnp.sin))
    return cos, sin


def rotate(
    x: Float[Array, "b l a d"], cos: Float[Array, "b l f"], sin: Float[Array, "b l f"]
) -> Float[Array, "b l a d"]:
    """Turns the pairs of queries or keys by their token's angles, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
