"""The data that the parts of this project hand to each other, and the letters of its axes.

Axis letters, used in every shape of this project::

    b rows          l tokens of a row     s text tokens of a row
    n segments      k modulation groups   p patch dimension
    t h w grid      c channels            e text width
    d width or head dimension             a attention heads

A *row* holds several *segments* (clips, images) side by side, as NaViT packs images
(Dehghani et al. 2023, "Patch n' Pack"). A *modulation group* is a set of tokens of one segment
that share a noise level. What a clip carries besides its video and its caption travels by name, as
a *field*: of tokens ``[b, l, ...]`` or of segments ``[b, n, ...]``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, NamedTuple, NotRequired, Protocol, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from dit_jax.files import refuse_if

Params = Any  # A nested dict of parameters, as Flax Linen makes it.
PAD = 0  # The segment id of padding; segments of a row are numbered 1, 2, ...

# Names under which rematerialisation policies know what a block computes: the results of attention,
# the product that its inputs are made from, and what enters the block.
ATTENTION, QKV, RESIDUAL = "attention", "qkv", "residual"


class Sample(TypedDict):
    """One training example, as a source yields it; the model reads the fields that its conditioners are
    named after."""

    # uint8 [t, h, w, c], or float latents.
    video: np.ndarray
    # The caption that is used if none is chosen at random.
    caption: str
    fps: float
    # float [s, e]: the caption as the states of a text encoder.
    text_states: NotRequired[np.ndarray]
    # All captions that the clip may be trained on, by feature, and the states [s, e] of each.
    captions: NotRequired[Mapping[str, str]]
    captions_states: NotRequired[Mapping[str, np.ndarray]]
    # Which data set of a mixture the sample is of, from 0.
    part: NotRequired[int]
    # One value for the whole clip, of any shape ({"label": 3}), or for every frame of pixels [t, ...].
    segment_fields: NotRequired[Mapping[str, Any]]
    frame_fields: NotRequired[Mapping[str, np.ndarray]]
    # Clips beside the clip: uint8 of its size in pixels, encoded as the clip is, or float [t, h, w, c]
    # on the grid of what the model generates.
    pixel_fields: NotRequired[Mapping[str, np.ndarray]]


class Source(Protocol):
    """Random access to samples; the same index gives the same sample in every process."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


# Metadata of a struct's field with values for every token, [b, l, ...], or a dict of such: those are
# sharded over the mesh's `context` axis too, all others over rows alone. Not a list of names, since a
# struct of any module may have token fields.
TOKENS = {"tokens": True}


def is_token_field(values: Any) -> Any:
    """A struct like ``values`` with True for every array of a token field, and False for others."""

    def flags(field: dataclasses.Field[Any]) -> Any:
        flag = bool(field.metadata.get("tokens"))
        return jax.tree.map(lambda _: flag, getattr(values, field.name))

    return type(values)(**{field.name: flags(field) for field in dataclasses.fields(values)})


@struct.dataclass(kw_only=True)
class Rows:
    """Packed rows of tokens and text, and the fields of their segments."""

    # Patches (`model.patches`): in a batch clean ones, zero at padding; to the denoiser noised ones.
    tokens: Float[Array, "b l p"] = struct.field(metadata=TOKENS)
    # (t, h, w), with t in latent frames at the reference frame rate.
    positions: Float[Array, "b l 3"] = struct.field(metadata=TOKENS)
    # 0 is padding; attention never crosses segments.
    segment_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    # Index of each token within its segment, from 0.
    token_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    # Text tokens [b, s] of captions, or states [b, s, e] of an encoder, packed the same way.
    text: Any
    # The segments of these [b, s]; to the denoiser, PAD behind the first token of a dropped caption.
    text_segment_ids: Any
    token_fields: dict[str, Shaped[Array, "b l *rest"]] = struct.field(
        metadata=TOKENS, default_factory=dict
    )
    # Always has "fps", the latent frames a second.
    segment_fields: dict[str, Shaped[Array, "b n *rest"]] = struct.field(default_factory=dict)


def per_segment(values: jax.Array, segment_ids: Int[Array, "b l"]) -> jax.Array:
    """Repeats ``[b, n, ...]`` values of segments for each of their tokens: ``[b, l, ...]``; padding has
    anything."""
    return jax.vmap(lambda row, ids: row[jnp.maximum(ids - 1, 0)])(values, segment_ids)


@struct.dataclass(kw_only=True)
class Batch(Rows):
    """Rows of clean tokens. Segment slot ``j`` of the ``[b, n]`` fields describes the tokens whose
    segment id is ``j + 1``; an empty slot has ``num_tokens == 0``."""

    # Latent frame of each token within its segment, from 0.
    frame_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    # Identity of each segment's sample: the randomness of its noise, wherever it is packed.
    sample_ids: UInt[Array, "b n"]
    num_tokens: Int[Array, "b n"]
    num_frames: Int[Array, "b n"]


@struct.dataclass(kw_only=True)
class DenoiserInputs(Rows):
    """All that the denoiser sees: one struct from the objective and the sampler to every layer."""

    group_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    # Noise level of each modulation group.
    group_t: Float[Array, "b k"]
    # 1 if the segment is unconditional: conditioners then leave their field out.
    dropped: Float[Array, "b n"]


@struct.dataclass
class Target:
    """What the output of the denoiser is measured against."""

    eps: Float[Array, "b l p"] = struct.field(metadata=TOKENS)
    # Noise level of each token: min(t of its segment, its noise cap). 0 is data, 1 is noise.
    tau: Float[Array, "b l"] = struct.field(metadata=TOKENS)
    # Whether the token is generated, and no conditioning token.
    generated: Bool[Array, "b l"] = struct.field(metadata=TOKENS)


@struct.dataclass
class Totals:
    """The mean loss of a batch's rows times ``weight``, and the terms to log, each times ``weight``."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    parts: dict[str, Float[Array, ""]]


# Scaled dot-product attention within segments, chosen in `parallel` and handed to models:
# `attention(q, k, v, q_segment_ids, k_segment_ids, *, window=None)` with q [b, l, a, d], k and v
# [b, m, a, d] and ids [b, l] and [b, m] makes [b, l, a, d]. The output at padding is finite and
# otherwise unspecified. If `k_segment_ids` is None the keys are of the queries' own tokens, and are
# sharded as those are; else they are others (text), whole on every device. `window` limits
# self-attention to keys at most so many tokens away.
Attention = Callable[..., jax.Array]
# `constrain(x, *logical_axes) -> x` shards x over the mesh.
Constrain = Callable[..., jax.Array]
# What linear layers multiply with; the signature is that of `jax.lax.dot_general`.
DotGeneral = Callable[..., jax.Array]


def unconstrained(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Returns ``x`` as it is: the ``Constrain`` of a single device."""
    return x


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a model computes: what depends on the machine, and not on the mathematics."""

    # Functions: which kernel runs is decided in `parallel`, which models do not import.
    attention: Attention
    constrain: Constrain = unconstrained
    # Of activations and matrix products; the float32 islands are named where they are.
    dtype: Any = jnp.float32
    dot_general: DotGeneral = jax.lax.dot_general
    # That of the transformer's blocks, which may multiply in 8 bits.
    block_dot_general: DotGeneral = jax.lax.dot_general


class Range(NamedTuple):
    """Bounds of a config's number, as an annotation of its type; ``config.check_types`` holds them."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        # Not by its negation: NaN compares to nothing, so that it is in no range.
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __repr__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        start, end = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {start}{self.low:g}, {self.high:.12g}{end}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, open_high=True)]  # A decay, a probability of dropping.
UnitInterval = Annotated[float, Range(0, 1)]


def require(prefix: str, config: Any, *rules: tuple[str, bool, str]) -> None:
    """``refuse_if`` for rules ``(field, whether it holds, what must be)`` of fields together; the
    ranges of single fields are in their types."""
    refuse_if(
        (not holds, f"{prefix}{name} is {attrgetter(name)(config)!r}: it must be {rule}.")
        for name, holds, rule in rules
    )


@dataclasses.dataclass(frozen=True)
class FrameGrid:
    """The one place that knows which frames share a latent frame, and which latent frames a token.

    The first frame of a clip stands alone, in a latent frame and a token of its own; every other
    latent frame holds ``stride`` frames (of the codec), every other token ``multiple`` latent frames::

        frames = 1 + n stride multiple,  latent frames = 1 + n multiple,  tokens = 1 + n
    """

    stride: int = 1
    multiple: int = 1

    @property
    def token_frames(self) -> int:
        """Frames of every token but the first, which holds one."""
        return self.stride * self.multiple

    def check(self, frames: int) -> None:
        """Raises ``ValueError``, with the nearest numbers, unless so many frames are whole tokens."""
        if frames < 1 or (frames - 1) % self.token_frames:
            low = self.whole(max(frames, 1))
            text = f"{frames} frames: give 1 + {self.token_frames}n, as the first frame has a token of "
            raise ValueError(f"{text}its own. The nearest are {low} and {low + self.token_frames}.")

    def whole(self, frames: int) -> int:
        """The most frames up to so many that have whole tokens."""
        return 1 + (frames - 1) // self.token_frames * self.token_frames

    def nearest(self, seconds: float, fps: float) -> int:
        """The number of frames with whole tokens that lasts about so long."""
        return 1 + round(max(seconds * fps - 1, 0) / self.token_frames) * self.token_frames

    def latents(self, frames: int) -> int:
        """Latent frames of so many frames; raises ``ValueError`` as ``check`` does."""
        self.check(frames)
        return 1 + (frames - 1) // self.stride

    def frames(self, latents: int) -> int:
        """Frames of so many latent frames."""
        return 1 + (latents - 1) * self.stride

    def per_token(self, values: np.ndarray, loop: bool = False) -> np.ndarray:
        """The values ``[t, ...]`` of frames, token by token along time: ``[n, token_frames, ...]``. The
        first frame is repeated to fill its token, as its pixels are; in a ``loop`` none is first."""
        if not loop:
            self.check(len(values))
            # [1 + n token_frames, ...] to [(1 + n) token_frames, ...]
            values = np.concatenate([np.repeat(values[:1], self.token_frames - 1, 0), values])
        return values.reshape(-1, self.token_frames, *values.shape[1:])


class Codec(Protocol):
    """Pixels ``[t, h, w, 3]``, float in [-1, 1], to latents ``[t', h', w', c]`` and back."""

    # Of the weights' bytes: latents of another hash are of another codec.
    @property
    def hash(self) -> str: ...
    # Frames, rows and columns of pixels in one latent.
    @property
    def strides(self) -> tuple[int, int, int]: ...
    # Float32, shifted and scaled: the mean, or with a key a sample of their distribution.
    def encode(self, video: np.ndarray, key: jax.Array | None = None) -> np.ndarray: ...
    # Float32, not clipped to [-1, 1].
    def decode(self, latents: np.ndarray) -> np.ndarray: ...
    # The same, some frames [n, h, w, 3] at a time, for clips too long to hold in memory.
    def decode_parts(self, latents: np.ndarray) -> Iterator[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """The identity: models of pixels."""

    hash: str = "pixels"
    strides: tuple[int, int, int] = (1, 1, 1)
    channels: int = 3

    def encode(self, video: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
        check_floating(video)
        return video

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self.encode(latents)

    def decode_parts(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(latents), 16):
            yield self.decode(latents[start : start + 16])


def check_floating(clip: np.ndarray) -> None:
    """Raises ``ValueError`` for whole numbers, which would be taken for pixels in [-1, 1]."""
    if not jnp.issubdtype(clip.dtype, jnp.floating):
        raise ValueError(f"a clip of {clip.dtype}: give floating point in [-1, 1], not 0 to 255.")


class TextEncoder(Protocol):
    """Captions to states ``[s, e]`` without padding, bfloat16."""

    @property
    def name(self) -> str: ...
    # Of the weights' bytes: states of another hash are of another encoder.
    @property
    def hash(self) -> str: ...
    @property
    def dim(self) -> int: ...
    def encode(self, captions: Sequence[str]) -> list[np.ndarray]: ...
