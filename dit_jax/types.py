"""Axis letters, the packed batch and the functions that rooms hand to each other.

Axis letters, used in every shape of this project (DESIGN section 7)::

    b rows          l tokens of a row     s text tokens of a row
    n segments      k conditioning groups p patch dimension
    t h w grid      c channels            e text width
    d width or head dimension             a attention heads

A *row* holds several *segments* (clips, images) side by side, as NaViT packs images
(Dehghani et al. 2023, "Patch n' Pack"). A *group* is a set of tokens of one segment that
share a noise level.

This module holds names only: no computation, and no import of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, NotRequired, Protocol, TypedDict

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8

Params = Any
"""A nested dict of parameters, as Flax Linen makes it."""

PAD = 0
"""The segment id of padding; segments of a row are numbered 1, 2, ..."""

ATTENTION, QKV, RESIDUAL = "attention", "qkv", "residual"
"""Names under which rematerialisation policies know what a block computes: the results of attention,
the product that its inputs are made from, and what enters the block."""


class Sample(TypedDict):
    """One training example as a source gives it."""

    video: np.ndarray
    """uint8 [t, h, w, c], or float latents."""
    caption: str
    """The one that is used where none is drawn."""
    fps: float
    text_states: NotRequired[np.ndarray]
    """float [s, e]: the caption as the states of a text encoder, where the data has them."""
    captions: NotRequired[Mapping[str, str]]
    """All that it may be trained on, by feature, where the data has several."""
    captions_states: NotRequired[Mapping[str, np.ndarray]]
    """Of each, float [s, e], where the data has states."""
    label: NotRequired[int]
    """The class, where the data has classes."""
    part: NotRequired[int]
    """Which set it is of, from 0, where the data is a mixture."""


class Source(Protocol):
    """Random access to samples; the same index gives the same sample in every process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@struct.dataclass
class PackedBatch:
    """Rows of packed clean tokens, and what is known of each segment.

    Segment slot ``j`` of the ``[b, n]`` fields describes the tokens whose segment id is
    ``j + 1``; an empty slot has ``num_tokens == 0``.
    """

    tokens: Float[Array, "b l p"]
    """Clean patches (see ``model.patch``); zero where padded."""
    positions: Float[Array, "b l 3"]
    """(t, h, w) coordinates; t in latent frames at the reference frame rate."""
    segment_ids: Int[Array, "b l"]
    """0 is padding; attention never crosses segments."""
    frame_ids: Int[Array, "b l"]
    """Latent frame of each token within its segment, from 0."""
    token_ids: Int[Array, "b l"]
    """Index of each token within its segment, from 0."""
    text: Int[Array, "b s"] | Float[Array, "b s e"]
    """Text tokens of the captions, or states of a text encoder, packed the same way."""
    text_segment_ids: Int[Array, "b s"]
    sample_ids: UInt[Array, "b n"]
    """Identity of each segment's sample: the randomness of its noise, wherever it is packed."""
    num_tokens: Int[Array, "b n"]
    num_frames: Int[Array, "b n"]
    """Latent frames of each segment."""
    low: Float[Array, "b l q"] | None = None
    """For super-resolution: patches of the clip as it is at low resolution, enlarged to this size."""


@struct.dataclass
class ClipBatch:
    """Windows of clips, for an autoencoder."""

    video: UInt8[Array, "b t h w 3"]
    num_frames: Int[Array, "b"]
    """Frames of each row that count; those behind fill it up."""


@struct.dataclass
class Totals:
    """The loss of a batch's rows together, and what it is made of."""

    loss: Float[Array, ""]
    """The mean, times ``weight``."""
    weight: Float[Array, ""]
    parts: dict[str, Float[Array, ""]]
    """Terms to log, each times ``weight``."""


ALONG_TOKENS = frozenset(
    {
        "tokens",
        "positions",
        "segment_ids",
        "frame_ids",
        "token_ids",
        "clean",
        "ceilings",
        "group_ids",
        "known",
        "low",
    }
)
"""Fields of batches (and of what is sampled) with a value for every token: ``[b, l, ...]``."""


@struct.dataclass
class Noised:
    """What the denoiser sees of a batch, and what it is measured against."""

    tokens: Float[Array, "b l p"]
    """Noised patches x_tau."""
    eps: Float[Array, "b l p"]
    tau: Float[Array, "b l"]
    """Noise level of each token: min(t of its segment, its ceiling). 0 is data, 1 is noise."""
    group_ids: Int[Array, "b l"]
    group_t: Float[Array, "b k"]
    """Noise level of each conditioning group."""
    free: Bool[Array, "b l"]
    """Whether the token is to be made, and not given."""
    dropped: Float[Array, "b n"]
    """1 where the segment's caption was dropped, else 0."""
    low: Float[Array, "b l q"] | None = None
    """For super-resolution: what is given at low resolution, noised."""
    group_low_t: Float[Array, "b k"] | None = None
    """Its noise level, as each conditioning group is told it."""


class Attention(Protocol):
    """Scaled dot-product attention within segments, made in ``parallel`` and given to models.

    Queries see the keys of their own segment id only; the output at padding is finite and
    otherwise unspecified. Without ``k_segment_ids`` the keys are of the queries' own tokens
    (self-attention), and are spread over devices as those are; with them they are others (text),
    whole on every device. ``band`` limits self-attention to keys at most so many tokens away in
    the row, on either side.
    """

    def __call__(
        self,
        q: Float[Array, "b l a d"],
        k: Float[Array, "b m a d"],
        v: Float[Array, "b m a d"],
        q_segment_ids: Int[Array, "b l"],
        k_segment_ids: Int[Array, "b m"] | None,
        *,
        band: int | None = None,
    ) -> Float[Array, "b l a d"]: ...


Constrain = Callable[..., jax.Array]
"""``constrain(x, *logical_axes) -> x``: lays ``x`` out over the mesh; the identity off-mesh."""

DotGeneral = Callable[..., jax.Array]
"""What linear layers multiply with; the signature is ``jax.lax.dot_general``'s."""


def unconstrained(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """The layout function of a single device: ``x`` as it is."""
    del logical_axes
    return x


class Range(NamedTuple):
    """Bounds of a config's number, as an annotation of its type; ``config.check_types`` holds them."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        """False for NaN, which compares to nothing."""
        assert isinstance(value, int | float)
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        start, end = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {start}{self.low:g}, {self.high:.12g}{end}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, open_high=True)]
"""In [0, 1): a decay, a probability of dropping."""
