"""Low-rank adapters of linear layers (Hu et al. 2021, "LoRA"), beside a frozen kernel W [in, out]::

    y = x W + bias + scale dropout(x) A B,     A [in, r], B [r, out], scale = alpha / r            (1)
    W' = W + scale A B                         what merging makes of it                            (2)

B begins at zero, so that a fresh adapter changes nothing. A and B are two more leaves of the parameter
tree, ``lora_a`` and ``lora_b``, beside the ``kernel`` that they adapt, and stacked over layers as it
is. The network is not rewritten for them: an interceptor of Flax adds the second term of (1) to every
``nn.Dense`` that has such leaves. Nothing is merged in training, so no gradient of a kernel exists.

A frozen kernel may be kept in 8 bits with a scale for each output, Q s ~ W (the base of Dettmers et
al. 2023, "QLoRA", is 4 bits); then x W is (x Q) s, and only Q's cast is made, in the layer at work.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float

from dit_jax.files import refuse_if
from dit_jax.model import TextToVideo
from dit_jax.model.layers import as_computed
from dit_jax.types import Fraction, Params, PositiveFloat, PositiveInt

A, B, SCALE = "lora_a", "lora_b", "kernel_scale"
BaseDtype = Literal["float32", "bfloat16", "int8", "fp8"]
EIGHT_BITS: dict[str, tuple[Any, float]] = {
    "int8": (jnp.int8, 127.0),
    "fp8": (jnp.float8_e4m3fn, 448.0),
}
"""Of each kind, the dtype and its largest value."""
Path = tuple[str, ...]
SHOWN = 12


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers are adapted, by what, and how the frozen base is kept."""

    rank: PositiveInt = 16
    # The scale of (1) is alpha / rank; unset, it is 1.
    alpha: PositiveFloat | None = None
    # Patterns of the layers' paths; * stands for any text, "/" included.
    targets: tuple[str, ...] = (
        "dit/blocks/*self_attention/*",
        "dit/blocks/*cross_attention/*",
        "dit/blocks/*mlp/*",
    )
    # Layers whose rank is another, by their whole paths; the scale stays alpha / rank.
    ranks: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    # Share of a layer's inputs that the adapter does not see, drawn anew for every token.
    dropout: Fraction = 0.0
    # How the base is kept in training: bfloat16 is what accelerators compute with anyway; int8 and fp8
    # hold the matrices of attention and MLPs in a quarter of float32, and move the output a little.
    base_dtype: BaseDtype = "float32"

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The leaves A and B of each adapted layer, by its path below "params" ("dit/blocks/mlp/up")."""

    layers: Mapping[str, tuple[Any, Any]]
    scale: float = 1.0


# --- The parameter tree ---


def is_adapter(path: str) -> bool:
    """Whether the parameter at a path is one of an adapter."""
    return path.endswith((f"/{A}", f"/{B}"))


def join(trained: Params, frozen: Params) -> Params:
    """One tree of the leaves of both."""
    flat = traverse_util.flatten_dict
    return traverse_util.unflatten_dict({**flat(frozen), **flat(trained)})


def layers_of(params: Params) -> dict[str, Path]:
    """The layers that can be adapted, ``{"dit/blocks/mlp/up": path}``, of boxed parameters: those with
    a matrix, which a scan may have stacked."""
    found = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        names = getattr(leaf, "names", ())
        if path[-1] == "kernel" and len(names) - ("layers" in names) == 2:
            found["/".join(path[1:-1])] = path[:-1]
    return found


def targeted(names: Iterable[str], config: LoraConfig) -> list[str]:
    """Those of the layers that a config adapts. Refused if a pattern or a rank is of none."""
    names = list(names)
    known = f"layers are {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
    unused = [one for one in config.targets if not any(fnmatchcase(x, one) for x in names)]
    # The defaults name cross-attention, which a model of classes has none of.
    none = len(unused) == len(config.targets)
    unused = [one for one in unused if none or one not in LoraConfig().targets]
    absent = [one for one in config.ranks if one not in names]
    targets = f"lora.targets {', '.join(unused) or '()'}: no layer has such a path; {known}."
    refuse_if([(none or bool(unused), targets)])
    refuse_if([(bool(absent), f"lora.ranks names {', '.join(absent)}: {known}.")])
    return [name for name in names if any(fnmatchcase(name, one) for one in config.targets)]


def add_adapters(params: Params, config: LoraConfig, key: jax.Array) -> Params:
    """Boxed parameters with fresh adapters, boxed too: A's input axis and B's output axis lie as the
    kernel's."""
    layers = layers_of(params)
    flat: dict[Path, Any] = traverse_util.flatten_dict(params)
    for name in targeted(layers, config):
        kernel: Any = flat[(*layers[name], "kernel")]
        *stack, d, e = kernel.value.shape
        *of_stack, of_in, of_out = kernel.names
        rank = config.ranks.get(name, config.rank)
        large = name not in config.ranks and rank > min(d, e)
        message = (
            f"lora.rank {rank} is larger than {name} [{d}, {e}] has: give at most {min(d, e)}."
        )
        refuse_if([(large, message)])
        # By the layer's name: what is adapted beside it does not change what it draws.
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        bound = d**-0.5  # As PEFT begins.
        a = jax.random.uniform(own, (*stack, d, rank), minval=-bound, maxval=bound)
        b = jnp.zeros((*stack, rank, e))
        flat[(*layers[name], A)] = nn.LogicallyPartitioned(a, (*of_stack, of_in, None))
        flat[(*layers[name], B)] = nn.LogicallyPartitioned(b, (*of_stack, None, of_out))
    return traverse_util.unflatten_dict(flat)


def adapter_of(params: Params, scale: float) -> Adapter:
    """The adapters among parameters."""
    flat = traverse_util.flatten_dict(params)
    paths = [path[:-1] for path in flat if path[-1] == A]
    return Adapter({"/".join(p[1:]): (flat[(*p, A)], flat[(*p, B)]) for p in paths}, scale)


def as_params(adapter: Adapter) -> Params:
    """The leaves of an adapter in their places, without its scale."""
    out = {}
    for name, (a, b) in adapter.layers.items():
        path = ("params", *name.split("/"))
        out |= {(*path, A): a, (*path, B): b}
    return traverse_util.unflatten_dict(out)


# --- The frozen base ---


def in_8_bits(path: Path) -> bool:
    """Whether a base of 8 bits keeps a parameter so: the matrices of attention and MLPs, which are
    most of a model. Modulation and what stands outside the blocks keep their precision."""
    of_blocks = path[1:3] == ("dit", "blocks") and path[-1] == "kernel"
    return of_blocks and not {"self_attention", "cross_attention", "mlp"}.isdisjoint(path)


def quantise(kernel: Float[Array, "*n d e"], kind: str) -> tuple[jax.Array, Float[Array, "*n e"]]:
    """A kernel in 8 bits, and the scale of each of its outputs."""
    dtype, limit = EIGHT_BITS[kind]
    wide = kernel.astype(jnp.float32)
    largest = jnp.abs(wide).max(-2)
    scale = jnp.where(largest > 0, largest, 1.0) / limit
    scaled = wide / scale[..., None, :]
    return (jnp.round(scaled) if kind == "int8" else scaled).astype(dtype), scale


def keep_base(params: Params, kind: BaseDtype) -> Params:
    """Parameters, boxed or not, as a frozen base keeps them."""
    if kind == "float32":
        return params
    out, flat = {}, dict[Path, Any](traverse_util.flatten_dict(params))
    for path, leaf in flat.items():
        value = getattr(leaf, "value", leaf)
        boxed: Any = leaf if isinstance(leaf, nn.LogicallyPartitioned) else None
        if kind == "bfloat16":
            parts = {path: as_computed(path, value, jnp.bfloat16)}
        elif in_8_bits(path):
            kernel, scale = quantise(value, kind)
            parts = {path: kernel, (*path[:-1], SCALE): scale}
        else:
            parts = {path: value}
        for name, part in parts.items():
            names = boxed and (
                boxed.names if name == path else (*boxed.names[:-2], boxed.names[-1])
            )
            out[name] = nn.LogicallyPartitioned(part, names) if boxed else part
    return traverse_util.unflatten_dict(out)


def read_as(shapes: Params, kind: BaseDtype) -> Params:
    """The shapes of a base as it is read: what ends in 8 bits passes through bfloat16, whose rounding
    is small beside theirs, so that no device ever holds the model in float32."""

    def narrow(path: Any, leaf: Any) -> Any:
        names = tuple(key.key for key in path)
        wide = kind == "float32" or kind in EIGHT_BITS and not in_8_bits(names)
        dtype = jax.eval_shape(partial(as_computed, names, dtype=jnp.bfloat16), leaf).dtype
        return leaf if wide else jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree_util.tree_map_with_path(narrow, shapes)


# --- In the network ---


def adapt(scale: float, dropout: float) -> Callable[..., Any]:
    """The interceptor that computes (1) in every linear layer with adapters, and the products of
    kernels in 8 bits."""

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        (x,), own = args, lambda name: layer.get_variable("params", name)
        if layer.has_variable("params", SCALE):
            x = x.astype(layer.dtype or x.dtype)
            numbers = ((x.ndim - 1,), (0,)), ((), ())
            product = layer.dot_general or jax.lax.dot_general
            y = product(x, own("kernel").astype(x.dtype), numbers, precision=layer.precision)
            y = y * own(SCALE).astype(y.dtype) + own("bias").astype(y.dtype)
        else:
            y = next_fun(x)
        if not layer.has_variable("params", A):
            return y
        x = x.astype(y.dtype)
        if dropout and layer.has_rng("dropout"):
            seen = jax.random.bernoulli(layer.make_rng("dropout"), 1 - dropout, x.shape)
            x = jnp.where(seen, x / (1 - dropout), 0)
        return y + scale * (x @ own(A).astype(y.dtype) @ own(B).astype(y.dtype))

    return intercept


class LoraModel(TextToVideo):
    """The model, with the adapters that its parameters have."""

    scale: float = 1.0
    dropout: float = 0.0  # If it gets random numbers of that name: in training.

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(adapt(self.scale, self.dropout)):
            return super().apply(variables, *args, **kwargs)


def adapted(model: TextToVideo, config: LoraConfig) -> LoraModel:
    """The same model, with adapters."""
    return LoraModel(model.config, model.runtime, config.scale, config.dropout)


# --- Out of the network again ---


def merge(params: Params, adapters: Sequence[Adapter]) -> Params:
    """Parameters with adapters added to their kernels (2); those given are used up."""
    deltas: dict[Path, list[Any]] = {}
    for one in adapters:
        for name, (a, b) in one.layers.items():
            path = ("params", *name.split("/"), "kernel")
            deltas.setdefault(path, []).append((a, b, one.scale))

    def add(params: Params, deltas: Any) -> Params:
        flat: dict[Path, Any] = traverse_util.flatten_dict(params)
        for path, parts in deltas.items():
            for a, b, scale in parts:
                product = jnp.einsum("...dr,...re->...de", a, b, precision="highest")
                flat[path] = flat[path] + scale * product.astype(flat[path].dtype)
        return traverse_util.unflatten_dict(flat)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(add, donate_argnums=0, out_shardings=shardings)(params, deltas)


def together(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter that adds what several add, with the ranks of all; its scale is 1."""
    layers: dict[str, tuple[Any, Any]] = {}
    for one in adapters:
        for name, (a, b) in one.layers.items():
            b = b * one.scale
            if name in layers:
                a = jnp.concatenate([layers[name][0], a], -1)
                b = jnp.concatenate([layers[name][1], b], -2)
            layers[name] = a, b
    return Adapter(layers)
