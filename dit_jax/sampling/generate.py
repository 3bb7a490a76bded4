"""From requests to tokens: noise, a solver, guidance.

A *request* is a prompt and a size. Requests become rows of one segment each, with a noise ceiling
for every token; what is held and what is free makes the mode, and this module does not ask which
it is. The noise of a request comes from its own seed: what is made does not depend on which
requests share the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from dit_jax.diffusion import (
    SOLVERS,
    DiffusionConfig,
    Estimate,
    Problem,
    SolverConfig,
    estimate,
    guide,
    guided_kind,
    levels_of,
    predicted_velocity,
    resolution_shift,
    split_output,
    start,
    token_noise,
)
from dit_jax.models import ModelConfig, PatchConfig, TextToVideo, as_computed, positions
from dit_jax.sampling.low_resolution import low_tokens, noised_low
from dit_jax.sampling.settings import SamplingConfig
from dit_jax.types import PAD, Params


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
    low: np.ndarray | None = None
    """For super-resolution: what the model is given, float ``[t, h, w, c]`` of the request's size."""


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
    low: Float[Array, "b l q"] | None = None
    """For super-resolution: what is given at low resolution (see ``PackedBatch``)."""


def text_condition(
    requests: Sequence[Request], model: ModelConfig, row_tokens: int | None = None
) -> Condition:
    """Text to video and text to image: one request a row, every token free.

    ``row_tokens`` pads rows to a common length; the longest request's if not given.
    """
    grids = [positions(model.patch, r.frames, r.height, r.width, r.fps)[0] for r in requests]
    length = row_tokens or max(len(grid) for grid in grids)
    b, s = len(requests), model.text.max_tokens
    places = np.zeros((b, length, 3), np.float32)
    segments, tokens = np.zeros((b, length), np.int32), np.zeros((b, length), np.int32)
    read = [model.text_tokens(r.prompt, r.text_states, r.label) for r in requests]
    text = np.zeros((b, s, *read[0].shape[1:]), read[0].dtype)
    text_segments = np.zeros((b, s), np.int32)
    for i, (grid, letters) in enumerate(zip(grids, read, strict=True)):
        count = len(grid)
        places[i, :count], segments[i, :count] = grid, 1
        tokens[i, :count] = np.arange(count)
        text[i, : len(letters)], text_segments[i, : len(letters)] = letters, 1
    # NumPy arrays here; `parallel.global_batch` makes them JAX arrays of the mesh.
    fields: dict[str, Any] = dict(
        clean=np.zeros((b, length, model.patch.dim), np.float32),
        ceilings=np.ones((b, length), np.float32),
        group_ids=np.zeros((b, length), np.int32),
        group_ceilings=np.ones((b, 1), np.float32),
        positions=places,
        segment_ids=segments,
        token_ids=tokens,
        text=text,
        text_segment_ids=text_segments,
        seeds=np.array([[request.seed % 2**32] for request in requests], np.uint32),
        low=low_tokens([request.low for request in requests], model, length),
    )
    return Condition(**fields)


def unconditioned(condition: Condition) -> Condition:
    """The same rows with the empty prompt: only the first token of every text is seen."""
    ids = condition.text_segment_ids
    first = jnp.arange(ids.shape[1]) == 0
    return dataclasses.replace(condition, text_segment_ids=jnp.where(first, ids, PAD))


NOISE_OF_STEPS = 2**32 - 1
"""Sets the noise of steps apart from that of tokens, whose indices are smaller."""


class Carry(NamedTuple):
    """What a step hands to the next."""

    x: Float[Array, "b l p"]
    history: Any
    """Of the solver (see ``diffusion.multistep``)."""


class Generator:
    """Compiled sampling for one model: ``generate`` compiles once for each shape of condition (and
    once more where guidance has an interval, for the steps outside).

    Raises:
        ValueError: where a model so trained cannot be sampled as the config says.
    """

    def __init__(
        self, model: TextToVideo, diffusion: DiffusionConfig, config: SamplingConfig
    ) -> None:
        config.check(diffusion, model.config.patch.channels)
        self.config = config
        self._model = model
        self._diffusion = diffusion
        self._solver = SOLVERS[config.solver]
        self._constants = SolverConfig(diffusion.variance, config.eta, config.sde_strength)
        self.begin = jax.jit(self._make_start)
        self._prepare = jax.jit(self.prepared)
        self._encode = jax.jit(partial(model.apply, method="encode_text"))
        self.step = jax.jit(self._make_step, donate_argnums=1)
        self._noise_low = jax.jit(partial(noised_low, diffusion.path, config.augmentation))

    def prepared(self, params: Params) -> Params:
        """Parameters (or their shapes) as the steps take them: what the layers would convert to the
        dtype of activations in every step is converted once. The numbers come out the same."""
        dtype = self._model.config.compute_dtype()
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: as_computed([entry.key for entry in path], leaf, dtype), params
        )

    def levels(self, tokens: int) -> Float[np.ndarray, "k"]:
        """The noise levels that are visited, for clips of so many tokens."""
        config, path = self.config, self._diffusion.path
        shift = config.shift or 1.0
        if config.spacing == "linear" and config.shift is None:
            shift = float(resolution_shift(self._diffusion.time, np.int64(tokens)))
        return levels_of(path, config.spacing, config.steps, shift, config.last_step)

    def _make_start(self, condition: Condition, t: Float[Array, ""]) -> Carry:
        keys = jax.vmap(jax.vmap(jax.random.key))(condition.seeds)
        dim = condition.clean.shape[-1]
        eps = token_noise(keys, condition.segment_ids, condition.token_ids, dim)
        x = start(self._diffusion.path, condition.clean, eps, condition.ceilings, t)
        return Carry(x, self._solver.begin(x, t))

    def _noise(self, condition: Condition, index: Int[Array, ""]) -> Float[Array, "b l p"]:
        def of_step(seed: Int[Array, ""]) -> jax.Array:
            steps = jax.random.fold_in(jax.random.key(seed), NOISE_OF_STEPS)
            return jax.random.fold_in(steps, index)

        keys = jax.vmap(jax.vmap(of_step))(condition.seeds)
        dim = condition.clean.shape[-1]
        return token_noise(keys, condition.segment_ids, condition.token_ids, dim)

    def _estimate(
        self,
        output: Float[Array, "b l o"],
        x: Float[Array, "b l p"],
        condition: Condition,
        t: Float[Array, ""],
        index: Int[Array, ""],
    ) -> Estimate:
        """What the network says, guided where its output has twice the rows (with text first)."""
        diffusion, guidance = self._diffusion, self.config.guidance
        tau = jnp.minimum(t, condition.ceilings)
        prediction, fraction = split_output(diffusion, output, x.shape[-1])
        guided = output.shape[0] > x.shape[0]

        def twice(y: jax.Array) -> jax.Array:
            return jnp.concatenate([y, y]) if guided else y

        if guided_kind(diffusion) != diffusion.prediction:
            prediction = predicted_velocity(diffusion, prediction, twice(x), twice(tau))
        if guided:
            conditional, without = jnp.split(prediction, 2)
            prediction = guide(
                guidance,
                conditional,
                without,
                t,
                tau,
                condition.segment_ids,
                condition.seeds.shape[1],
                self._model.config.patch.channels,
            )
            fraction = None if fraction is None else fraction[: x.shape[0]]
        if guidance.zero_init:
            prediction = jnp.where(index < guidance.zero_init, 0, prediction)
        return estimate(diffusion, prediction, x, tau, fraction)

    def _make_step(
        self,
        params: Params,
        carry: Carry,
        condition: Condition,
        text: Float[Array, "b s e"],
        text_segment_ids: Int[Array, "b s"],
        t: Float[Array, ""],
        t_next: Float[Array, ""],
        index: Int[Array, ""],
    ) -> Carry:
        """One step of the solver, from level ``t`` to ``t_next``; ``index`` counts them. It is guided
        where there is twice as much text as clips: the prompts, and then the empty ones."""
        guided = text.shape[0] > carry.x.shape[0]

        def twice(y: Any) -> Any:
            return jnp.concatenate([y, y]) if guided else y

        low = {}
        if condition.low is not None:
            level = jnp.full_like(condition.group_ceilings, self.config.augmentation)
            low = {"low": twice(condition.low), "group_low_t": twice(level)}

        def denoiser(x: Float[Array, "b l p"], t: Float[Array, ""]) -> Estimate:
            output: Any = self._model.apply(
                params,
                twice(x),
                twice(condition.positions),
                twice(condition.segment_ids),
                twice(condition.group_ids),
                twice(jnp.minimum(t, condition.group_ceilings)),
                text,
                text_segment_ids,
                method="denoise",
                **low,
            )
            return self._estimate(output, x, condition, t, index)

        problem = Problem(self._diffusion.path, condition.ceilings, self._constants)
        noise = partial(self._noise, condition, index)
        return Carry(
            *self._solver.step(problem, denoiser, carry.x, carry.history, t, t_next, noise)
        )

    def _guided(self, t: float, t_next: float) -> bool:
        """Whether a step evaluates the model at any level that is guided."""
        guidance = self.config.guidance
        levels = [t, t_next] if self._solver.evaluations > 1 and t_next > 0 else [t]
        return any(guidance.guided_at(float(level)) for level in levels)

    def __call__(
        self,
        params: Params,
        condition: Condition,
        on_step: Callable[[], object] = lambda: None,
    ) -> Float[Array, "b l p"]:
        """Clean tokens for a condition; ``on_step`` is called after each step of the solver."""
        if condition.low is not None:
            ids = condition.seeds, condition.segment_ids, condition.token_ids
            condition = dataclasses.replace(condition, low=self._noise_low(condition.low, *ids))
        if self._model.config.compute_dtype() != jnp.float32:
            params = self._prepare(params)
        text = self._encode(params, condition.text, condition.text_segment_ids)
        text_segment_ids = condition.text_segment_ids
        both = text, text_segment_ids
        if self.config.guidance.active:
            empty = unconditioned(condition).text_segment_ids
            without = self._encode(params, condition.text, empty)
            both = (
                jnp.concatenate([text, without]),
                jnp.concatenate([text_segment_ids, empty]),
            )
        levels = self.levels(int((condition.segment_ids != PAD).sum(1).max()))
        carry = self.begin(condition, levels[0])
        for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
            read = both if self._guided(t, t_next) else (text, text_segment_ids)
            carry = self.step(params, carry, condition, *read, t, t_next, np.int32(i))
            carry.x.block_until_ready()
            on_step()
        return carry.x


def check_request(request: Request, patch: PatchConfig) -> None:
    """Raises ``ValueError`` where the model cannot make such a clip, with what it can."""
    patch.grid(request.frames, request.height, request.width)
    if not 0 < request.fps < math.inf:
        raise ValueError(f"fps is {request.fps}: a frame rate is above 0 and finite; try 24.")
