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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from dit_jax.diffusion import (
    SOLVERS,
    DiffusionConfig,
    classifier_free,
    predicted_velocity,
    resolution_shift,
    sigma_schedule,
    start,
    token_noise,
)
from dit_jax.models import ModelConfig, PatchConfig, TextToVideo, as_computed, positions
from dit_jax.types import PAD, Params


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How clips are drawn from a trained model, and of what size unless said."""

    frames: int = 17
    height: int = 256
    width: int = 256
    fps: float = 24.0
    steps: int = 30
    solver: Literal["euler", "heun"] = "euler"
    cfg_scale: float = 4.0
    """Guidance; 1 is none and halves the work."""
    shift: float | None = None
    """Of the noise schedule towards noise. Unset: the shift that training used for such a size."""
    batch: int = 32
    """Clips made at once."""

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}: it is at least 1.")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"sampling.fps is {self.fps}: it is above 0 and finite (24 is usual).")
        if self.cfg_scale < 0:
            raise ValueError(f"sampling.cfg_scale is {self.cfg_scale}: it is at least 0.")
        if self.shift is not None and self.shift <= 0:
            raise ValueError(
                f"sampling.shift is {self.shift}: it is above 0 (1 is none), or unset."
            )


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
    )
    return Condition(**fields)


def unconditioned(condition: Condition) -> Condition:
    """The same rows with the empty prompt: only the first token of every text is seen."""
    ids = condition.text_segment_ids
    first = jnp.arange(ids.shape[1]) == 0
    return dataclasses.replace(condition, text_segment_ids=jnp.where(first, ids, PAD))


class Generator:
    """Compiled sampling for one model: ``generate`` compiles once for each shape of condition."""

    def __init__(
        self, model: TextToVideo, diffusion: DiffusionConfig, config: SamplingConfig
    ) -> None:
        self.config = config
        self._model = model
        self._diffusion = diffusion
        self._begin = jax.jit(self._make_start)
        self._prepare = jax.jit(self.prepared)
        self._encode = jax.jit(partial(model.apply, method="encode_text"))
        self.step = jax.jit(self._make_step, donate_argnums=1)

    def prepared(self, params: Params) -> Params:
        """Parameters (or their shapes) as the steps take them: what the layers would convert to the
        dtype of activations in every step is converted once. The numbers come out the same."""
        dtype = self._model.config.compute_dtype()
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: as_computed([entry.key for entry in path], leaf, dtype), params
        )

    def _make_start(self, condition: Condition) -> Float[Array, "b l p"]:
        keys = jax.vmap(jax.vmap(jax.random.key))(condition.seeds)
        dim = condition.clean.shape[-1]
        eps = token_noise(keys, condition.segment_ids, condition.token_ids, dim)
        return start(condition.clean, eps, condition.ceilings)

    def _make_step(
        self,
        params: Params,
        x: Float[Array, "b l p"],
        condition: Condition,
        text: Float[Array, "b s e"],
        text_segment_ids: Int[Array, "b s"],
        sigma: Float[Array, ""],
        sigma_next: Float[Array, ""],
    ) -> Float[Array, "b l p"]:
        guided = text.shape[0] > x.shape[0]

        def twice(y: Any) -> Any:
            return jnp.concatenate([y, y]) if guided else y

        def velocity(x: Float[Array, "b l p"], sigma: Float[Array, ""]) -> Float[Array, "b l p"]:
            output: Any = self._model.apply(
                params,
                twice(x),
                twice(condition.positions),
                twice(condition.segment_ids),
                twice(condition.group_ids),
                twice(jnp.minimum(sigma, condition.group_ceilings)),
                text,
                text_segment_ids,
                method="denoise",
            )
            tau = twice(jnp.minimum(sigma, condition.ceilings))
            v = predicted_velocity(self._diffusion, output, twice(x), tau)
            if not guided:
                return v
            with_text, without = jnp.split(v, 2)
            return classifier_free(with_text, without, self.config.cfg_scale)

        step = SOLVERS[self.config.solver]
        return step(velocity, x, condition.ceilings, sigma, sigma_next)

    def __call__(
        self,
        params: Params,
        condition: Condition,
        on_step: Callable[[], object] = lambda: None,
    ) -> Float[Array, "b l p"]:
        """Clean tokens for a condition; ``on_step`` is called after each step of the solver."""
        config = self.config
        if self._model.config.compute_dtype() != jnp.float32:
            params = self._prepare(params)
        text = self._encode(params, condition.text, condition.text_segment_ids)
        text_segment_ids = condition.text_segment_ids
        if config.cfg_scale != 1:
            empty = unconditioned(condition).text_segment_ids
            text = jnp.concatenate([text, self._encode(params, condition.text, empty)])
            text_segment_ids = jnp.concatenate([text_segment_ids, empty])
        count = (condition.segment_ids != PAD).sum(1).max()
        shift = config.shift or float(resolution_shift(self._diffusion.time, count))
        sigmas = sigma_schedule(config.steps, shift)
        x = self._begin(condition)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = self.step(params, x, condition, text, text_segment_ids, sigma, sigma_next)
            x.block_until_ready()
            on_step()
        return x


def check_request(request: Request, patch: PatchConfig) -> None:
    """Raises ``ValueError`` where the model cannot make such a clip, with what it can."""
    patch.grid(request.frames, request.height, request.width)
    if not 0 < request.fps < math.inf:
        raise ValueError(f"fps is {request.fps}: a frame rate is above 0 and finite; try 24.")
