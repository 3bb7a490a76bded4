"""Self-attention among tokens that are spread over the devices of the ``context`` axis.

Two ways, and their product (Fang & Zhao 2024, "USP: A Unified Sequence Parallelism Approach"):

* Ulysses (Jacobs et al. 2023, "DeepSpeed Ulysses"): ``u`` devices exchange tokens for heads, so that
  each holds all of their tokens for a part of the heads; ``u`` divides the heads. A device sends and
  receives each of q, k, v and the result once, (u - 1) / u of its own tokens' worth.
* Ring (Liu et al. 2023, "Ring Attention with Blockwise Transformers"): keys and values travel around
  ``r`` devices while each attends to those at hand, and the parts are put together by their sums of
  weights (the online softmax). Heads need not divide. A device receives everybody's keys and values.

``context = r x u``: neighbours exchange heads, and groups of them form the ring, which carries only its
share of the heads: the more Ulysses, the less there is to carry. A banded layer fetches the parts that
its band reaches, and no more.

Cross-attention needs none of this: queries stay where they are and the text is on every device.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dit_jax.parallel.attention import NOBODY, Band, Blocks
from dit_jax.parallel.rules import activation_spec
from dit_jax.parallel.splash import SplashConfig
from dit_jax.types import ATTENTION

AXIS = "context"


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Which kernel computes attention, and how a row's tokens meet when they are spread."""

    kernel: Literal["auto", "xla", "host", "splash", "flash"] = "auto"
    """xla: plain matrix products, the reference. host: the same for CPUs. splash: JAX's Pallas
    kernel for TPUs. flash: JAX's Pallas kernel for GPUs. auto: by the platform."""
    ulysses: int | None = None
    """Of the ``context`` devices, how many exchange heads; the others form the ring. Unset: as many as
    divide the heads that ``mesh.tensor`` leaves."""
    splash: SplashConfig = SplashConfig()

    def __post_init__(self) -> None:
        if self.ulysses is not None and self.ulysses < 1:
            raise ValueError(
                f"attention.ulysses is {self.ulysses}: it is at least 1 (a ring alone), or unset."
            )


DEFAULT_ATTENTION = AttentionConfig()


def ulysses_size(config: AttentionConfig, context: int, heads: int) -> int:
    """How many of ``context`` devices exchange heads, ``heads`` being those on one device."""
    if config.ulysses is None:
        return math.gcd(context, heads)
    size = config.ulysses
    if context % size or heads % size:
        raise ValueError(
            f"attention.ulysses {size} must divide mesh.context {context} and the {heads} heads that a "
            f"device of mesh.tensor has: take {math.gcd(context, heads)}, or leave it unset."
        )
    return size


@dataclasses.dataclass(frozen=True)
class Ring:
    """``groups`` parts of a row, each on ``width`` neighbouring devices."""

    groups: int
    width: int

    def shift(self, x: jax.Array, by: int, wrap: bool = True) -> jax.Array:
        """What the device ``by`` groups further on holds; zeros beyond the end without ``wrap``."""
        places = range(self.groups * self.width)
        size, step = len(places), by * self.width
        pairs = [(i, (i - step) % size) for i in places if wrap or 0 <= i - step < size]
        return jax.lax.ppermute(x, AXIS, pairs)

    @property
    def here(self) -> jax.Array:
        """The group of this device."""
        return jax.lax.axis_index(AXIS) // self.width

    def ids(self, everyone: Int[Array, "b m"], group: jax.Array | int) -> Int[Array, "b l"]:
        """The segment ids of a group's tokens; of none beyond the ends."""
        length = everyone.shape[1] // self.groups
        start = jnp.clip(group, 0, self.groups - 1) * length
        part = jax.lax.dynamic_slice_in_dim(everyone, start, length, axis=1)
        return jnp.where((group >= 0) & (group < self.groups), part, NOBODY)

    def reach(self, band: Band, length: int) -> list[int]:
        """How many groups away the keys are that a band sees, this device's own first."""
        far = min(-(-band.width // length), self.groups - 1)
        return sorted(range(-far, far + 1), key=abs)


def _merge(
    out: jax.Array, lse: jax.Array, more: jax.Array, more_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Results over two sets of keys as one over both."""
    total = jnp.logaddexp(lse, more_lse)
    old, new = jnp.exp(lse - total)[..., None], jnp.exp(more_lse - total)[..., None]
    return out * old + more.astype(jnp.float32) * new, total


Residuals = tuple[jax.Array, ...]


def _ring_forward(
    blocks: Blocks,
    ring: Ring,
    band: Band | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: jax.Array,
) -> tuple[jax.Array, Residuals]:
    here, q_ids = ring.here, ring.ids(ids, ring.here)
    if band is not None:
        length, parts = q.shape[2], []
        for away in ring.reach(band, q.shape[2]):
            ks, vs = (ring.shift(x, away, wrap=False) if away else x for x in (k, v))
            part = Band(band.width, -away * length)
            parts.append(blocks.forward(q, ks, vs, q_ids, ring.ids(ids, here + away), part))
        out, lse = parts[0][0].astype(jnp.float32), parts[0][1]
        for more in parts[1:]:
            out, lse = _merge(out, lse, *more)
    else:

        def attend(i: jax.Array | int, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return blocks.forward(q, k, v, q_ids, ring.ids(ids, (here + i) % ring.groups), None)

        def turn(carry: Residuals, i: jax.Array) -> tuple[Residuals, None]:
            k, v, out, lse = carry
            # Sent before they are used, so that the way and the work overlap.
            k_next, v_next = ring.shift(k, 1), ring.shift(v, 1)
            return (k_next, v_next, *_merge(out, lse, *attend(i, k, v))), None

        nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32))
        (last_k, last_v, out, lse), _ = jax.lax.scan(
            turn, (k, v, *nothing), jnp.arange(ring.groups - 1)
        )
        out, lse = _merge(out, lse, *attend(ring.groups - 1, last_k, last_v))
    out = checkpoint_name(out.astype(q.dtype), ATTENTION)
    lse = checkpoint_name(lse, ATTENTION)
    return out, (q, k, v, ids, out, lse)


def _ring_backward(
    blocks: Blocks, ring: Ring, band: Band | None, kept: Residuals, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, ids, out, lse = kept
    here, q_ids = ring.here, ring.ids(ids, ring.here)
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    if band is not None:
        dq, dk, dv = zeros
        for away in ring.reach(band, q.shape[2]):
            ks, vs = (ring.shift(x, away, wrap=False) if away else x for x in (k, v))
            part = Band(band.width, -away * q.shape[2])
            given = (q, ks, vs, q_ids, ring.ids(ids, here + away), part, out, lse, dout)
            more_q, more_k, more_v = blocks.backward(*given)
            if away:
                more_k, more_v = (ring.shift(x, -away, wrap=False) for x in (more_k, more_v))
            dq, dk, dv = dq + more_q, dk + more_k, dv + more_v
    else:

        def turn(carry: Residuals, i: jax.Array) -> tuple[Residuals, None]:
            k, v, *_ = carry
            k_next, v_next = ring.shift(k, 1), ring.shift(v, 1)
            return (k_next, v_next, *slopes(i, *carry)), None

        def slopes(i: jax.Array | int, *carry: jax.Array) -> Residuals:
            k, v, dq, dk, dv = carry
            k_ids = ring.ids(ids, (here + i) % ring.groups)
            more_q, more_k, more_v = blocks.backward(q, k, v, q_ids, k_ids, None, out, lse, dout)
            # The gradients travel with their keys and values, and are home when the ring has turned.
            return dq + more_q, ring.shift(dk + more_k, 1), ring.shift(dv + more_v, 1)

        turned, _ = jax.lax.scan(turn, (k, v, *zeros), jnp.arange(ring.groups - 1))
        dq, dk, dv = slopes(ring.groups - 1, *turned)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring_attention(
    blocks: Blocks,
    ring: Ring,
    band: Band | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    """Queries ``[b, a, l, d]`` of this device's group to everybody's keys; ``ids`` are everybody's."""
    return _ring_forward(blocks, ring, band, q, k, v, ids)[0]


_ring_attention.defvjp(_ring_forward, _ring_backward)


class SpreadAttention:
    """``Attention`` over a mesh: each device runs ``blocks`` on what lies or comes there."""

    def __init__(self, mesh: Mesh, blocks: Blocks, config: AttentionConfig) -> None:
        self.mesh, self.blocks, self.config = mesh, blocks, config

    def __call__(
        self,
        q: Float[Array, "b l a d"],
        k: Float[Array, "b m a d"],
        v: Float[Array, "b m a d"],
        q_segment_ids: Int[Array, "b l"],
        k_segment_ids: Int[Array, "b m"] | None,
        *,
        band: int | None = None,
    ) -> Float[Array, "b l a d"]:
        # Text attending to itself, with one array of ids for both, is whole on every device.
        text = k_segment_ids is q_segment_ids
        along = "text_tokens" if text else "tokens"
        of_q = activation_spec(self.mesh, q.shape, "batch", along, "heads", None)
        rows, tokens, heads, _ = of_q
        limit = None if band is None else Band(band)
        spread = k_segment_ids is None and tokens is not None and self.mesh.shape[AXIS] > 1
        of_k, ids, of_ids = (
            of_q,
            (q_segment_ids,),
            (PartitionSpec(rows, None if spread else tokens),),
        )
        if k_segment_ids is not None and not text:
            of_k = PartitionSpec(rows, None, heads, None)
            ids, of_ids = (*ids, k_segment_ids), (*of_ids, PartitionSpec(rows, None))
        return jax.shard_map(
            partial(self._spread if spread else self._own, limit),
            mesh=self.mesh,
            in_specs=(of_q, of_k, of_k, *of_ids),
            out_specs=of_q,
            check_vma=False,
        )(q * q.shape[-1] ** -0.5, k, v, *ids)

    def _own(self, band: Band | None, *given: jax.Array) -> jax.Array:
        """Attention to keys that are all on this device; one array of ids is the queries' and keys'."""
        q, k, v, q_ids, *of_k = given
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return self.blocks.whole(q, k, v, q_ids, of_k[0] if of_k else q_ids, band).swapaxes(1, 2)

    def _spread(self, band: Band | None, *given: jax.Array) -> jax.Array:
        """Attention among tokens spread over ``context``; ``ids`` are those of the whole row."""
        q, k, v, ids = given
        context = self.mesh.shape[AXIS]
        width = ulysses_size(self.config, context, q.shape[2])
        ring = Ring(context // width, width)
        neighbours = [[g * width + i for i in range(width)] for g in range(ring.groups)]

        def exchange(x: jax.Array, split: int, join: int) -> jax.Array:
            if width == 1:
                return x
            return jax.lax.all_to_all(
                x, AXIS, split, join, axis_index_groups=neighbours, tiled=True
            )

        q, k, v = (exchange(x.swapaxes(1, 2), 1, 2) for x in (q, k, v))
        if ring.groups == 1:
            out: Any = self.blocks.whole(q, k, v, ids, ids, band)
        else:
            out = _ring_attention(self.blocks, ring, band, q, k, v, ids)
        return exchange(out, 2, 1).swapaxes(1, 2)
