"""The products of linear layers: as they are, flat on CPUs, or in 8 bits by qwix.

In 8 bits every operand is scaled by its largest magnitude (per token, or per column of a kernel) and
rounded for the product alone: kernels, their gradients, optimizer state and everything between the
products stay in the types they have. For y = x w with slope g:

    kind   x w         g wT        xT g, the kernel's gradient
    int8   int8        int8        not quantised (SwitchBack, Wortsman et al. 2023, algorithm 1): over
                                   all tokens errors add up, and above 133,000 an int32 can overflow
    fp8    e4m3 e4m3   e5m2 e4m3   e4m3 e5m2 (Micikevicius et al. 2022, "FP8 formats")

Kernels sharded over ``fsdp`` are gathered as int8 (in a step compiled for eight CPUs). What is summed
over ``tensor`` travels as int32 or float32, twice the bytes of bfloat16; the rematerialisation policy
"dots" keeps these sums too. int8 is fast on TPUs from v5e and on GPUs, fp8 on TPU7x and on GPUs from
H100; elsewhere both only cost. Not here: stochastic rounding, delayed scaling, 8-bit gradients on the
wire.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dit_jax.parallel.mesh import platform
from dit_jax.types import DotGeneral

Matmul = Literal["full", "int8", "fp8"]
VALUES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
SLOPES = {"int8": jnp.int8, "fp8": jnp.float8_e5m2}


def _quantize(x: jax.Array, dtype: Any, *axes: int) -> Any:
    """``x`` in 8 bits, with one scale for all elements that differ in ``axes`` alone."""
    import qwix  # an extra

    channels = tuple(i for i in range(x.ndim) if i not in axes)
    return qwix.quantize(x.astype(jnp.float32), dtype, channelwise_axes=channels)


def _product(a: Any, b: Any, of_a: tuple[int, ...], of_b: tuple[int, ...]) -> jax.Array:
    """The product of two 8-bit arrays over these axes, scaled back, float32."""
    import qwix

    return qwix.dot_general(a, b, ((of_a, of_b), ((), ())))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(kind: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[..., d]`` times ``[d, e]``, both of one type, which the result and the gradients have."""
    return _linear_forward(kind, x, kernel)[0]


def _linear_forward(kind: str, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    last, dtype = x.ndim - 1, VALUES[kind]
    x8, kernel8 = _quantize(x, dtype, last), _quantize(kernel, dtype, 0)
    out = _product(x8, kernel8, (last,), (0,)).astype(x.dtype)
    return out, (x if kind == "int8" else x8, kernel8)


def _linear_backward(kind: str, residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel8 = residuals
    last, tokens = g.ndim - 1, tuple(range(g.ndim - 1))
    wide, dtype = g.astype(jnp.float32), SLOPES[kind]
    # A scale cannot be taken out of a sum along its own axis. So the slope is multiplied by the other
    # operand's (kernel's [1, e], x's [..., 1]) before it is rounded.
    dx = _product(_quantize(wide * kernel8.scale, dtype, last), kernel8.qvalue, (last,), (1,))
    if kind == "int8":
        d_kernel = jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())))
    else:
        slope8 = _quantize(wide * x.scale, dtype, *tokens)
        d_kernel = _product(x.qvalue, slope8, tokens, tokens)
    return dx.astype(g.dtype), d_kernel.astype(g.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def flat_dot_general(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
    """``dot_general`` of ``[b, l, d]`` and ``[d, e]`` as one of two matrices ``[b l, d]``.

    On a CPU the gradient of ``rhs`` is then one product too, without a strided copy of ``lhs``.
    """
    ((contract, kernel), batch) = dimension_numbers
    if tuple(contract) != (lhs.ndim - 1,) or tuple(kernel) != (0,) or any(map(len, batch)):
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)
    flat = lhs.reshape(-1, lhs.shape[-1])
    out = jax.lax.dot_general(flat, rhs, (((1,), (0,)), ((), ())), **options)
    return out.reshape(*lhs.shape[:-1], *rhs.shape[1:])


def choose_dot_general(mesh: Mesh, matmul: Matmul = "full") -> DotGeneral:
    """The product for linear layers on a mesh."""
    if matmul == "full":
        # Rows and sharded tokens lie on different mesh axes: to join them would move them.
        flat = platform(mesh) == "cpu" and mesh.shape["context"] == 1
        return flat_dot_general if flat else jax.lax.dot_general
    if importlib.util.find_spec("qwix") is None:
        raise ValueError(
            f"model.matmul is {matmul!r}, which qwix computes, and qwix is not installed: pip install "
            "'dit-jax[quant]', in a clone pip install -e '.[quant]', or set model.matmul to full."
        )

    def dot_general(lhs: jax.Array, rhs: jax.Array, dimensions: Any, **precision: Any) -> jax.Array:
        (contract, batch), last = dimensions, lhs.ndim - 1
        assert tuple(map(tuple, contract)) == ((last,), (0,)) and not any(batch) and rhs.ndim == 2
        assert lhs.dtype == rhs.dtype, (lhs.dtype, rhs.dtype)
        return _linear(matmul, lhs, rhs)

    return dot_general
