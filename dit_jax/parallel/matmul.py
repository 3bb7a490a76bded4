"""The products of linear layers: as they are, flat on CPUs, or in 8 bits by qwix.

In 8 bits every operand is scaled by its largest magnitude (per token, or per column of a kernel) and
rounded for the product alone. For y = x w with the gradient g of y:

    kind   x w         g wT        xT g, the kernel's gradient
    int8   int8        int8        not quantised (SwitchBack, Wortsman et al. 2023, algorithm 1): over
                                   all tokens errors add up, and above 133,000 an int32 can overflow
    fp8    e4m3 e4m3   e5m2 e4m3   e4m3 e5m2 (Micikevicius et al. 2022, "FP8 formats")

Kernels sharded over ``fsdp`` are gathered as int8. What is summed over ``tensor`` travels as int32 or
float32, twice the bytes of bfloat16. Not here: stochastic rounding, delayed scaling.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dit_jax.files import InputError
from dit_jax.parallel.mesh import platform
from dit_jax.types import DotGeneral

VALUES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
GRADIENTS = {"int8": jnp.int8, "fp8": jnp.float8_e5m2}


def _in_8_bits(kind: str) -> DotGeneral:
    """The product of ``[..., d]`` and ``[d, e]``, both of one type, which its gradients have too."""
    import qwix  # an extra

    def quantize(x: jax.Array, dtype: Any, *axes: int) -> Any:
        """``x`` in 8 bits, with one scale for all elements that differ in ``axes`` alone."""
        channels = tuple(i for i in range(x.ndim) if i not in axes)
        return qwix.quantize(x.astype(jnp.float32), dtype, channelwise_axes=channels)

    def product(a: Any, b: Any, of_a: tuple[int, ...], of_b: tuple[int, ...]) -> jax.Array:
        return qwix.dot_general(a, b, ((of_a, of_b), ((), ())))  # scaled back, float32

    def forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
        last, dtype = x.ndim - 1, VALUES[kind]
        x8, kernel8 = quantize(x, dtype, last), quantize(kernel, dtype, 0)
        out = product(x8, kernel8, (last,), (0,)).astype(x.dtype)
        return out, (x if kind == "int8" else x8, kernel8)

    def backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel8 = residuals
        last, tokens = g.ndim - 1, tuple(range(g.ndim - 1))
        wide, dtype = g.astype(jnp.float32), GRADIENTS[kind]
        # A scale cannot be taken out of a sum along its own axis. So the gradient is multiplied by the
        # other operand's (kernel's [1, e], x's [..., 1]) before it is rounded.
        dx = product(quantize(wide * kernel8.scale, dtype, last), kernel8.qvalue, (last,), (1,))
        if kind == "int8":
            d_kernel = jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())))
        else:
            g8 = quantize(wide * x.scale, dtype, *tokens)
            d_kernel = product(x.qvalue, g8, tokens, tokens)
        return dx.astype(g.dtype), d_kernel.astype(g.dtype)

    linear = jax.custom_vjp(lambda x, kernel: forward(x, kernel)[0])
    linear.defvjp(forward, backward)
    return lambda x, kernel, numbers, **options: linear(x, kernel)


def flat_dot_general(x: jax.Array, kernel: jax.Array, numbers: Any, **options: Any) -> jax.Array:
    """``dot_general`` of ``[b, l, d]`` and ``[d, e]`` as one of two matrices ``[b l, d]``.

    On a CPU the gradient of ``kernel`` is then one product too, without a strided copy of ``x``.
    """
    out = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options
    )
    return out.reshape(*x.shape[:-1], kernel.shape[1])


def choose_dot_general(mesh: Mesh, matmul: Literal["full", "int8", "fp8"] = "full") -> DotGeneral:
    """The product for linear layers, whose kernels are matrices, on a mesh."""
    if matmul == "full":
        # Rows and sharded tokens lie on different mesh axes: to join them would move them.
        flat = platform(mesh) == "cpu" and mesh.shape["context"] == 1
        return flat_dot_general if flat else jax.lax.dot_general
    if importlib.util.find_spec("qwix") is None:
        raise InputError(
            f"model.matmul is {matmul!r}, and qwix is not installed: pip install 'dit-jax[quant]', or "
            "set model.matmul to full."
        )
    return _in_8_bits(matmul)
