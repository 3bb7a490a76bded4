"""An optimizer's moments in bfloat16 or in 8 bits.

A second moment falls by at most 1 - b2 of itself in a step, less than half the distance between
neighbours in few bits: rounded to the nearest it would rise and never fall. So everything here is
rounded at random to one of its two neighbours, such that the mean is kept::

    (1)  E[round(x)] = x
    (2)  s_ij = min(max_k |x_ik|, max_k |x_kj|)       scale of a matrix (Li et al. 2023, section 4.2)
    (3)  x = sign(x) s (code / top)^4                 8 bits: 1.5 % to 4 % apart within a decade of s

Blocks of neighbours (Dettmers et al. 2021) would be cut by the mesh: 5,120 numbers over 64 devices are
80 each. The largest numbers of rows and columns are the same on every mesh, and far fewer.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax


class CompressedState(NamedTuple):
    """The state of another transformation, whose matrices are kept in few bits."""

    steps: jax.Array  # What the randomness of the next rounding is made of.
    codes: Any  # The state's own tree; int8 or, of what is never negative, uint8; or bfloat16.
    rows: Any  # [..., n, 1] for codes of 8 bits, else None.
    columns: Any  # [..., 1, m]


def round_to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 to bfloat16 by (1): noise below the bits that are kept carries into them."""
    noise = jax.random.bits(key, x.shape, jnp.uint16)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def encode(x: jax.Array, key: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes of 8 bits, and the largest numbers of rows and columns."""
    top, size = 127 if signed else 255, jnp.abs(x)
    row, column = size.max(-1, keepdims=True), size.max(-2, keepdims=True)
    # (2); the smallest normal number stands for a scale of zero, by which nothing can be divided.
    size /= jnp.maximum(jnp.minimum(row, column), jnp.finfo(jnp.float32).tiny)
    low = jnp.clip(jnp.floor(top * size**0.25), 0, top - 1)
    below, above = (low / top) ** 4, ((low + 1) / top) ** 4
    code = low + (jax.random.uniform(key, x.shape) * (above - below) < size - below)
    if signed:
        return (jnp.sign(x) * code).astype(jnp.int8), row, column
    # The root of a second moment is divided by: it is no zero but if it was.
    return jnp.maximum(code, size > 0).astype(jnp.uint8), row, column


def decode(code: jax.Array, row: jax.Array | None, column: jax.Array | None) -> jax.Array:
    """A leaf of the state, in float32 if it is not whole numbers."""
    if row is None or column is None:
        return code.astype(jnp.float32) if code.dtype == jnp.bfloat16 else code
    top = 127 if code.dtype == jnp.int8 else 255
    power = (code.astype(jnp.float32) / top) ** 4  # (3)
    return jnp.sign(code).astype(jnp.float32) * power * jnp.minimum(row, column)


def compressed(
    inner: optax.GradientTransformation, dtype: Literal["bfloat16", "int8"]
) -> optax.GradientTransformation:
    """The same transformation, with the matrices of its state in fewer bits between the steps."""

    def pack(state: Any, count: jax.Array) -> CompressedState:
        leaves, tree = jax.tree_util.tree_flatten_with_path(state)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))

        def one(path: Any, x: jax.Array, key: jax.Array) -> tuple[Any, Any, Any]:
            if x.ndim < 2:  # Counters and vectors.
                return x, None, None
            if dtype == "bfloat16":
                return round_to_bfloat16(x, key), None, None
            return encode(x, key, signed=".nu" not in map(str, path))

        packed = [one(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)]
        return CompressedState(count, *(tree.unflatten(part) for part in zip(*packed, strict=True)))

    def init(params: Any) -> CompressedState:
        # Else XLA computes the codes of its zeros while it compiles, for minutes.
        return pack(*jax.lax.optimization_barrier((inner.init(params), jnp.zeros((), jnp.int32))))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, CompressedState]:
        whole = jax.tree.map(decode, state.codes, state.rows, state.columns)
        updates, whole = inner.update(updates, whole, params)
        return updates, pack(whole, state.steps + 1)

    return optax.GradientTransformation(init, update)
