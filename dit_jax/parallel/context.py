"""Self-attention among tokens that are sharded over the ``context`` axis, and the choice of kernels.

Two ways, and their product (Fang & Zhao 2024, "USP: A Unified Sequence Parallelism Approach"):

* Ulysses (Jacobs et al. 2023, "DeepSpeed Ulysses"): ``u`` devices exchange tokens for heads, so that
  each holds all of their tokens for a part of the heads; ``u`` divides the heads. A device sends and
  receives each of q, k, v and the result once, (u - 1) / u of its own tokens' worth.
* Ring (Liu et al. 2023, "Ring Attention with Blockwise Transformers"): keys and values travel around
  ``r`` devices while each attends to those at hand, and the parts are merged by the online softmax:

      lse = log(e^lse1 + e^lse2)        O = O1 e^(lse1 - lse) + O2 e^(lse2 - lse)        (1)

  Heads need not divide. A device receives everybody's keys and values.

``context = r x u``: neighbours exchange heads, and groups of them form the ring, which carries only its
share of the heads: the more Ulysses, the less there is to carry. A layer with a local window fetches
the parts that its window reaches, and no more.

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
from jaxtyping import Array, Int

from dit_jax.parallel import attention as plain
from dit_jax.parallel.attention import Kernel, Operands, Window
from dit_jax.parallel.mesh import activation_spec, platform
from dit_jax.parallel.pallas import LANES, SplashConfig, flash_kernel, splash_kernel
from dit_jax.types import ATTENTION, Attention, PositiveInt

AXIS = "context"
AUTO = {"cpu": "host", "tpu": "splash", "gpu": "flash", "cuda": "flash", "rocm": "xla"}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Which kernel computes attention, and how the tokens of a sharded row meet."""

    kernel: Literal["auto", "xla", "host", "splash", "flash"] = "auto"
    """xla: plain matrix products, the reference. host: the same for CPUs. splash: JAX's Pallas
    kernel for TPUs. flash: JAX's Pallas kernel for GPUs. auto: by the platform."""
    ulysses: PositiveInt | None = None
    """Of the ``context`` devices, how many exchange heads; the others form the ring (1: a ring alone).
    Unset: as many as divide the heads that ``mesh.tensor`` leaves."""
    splash: SplashConfig = SplashConfig()


DEFAULT_ATTENTION = AttentionConfig()


def ulysses_size(config: AttentionConfig, context: int, heads: int) -> int:
    """How many of ``context`` devices exchange heads, ``heads`` being those on one device."""
    most = math.gcd(context, heads)
    size = most if config.ulysses is None else config.ulysses
    if size < 1 or most % size:
        raise ValueError(
            f"attention.ulysses {size} must divide mesh.context {context} and the {heads} heads that a "
            f"device of mesh.tensor has: take {most}, or leave it unset."
        )
    return size


def _kernel_name(mesh: Mesh, config: AttentionConfig) -> str:
    return AUTO.get(platform(mesh), "xla") if config.kernel == "auto" else config.kernel


def token_multiple(mesh: Mesh, config: AttentionConfig = DEFAULT_ATTENTION) -> int:
    """What the tokens of a row must be a multiple of on this mesh."""
    context = mesh.shape[AXIS]
    blocks = context > 1 and _kernel_name(mesh, config) == "splash"
    return context * (LANES if blocks else 1)


def choose_attention(mesh: Mesh, config: AttentionConfig = DEFAULT_ATTENTION) -> Attention:
    """The attention function for a mesh."""
    name, on_cpu = _kernel_name(mesh, config), platform(mesh) == "cpu"
    if name == "splash":
        kernel = splash_kernel(config.splash, interpret=on_cpu)
    elif name == "flash":
        kernel = flash_kernel(interpret=on_cpu)
    elif mesh.shape[AXIS] > 1:
        kernel = plain.HOST
    elif name == "host":
        # Blocks go one after the other: not if rows or heads lie on several devices.
        return plain.blockwise_attention if on_cpu and mesh.size == 1 else plain.host_attention
    else:
        return plain.xla_attention

    def attend(x: Operands, window: Window | None) -> jax.Array:
        # Text attending to itself, with one array of ids for both, is whole on every device.
        text, cross = x.k_ids is x.q_ids, x.k_ids is not None and x.k_ids is not x.q_ids
        along = "text_tokens" if text else "tokens"
        of_q = activation_spec(mesh, x.q.shape, "batch", "heads", along, None)
        rows, heads, tokens, _ = of_q
        sharded = x.k_ids is None and tokens is not None and mesh.shape[AXIS] > 1
        of_k = PartitionSpec(rows, heads, None, None) if cross else of_q
        # The ids of a sharded row are whole on every device: the ring cuts out those that it needs.
        ids: Any = (x.q_ids,)
        of_ids = (PartitionSpec(rows, None if sharded else tokens),)
        if cross:
            ids, of_ids = (x.q_ids, x.k_ids), (*of_ids, PartitionSpec(rows, None))

        def on_device(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
            local = Operands(q, k, v, ids[0], ids[-1])  # one array of ids serves queries and keys
            if not sharded:
                return kernel.whole(local, window)
            width = ulysses_size(config, mesh.shape[AXIS], q.shape[1])
            return _context_parallel(kernel, Ring(mesh.shape[AXIS] // width, width), local, window)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(of_q, of_k, of_k, *of_ids),
            out_specs=of_q,
            check_vma=False,  # Pallas kernels do not say over which axes their results vary
        )(x.q, x.k, x.v, *ids)

    return plain.make_attention(attend)


def _context_parallel(kernel: Kernel, ring: Ring, x: Operands, window: Window | None) -> jax.Array:
    """Attention among tokens sharded over ``context``; ``x`` has all segment ids of its rows."""
    neighbours = [[g * ring.width + i for i in range(ring.width)] for g in range(ring.groups)]

    def exchange(y: jax.Array, split: int, join: int) -> jax.Array:
        if ring.width == 1:
            return y
        return jax.lax.all_to_all(y, AXIS, split, join, axis_index_groups=neighbours, tiled=True)

    # [b, a, l / context, d] -> [b, a / width, l / groups, d]
    x = x._replace(q=exchange(x.q, 1, 2), k=exchange(x.k, 1, 2), v=exchange(x.v, 1, 2))
    if ring.groups == 1:
        out = kernel.whole(x, window)
    else:
        out: Any = _ring_attention(kernel, ring, window, *x[:4])
    return exchange(out, 2, 1)


@dataclasses.dataclass(frozen=True)
class Ring:
    """``groups`` parts of a row, each on ``width`` neighbouring devices."""

    groups: int
    width: int

    def shift(self, x: jax.Array, by: int, wrap: bool = True) -> jax.Array:
        """What the device ``by`` groups further on holds; zeros beyond the end without ``wrap``."""
        size, step = self.groups * self.width, by * self.width
        pairs = [(i, (i - step) % size) for i in range(size) if wrap or 0 <= i - step < size]
        return jax.lax.ppermute(x, AXIS, pairs) if by else x

    def ids(self, row_ids: Int[Array, "b m"], away: Any, wrap: bool = True) -> Int[Array, "b l"]:
        """The segment ids of the tokens ``away`` groups further on; of none beyond the ends."""
        length = row_ids.shape[1] // self.groups
        group = jax.lax.axis_index(AXIS) // self.width + away
        part = group % self.groups if wrap else jnp.clip(group, 0, self.groups - 1)
        ids = jax.lax.dynamic_slice_in_dim(row_ids, part * length, length, axis=1)
        return ids if wrap else jnp.where(part == group, ids, plain.NOBODY)

    def reach(self, window: Window, length: int) -> list[int]:
        """How many groups away the keys are that a window sees, this device's own first."""
        far = min(-(-window.width // length), self.groups - 1)
        return sorted(range(-far, far + 1), key=abs)


def _merge(
    out: jax.Array, lse: jax.Array, more: jax.Array, more_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Results over two sets of keys as one over both (1), in float32."""
    total = jnp.logaddexp(lse, more_lse)
    old, new = jnp.exp(lse - total)[..., None], jnp.exp(more_lse - total)[..., None]
    return out * old + more.astype(jnp.float32) * new, total


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring_attention(
    kernel: Kernel, ring: Ring, window: Window | None, *operands: jax.Array
) -> jax.Array:
    """Queries ``[b, a, l, d]`` of this device's group to the keys of the whole row; the operands are
    q, k, v of the group and the segment ids of the row."""
    return _ring_forward(kernel, ring, window, *operands)[0]


def _ring_forward(
    kernel: Kernel, ring: Ring, window: Window | None, *operands: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q, k, v, row_ids = operands
    q_ids, length = ring.ids(row_ids, 0), q.shape[2]
    out, lse = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    if window is not None:
        for away in ring.reach(window, length):
            ks, vs = (ring.shift(x, away, wrap=False) for x in (k, v))
            x = Operands(q, ks, vs, q_ids, ring.ids(row_ids, away, wrap=False))
            more = kernel.forward(x, Window(window.width, -away * length))
            out, lse = _merge(out, lse, *more)
    else:

        def attend(i: Any, k: jax.Array, v: jax.Array, out: Any, lse: Any) -> tuple[Any, Any]:
            x = Operands(q, k, v, q_ids, ring.ids(row_ids, i))
            return _merge(out, lse, *kernel.forward(x, None))

        def turn(carry: Any, i: jax.Array) -> tuple[Any, None]:
            # Sent before they are used, so that communication and work overlap.
            k_next, v_next = ring.shift(carry[0], 1), ring.shift(carry[1], 1)
            return (k_next, v_next, *attend(i, *carry)), None

        last = ring.groups - 1  # the last keys are not sent on
        carry, _ = jax.lax.scan(turn, (k, v, out, lse), jnp.arange(last))
        out, lse = attend(last, *carry)
    out, lse = checkpoint_name(out.astype(q.dtype), ATTENTION), checkpoint_name(lse, ATTENTION)
    return out, (*operands, out, lse)


def _ring_backward(
    kernel: Kernel, ring: Ring, window: Window | None, residuals: Any, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, row_ids, out, lse = residuals
    q_ids, length = ring.ids(row_ids, 0), q.shape[2]
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    if window is not None:
        for away in ring.reach(window, length):
            ks, vs = (ring.shift(x, away, wrap=False) for x in (k, v))
            x = Operands(q, ks, vs, q_ids, ring.ids(row_ids, away, wrap=False))
            part = Window(window.width, -away * length)
            more_q, *more = kernel.backward(x, part, out, lse, dout)
            more_k, more_v = (ring.shift(y, -away, wrap=False) for y in more)
            dq, dk, dv = dq + more_q, dk + more_k, dv + more_v
    else:

        def slopes(i: Any, *carry: jax.Array) -> tuple[jax.Array, ...]:
            k, v, dq, dk, dv = carry
            x = Operands(q, k, v, q_ids, ring.ids(row_ids, i))
            more_q, more_k, more_v = kernel.backward(x, None, out, lse, dout)
            # The gradients travel with their keys and values, and are home when the ring has turned.
            return dq + more_q, ring.shift(dk + more_k, 1), ring.shift(dv + more_v, 1)

        def turn(carry: Any, i: jax.Array) -> tuple[Any, None]:
            k_next, v_next = ring.shift(carry[0], 1), ring.shift(carry[1], 1)
            return (k_next, v_next, *slopes(i, *carry)), None

        last = ring.groups - 1
        carry, _ = jax.lax.scan(turn, (k, v, dq, dk, dv), jnp.arange(last))
        dq, dk, dv = slopes(last, *carry)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring_attention.defvjp(_ring_forward, _ring_backward)
