"""Self-attention among tokens that are sharded over the ``context`` axis, and the choice of kernels.

Two ways, and their product (Fang & Zhao 2024, "USP: A Unified Sequence Parallelism Approach"):

* Ulysses (Jacobs et al. 2023, "DeepSpeed Ulysses"): ``u`` devices exchange tokens for heads, so that
  each holds all of their tokens for a part of the heads; ``u`` divides the heads. A device sends and
  receives each of q, k, v and the result once, (u - 1) / u of its own tokens' worth.
* Ring (Liu et al. 2023, "Ring Attention with Blockwise Transformers"): keys and values travel around
  ``r`` devices while each attends to those at hand, and the parts are merged by the online softmax:

      lse = log(e^lse1 + e^lse2)        O = O1 e^(lse1 - lse) + O2 e^(lse2 - lse)        (1)

``context = r x u``: neighbours exchange heads, and groups of them form the ring, which carries only its
share of the heads. A layer with a local window fetches the parts that its window reaches, and no more.
Cross-attention needs none of this: queries stay where they are and the text is on every device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dit_jax.files import InputError
from dit_jax.parallel import attention as plain
from dit_jax.parallel.attention import Kernel, Operands, SplashConfig, Window
from dit_jax.parallel.mesh import activation_spec, platform
from dit_jax.types import ATTENTION, Attention, PositiveInt

AXIS = "context"
AUTO = {"cpu": "host", "tpu": "splash", "gpu": "flash", "cuda": "flash"}


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
    """Returns how many of ``context`` devices exchange heads, ``heads`` being those on one device."""
    most = math.gcd(context, heads)
    size = most if config.ulysses is None else config.ulysses
    if size < 1 or most % size:
        raise InputError(
            f"attention.ulysses {size} must divide mesh.context {context} and the {heads} heads that a "
            f"device of mesh.tensor has: take {most}, or leave it unset."
        )
    return size


def _kernel_name(mesh: Mesh, config: AttentionConfig) -> str:
    return AUTO.get(platform(mesh), "xla") if config.kernel == "auto" else config.kernel


def token_multiple(mesh: Mesh, config: AttentionConfig = DEFAULT_ATTENTION) -> int:
    """Returns what the tokens of a row must be a multiple of on this mesh."""
    context = mesh.shape[AXIS]
    return context * (plain.LANES if context > 1 and _kernel_name(mesh, config) == "splash" else 1)


def choose_attention(mesh: Mesh, config: AttentionConfig = DEFAULT_ATTENTION) -> Attention:
    """Returns the attention function for a mesh."""
    name, on_cpu, context = _kernel_name(mesh, config), platform(mesh) == "cpu", mesh.shape[AXIS]
    kernel = plain.HOST
    if name == "splash":
        kernel = plain.splash_kernel(config.splash, interpret=on_cpu)
    elif name == "flash":
        kernel = plain.flash_kernel(interpret=on_cpu)
    elif context == 1 and name == "xla":
        return plain.xla_attention
    elif context == 1:
        # Blocks go one after the other: not if rows or heads lie on several devices.
        return plain.blockwise_attention if on_cpu and mesh.size == 1 else plain.host_attention

    def attend(x: Operands, window: Window | None) -> jax.Array:
        # Text attending to itself, with one array of ids for both, is whole on every device.
        text, cross = x.k_ids is x.q_ids, x.k_ids is not None and x.k_ids is not x.q_ids
        along = "text_tokens" if text else "tokens"
        of_q = activation_spec(mesh, x.q.shape, "batch", "heads", along, None)
        rows, heads, tokens, _ = of_q
        sharded = x.k_ids is None and tokens is not None and context > 1
        of_k = P(rows, heads, None, None) if cross else of_q
        # The ids of a sharded row are whole on every device: the ring cuts out those that it needs.
        ids, of_ids = [x.q_ids], [P(rows, None if sharded else tokens)]
        if cross:
            ids, of_ids = [*ids, x.k_ids], [*of_ids, P(rows, None)]

        def on_device(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
            local = Operands(q, k, v, ids[0], ids[-1])  # one array of ids serves queries and keys
            if not sharded:
                return kernel.whole(local, window)
            width = ulysses_size(config, context, q.shape[1])
            return _exchange_heads(kernel, context // width, width, local, window)

        specs = (of_q, of_k, of_k, *of_ids)
        # check_vma: Pallas kernels do not say over which axes their results vary.
        run = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=of_q, check_vma=False)
        return run(x.q, x.k, x.v, *ids)

    return plain.make_attention(attend)


def _exchange_heads(
    kernel: Kernel, groups: int, width: int, x: Operands, window: Window | None
) -> jax.Array:
    """Attention among tokens sharded over ``groups`` of ``width`` neighbouring devices, which exchange
    tokens for heads; ``x`` has all segment ids of its rows."""
    neighbours = [[g * width + i for i in range(width)] for g in range(groups)]

    def exchange(y: jax.Array, split: int, join: int) -> jax.Array:
        if width == 1:
            return y
        return jax.lax.all_to_all(y, AXIS, split, join, axis_index_groups=neighbours, tiled=True)

    # [b, a, l / context, d] -> [b, a / width, l / groups, d]
    x = x._replace(q=exchange(x.q, 1, 2), k=exchange(x.k, 1, 2), v=exchange(x.v, 1, 2))
    alone = groups == 1
    out = kernel.whole(x, window) if alone else _ring(kernel, groups, width, x, window)
    return exchange(out, 2, 1)


def _ring(kernel: Kernel, groups: int, width: int, x: Operands, window: Window | None) -> jax.Array:
    """Attention of a group's queries ``[b, a, l, d]`` to the keys of all groups, which travel; ``x``
    has the segment ids ``[b, groups l]`` of the whole row."""
    length = x.q.shape[2]

    def shift(y: jax.Array, by: int) -> jax.Array:
        """What the device ``by`` groups further on holds; zeros if a window ends before."""
        size, step = groups * width, by * width
        # A window ends where the row does: nothing need be sent from one end to the other.
        senders = [i for i in range(size) if window is None or 0 <= i - step < size]
        return jax.lax.ppermute(y, AXIS, [(i, (i - step) % size) for i in senders]) if by else y

    def part(q: Any, k: Any, v: Any, row_ids: jax.Array, away: Any) -> tuple[Operands, Any]:
        """What a kernel takes for the keys of the group ``away`` groups further on."""
        here = jax.lax.axis_index(AXIS) // width

        def ids(group: Any) -> jax.Array:
            start = group % groups * length
            out = jax.lax.dynamic_slice_in_dim(row_ids, start, length, axis=1)
            return jnp.where(group == group % groups, out, plain.NOBODY) if window else out

        moved = window and Window(window.width, -away * length)
        return Operands(q, k, v, ids(here), ids(here + away)), moved

    def visit(attend: Callable[..., Any], keys: Any, state: Any, home: Any) -> tuple[Any, Any]:
        """Calls ``attend(state, away, *keys) -> (state, more)`` for all groups that queries see.

        ``home`` are sums of ``more``, which belongs to the keys, on the keys' own device.
        """
        last = groups - 1
        if window is not None:
            far = min(-(-window.width // length), last)
            for away in sorted(range(-far, far + 1), key=abs):
                state, more = attend(state, away, *(shift(y, away) for y in keys))
                home = tuple(y + shift(z, -away) for y, z in zip(home, more, strict=True))
            return state, home

        def visit_one(away: Any, keys: Any, state: Any, home: Any) -> tuple[Any, Any]:
            state, more = attend(state, away, *keys)
            # Gradients travel with their keys, and are home when the ring has turned.
            return state, tuple(shift(y + z, 1) for y, z in zip(home, more, strict=True))

        def turn(carry: Any, away: jax.Array) -> tuple[Any, None]:
            # Sent before they are used, so that communication and work overlap.
            following = tuple(shift(y, 1) for y in carry[0])
            return (following, *visit_one(away, *carry)), None

        carry, _ = jax.lax.scan(turn, (keys, state, home), jnp.arange(last))
        return visit_one(last, *carry)  # the last keys are not sent on

    def forward(q: Any, k: Any, v: Any, row_ids: jax.Array) -> tuple[jax.Array, Any]:
        def attend(state: Any, away: Any, k: jax.Array, v: jax.Array) -> tuple[Any, tuple[()]]:
            out, lse = state
            more, more_lse = kernel.forward(*part(q, k, v, row_ids, away))
            total = jnp.logaddexp(lse, more_lse)  # (1), in float32
            old, new = jnp.exp(lse - total)[..., None], jnp.exp(more_lse - total)[..., None]
            return (out * old + more.astype(jnp.float32) * new, total), ()

        start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        (out, lse), _ = visit(attend, (k, v), start, ())
        out, lse = checkpoint_name(out.astype(q.dtype), ATTENTION), checkpoint_name(lse, ATTENTION)
        return out, (q, k, v, row_ids, out, lse)

    def backward(residuals: Any, dout: jax.Array) -> tuple[Any, ...]:
        q, k, v, row_ids, out, lse = residuals

        def attend(dq: Any, away: Any, k: jax.Array, v: jax.Array) -> tuple[Any, Any]:
            more, *of_keys = kernel.backward(*part(q, k, v, row_ids, away), out, lse, dout)
            return dq + more, of_keys

        start, *home = (jnp.zeros(y.shape, jnp.float32) for y in (q, k, v))
        dq, (dk, dv) = visit(attend, (k, v), start, tuple(home))
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None

    attention = jax.custom_vjp(lambda *operands: forward(*operands)[0])
    attention.defvjp(forward, backward)
    return attention(*x[:4])
