"""Requests, and the inputs of the sampler that are made of them: rows of tokens with noise caps.

Which tokens are conditioning tokens and which are generated makes the mode (docs/DESIGN.md, section 3),
and this module does not ask which it is: ``modes`` knows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from dit_jax.model import ModelConfig, PatchConfig, TextStatesConfig, check_fields, field_tokens
from dit_jax.sampling.given import Given, given_tokens, places
from dit_jax.sampling.loops import cycle
from dit_jax.types import PAD, TOKENS


@dataclasses.dataclass(frozen=True)
class Request:
    """One clip to make."""

    prompt: str
    frames: int
    height: int
    width: int
    fps: float
    seed: int
    text_states: np.ndarray | None = None
    """The prompt as the states ``[s, e]`` of a text encoder, for a model that reads those."""
    segment_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """One value for the whole clip: ``{"label": 3}``. Names are those of ``model.conditioners``."""
    frame_fields: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """One value for every frame of pixels: ``[t, ...]``."""
    pixel_fields: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Clips beside the clip, float ``[t, h, w, c]`` of the request's size."""
    time_stride: int = 1
    """Frames of pixels to a latent frame but the first: the codec's stride in time, which
    ``frame_fields`` are grouped by."""
    negative: str = ""
    """What guidance leads away from, in place of the empty prompt."""
    negative_states: np.ndarray | None = None
    given: Given | None = None
    """Latents that are known, and how free each is (see ``modes``); unset, all are free."""
    times: np.ndarray | None = None
    """``[frames]`` when each latent frame is shown, in latent frames; unset, 0, 1, 2, ..."""
    loop: bool = False
    """The last frame is followed by the first. No latent is then a first frame's (which with a causal
    codec holds one frame, and the others several)."""

    @property
    def size(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    def num_tokens(self, patch: PatchConfig) -> int:
        """Raises ``ValueError`` as ``PatchConfig.grid`` does."""
        _, h, w = patch.grid(1, self.height, self.width)
        frames = self.frames + self.loop
        return patch.num_tokens(frames, self.height, self.width) - self.loop * h * w


@struct.dataclass
class SamplerInputs:
    """What the solver starts from: rows of tokens, what is known of them, and their noise caps."""

    clean: Float[Array, "b l p"] = struct.field(metadata=TOKENS)
    """Conditioning tokens; anything where the cap is 1."""
    ceilings: Float[Array, "b l"] = struct.field(metadata=TOKENS)
    """The noise caps: 0 is a conditioning token, 1 is generated."""
    group_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    group_ceilings: Float[Array, "b k"]
    """The cap that the tokens of a modulation group share."""
    positions: Float[Array, "b l 3"] = struct.field(metadata=TOKENS)
    segment_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    token_ids: Int[Array, "b l"] = struct.field(metadata=TOKENS)
    text: Int[Array, "b s"] | Float[Array, "b s e"]
    text_segment_ids: Int[Array, "b s"]
    seeds: Int[Array, "b n"]
    known: Bool[Array, "b l p"] | None = struct.field(metadata=TOKENS, default=None)
    """Numbers that are kept in tokens that are generated; None if no row has any."""
    cycles: Float[Array, "b 3"] | None = None
    """Loops (see ``loops.cycle``); None if no row is one."""
    negative: Int[Array, "b s"] | Float[Array, "b s e"] | None = None
    """In place of the empty text; None if every row has that."""
    negative_segment_ids: Int[Array, "b s"] | None = None
    token_fields: dict[str, Shaped[Array, "b l *rest"]] = struct.field(
        metadata=TOKENS, default_factory=dict
    )
    segment_fields: dict[str, Shaped[Array, "b n *rest"]] = struct.field(default_factory=dict)


def request_fields(
    request: Request, patch: PatchConfig
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The fields of a request's tokens ``[l, ...]``, and of its segment."""
    fields = request.frame_fields, request.pixel_fields
    tokens = field_tokens(patch, request.time_stride, request.size, *fields, request.loop)
    segment = {name: np.asarray(value) for name, value in request.segment_fields.items()}
    return tokens, {**segment, "fps": np.array(request.fps, np.float32)}


def make_inputs(
    requests: Sequence[Request],
    model: ModelConfig,
    row_tokens: int | None = None,
    together: Sequence[Request] = (),
) -> SamplerInputs:
    """One request a row.

    Args:
        row_tokens: pads rows to a common length; the longest request's if not given.
        together: all requests whose inputs are to have one form, that a step compiled for one
            serves them all.
    """
    every = [*requests, *together]
    grids = [places(model.patch, r.size, r.fps, r.times, r.loop) for r in requests]
    length = row_tokens or max(len(grid) for grid in grids)
    b = len(requests)
    where = np.zeros((b, length, 3), np.float32)
    segments, tokens = np.zeros((b, length), np.int32), np.zeros((b, length), np.int32)
    for i, grid in enumerate(grids):
        count = len(grid)
        where[i, :count], segments[i, :count] = grid, 1
        tokens[i, :count] = np.arange(count)
    read = [model.text_tokens(r.prompt, r.text_states) for r in requests]
    text, text_segments = _texts(read, model)
    # NumPy arrays here; `parallel.global_batch` makes them JAX arrays of the mesh.
    fields: dict[str, Any] = dict(
        **_given(requests, every, model.patch, length),
        positions=where,
        segment_ids=segments,
        token_ids=tokens,
        text=text,
        text_segment_ids=text_segments,
        seeds=np.array([[request.seed % 2**32] for request in requests], np.uint32),
        **_fields(requests, model, length),
    )
    if any(r.loop for r in every):
        cycles = [cycle(grid, r.loop) for grid, r in zip(grids, requests, strict=True)]
        fields["cycles"] = np.array(cycles, np.float32)
    if any(r.negative for r in every):
        read = [_negative_tokens(r, model) for r in requests]
        fields["negative"], fields["negative_segment_ids"] = _texts(read, model)
    return SamplerInputs(**fields)


def _fields(
    requests: Sequence[Request], model: ModelConfig, length: int
) -> dict[str, dict[str, np.ndarray]]:
    """The fields of all requests, which have the same ones, as rows."""
    pairs = [request_fields(request, model.patch) for request in requests]
    kinds = {name: one.field(model).dtype for name, one in model.conditioners.items()}
    tokens: dict[str, np.ndarray] = {}
    for name, values in pairs[0][0].items():
        dtype = kinds.get(name, np.float32)
        tokens[name] = np.zeros((len(requests), length, *values.shape[1:]), dtype)
        for row, (own, _) in zip(tokens[name], pairs, strict=True):
            row[: len(own[name])] = own[name]
    segments = {
        name: np.stack([own[name] for _, own in pairs])[:, None].astype(kinds.get(name, np.float32))
        for name in pairs[0][1]
    }
    return {"token_fields": tokens, "segment_fields": segments}


def _texts(read: Sequence[np.ndarray], model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Texts as rows of one length, and which of it is theirs."""
    b, s = len(read), model.text.max_tokens
    text, segments = np.zeros((b, s, *read[0].shape[1:]), read[0].dtype), np.zeros((b, s), np.int32)
    for i, letters in enumerate(read):
        text[i, : len(letters)], segments[i, : len(letters)] = letters, 1
    return text, segments


def _negative_tokens(request: Request, model: ModelConfig) -> np.ndarray:
    states = request.negative_states
    if states is None and isinstance(model.text, TextStatesConfig) and not request.negative:
        states = np.zeros((0, model.text.dim), np.float32)
    return model.text_tokens(request.negative, states)


def _given(
    requests: Sequence[Request], every: Sequence[Request], patch: PatchConfig, length: int
) -> dict[str, np.ndarray]:
    """What rows are given: ``clean``, ``ceilings``, their groups, and ``known`` if any is."""
    b, levels = len(requests), [r.given.levels if r.given else np.ones(1) for r in every]
    clean = np.zeros((b, length, patch.dim), np.float32)
    ceilings, group_ids = np.ones((b, length), np.float32), np.zeros((b, length), np.int32)
    group_ceilings = np.ones((b, max(map(len, levels))), np.float32)
    known = np.zeros((b, length, patch.dim), bool)
    for i, request in enumerate(requests):
        if request.given is None:
            continue
        told = given_tokens(patch, request.given, request.loop)
        count = len(told.clean)
        clean[i, :count], known[i, :count] = told.clean, told.known
        ceilings[i, :count] = told.ceilings
        distinct, group_ids[i, :count] = np.unique(told.ceilings, return_inverse=True)
        group_ceilings[i, : len(distinct)] = distinct
    found: dict[str, np.ndarray] = dict(
        clean=clean, ceilings=ceilings, group_ids=group_ids, group_ceilings=group_ceilings
    )
    # Where patches hold several latents of unlike ceilings; all rows of a run have it or none.
    if any(r.given is not None and given_tokens(patch, r.given, r.loop).known.any() for r in every):
        found["known"] = known
    return found


def unconditioned(condition: SamplerInputs) -> SamplerInputs:
    """The same rows with the negative prompt, or the empty one: only the first token of every text
    is seen."""
    if condition.negative is not None:
        assert condition.negative_segment_ids is not None
        return dataclasses.replace(
            condition, text=condition.negative, text_segment_ids=condition.negative_segment_ids
        )
    ids = condition.text_segment_ids
    first = jnp.arange(ids.shape[1]) == 0
    return dataclasses.replace(condition, text_segment_ids=jnp.where(first, ids, PAD))


def check_request(request: Request, patch: PatchConfig) -> None:
    """Raises ``ValueError`` where the model cannot make such a clip, with what it can."""
    patch.grid(1, request.height, request.width)
    if not request.loop:
        patch.grid(request.frames, request.height, request.width)
    if not 0 < request.fps < math.inf:
        raise ValueError(f"fps is {request.fps}: a frame rate is above 0 and finite; try 24.")
    places(patch, request.size, request.fps, request.times, request.loop)
    wanted = (*request.size, patch.channels)
    if request.given is not None and request.given.clean.shape != wanted:
        raise ValueError(
            f"given latents of shape {request.given.clean.shape} for a request of {wanted}: give as "
            "many as are asked for."
        )


def check_request_fields(request: Request, model: ModelConfig) -> None:
    """Raises ``ValueError`` unless a request has every field that the model is conditioned on."""
    check_fields(model, *request_fields(request, model.patch), "the request")
