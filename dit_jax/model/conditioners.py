"""Conditioners: how what a clip carries besides its caption reaches the transformer.

``ModelConfig.conditioners`` has one for each field that the model reads, under the field's name. A
conditioner is a small module that turns its field into one of these::

    tokens      [b, l, d]  added to the embedded patches
    modulation  [b, k, d]  added to the condition that modulates every block, by modulation group
    text        [b, m, e]  more text tokens, which every block attends to
    image       [b, m, d]  states of images, to which blocks attend with keys of their own

So a new condition is three places: the source that yields the field, a conditioner, and a line of a
config (docs/conditions.md). A segment that is ``dropped`` is unconditional, in training and in
classifier-free guidance: its conditioners leave the field out, or put a learned null in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Shaped

from dit_jax.files import InputError
from dit_jax.model.layers import States, dense
from dit_jax.types import DenoiserInputs, PositiveInt, Runtime, Sample, per_segment

if TYPE_CHECKING:
    from dit_jax.model.dit import ModelConfig


class Field(NamedTuple):
    """What a conditioner reads: a value of this shape and dtype for every token or segment."""

    of: Literal["token", "segment"]
    shape: tuple[int, ...]
    dtype: Any = np.float32
    classes: int | None = None  # Values are whole numbers below this.


class Conditioning(NamedTuple):
    """What a conditioner adds to the transformer; None adds nothing."""

    tokens: Float[Array, "b l d"] | None = None
    modulation: Float[Array, "b #k d"] | None = None
    # States, and the segments that they belong to.
    text: States | None = None
    image: States | None = None  # For a model with ``dit.image_attention``.


@dataclasses.dataclass(frozen=True)
class Conditioner:
    """The config of a conditioner; most need ``field`` and ``build`` alone. ``name`` is the field's."""

    def field(self, model: ModelConfig) -> Field:
        """What it reads."""
        # Not an abstract class: a stored config has this one in place of one of a user's own module.
        raise InputError(
            "the model has a conditioner of a module outside dit_jax, of which a run stores nothing: "
            "give the config that has it (--config)."
        )

    def build(self, name: str, model: ModelConfig, runtime: Runtime) -> Any:
        """The module: a function of ``DenoiserInputs`` that returns a ``Conditioning``."""

    def with_images(self, name: str, request: Any, space: Any, images: Any) -> Any:
        """The request with the field made of known frames, ``{number: uint8 [h, w, 3]}``; None if it is
        not made of images. With one that is, image-to-video has no known latents."""

    def derive(self, name: str, sample: Sample) -> Sample:
        """The sample with the field, if the field is computed from the clip (or a source lacks it)."""
        return sample

    def prepare(self, name: str, keys: Shaped[Array, "b n"], rows: Any, train: bool) -> Any:
        """The rows (any struct that has fields) as the model reads them, once before every step of
        training or the first step of sampling: the place for noise on the condition. ``keys`` are of
        each segment's sample or seed; fold in a number of your own."""
        return rows


def group_segments(inputs: DenoiserInputs) -> Int[Array, "b k"]:
    """The segment of each modulation group; 0 for a group without tokens."""
    groups = jnp.arange(inputs.group_t.shape[1])
    member = inputs.group_ids[:, None, :] == groups[None, :, None]  # [b, k, l]
    return jnp.where(member, inputs.segment_ids[:, None, :], 0).max(-1)


def per_group(inputs: DenoiserInputs, values: jax.Array) -> jax.Array:
    """``per_segment`` for each of the segments' modulation groups: ``[b, k, ...]``."""
    return per_segment(values, group_segments(inputs))


def prepare_fields(
    conditioners: Mapping[str, Conditioner], keys: Shaped[Array, "b n"], rows: Any, train: bool
) -> Any:
    """The rows after every conditioner's ``prepare``."""
    for name, conditioner in conditioners.items():
        rows = conditioner.prepare(name, keys, rows, train)
    return rows


def check_fields(
    model: ModelConfig,
    token_fields: Mapping[str, np.ndarray],
    segment_fields: Mapping[str, Any],
    what: str,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The token and segment fields that the model reads, in their types; refuses a sample or a request
    (``what``) that lacks one."""
    read: dict[str, dict[str, np.ndarray]] = {"token": {}, "segment": {}}
    for name, conditioner in model.conditioners.items():
        of, expected, dtype, classes = conditioner.field(model)
        fields = token_fields if of == "token" else segment_fields
        value, problem = np.asarray(fields.get(name)), None
        shape = value.shape[1:] if of == "token" else value.shape
        if name not in fields:
            problem = f"no {of} field {name!r} (only {sorted({**token_fields, **segment_fields})})"
        elif shape != expected:
            problem = f"the field {name!r} of shape {shape} for every {of}, not {expected}"
        elif classes and not (0 <= value.min() and value.max() < classes):
            problem = f"the {name} {value}, and the model has 0 to {classes - 1}"
        if problem:
            raise ValueError(f"{what} has {problem}: see model.conditioners.{name}.")
        read[of][name] = value.astype(dtype)
    return read["token"], read["segment"]


@dataclasses.dataclass(frozen=True)
class ClassLabels(Conditioner):
    """Classes by number, a segment field: embeddings that are added to those of noise levels. Dropped
    labels become the null class, whose number is ``classes`` (Ho & Salimans 2022)."""

    classes: PositiveInt = 1000

    def field(self, model: ModelConfig) -> Field:
        return Field("segment", (), np.int32, self.classes)

    def build(self, name: str, model: ModelConfig, runtime: Runtime) -> nn.Module:
        return ClassEmbedding(name, self.classes, model.dit.width, runtime)


class ClassEmbedding(nn.Module):
    """The embedding of each modulation group's class, float32."""

    field: str
    classes: int
    width: int
    runtime: Runtime

    @nn.compact
    def __call__(self, inputs: DenoiserInputs) -> Conditioning:
        normal = nn.initializers.normal(0.02)  # As DiT's.
        init = nn.with_logical_partitioning(normal, ("vocab", "embed_out"))
        # Flax types the boxed initial value; `param` returns it unboxed.
        table: Any = self.param("embedding", init, (self.classes + 1, self.width))
        labels = jnp.where(inputs.dropped > 0, self.classes, inputs.segment_fields[self.field])
        embedded = table[per_group(inputs, labels)]  # [b, k, d]
        return Conditioning(modulation=self.runtime.constrain(embedded, "batch", None, "width"))


@dataclasses.dataclass(frozen=True)
class Signal(Conditioner):
    """Numbers, such as a frame rate, an action or a camera's pose, through two linear layers: those of
    segments added to the modulation, those of tokens (of frames) to the patches."""

    of: Literal["token", "segment"] = "segment"
    # Of a value; of a token, ``(frames, ...)`` with the codec's stride in time times ``patch.t``.
    shape: tuple[int, ...] = ()
    scale: float = 1.0  # What the numbers are multiplied by: they should then be about 1 in size.

    def field(self, model: ModelConfig) -> Field:
        return Field(self.of, self.shape)

    def build(self, name: str, model: ModelConfig, runtime: Runtime) -> nn.Module:
        return SignalEmbedding(name, self, model.dit.width, runtime)


class SignalEmbedding(nn.Module):
    """The embedding of numbers, float32; nothing for dropped segments."""

    field: str
    config: Signal
    width: int
    runtime: Runtime

    @nn.compact
    def __call__(self, inputs: DenoiserInputs) -> Conditioning:
        if self.config.of == "token":
            values = inputs.token_fields[self.field]
            dropped, axis = per_segment(inputs.dropped, inputs.segment_ids), "tokens"
        else:
            values = per_group(inputs, inputs.segment_fields[self.field])
            dropped, axis = per_group(inputs, inputs.dropped), None
        rows = values.astype(jnp.float32).reshape(*values.shape[:2], -1) * self.config.scale
        linear = partial(dense, self.width, dtype=jnp.float32, precision="highest")
        hidden = nn.silu(linear(("patch", "embed"), name="up")(rows))
        out = linear(("embed", "embed_out"), name="out")(hidden) * (1 - dropped)[..., None]
        out = self.runtime.constrain(out, "batch", axis, "width")
        return Conditioning(tokens=out) if axis else Conditioning(modulation=out)
