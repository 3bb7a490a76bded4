"""The sampler: from requests to clips.

Requests become rows of one segment each (``request.make_inputs``). With noise levels 1 = s_0 > ... >
s_K = 0, and for every token its noise cap c and clean value k::

    start   x = (1 - c) k + c eps                                                              (1)
    step    tau = min(s_i, c),  x <- x + (min(s_{i+1}, c) - tau) v(x, tau)                     (2)

of which (2) is Euler's; see ``diffusion.solvers``. The noise of a request comes from its own seed
alone, so that a clip does not depend on which requests share its batch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from dit_jax.diffusion import (
    SOLVERS,
    DiffusionConfig,
    Estimate,
    GuidanceConfig,
    SolverConfig,
    Spacing,
    estimate,
    guide,
    guided_kind,
    interpolate,
    noise_levels,
    resolution_shift,
    solvers,
    split_output,
    start,
    token_noise,
    velocity_of,
)
from dit_jax.files import InputError
from dit_jax.model import (
    DiTConfig,
    ModelConfig,
    PatchConfig,
    TextToVideo,
    as_computed,
    denoise_and_keep,
    first_modulation,
    prepare_fields,
    unpatchify,
)
from dit_jax.parallel import batch_shards, global_batch, token_multiple
from dit_jax.sampling.media import to_uint8
from dit_jax.sampling.request import Request, SamplerInputs, check_request, make_inputs
from dit_jax.types import (
    PAD,
    DenoiserInputs,
    NonNegativeFloat,
    Params,
    PositiveFloat,
    PositiveInt,
    Range,
)

STEP_NOISE = 2**32 - 1
"""Sets the noise of steps apart from that of tokens, whose indices are smaller."""
GOLDEN = 0.6180339887498949
"""Multiples of this, modulo 1, fill a circle evenly however many there are."""
LOOP_CONTEXT = 8
"""Latents of a loop's end that are decoded before its beginning."""

Decode = Callable[[np.ndarray], np.ndarray]
"""Latents ``[t, h, w, c]`` to pixels ``[t, h, w, 3]``, float in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How clips of any size are sampled."""

    steps: PositiveInt = 30
    """Steps of the solver."""
    solver: Literal["euler", "heun", "ddim", "ddpm", "sde", "dpmpp_2m", "unipc"] = "euler"
    """See ``diffusion.solvers``: sde follows velocities, the others any path."""
    eta: Annotated[float, Range(0, 1)] = 0.0
    """Noise of ddim: 0 is none, 1 as much as ddpm."""
    sde_strength: NonNegativeFloat = 1.0
    """Noise of sde: its diffusion is this times sigma."""
    spacing: Spacing = "linear"
    """Of the noise levels: trailing and linspace (DiT) pick indices of the discrete path."""
    last_step: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = None
    """Level from which the last step of a linear spacing goes to 0 (0.04 for SiT's sde, before the
    shift). None: all steps are alike."""
    shift: PositiveFloat | None = None
    """Of the noise schedule towards noise. None: the shift that training used for such a size."""
    cfg_scale: NonNegativeFloat = 4.0
    """Guidance; 1 is none and halves the work."""
    cfg_channels: PositiveInt | None = None
    """Guide only this many channels, from the first (DiT: 3 of 4). None: all."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at noise levels low < t <= high; outside, steps have half the work."""
    cfg_rescale: Annotated[float, Range(0, 1)] = 0.0
    """Share in which the guided prediction keeps the deviation of the conditional (0.7 is usual)."""
    cache_threshold: NonNegativeFloat = 0.0
    """Feature caching: steps reuse what the transformer's blocks added, until the noise level's part
    of the first block's input has changed by this share in all (docs/long.md). 0 is off, as loops
    always are: their positions turn."""
    batch: PositiveInt = 32
    """Clips made at once."""

    @property
    def guidance(self) -> GuidanceConfig:
        return GuidanceConfig(
            self.cfg_scale, self.cfg_channels, self.cfg_interval, self.cfg_rescale
        )

    def check(self, diffusion: DiffusionConfig, channels: int) -> None:
        """Raises ``InputError`` if a model trained like this cannot be sampled like this."""
        path, solver, spaced = diffusion.path, SOLVERS[self.solver], self.spacing != "linear"
        rules = {
            f"last_step is {self.last_step} of {self.steps} step: give several steps, or None.": (
                self.last_step is not None and self.steps < 2
            ),
            f"solver {self.solver!r} follows a velocity, and path.kind 'ddpm' has none: use 'ddpm' or "
            "'ddim' with eta for noise, or another solver for none.": (
                solver.continuous and path.discrete
            ),
            f"spacing {self.spacing!r} takes no shift ({self.shift}) and no last_step "
            f"({self.last_step}): set both to None, or spacing to 'linear'.": (
                spaced and (self.shift not in (None, 1) or self.last_step is not None)
            ),
            f"spacing {self.spacing!r} picks {self.steps} indices of path.kind 'ddpm', and the path is "
            f"{path.kind!r} of {path.timesteps}: use 'linear', or fewer steps.": (
                spaced and (not path.discrete or self.steps > path.timesteps)
            ),
            f"cache_threshold is {self.cache_threshold} and the solver {self.solver!r}, whose step "
            "looks twice to see a difference: take 'euler', 'dpmpp_2m' or 'unipc', or 0.": (
                self.cache_threshold > 0 and solver.evaluations > 1
            ),
            f"cfg_channels is {self.cfg_channels}, and the model's patches have {channels} channels: "
            "guide at most so many, or None for all.": (self.guidance.channels or 0) > channels,
        }
        for message, broken in rules.items():
            if broken:
                raise InputError(f"sampling.{message}")


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SamplerConfig):
    """How clips are sampled, and their size by default."""

    frames: PositiveInt = 17
    height: PositiveInt = 256
    width: PositiveInt = 256
    fps: PositiveFloat = 24.0


class Carry(NamedTuple):
    """What a step hands to the next."""

    x: Float[Array, "b l p"]
    history: Any
    """The earlier evaluations that a multistep solver remembers."""


class Generator:
    """Compiled sampling for one model.

    A call compiles once for each shape of inputs; once more if guidance has an interval, for the steps
    outside; and if features are cached, for the steps that reuse them.
    """

    def __init__(
        self, model: TextToVideo, diffusion: DiffusionConfig, config: SamplerConfig
    ) -> None:
        config.check(diffusion, model.config.patch.channels)
        self.config, self._model, self._diffusion = config, model, diffusion
        self._solver = SOLVERS[config.solver]
        self._constants = SolverConfig(
            config.solver, diffusion.variance, config.eta, config.sde_strength
        )
        self.begin = jax.jit(self._begin)
        self.step = jax.jit(self._step, donate_argnums=1)
        self.prepare_fields = jax.jit(self._prepare_fields)
        self._cast = jax.jit(self.cast)
        self._encode = jax.jit(partial(model.apply, method="encode_text"))
        # Feature caching: steps that keep what the blocks add, and steps that reuse it.
        self._keep_step = jax.jit(self._step_and_keep, donate_argnums=1)
        self._reuse_step = jax.jit(self._step_and_reuse, donate_argnums=2)
        self._changes = jax.jit(
            lambda params, levels: model.runtime.constrain(
                relative_changes(model.config.dit, params, levels), None
            )
        )

    def cast(self, params: Params) -> Params:
        """Parameters (or their shapes) in the dtypes in which the layers compute: once, in place of in
        every step. The numbers come out the same."""
        dtype = self._model.config.compute_dtype()
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: as_computed([entry.key for entry in path], leaf, dtype), params
        )

    def levels(self, tokens: int) -> Float[np.ndarray, "k"]:
        """The noise levels that are visited, for clips of this many tokens."""
        config, path = self.config, self._diffusion.path
        shift = config.shift or 1.0
        if config.spacing == "linear" and config.shift is None:
            shift = float(resolution_shift(self._diffusion.time, np.int64(tokens)))
        return noise_levels(path, config.spacing, config.steps, shift, config.last_step)

    def batch_key(self, request: Request) -> tuple[float, ...]:
        """Requests with different step schedules are never batched together, so that none depends on
        another; this is what decides the schedule."""
        config, time = self.config, self._diffusion.time
        by_size = config.spacing == "linear" and config.shift is None and time.reference_tokens
        key = (float(request.num_tokens(self._model.config.patch)) if by_size else 0.0,)
        if config.cache_threshold:
            highest = 1.0 if request.known is None else float(request.known.noise_caps.max())
            key += (highest, float(request.loop))
        return key

    def __call__(
        self,
        params: Params,
        inputs: SamplerInputs,
        on_step: Callable[[], object] = lambda: None,
    ) -> Float[Array, "b l p"]:
        """Clean tokens; ``on_step`` is called after each step of the solver."""
        if self._model.config.conditioners:
            inputs = self.prepare_fields(inputs)
        if self._model.config.compute_dtype() != jnp.float32:
            params = self._cast(params)
        text = self._encode(params, inputs.text, inputs.text_segment_ids)
        plain = both = text, inputs.text_segment_ids
        if self.config.guidance.active:
            other = inputs.unconditioned()
            without = (
                self._encode(params, other.text, other.text_segment_ids),
                other.text_segment_ids,
            )
            both = tuple(map(jnp.concatenate, zip(plain, without, strict=True)))
        filled = inputs.segment_ids != PAD
        levels = self.levels(int(filled.sum(1).max()))
        # Above the highest cap nothing moves: those steps are not made.
        highest = float(jnp.where(filled, inputs.noise_caps, 0).max())
        first = min(int((levels[1:] >= np.float32(highest)).sum()), len(levels) - 2)
        carry, residual = self.begin(inputs, levels[first]), None
        caching = self.config.cache_threshold and inputs.cycles is None  # a loop's positions turn
        runs = iter(self.plan(params, levels[first:]) if caching else ())
        for i, (t, t_next) in enumerate(itertools.pairwise(levels)):
            if i >= first:
                step_inputs = inputs, *(both if self._guided(t, t_next) else plain), t, t_next
                if not caching:
                    carry = self.step(params, carry, *step_inputs, np.int32(i))
                elif next(runs):
                    carry, residual = self._keep_step(params, carry, *step_inputs, np.int32(i))
                else:
                    carry = self._reuse_step(params, residual, carry, *step_inputs, np.int32(i))
                carry.x.block_until_ready()
            on_step()
        return carry.x

    def _prepare_fields(self, inputs: SamplerInputs) -> SamplerInputs:
        """The inputs with their fields as the model reads them (see ``Conditioner.prepare``)."""
        keys = jax.vmap(jax.vmap(jax.random.key))(inputs.seeds)
        return prepare_fields(self._model.config.conditioners, keys, inputs, train=False)

    def _begin(self, inputs: SamplerInputs, t: Float[Array, ""]) -> Carry:
        eps = self._noise(inputs)
        x = start(self._diffusion.path, inputs.clean, eps, inputs.noise_caps, t)  # (1)
        return Carry(x, solvers.start_history(self.config.solver, x, t))

    def _noise(
        self, inputs: SamplerInputs, index: Int[Array, ""] | None = None
    ) -> Float[Array, "b l p"]:
        """The noise with which tokens begin, or that of step ``index`` of a stochastic solver."""

        def key_of(seed: Int[Array, ""]) -> jax.Array:
            key = jax.random.key(seed)
            if index is None:
                return key
            return jax.random.fold_in(jax.random.fold_in(key, STEP_NOISE), index)

        keys = jax.vmap(jax.vmap(key_of))(inputs.seeds)
        return token_noise(keys, inputs.segment_ids, inputs.token_ids, inputs.clean.shape[-1])

    def _step(self, params: Params, carry: Carry, *rest: Any) -> Carry:
        return self._solve(partial(self._model.apply, params, method="denoise"), carry, *rest)

    def _solve(
        self,
        evaluate: Callable[[DenoiserInputs], Any],
        carry: Carry,
        inputs: SamplerInputs,
        text: Float[Array, "b s e"],
        text_segment_ids: Int[Array, "b s"],
        t: Float[Array, ""],
        t_next: Float[Array, ""],
        index: Int[Array, ""],
    ) -> Carry:
        """Step ``index`` of the solver, from level ``t`` to ``t_next``, with the network ``evaluate``.

        It is guided if there is twice as much text as clips: the prompts, and then the empty ones.
        """
        guided = text.shape[0] > carry.x.shape[0]
        if inputs.cycles is not None:
            evaluate = on_two_cuts(evaluate, inputs.cycles, index)

        def denoiser(x: Float[Array, "b l p"], t: Float[Array, ""]) -> Estimate:
            seen = DenoiserInputs(
                tokens=x,
                positions=inputs.positions,
                segment_ids=inputs.segment_ids,
                token_ids=inputs.token_ids,
                group_ids=inputs.group_ids,
                group_t=jnp.minimum(t, inputs.group_noise_caps),
                text=None,
                text_segment_ids=None,
                dropped=jnp.zeros(inputs.seeds.shape),
                token_fields=inputs.token_fields,
                segment_fields=inputs.segment_fields,
            )
            if guided:
                dropped = jnp.concatenate([seen.dropped, jnp.ones_like(seen.dropped)])
                seen = jax.tree.map(lambda y: jnp.concatenate([y, y]), seen)
                seen = dataclasses.replace(seen, dropped=dropped)
            seen = dataclasses.replace(seen, text=text, text_segment_ids=text_segment_ids)
            return self._estimate(evaluate(seen), x, inputs, t)

        path, caps, noise = (
            self._diffusion.path,
            inputs.noise_caps,
            partial(self._noise, inputs, index),
        )
        x, history = solvers.step(
            self._constants, path, caps, denoiser, carry.x, carry.history, t, t_next, noise
        )
        if inputs.kept is not None:
            # Numbers that are known in generated tokens, at the level where their token now is.
            known = interpolate(path, inputs.clean, self._noise(inputs), jnp.minimum(t_next, caps))
            x = jnp.where(inputs.kept, known, x)
        return Carry(x, history)

    def _estimate(
        self,
        output: Float[Array, "b l o"],
        x: Float[Array, "b l p"],
        inputs: SamplerInputs,
        t: Float[Array, ""],
    ) -> Estimate:
        """What the network predicts, guided if its output has twice the rows (with text first)."""
        diffusion, guided = self._diffusion, len(output) > len(x)
        tau = jnp.minimum(t, inputs.noise_caps)
        prediction, fraction = split_output(diffusion, output, x.shape[-1])
        if guided_kind(diffusion) != diffusion.prediction:
            xs, taus = (jnp.concatenate([y, y]) if guided else y for y in (x, tau))
            prediction = velocity_of(diffusion.path, diffusion.prediction, prediction, xs, taus)
        if guided:
            segments, channels = inputs.seeds.shape[1], self._model.config.patch.channels
            (with_text, without), ids = jnp.split(prediction, 2), inputs.segment_ids
            guidance = self.config.guidance
            prediction = guide(guidance, with_text, without, t, tau, ids, segments, channels)
            fraction = None if fraction is None else fraction[: len(x)]
        return estimate(diffusion, prediction, x, tau, fraction)

    def _guided(self, t: float, t_next: float) -> bool:
        """Whether a step evaluates the model at any level that is guided."""
        levels = [t, t_next] if self._solver.evaluations > 1 and t_next > 0 else [t]
        return any(self.config.guidance.guided_at(float(level)) for level in levels)

    # --- feature caching ---
    #
    # TeaCache (Liu et al. 2024, arXiv 2411.19108, section 3.3) adds up how much the modulated input of
    # the first block changes from step to step, and runs the blocks again where the sum reaches a
    # threshold. Here the sum is of the part of that change which the noise level alone decides, its
    # shift and scale: the input's own change differs by 2 to 6 % between clips (a step of the
    # quickstart's model). So steps are planned before the first, the same for every clip of a batch,
    # whatever its neighbours, on every mesh. The threshold counts the plain relative change, with no
    # polynomial fitted to a model. docs/log.md has what it costs.

    def plan(self, params: Params, levels: Float[np.ndarray, "k"]) -> list[bool]:
        """Whether each step runs the transformer's blocks; the others reuse what those added."""
        guided = list(itertools.starmap(self._guided, itertools.pairwise(levels)))
        if not self.config.cache_threshold:
            return [True] * len(guided)
        changes = np.asarray(self._changes(params, levels))
        return plan_steps(changes, guided, self.config.cache_threshold)

    def _step_and_keep(
        self, params: Params, carry: Carry, *rest: Any
    ) -> tuple[Carry, Float[Array, "c l d"]]:
        kept: list[jax.Array] = []

        def evaluate(inputs: DenoiserInputs) -> jax.Array:
            output, residual = denoise_and_keep(self._model, params, inputs)
            kept.append(residual)
            return output

        carry = self._solve(evaluate, carry, *rest)
        return carry, kept[0]

    def _step_and_reuse(
        self, params: Params, residual: Float[Array, "c l d"], carry: Carry, *rest: Any
    ) -> Carry:
        denoise = partial(self._model.apply, params, method="denoise", residual=residual)
        return self._solve(denoise, carry, *rest)


def relative_changes(
    config: DiTConfig, params: Params, levels: Float[Array, "k"]
) -> Float[Array, "m"]:
    """How much the first block's modulation changes from each level to the next, ``m = k - 1``: the
    mean absolute change over the mean absolute value before."""
    modulation = first_modulation(config, params["params"]["dit"], levels)
    change = jnp.abs(modulation[1:] - modulation[:-1]).mean(-1)
    return change / jnp.abs(modulation[:-1]).mean(-1)


def plan_steps(
    changes: Sequence[float] | Float[np.ndarray, "m"], guided: Sequence[bool], threshold: float
) -> list[bool]:
    """Whether each step runs the blocks; ``changes[i]`` is the change from step i to step i + 1.

    The first step and the last run them, and so does each whose guidance is on or off unlike the one's
    before, which has no such rows.
    """
    runs: list[bool] = []
    total = 0.0
    for i, here in enumerate(guided):
        total += float(changes[i - 1]) if i else 0.0
        must = i in (0, len(guided) - 1) or here != guided[i - 1]
        runs.append(must or total >= threshold)
        total = 0.0 if runs[-1] else total
    return runs


# --- seamless loops from text ---
#
# Time is a circle, and the model, which knows lines, is asked about two cuts of it: in every step the
# circle is cut in two places half a turn apart, and the predictions of both lines are averaged, each
# token's weight the larger the further it lies from that cut. Over the steps the cuts go round (as in
# Mobius, Bi et al. 2025, which has one), so that no frame stays next to one.


def turn(
    positions: Float[Array, "b l 3"], cycles: Float[Array, "b 3"], share: Float[Array, ""] | float
) -> tuple[Float[Array, "b l 3"], Float[Array, "b l 1"]]:
    """Positions of loops that begin ``share`` of a turn later, in whole tokens, and the weight of each
    token: sin^2 of its distance from the cut, 1 in the middle. Rows that are no loops stay as they are.

    To roll the latents of a loop is to roll their times.
    """
    count, first, unit = (cycles[:, i : i + 1] for i in range(3))
    is_loop, length = count > 0, jnp.maximum(count, 1)
    clock = positions[..., 0]
    number = jnp.round((clock - first) / jnp.where(is_loop, unit, 1))
    number = jnp.mod(number - jnp.floor(jnp.mod(share, 1.0) * count), length)
    weight = jnp.sin(jnp.pi * (number + 0.5) / length) ** 2
    rolled = positions.at[..., 0].set(jnp.where(is_loop, first + unit * number, clock))
    return rolled, jnp.where(is_loop, weight, 1)[..., None]


def on_two_cuts(
    evaluate: Callable[[DenoiserInputs], Array],
    cycles: Float[Array, "b 3"],
    index: Int[Array, ""],
) -> Callable[[DenoiserInputs], Array]:
    """The network of step ``index`` for rows ``[b or 2 b, ...]`` of which some are loops."""

    def both(inputs: DenoiserInputs) -> Array:
        circles = jnp.concatenate([cycles] * (len(inputs.tokens) // len(cycles)))
        cuts = [turn(inputs.positions, circles, index * GOLDEN + half) for half in (0.0, 0.5)]
        doubled = jax.tree.map(lambda y: jnp.concatenate([y, y]), inputs)
        positions = jnp.concatenate([where for where, _ in cuts])
        outputs = jnp.split(evaluate(dataclasses.replace(doubled, positions=positions)), 2)
        weights = [weight for _, weight in cuts]
        return sum(w * y for w, y in zip(weights, outputs, strict=True)) / (weights[0] + weights[1])

    return both


def decode_loop(decode: Decode, latents: np.ndarray) -> np.ndarray:
    """A loop's pixels: what comes before its first latent is its end, also for a causal decoder."""
    before = latents[np.arange(-LOOP_CONTEXT, 0) % len(latents)]
    pixels = decode(np.concatenate([before, latents]))
    stride = (len(pixels) - 1) // (LOOP_CONTEXT + len(latents) - 1)
    return pixels[-stride * len(latents) :]


# --- requests to clips, in batches over the mesh ---


def make_clips(
    generator: Generator,
    params: Params,
    requests: Sequence[Request],
    model: ModelConfig,
    mesh: Mesh,
    progress: bool = False,
    decode: Decode | None = None,
) -> list[np.ndarray]:
    """Every request's clip, uint8 ``[t, h, w, 3]``; the same on every process.

    Requests of any sizes (in latents, if ``decode`` turns what the model generates into pixels) share
    batches; all are checked before the first is sampled.
    """
    for request in requests:
        check_request(request, model)
    keys = collections.Counter(map(generator.batch_key, requests))
    batches = sum(-(-n // clips_at_once(generator, n, mesh)) for n in keys.values())
    with progress_bar(batches * generator.config.steps, "sampling", progress) as bar:
        rows = make_rows(generator, params, requests, model, mesh, bar.update)
        return [
            to_uint8(_pixels(request, row, model.patch, decode))
            for request, row in zip(requests, rows, strict=True)
        ]


def progress_bar(total: int, what: str, shown: bool) -> tqdm:
    """A bar of the solver's steps, on the first process alone."""
    hidden = not shown or jax.process_index() != 0
    return tqdm(total=total, unit="step", desc=what, disable=hidden, dynamic_ncols=True)


def clips_at_once(generator: Generator, count: int, mesh: Mesh) -> int:
    """Rows of the batches in which ``count`` requests are sampled."""
    config, shards = generator.config, batch_shards(mesh)
    if config.cfg_scale != 1 and config.cfg_interval == (0.0, 1.0) and shards % 2 == 0:
        shards //= 2  # every step has two rows for each clip
    return -(-min(config.batch, count) // shards) * shards


def make_rows(
    generator: Generator,
    params: Params,
    requests: Sequence[Request],
    model: ModelConfig,
    mesh: Mesh,
    on_step: Callable[[], object] = lambda: None,
    together: Sequence[Request] = (),
) -> Iterator[np.ndarray]:
    """Rows ``[l, p]`` that begin with the clean tokens of each request; the same on every process.

    Args:
        on_step: called after each step of the solver.
        together: requests of other calls that are to be made by the same compiled step.
    """
    keys = [generator.batch_key(request) for request in requests]
    rows: dict[int, np.ndarray] = {}
    gather, yielded = _gather(mesh), 0
    for key in dict.fromkeys(keys):
        indices = [i for i, one in enumerate(keys) if one == key]
        every = [*(requests[i] for i in indices), *together]
        multiple = token_multiple(mesh)
        length = -(-max(one.num_tokens(model.patch) for one in every) // multiple) * multiple
        size = clips_at_once(generator, len(indices), mesh)
        for first in range(0, len(indices), size):
            part = indices[first : first + size]
            # A short last batch is filled up, so that all batches run the same compiled step.
            batch = [requests[i] for i in [*part, *part[-1:] * (size - len(part))]]
            inputs = make_inputs(batch, model, length, every)
            placed = global_batch(mesh, inputs, tuple(range(size)), size)
            rows |= zip(part, np.asarray(gather(generator(params, placed, on_step))), strict=False)
            while yielded in rows:  # in the order of requests, as soon as they are there
                yield rows.pop(yielded)
                yielded += 1


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """The same array on every process; compiled once, however often clips are made."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _pixels(
    request: Request, row: np.ndarray, patch: PatchConfig, decode: Decode | None
) -> np.ndarray:
    """A request's clip, float in [-1, 1], of a row that begins with its tokens."""
    frames, height, width = request.size
    tokens = row[: request.num_tokens(patch)]
    if not request.loop:
        clip = unpatchify(patch, tokens, frames, height, width)
        return clip if decode is None else decode(clip)
    # A first frame's tokens ahead, for the patches, which is cut off again.
    _, h, w = patch.grid(1, height, width)
    clip = unpatchify(patch, np.concatenate([tokens[: h * w], tokens]), frames + 1, height, width)
    return clip[1:] if decode is None else decode_loop(decode, clip[1:])
