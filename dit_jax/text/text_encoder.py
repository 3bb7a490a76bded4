"""Text encoders: captions to states, for whoever prepares data or shows samples.

A ``TextEncoder`` is what ``Codec`` is for pictures: it has a name and a hash, by which stored states
are known to be its own. ``StatesEncoder`` runs a network of this room over tokens, some captions at a
time, padded to few lengths so that few shapes are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dit_jax.types import Constrain, Params, unconstrained
from dit_jax.types import TextEncoder as TextEncoder

SHORTEST = 16
"""Tokens that captions are padded to at least; then the powers of two above, up to the longest."""
STORED = np.dtype(ml_dtypes.bfloat16)
"""What states are handed out and stored as."""

Apply = Callable[
    [Params, Int[Array, "b s"], Bool[Array, "b s"]],
    Float[Array, "b s e"],
]
"""Parameters, tokens and a mask of those that are no padding, to states."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """How an encoder's parameters and batches lie on devices; made where the mesh is known."""

    shardings: Callable[[Params], Params]
    """Of abstract parameters that carry their logical axes."""
    place: Callable[[np.ndarray], jax.Array]
    """Lays a batch ``[b, s]``, the same on every process, over the devices."""
    whole: jax.sharding.Sharding
    """Of what every process reads."""
    rows: int = 1
    """Batches have a multiple of so many captions."""
    constrain: Constrain = unconstrained


def one_device() -> Placement:
    """Everything on the first device of this process."""
    whole = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return Placement(
        shardings=lambda boxed: jax.tree.map(
            lambda _: whole, boxed, is_leaf=lambda leaf: hasattr(leaf, "names")
        ),
        place=lambda batch: jax.device_put(batch, whole),
        whole=whole,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class StatesEncoder:
    """An encoder of this room, its tokenizer and its parameters."""

    name: str
    hash: str
    dim: int
    max_tokens: int
    tokenize: Callable[[str], list[int]] = dataclasses.field(repr=False)
    """A caption to tokens, at most ``max_tokens``, the ones that begin and end it included."""
    apply: Apply = dataclasses.field(repr=False)
    params: Params = dataclasses.field(repr=False)
    placement: Placement = dataclasses.field(repr=False)
    batch: int = 32
    """Captions encoded at once; fewer where there are fewer."""

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """See ``TextEncoder.encode``."""
        tokens = [self.tokenize(caption) for caption in captions]
        # Captions of about one length go together, so that little of a batch is padding.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        rows = min(self.batch, _power(len(tokens), 1))
        rows = -(-rows // self.placement.rows) * self.placement.rows
        out: list[Any] = [None] * len(tokens)
        for start in range(0, len(tokens), rows):
            part = order[start : start + rows]
            length = min(_power(len(tokens[part[-1]]), SHORTEST), self.max_tokens)
            batch = np.zeros((rows, length), np.int32)
            mask = np.zeros((rows, length), bool)
            # A short last batch is filled up with its first caption.
            for row, i in enumerate(part + part[:1] * (rows - len(part))):
                batch[row, : len(tokens[i])], mask[row, : len(tokens[i])] = tokens[i], True
            place = self.placement.place
            states = jax.device_get(self._run(self.params, place(batch), place(mask)))
            for row, i in enumerate(part):
                out[i] = states[row, : len(tokens[i])].astype(STORED)
        return out

    @cached_property
    def _run(self) -> Callable[..., Any]:
        return jax.jit(self.apply, out_shardings=self.placement.whole)


def _power(count: int, least: int) -> int:
    """The smallest power of two times ``least`` that is at least ``count``."""
    size = least
    while size < count:
        size *= 2
    return size
