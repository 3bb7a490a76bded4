"""The sampler: from requests to clips.

Requests become rows of one segment each (``request.make_inputs``). With noise levels 1 = s_0 > ... >
s_K = 0, and for every token its noise cap c and clean value k::

    start   x = (1 - c) k + c eps                                                              (1)
    step    tau = min(s_i, c),  x <- x + (min(s_{i+1}, c) - tau) v(x, tau)                     (2)

of which (2) is Euler's; see ``diffusion.solvers``. A seamless loop of n tokens along time is a circle,
and the model knows lines: it is evaluated on two, cut half a turn apart, in which a token has the
places j_1 and j_2::

    v = (w_1 v_1 + w_2 v_2) / (w_1 + w_2),    w_i = sin^2(pi (j_i + 1/2) / n)                  (3)

The noise of a request comes from its own seed alone, so that a clip does not depend on which requests
share its batch.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from dit_jax.diffusion import DiffusionConfig, objective, paths, solvers
from dit_jax.diffusion.objective import each
from dit_jax.model import TextToVideo, dit, layers, prepare_fields, unpatchify
from dit_jax.parallel import batch_shards, global_batch, token_multiple
from dit_jax.sampling.request import Request, SamplerInputs, check_request, make_inputs
from dit_jax.types import PAD, DenoiserInputs, Params, Range, UnitInterval, require
from dit_jax.types import NonNegativeFloat as NonNegative
from dit_jax.types import PositiveFloat as Positive
from dit_jax.types import PositiveInt as Count

STEP_NOISE = 2**32 - 1  # sets the noise of steps apart from tokens', whose indices are smaller
GOLDEN = 0.6180339887498949  # multiples of this, modulo 1, fill a circle evenly
LOOP_CONTEXT = 8  # latents of a loop's end that are decoded before its beginning

Tokens = Float[Array, "b l p"]
Carry = tuple[Tokens, solvers.History]  # what a step of the solver hands to the next
Decode = Callable[[np.ndarray], np.ndarray]
"""Latents ``[t, h, w, c]`` to pixels ``[t, h, w, 3]``, float in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class SamplerConfig(solvers.GuidanceConfig):
    """How clips of any size are sampled."""

    steps: Count = 30  # Steps of the solver.
    solver: Literal["euler", "heun", "ddim", "ddpm", "sde", "dpmpp_2m", "unipc"] = "euler"
    """See ``diffusion.solvers``: sde follows velocities, the others any path."""
    eta: UnitInterval = 0.0  # Noise of ddim: 0 is none, 1 as much as ddpm.
    sde_strength: NonNegative = 1.0  # Noise of sde: its diffusion is this times sigma.
    spacing: solvers.Spacing = "linear"
    """Of the noise levels: trailing and linspace (DiT) pick indices of the discrete path. flow is of
    published flow models, which are told whole thousandths of a level, rounded down."""
    last_step: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = None
    """Level from which the last of linear steps goes to 0 (SiT's sde: 0.04). None: all are alike."""
    shift: Positive | None = None
    """Of the noise schedule towards noise. None: the shift that training used for such a size."""
    cache_threshold: NonNegative = 0.0
    """Feature caching: the change of the first block's modulation up to which steps reuse what the
    blocks added (docs/long.md). 0 is off, as loops always are."""
    batch: Count = 32  # Clips made at once.

    def check(self, diffusion: DiffusionConfig, channels: int) -> None:
        """Raises ``ValueError`` if a model trained like this cannot be sampled like this."""
        path, solver = diffusion.path, solvers.SOLVERS[self.solver]
        linear, (low, high) = self.spacing in ("linear", "flow"), self.cfg_interval
        shifted = self.shift not in (None, 1) or self.last_step is not None
        enough = path.discrete and self.steps <= path.timesteps
        chain = f"path.kind {path.kind!r} of {path.timesteps} steps"
        once = not self.cache_threshold or solver.evaluations == 1
        require(
            "sampling.",
            self,
            ("last_step", self.last_step is None or self.steps > 1, "None for a single step"),
            (
                "last_step",
                self.last_step is None or self.spacing != "flow",
                "None for spacing flow",
            ),
            ("solver", not (solver.continuous and path.discrete), f"ddpm or ddim for {chain}"),
            ("spacing", linear or not shifted, "linear for a shift or a last_step"),
            ("spacing", linear or enough, f"linear for {self.steps} steps and {chain}"),
            ("cache_threshold", once, f"0 for {self.solver!r}, which evaluates twice a step"),
            ("cfg_interval", 0 <= low < high <= 1, "noise levels 0 <= low < high <= 1"),
            ("cfg_channels", (self.cfg_channels or 0) <= channels, f"at most {channels}"),
        )


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SamplerConfig):
    """How clips are sampled, and their size by default."""

    frames: Count = 17
    height: Count = 256
    width: Count = 256
    fps: Positive = 24.0
    negative_prompt: str = ""  # What guidance leads away from, if a command does not say.


class Experts(NamedTuple):
    """The parameters of two models of one config, of which the second takes over at low noise levels
    (Balaji et al. 2022, "eDiff-I"; Wan 2.2)."""

    high: Params
    low: Params | None  # None: the first makes all steps.
    below: float = 0.0  # The noise levels of the second.
    cfg_scale: float | None = None  # Its guidance; None: that of the first.


class Generator:
    """Compiled sampling for one model.

    A call compiles once for each shape of inputs; once more if guidance has an interval, for the steps
    outside; and if features are cached, for the steps that reuse them.
    """

    def __init__(self, model: TextToVideo, diffusion: DiffusionConfig, config: SamplerConfig):
        config.check(diffusion, model.config.patch.channels)
        self.config, self.model, self._diffusion = config, model, diffusion
        self._constants = solvers.SolverConfig(
            config.solver, diffusion.variance, config.eta, config.sde_strength
        )
        self.begin = jax.jit(self._begin)
        self.step = jax.jit(self._step, donate_argnums=1, static_argnames=("keep", "scale"))
        self.prepare_fields = jax.jit(self._prepare_fields)
        self.cast = jax.jit(self._cast)
        self._encode, self._extent = jax.jit(self._encode_texts), jax.jit(extent)
        self.changes = jax.jit(self._changes)

    def levels(self, tokens: int) -> Float[np.ndarray, "k"]:
        """The noise levels that are visited, for clips of this many tokens."""
        config, path, shift = self.config, self._diffusion.path, self.config.shift
        if shift is None:
            shift = float(paths.resolution_shift(self._diffusion.time, np.int64(tokens)))
        return solvers.noise_levels(path, config.spacing, config.steps, shift, config.last_step)

    def batch_key(self, request: Request) -> tuple[Any, ...]:
        """What decides a request's step schedule. Requests of different schedules are never batched
        together, so that none depends on another."""
        levels = self.levels(request.num_tokens(self.model.config.patch)).tobytes()
        if not self.config.cache_threshold:
            return (levels,)
        highest = 1.0 if request.known is None else float(request.known.noise_caps.max())
        return levels, highest, request.loop

    def __call__(
        self, params: Params | Experts, inputs: SamplerInputs, on_steps=lambda n: None
    ) -> Tokens:
        """Clean tokens; ``on_steps(n)`` is called after n more steps of the solver."""
        experts = params if isinstance(params, Experts) else Experts(params, None)
        if self.model.config.conditioners:
            inputs = self.prepare_fields(inputs)

        def ready(params: Params) -> tuple[Params, Any, Any]:
            """Parameters, and the states of the prompts alone and of both prompts."""
            if self.model.config.compute_dtype() != jnp.float32:
                params = self.cast(params)  # once, in place of in every step
            return params, *self._encode(params, inputs)

        models = [ready(one) for one in (experts.high, experts.low) if one is not None]

        tokens, highest = jax.device_get(self._extent(inputs))
        levels = self.levels(int(tokens))
        # Above the highest cap nothing moves: those steps are not made.
        first = min(int((levels[1:] >= highest).sum()), len(levels) - 2)
        carry, residual = self.begin(inputs, levels[first]), []
        caching = self.config.cache_threshold > 0 and inputs.cycles is None and len(models) == 1
        runs = self.plan(models[0][0], levels[first:]) if caching else []
        on_steps(first)
        for i, (t, t_next) in enumerate(itertools.pairwise(levels[first:]), first):
            low = len(models) > 1 and bool(t < np.float32(experts.below))
            params, alone, both = models[low]
            text = both if self._guided(t, t_next) else alone
            at = params, carry, inputs, *text, t, t_next, np.int32(i)
            if caching and runs[i - first]:
                carry, *residual = self.step(*at, keep=True)
            else:
                scale = experts.cfg_scale if low else None
                carry, _ = self.step(*at, *residual, scale=scale)
            carry[0].block_until_ready()
            on_steps(1)
        return carry[0]

    def _cast(self, params: Params) -> Params:
        """Parameters in the dtypes in which the layers compute; the numbers come out the same."""
        dtype = self.model.config.compute_dtype()
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: layers.as_computed([key.key for key in path], leaf, dtype), params
        )

    def _encode_texts(self, params: Params, inputs: SamplerInputs) -> tuple[Any, Any]:
        """States and ids of the prompts alone, and of both prompts ``[2 b, s, ...]`` if guided."""
        read = [inputs, inputs.unconditioned()] if self.config.cfg_scale != 1 else [inputs]
        encode = partial(self.model.apply, params, method="encode_text")
        ids = [one.text_segment_ids for one in read]
        texts = [(encode(one.text, i), i) for one, i in zip(read, ids, strict=True)]
        return texts[0], [jnp.concatenate(halves) for halves in zip(*texts, strict=True)]

    def _prepare_fields(self, inputs: SamplerInputs) -> SamplerInputs:
        """The inputs with their fields as the model reads them (see ``Conditioner.prepare``)."""
        keys = each(jax.random.key)(inputs.seeds)
        return prepare_fields(self.model.config.conditioners, keys, inputs, train=False)

    def _begin(self, inputs: SamplerInputs, t: Float[Array, ""]) -> Carry:
        eps = self._noise(inputs)
        x = solvers.start(self._diffusion.path, inputs.tokens, eps, inputs.noise_caps, t)  # (1)
        return x, solvers.start_history(self.config.solver, x, t)

    def _noise(self, inputs: SamplerInputs, index: Int[Array, ""] | None = None) -> Tokens:
        """The noise with which tokens begin, or that of step ``index`` of a stochastic solver."""
        fold, dim = jax.random.fold_in, inputs.tokens.shape[-1]
        keys = each(jax.random.key)(inputs.seeds)  # [b, 1]: a row has one segment
        if index is not None:
            keys = each(lambda key: fold(fold(key, STEP_NOISE), index))(keys)
        return objective.token_noise(keys, inputs.segment_ids, inputs.token_ids, dim)

    def _step(
        self,
        params,
        carry,
        inputs,
        text,
        ids,
        t,
        t_next,
        index,
        residual=None,
        keep=False,
        scale=None,
    ) -> tuple[Carry, Any]:
        """Step ``index`` of the solver, from level ``t`` to ``t_next``; with ``keep`` also what the
        blocks added ``[c, l, d]``, which another step takes in their place as ``residual``.

        It is guided if there is twice as much text ``[c, s, e]`` as clips (c = 2 b): the prompts, and
        then the empty ones. ``scale`` is that of guidance, if not the config's.
        """
        diffusion, path = self._diffusion, self._diffusion.path
        (x, history), cycles = carry, inputs.cycles
        b, guided = len(x), len(text) > len(x)

        def network(seen: DenoiserInputs) -> Any:
            nonlocal residual
            if not keep:
                return self.model.apply(params, seen, residual, encoded=True)
            output, residual = dit.denoise_and_keep(self.model, params, seen)
            return output

        evaluate = network if cycles is None else partial(on_two_cuts, network, cycles, index)

        def rows(y: jax.Array) -> jax.Array:
            return jnp.concatenate([y, y]) if guided else y  # [b, ...] to [2 b, ...]

        whole = jax.tree.map(rows, inputs)
        dropped = (jnp.arange(len(text)) >= b).astype(jnp.float32)[:, None]
        whole = dataclasses.replace(whole, text=text, text_segment_ids=ids, dropped=dropped)

        def denoiser(x: Tokens, t: Array) -> paths.Estimate:
            tau = jnp.minimum(t, inputs.noise_caps)
            group_t = jnp.minimum(t, whole.group_t)
            if self.config.spacing == "flow":
                group_t = jnp.floor(group_t * solvers.FLOW_STEPS) / solvers.FLOW_STEPS
            seen = dataclasses.replace(whole, tokens=rows(x), group_t=group_t)
            prediction, fraction = objective.split_output(diffusion, evaluate(seen), x.shape[-1])
            if not path.discrete:  # Guidance is of velocities.
                kind, xt = diffusion.prediction, seen.tokens
                prediction = paths.velocity_of(path, kind, prediction, xt, rows(tau))
            if guided:
                with_text, without = jnp.split(prediction, 2)
                channels = self.model.config.patch.channels
                config = self.config
                config = config if scale is None else dataclasses.replace(config, cfg_scale=scale)
                prediction = solvers.guide(config, with_text, without, t, channels)
                fraction = None if fraction is None else fraction[:b]
            return objective.estimate(diffusion, prediction, x, tau, fraction)

        caps, noise = inputs.noise_caps, partial(self._noise, inputs, index)
        x, history = solvers.step(  # (2)
            self._constants, path, caps, denoiser, x, history, t, t_next, noise
        )
        if inputs.kept is not None:
            # Numbers that are known in generated tokens, at the level where their token now is.
            level, eps = jnp.minimum(t_next, caps), self._noise(inputs)
            known = paths.interpolate(path, inputs.tokens, eps, level)
            x = jnp.where(inputs.kept, known, x)
        return (x, history), residual if keep else None

    def _guided(self, t: float, t_next: float) -> bool:
        """Whether a step evaluates the model at any level that is guided."""
        evaluations = solvers.SOLVERS[self.config.solver].evaluations
        levels = [t, t_next] if evaluations > 1 and t_next > 0 else [t]
        return any(self.config.guided_at(float(level)) for level in levels)

    # --- Feature caching ---
    #
    # TeaCache (Liu et al. 2024, arXiv 2411.19108, section 3.3) adds up how much the modulated input of
    # the first block changes from step to step, and runs the blocks again where the sum reaches a
    # threshold. Here the sum is of the part of that change which the noise level alone decides, its
    # shift and scale: the input's own change differs by 2 to 6 % between clips (a step of the
    # quickstart's model). So steps are planned before the first, the same for every clip of a batch,
    # whatever its neighbours, on every mesh. docs/log.md has what it costs.

    def _changes(self, params: Params, levels: Float[Array, "k"]) -> Float[Array, "m"]:
        """How much the first block's modulation changes from each level to the next, ``m = k - 1``: the
        mean absolute change over the mean absolute value before."""
        modulation = dit.first_modulation(self.model.config.dit, params["params"]["dit"], levels)
        change = jnp.abs(modulation[1:] - modulation[:-1]).mean(-1)
        # Whole on every device, for every process reads them.
        return self.model.runtime.constrain(change / jnp.abs(modulation[:-1]).mean(-1), None)

    def plan(self, params: Params, levels: Float[np.ndarray, "k"]) -> list[bool]:
        """Whether each step runs the transformer's blocks; the others reuse what those added."""
        changes = np.asarray(self.changes(params, levels), float)
        guided = [self._guided(*pair) for pair in itertools.pairwise(levels)]
        runs, total = [True], 0.0
        for i in range(1, len(guided)):
            total += changes[i - 1]
            # Where guidance begins or ends, the residual of the step before has other rows.
            must = i == len(guided) - 1 or guided[i] != guided[i - 1]
            runs.append(must or total >= self.config.cache_threshold)
            total = 0.0 if runs[-1] else total
        return runs


def extent(inputs: SamplerInputs) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """How many tokens the longest clip has, and the highest noise cap."""
    filled = inputs.segment_ids != PAD
    return filled.sum(1).max(), jnp.where(filled, inputs.noise_caps, 0).max()


# --- Seamless loops from text ---


def on_two_cuts(
    evaluate: Callable[[DenoiserInputs], Array],
    cycles: Float[Array, "b 3"],
    index: Int[Array, ""],
    inputs: DenoiserInputs,
) -> Float[Array, "c l o"]:
    """The network's output (3) in step ``index`` for rows of which some are loops; c is b or 2 b."""
    circles = jnp.concatenate([cycles] * (len(inputs.tokens) // len(cycles)))
    count, first, unit = (circles[:, i : i + 1] for i in range(3))  # [c, 1] each
    is_loop, length = count > 0, jnp.maximum(count, 1)
    clock = inputs.positions[..., 0]  # [c, l]
    positions, weights = [], []
    for half in (0.0, 0.5):
        # The cuts go round from step to step (as in Mobius, Bi et al. 2025, which has one), so that no
        # frame stays next to one. To roll the latents of a loop is to roll their times.
        share = jnp.mod(index * GOLDEN + half, 1.0)
        place = jnp.round((clock - first) / jnp.where(is_loop, unit, 1))
        place = jnp.mod(place - jnp.floor(share * count), length)
        turned = jnp.where(is_loop, first + unit * place, clock)
        positions.append(inputs.positions.at[..., 0].set(turned))
        weight = jnp.sin(jnp.pi * (place + 0.5) / length) ** 2
        weights.append(jnp.where(is_loop, weight, 1)[..., None])
    doubled = jax.tree.map(lambda y: jnp.concatenate([y, y]), inputs)
    doubled = dataclasses.replace(doubled, positions=jnp.concatenate(positions))
    (w, other_w), (y, other_y) = weights, jnp.split(evaluate(doubled), 2)
    return (w * y + other_w * other_y) / (w + other_w)


def decode_loop(decode: Decode, latents: np.ndarray) -> np.ndarray:
    """A loop's pixels: what comes before its first latent is its end, also for a causal decoder."""
    before = latents[np.arange(-LOOP_CONTEXT, 0) % len(latents)]
    pixels = decode(np.concatenate([before, latents]))
    stride = (len(pixels) - 1) // (LOOP_CONTEXT + len(latents) - 1)
    return pixels[-stride * len(latents) :]


# --- Requests to latents, in batches over the mesh ---


def make_latents(
    generator: Generator,
    params: Params | Experts,
    requests: Sequence[Request],
    mesh: Mesh,
    progress: str = "",
    together: Sequence[Request] = (),
) -> list[np.ndarray]:
    """What the model generates for each request, ``[t, h, w, c]``; the same on every process.

    ``progress`` names a bar of the solver's steps; ``together`` are requests of other calls that the
    same compiled step is to serve.
    """
    config, model = generator.config, generator.model.config
    multiple, shards = token_multiple(mesh), batch_shards(mesh)
    if config.cfg_scale != 1 and config.cfg_interval == (0.0, 1.0) and shards % 2 == 0:
        shards //= 2  # every step has two rows for each clip
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for i, request in enumerate(requests):
        check_request(request, model)
        groups[generator.batch_key(request)].append(i)
    batches = []
    for group in groups.values():
        size = -(-min(config.batch, len(group)) // shards) * shards
        batches += [(group, group[at : at + size], size) for at in range(0, len(group), size)]

    out: dict[int, np.ndarray] = {}
    steps = len(batches) * config.steps
    hidden = not progress or jax.process_index() != 0
    with tqdm(total=steps, unit="step", desc=progress, disable=hidden, dynamic_ncols=True) as bar:
        for group, part, size in batches:
            every = [*(requests[i] for i in group), *together]
            length = -(-max(one.num_tokens(model.patch) for one in every) // multiple) * multiple
            # A short last batch is filled up, so that all batches run the same compiled step.
            batch = [requests[i] for i in part + part[-1:] * (size - len(part))]
            inputs = make_inputs(batch, model, length, every)
            inputs = global_batch(mesh, inputs, tuple(range(size)), size)
            tokens = generator(params, inputs, bar.update)
            rows = multihost_utils.process_allgather(tokens, tiled=True)
            for i, row in zip(part, rows, strict=False):
                one, count = requests[i], requests[i].num_tokens(model.patch)
                out[i] = unpatchify(model.patch, row[:count], *one.size, loop=one.loop)
    return [out[i] for i in range(len(requests))]
