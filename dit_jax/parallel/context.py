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

from dit_jax.parallel.attention import (
    HOST,
    NOBODY,
    Kernel,
    Operands,
    Window,
    blockwise_attention,
    host_attention,
    make_attention,
    xla_attention,
)
from dit_jax.parallel.mesh import activation_spec, platform
from dit_jax.parallel.pallas import LANES, SplashConfig, flash_kernel, splash_kernel
from dit_jax.types import ATTENTION, Attention

AXIS = "context"
AUTO = {"cpu": "host", "tpu": "splash", "gpu": "flash", "cuda": "flash", "rocm": "xla"}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Which kernel computes attention, and how the tokens of a sharded row meet."""

    kernel: Literal["auto", "xla", "host", "splash", "flash"] = "auto"
    """xla: plain matrix products, the reference. host: the same for CPUs. splash: JAX's Pallas
    kernel for TPUs. flash: JAX's Pallas kernel for GPUs. auto: by the platform."""
    ulysses: int | None = None
    """Of the ``context`` devices, how many exchange heads; the others form the ring (1: a ring alone).
    Unset: as many as divide the heads that ``mesh.tensor`` leaves."""
    splash: SplashConfig = SplashConfig()


DEFAULT_ATTENTION = AttentionConfig()


def ulysses_size(config: AttentionConfig, context: int, heads: int) -> int:
    """How many of ``context`` devices exchange heads, ``heads`` being those on one device."""
    size = config.ulysses
    if size is None:
        return math.gcd(context, heads)
    if size < 1 or context % size or heads % size:
        raise ValueError(
            f"attention.ulysses {size} must divide mesh.context {context} and the {heads} heads that a "
            f"device of mesh.tensor has: take {math.gcd(context, heads)}, or leave it unset."
        )
    return size


def choose_attention(
    mesh: Mesh, config: AttentionConfig = DEFAULT_ATTENTION, interpret: bool | None = None
) -> Attention:
    """The attention function for a mesh.

    ``interpret`` runs the Pallas kernels by the interpreter, for tests; unset, on CPUs.
    """
    name, on_cpu = _kernel_name(mesh, config), platform(mesh) == "cpu"
    interpret = on_cpu if interpret is None else interpret
    if name == "splash":
        kernel = splash_kernel(config.splash, interpret)
    elif name == "flash":
        kernel = flash_kernel(interpret)
    elif mesh.shape[AXIS] > 1:
        kernel = HOST
    elif name == "host":
        # A row or head on several devices must not be computed one after the other.
        return blockwise_attention if on_cpu and mesh.size == 1 else host_attention
    else:
        return xla_attention
    return make_attention(partial(_attend_over_mesh, mesh, kernel, config))


def _kernel_name(mesh: Mesh, config: AttentionConfig) -> str:
    return AUTO.get(platform(mesh), "xla") if config.kernel == "auto" else config.kernel


def token_multiple(mesh: Mesh, config: AttentionConfig = DEFAULT_ATTENTION) -> int:
    """What the tokens of a row must be a multiple of on this mesh."""
    context = mesh.shape[AXIS]
    blocks = context > 1 and _kernel_name(mesh, config) == "splash"
    return context * (LANES if blocks else 1)


# ---------------------------------------------------------------------------------------------------
# Ring attention
# ---------------------------------------------------------------------------------------------------


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

    @property
    def here(self) -> jax.Array:
        """The group of this device."""
        return jax.lax.axis_index(AXIS) // self.width

    def ids(self, row_ids: Int[Array, "b m"], group: jax.Array | int) -> Int[Array, "b l"]:
        """The segment ids of a group's tokens; of none beyond the ends."""
        length = row_ids.shape[1] // self.groups
        start = jnp.clip(group, 0, self.groups - 1) * length
        part = jax.lax.dynamic_slice_in_dim(row_ids, start, length, axis=1)
        return jnp.where((group >= 0) & (group < self.groups), part, NOBODY)

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
    kernel: Kernel,
    ring: Ring,
    window: Window | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row_ids: jax.Array,
) -> jax.Array:
    """Queries ``[b, a, l, d]`` of this device's group to the keys of the whole row."""
    return _ring_forward(kernel, ring, window, q, k, v, row_ids)[0]


def _ring_forward(
    kernel: Kernel, ring: Ring, window: Window | None, *operands: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q, k, v, row_ids = operands
    here, q_ids, length = ring.here, ring.ids(row_ids, ring.here), q.shape[2]
    if window is not None:
        parts = []
        for away in ring.reach(window, length):
            ks, vs = (ring.shift(x, away, wrap=False) for x in (k, v))
            x = Operands(q, ks, vs, q_ids, ring.ids(row_ids, here + away))
            parts.append(kernel.forward(x, Window(window.width, -away * length)))
        out, lse = parts[0][0].astype(jnp.float32), parts[0][1]
        for part in parts[1:]:
            out, lse = _merge(out, lse, *part)
    else:

        def attend(i: jax.Array | int, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            k_ids = ring.ids(row_ids, (here + i) % ring.groups)
            return kernel.forward(Operands(q, k, v, q_ids, k_ids), None)

        def turn(carry: Any, i: jax.Array) -> tuple[Any, None]:
            k, v, out, lse = carry
            # Sent before they are used, so that communication and work overlap.
            k_next, v_next = ring.shift(k, 1), ring.shift(v, 1)
            return (k_next, v_next, *_merge(out, lse, *attend(i, k, v))), None

        nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32))
        turns = jnp.arange(ring.groups - 1)
        (last_k, last_v, out, lse), _ = jax.lax.scan(turn, (k, v, *nothing), turns)
        out, lse = _merge(out, lse, *attend(ring.groups - 1, last_k, last_v))
    out = checkpoint_name(out.astype(q.dtype), ATTENTION)
    lse = checkpoint_name(lse, ATTENTION)
    return out, (*operands, out, lse)


def _ring_backward(
    kernel: Kernel, ring: Ring, window: Window | None, residuals: Any, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, row_ids, out, lse = residuals
    here, q_ids, length = ring.here, ring.ids(row_ids, ring.here), q.shape[2]
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    if window is not None:
        for away in ring.reach(window, length):
            ks, vs = (ring.shift(x, away, wrap=False) for x in (k, v))
            x = Operands(q, ks, vs, q_ids, ring.ids(row_ids, here + away))
            part = Window(window.width, -away * length)
            more_q, *more = kernel.backward(x, part, out, lse, dout)
            more_k, more_v = (ring.shift(y, -away, wrap=False) for y in more)
            dq, dk, dv = dq + more_q, dk + more_k, dv + more_v
    else:

        def slopes(i: jax.Array | int, *carry: jax.Array) -> tuple[jax.Array, ...]:
            k, v, dq, dk, dv = carry
            x = Operands(q, k, v, q_ids, ring.ids(row_ids, (here + i) % ring.groups))
            more_q, more_k, more_v = kernel.backward(x, None, out, lse, dout)
            # The gradients travel with their keys and values, and are home when the ring has turned.
            return dq + more_q, ring.shift(dk + more_k, 1), ring.shift(dv + more_v, 1)

        def turn(carry: Any, i: jax.Array) -> tuple[Any, None]:
            k_next, v_next = ring.shift(carry[0], 1), ring.shift(carry[1], 1)
            return (k_next, v_next, *slopes(i, *carry)), None

        turned, _ = jax.lax.scan(turn, (k, v, dq, dk, dv), jnp.arange(ring.groups - 1))
        dq, dk, dv = slopes(ring.groups - 1, *turned)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring_attention.defvjp(_ring_forward, _ring_backward)


# ---------------------------------------------------------------------------------------------------
# Over the mesh
# ---------------------------------------------------------------------------------------------------


def _attend_over_mesh(
    mesh: Mesh,
    kernel: Kernel,
    config: AttentionConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array | None,
    window: Window | None,
) -> jax.Array:
    """Each device runs the kernel on what lies or comes there; for ``make_attention``."""
    # Text attending to itself, with one array of ids for both, is whole on every device.
    text = k_ids is q_ids
    of_q = activation_spec(
        mesh, q.shape, "batch", "text_tokens" if text else "tokens", "heads", None
    )
    rows, tokens, heads, _ = of_q
    sharded = k_ids is None and tokens is not None and mesh.shape[AXIS] > 1
    # The ids of a sharded row are whole on every device: the ring cuts out those that it needs.
    of_k, ids, of_ids = of_q, (q_ids,), (PartitionSpec(rows, None if sharded else tokens),)
    if k_ids is not None and not text:
        of_k = PartitionSpec(rows, None, heads, None)
        ids, of_ids = (*ids, k_ids), (*of_ids, PartitionSpec(rows, None))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        """Attention to keys that are all on this device; one array of ids serves queries and keys."""
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return kernel.whole(Operands(q, k, v, ids[0], ids[-1]), window).swapaxes(1, 2)

    return jax.shard_map(
        partial(_context_parallel, mesh.shape[AXIS], kernel, config, window) if sharded else local,
        mesh=mesh,
        in_specs=(of_q, of_k, of_k, *of_ids),
        out_specs=of_q,
        check_vma=False,
    )(q, k, v, *ids)


def _context_parallel(
    context: int,
    kernel: Kernel,
    config: AttentionConfig,
    window: Window | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row_ids: jax.Array,
) -> jax.Array:
    """Attention among tokens sharded over ``context``: Ulysses within groups, a ring of groups."""
    width = ulysses_size(config, context, q.shape[2])
    ring = Ring(context // width, width)
    neighbours = [[g * width + i for i in range(width)] for g in range(ring.groups)]

    def exchange(x: jax.Array, split: int, join: int) -> jax.Array:
        if width == 1:
            return x
        return jax.lax.all_to_all(x, AXIS, split, join, axis_index_groups=neighbours, tiled=True)

    # [b, l / context, a, d] -> [b, a / width, l / groups, d]
    q, k, v = (exchange(x.swapaxes(1, 2), 1, 2) for x in (q, k, v))
    if ring.groups == 1:
        out = kernel.whole(Operands(q, k, v, row_ids, row_ids), window)
    else:
        out: Any = _ring_attention(kernel, ring, window, q, k, v, row_ids)
    return exchange(out, 2, 1).swapaxes(1, 2)
