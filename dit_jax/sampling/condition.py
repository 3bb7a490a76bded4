"""Requests, and the conditions that solvers are given for them: rows of tokens with noise ceilings.

What is held and what is free makes the mode (DESIGN section 3), and this module does not ask which it
is: ``modes`` knows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dit_jax.model import ModelConfig, PatchConfig, TextStatesConfig
from dit_jax.sampling.given import Given, given_tokens, places
from dit_jax.sampling.loops import cycle
from dit_jax.sampling.low_resolution import low_tokens
from dit_jax.types import PAD


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
    label: int | None = None
    """The class, for a model of classes."""
    negative: str = ""
    """What guidance leads away from, in place of the empty prompt."""
    negative_states: np.ndarray | None = None
    low: np.ndarray | None = None
    """For super-resolution: what the model is given, float ``[t, h, w, c]`` of the request's size."""
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
class Condition:
    """What the solver is given: rows of tokens, what is known of them, and how free each is."""

    clean: Float[Array, "b l p"]
    """Given tokens; anything where the ceiling is 1."""
    ceilings: Float[Array, "b l"]
    """0 is given and held, 1 is free."""
    group_ids: Int[Array, "b l"]
    group_ceilings: Float[Array, "b k"]
    """The ceiling that the tokens of a group share."""
    positions: Float[Array, "b l 3"]
    segment_ids: Int[Array, "b l"]
    token_ids: Int[Array, "b l"]
    text: Int[Array, "b s"] | Float[Array, "b s e"]
    text_segment_ids: Int[Array, "b s"]
    seeds: Int[Array, "b n"]
    known: Bool[Array, "b l p"] | None = None
    """Numbers that are given in tokens that are not held; None where no row has any."""
    cycles: Float[Array, "b 3"] | None = None
    """Loops (see ``loops.cycle``); None where no row is one."""
    negative: Int[Array, "b s"] | Float[Array, "b s e"] | None = None
    """In place of the empty text; None where every row has that."""
    negative_segment_ids: Int[Array, "b s"] | None = None
    low: Float[Array, "b l q"] | None = None
    """For super-resolution: what is given at low resolution (see ``PackedBatch``)."""


def make_condition(
    requests: Sequence[Request],
    model: ModelConfig,
    row_tokens: int | None = None,
    together: Sequence[Request] = (),
) -> Condition:
    """One request a row.

    Args:
        row_tokens: pads rows to a common length; the longest request's if not given.
        together: all requests whose conditions are to have one form, that a step compiled for one
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
    read = [model.text_tokens(r.prompt, r.text_states, r.label) for r in requests]
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
        low=low_tokens([request.low for request in requests], model, length),
    )
    if any(r.loop for r in every):
        cycles = [cycle(grid, r.loop) for grid, r in zip(grids, requests, strict=True)]
        fields["cycles"] = np.array(cycles, np.float32)
    if any(r.negative for r in every):
        read = [_negative_tokens(r, model) for r in requests]
        fields["negative"], fields["negative_segment_ids"] = _texts(read, model)
    return Condition(**fields)


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


def unconditioned(condition: Condition) -> Condition:
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
