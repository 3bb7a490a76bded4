"""From the sampler's inputs to tokens: noise, a solver, guidance.

A *request* is a prompt and a size. Requests become rows of one segment each, with a noise ceiling
for every token (``condition``). The noise of a request comes from its own seed: what is made does
not depend on which requests share the batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dit_jax.diffusion import (
    SOLVERS,
    DiffusionConfig,
    Estimate,
    SolverConfig,
    SolverContext,
    StepInput,
    estimate,
    guide,
    guided_kind,
    interpolate,
    noise_levels,
    resolution_shift,
    split_output,
    start,
    token_noise,
    velocity_of,
)
from dit_jax.model import Fields, TextToVideo, as_computed, prepare_fields
from dit_jax.sampling.caching import CachedSteps
from dit_jax.sampling.condition import Request, SamplerInputs, unconditioned
from dit_jax.sampling.loops import closed
from dit_jax.sampling.settings import SamplingConfig
from dit_jax.types import PAD, DenoiserInputs, Params

NOISE_OF_STEPS = 2**32 - 1
"""Sets the noise of steps apart from that of tokens, whose indices are smaller."""


class Carry(NamedTuple):
    """What a step hands to the next."""

    x: Float[Array, "b l p"]
    history: Any
    """The earlier evaluations that a multistep solver remembers."""


class Generator:
    """Compiled sampling for one model: a call compiles once for each shape of condition (once more
    where guidance has an interval, for the steps outside; and where features are cached, for the steps
    that reuse them).

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
        threshold = config.cache_threshold
        self._cached = CachedSteps(model, self._solve, threshold) if threshold else None
        self.prepare_fields = jax.jit(self._prepare_fields)

    def prepared(self, params: Params) -> Params:
        """Parameters (or their shapes) as the steps take them: what the layers would convert to the
        dtype of activations in every step is converted once. The numbers come out the same."""
        dtype = self._model.config.compute_dtype()
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: as_computed([entry.key for entry in path], leaf, dtype), params
        )

    def _prepare_fields(self, condition: SamplerInputs) -> SamplerInputs:
        """The inputs with their fields as the model reads them (see ``Conditioner.prepare``)."""
        tokens, segments = prepare_fields(
            self._model.config.conditioners,
            jax.vmap(jax.vmap(jax.random.key))(condition.seeds),
            condition.segment_ids,
            condition.token_ids,
            Fields(condition.token_fields, condition.segment_fields),
            train=False,
        )
        return dataclasses.replace(condition, token_fields=tokens, segment_fields=segments)

    def levels(self, tokens: int) -> Float[np.ndarray, "k"]:
        """The noise levels that are visited, for clips of so many tokens."""
        config, path = self.config, self._diffusion.path
        shift = config.shift or 1.0
        if config.spacing == "linear" and config.shift is None:
            shift = float(resolution_shift(self._diffusion.time, np.int64(tokens)))
        return noise_levels(path, config.spacing, config.steps, shift, config.last_step)

    def steps_of(self, request: Request) -> tuple[float, ...]:
        """What of a request decides which steps are made, and how: requests that differ in it share no
        batch, that none depends on another."""
        config, time = self.config, self._diffusion.time
        shifts = config.spacing == "linear" and config.shift is None
        tokens = request.num_tokens(self._model.config.patch)
        found = (float(tokens) if shifts and time.reference_tokens else 0.0,)
        if self._cached is not None:
            highest = 1.0 if request.given is None else float(request.given.ceilings.max())
            found += (highest, float(request.loop))
        return found

    def _make_start(self, condition: SamplerInputs, t: Float[Array, ""]) -> Carry:
        eps = self._token_noise(condition)
        x = start(self._diffusion.path, condition.clean, eps, condition.ceilings, t)
        return Carry(x, self._solver.begin(x, t))

    def _token_noise(self, condition: SamplerInputs) -> Float[Array, "b l p"]:
        """That with which tokens begin."""
        keys = jax.vmap(jax.vmap(jax.random.key))(condition.seeds)
        dim = condition.clean.shape[-1]
        return token_noise(keys, condition.segment_ids, condition.token_ids, dim)

    def _noise(self, condition: SamplerInputs, index: Int[Array, ""]) -> Float[Array, "b l p"]:
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
        condition: SamplerInputs,
        t: Float[Array, ""],
    ) -> Estimate:
        """What the network says, guided where its output has twice the rows (with text first)."""
        diffusion, guidance = self._diffusion, self.config.guidance
        tau = jnp.minimum(t, condition.ceilings)
        prediction, fraction = split_output(diffusion, output, x.shape[-1])
        guided = output.shape[0] > x.shape[0]

        def twice(y: jax.Array) -> jax.Array:
            return jnp.concatenate([y, y]) if guided else y

        if guided_kind(diffusion) != diffusion.prediction:
            kind = diffusion.prediction
            prediction = velocity_of(diffusion.path, kind, prediction, twice(x), twice(tau))
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
        return estimate(diffusion, prediction, x, tau, fraction)

    def _make_step(self, params: Params, carry: Carry, *given: Any) -> Carry:
        return self._solve(partial(self._model.apply, params, method="denoise"), carry, *given)

    def plan(self, params: Params, levels: Float[np.ndarray, "k"]) -> list[bool]:
        """Whether each step runs the transformer's blocks; the others reuse what those added."""
        if self._cached is None:
            return [True] * (len(levels) - 1)
        return self._cached.plan(
            params, levels, list(itertools.starmap(self._guided, itertools.pairwise(levels)))
        )

    def _solve(
        self,
        evaluate: Callable[..., Any],
        carry: Carry,
        condition: SamplerInputs,
        text: Float[Array, "b s e"],
        text_segment_ids: Int[Array, "b s"],
        t: Float[Array, ""],
        t_next: Float[Array, ""],
        index: Int[Array, ""],
    ) -> Carry:
        """One step of the solver, from level ``t`` to ``t_next``; ``index`` counts them. It is guided
        where there is twice as much text as clips: the prompts, and then the empty ones. ``evaluate``
        is the transformer."""
        guided = text.shape[0] > carry.x.shape[0]
        if condition.cycles is not None:
            evaluate = closed(evaluate, condition.cycles, index)

        def denoiser(x: Float[Array, "b l p"], t: Float[Array, ""]) -> Estimate:
            inputs = DenoiserInputs(
                tokens=x,
                positions=condition.positions,
                segment_ids=condition.segment_ids,
                group_ids=condition.group_ids,
                group_t=jnp.minimum(t, condition.group_ceilings),
                text=None,
                text_segment_ids=None,
                dropped=jnp.zeros(condition.seeds.shape),
                token_fields=condition.token_fields,
                segment_fields=condition.segment_fields,
            )
            if guided:
                dropped = jnp.concatenate([inputs.dropped, jnp.ones_like(inputs.dropped)])
                inputs = jax.tree.map(lambda y: jnp.concatenate([y, y]), inputs)
                inputs = dataclasses.replace(inputs, dropped=dropped)
            inputs = dataclasses.replace(inputs, text=text, text_segment_ids=text_segment_ids)
            return self._estimate(evaluate(inputs), x, condition, t)

        context = SolverContext(self._diffusion.path, condition.ceilings, self._constants)
        noise = partial(self._noise, condition, index)
        x, history = self._solver.step(
            StepInput(context, denoiser, carry.x, carry.history, t, t_next, noise)
        )
        if condition.known is not None:
            eps = self._token_noise(condition)
            at = context.tau(t_next)
            given = interpolate(self._diffusion.path, condition.clean, eps, at)
            x = jnp.where(condition.known, given, x)
        return Carry(x, history)

    def _guided(self, t: float, t_next: float) -> bool:
        """Whether a step evaluates the model at any level that is guided."""
        guidance = self.config.guidance
        levels = [t, t_next] if self._solver.evaluations > 1 and t_next > 0 else [t]
        return any(guidance.guided_at(float(level)) for level in levels)

    def __call__(
        self,
        params: Params,
        condition: SamplerInputs,
        on_step: Callable[[], object] = lambda: None,
    ) -> Float[Array, "b l p"]:
        """Clean tokens of the sampler's inputs; ``on_step`` is called after each step of the solver."""
        if self._model.config.conditioners:
            condition = self.prepare_fields(condition)
        if self._model.config.compute_dtype() != jnp.float32:
            params = self._prepare(params)
        text = self._encode(params, condition.text, condition.text_segment_ids)
        text_segment_ids = condition.text_segment_ids
        both = text, text_segment_ids
        if self.config.guidance.active:
            other = unconditioned(condition)
            without = self._encode(params, other.text, other.text_segment_ids)
            both = (
                jnp.concatenate([text, without]),
                jnp.concatenate([text_segment_ids, other.text_segment_ids]),
            )
        seen = condition.segment_ids != PAD
        levels = self.levels(int(seen.sum(1).max()))
        # Above the highest ceiling nothing moves: those steps are not made.
        highest = float(jnp.where(seen, condition.ceilings, 0).max())
        first = min(int((levels[1:] >= np.float32(highest)).sum()), len(levels) - 2)
        carry, step = self.begin(condition, levels[first]), self.step
        if self._cached is not None and condition.cycles is None:
            step = self._cached.following(self.plan(params, levels[first:]))
        for i, (t, t_next) in enumerate(itertools.pairwise(levels)):
            if i < first:
                on_step()
                continue
            read = both if self._guided(t, t_next) else (text, text_segment_ids)
            carry = step(params, carry, condition, *read, t, t_next, np.int32(i))
            carry.x.block_until_ready()
            on_step()
        return carry.x
