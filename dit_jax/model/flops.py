"""How much a program computes, counted in its jaxpr: a multiplication and an addition are two flops."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dit_jax.model.dit import ModelConfig, TextToVideo, blank_inputs
from dit_jax.types import Params, Runtime

L, S = 1009, 997  # Primes, told from all other sizes of a model.


def traced_products(jaxpr: Any, partitions: int = 1) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Every product of a jaxpr: how often all devices compute it, and the sizes that it multiplies. A
    ``scan`` counts its length, a ``cond`` its dearest branch, a ``shard_map`` its number of devices, a
    ``while`` once; kernels are opened up."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            x = equation.invars[0].aval.shape
            (contracted, _), _ = params["dimension_numbers"]
            yield 1, (*equation.outvars[0].aval.shape, *(x[d] for d in contracted))
        elif name == "conv_general_dilated":
            kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            yield 1, (*equation.outvars[0].aval.shape, *(kernel[d] for d in spec[1:]))
        elif name == "cond":
            dearest = max(params["branches"], key=lambda one: traced_flops(one, partitions))
            yield from traced_products(dearest, partitions)
        else:
            times = {"scan": params.get("length"), "shard_map": partitions}.get(name, 1)
            if name == "pallas_call":
                grid = params["grid_mapping"].grid
                times = math.prod(int(n) for n in grid if isinstance(n, int | np.integer))
            for value in params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                        for count, sizes in traced_products(inner, partitions):
                            yield times * count, sizes


def traced_flops(jaxpr: Any, partitions: int = 1) -> float:
    """Flops of all products in a jaxpr, over all devices."""
    return float(sum(2 * n * math.prod(sizes) for n, sizes in traced_products(jaxpr, partitions)))


def _all_pairs(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
    """The two products of attention, of every query with every key."""
    return jnp.einsum("balm,bmad->blad", jnp.einsum("blad,bmad->balm", q, k), v)


@functools.cache
def _monomials(config: ModelConfig, encode_text: bool) -> dict[tuple[int, int], int]:
    """Flops of a segment of l tokens and s text tokens as a polynomial: {(i, j): factor of l^i s^j}."""
    model = TextToVideo(config, Runtime(_all_pairs))
    params = jax.eval_shape(lambda key: model.init(key, blank_inputs(config)), jax.random.key(0))

    def forward(params: Params) -> Any:
        inputs = blank_inputs(config, L, S)
        if not encode_text:
            inputs = dataclasses.replace(inputs, text=jnp.zeros((1, S, config.text_width)))
        return model.apply(params, inputs, encoded=not encode_text)

    out = collections.Counter()
    for times, sizes in traced_products(jax.make_jaxpr(forward)(params)):
        factor = 2 * times * math.prod(n for n in sizes if n not in (L, S))
        out[sizes.count(L), sizes.count(S)] += factor
    return dict(out)


def forward_flops(
    config: ModelConfig,
    num_tokens: Int[np.ndarray, "*b"],
    num_text: Int[np.ndarray, "*b"],
    encode_text: bool = True,
) -> Float[np.ndarray, "*b"]:
    """Flops of a forward pass over segments of so many tokens and text tokens (without ``encode_text``,
    of the transformer alone): attention within segments and windows, no padding or recomputation."""
    l, s, dit = num_tokens.astype(np.float64), num_text.astype(np.float64), config.dit
    monomials = _monomials(config, encode_text)
    total = sum(factor * l**i * s**j for (i, j), factor in monomials.items()) * (l > 0)
    if dit.window is not None:  # Windowed layers see 2 r + 1 keys a token, fewer near both ends.
        reach = np.minimum(dit.window, np.maximum(l - 1, 0))
        seen = l * (2 * reach + 1) - reach * (reach + 1)
        total -= (dit.depth - dit.depth // dit.global_every) * 4 * dit.width * (l * l - seen)
    return total
