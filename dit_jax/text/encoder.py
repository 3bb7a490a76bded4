"""Captions to states, for whoever prepares data or shows samples.

A ``TextEncoder`` is what ``Codec`` is for pictures: it has a name and a hash, by which stored states
are known to be its own. ``StatesEncoder`` runs a network over tokens, some captions at a time, padded
to few lengths so that few shapes are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.parallel import batch_sharding, batch_shards
from dit_jax.types import Params

SHORTEST = 16  # tokens that captions are padded to at least; then the powers of two above
STORED = np.dtype(ml_dtypes.bfloat16)  # what states are handed out and stored as


@dataclasses.dataclass(frozen=True, eq=False)
class StatesEncoder:
    """A ``TextEncoder``: a network, its tokenizer and its parameters, over a mesh."""

    name: str
    hash: str
    dim: int
    max_tokens: int
    tokenize: Callable[[str], list[int]] = dataclasses.field(repr=False)
    apply: Callable[..., Any] = dataclasses.field(repr=False)  # of parameters, tokens and mask
    params: Params = dataclasses.field(repr=False)
    mesh: Mesh = dataclasses.field(repr=False)
    batch: int = 32  # captions encoded at once; fewer where there are fewer

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """See ``TextEncoder.encode``; all processes of the mesh encode the same captions together."""
        tokens, parts = [self.tokenize(caption) for caption in captions], batch_shards(self.mesh)
        # Captions of about one length go together, so that little of a batch is padding.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        rows = min(self.batch, _power(len(tokens), 1))
        rows = -(-rows // parts) * parts
        out: list[Any] = [None] * len(tokens)
        for start in range(0, len(tokens), rows):
            part = order[start : start + rows]
            length = min(_power(len(tokens[part[-1]]), SHORTEST), self.max_tokens)
            batch = np.zeros((rows, length), np.int32)
            mask = np.zeros((rows, length), bool)
            # A short last batch is filled up with its first caption.
            for row, i in enumerate(part + part[:1] * (rows - len(part))):
                batch[row, : len(tokens[i])], mask[row, : len(tokens[i])] = tokens[i], True
            sharding = batch_sharding(self.mesh, 2, tokens=False)
            placed = [
                jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
                for array in (batch, mask)
            ]
            states = jax.device_get(self._run(self.params, *placed))
            for row, i in enumerate(part):
                out[i] = states[row, : len(tokens[i])].astype(STORED)
        return out

    @cached_property
    def _run(self) -> Callable[..., Any]:
        # Whole on every device: every process reads the states.
        return jax.jit(self.apply, out_shardings=NamedSharding(self.mesh, PartitionSpec()))


def _power(count: int, least: int) -> int:
    """The smallest power of two times ``least`` that is at least ``count``."""
    return least << max(-(-count // least) - 1, 0).bit_length()
