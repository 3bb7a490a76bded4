"""What training asks of the denoiser: noised batches, and the loss of every token.

The squared error of what is predicted, or of the velocity that follows from it, weighted by the noise
level of each token; with a learned variance, the variational bound besides (see ``bound``).

All randomness of a segment comes from its sample's identity and the step's key, never from the
place where it was packed: a sample's loss does not depend on its neighbours, nor on the number
of devices.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from dit_jax.diffusion.bound import bound
from dit_jax.diffusion.ceilings import CeilingConfig, Pattern, draw_pattern, held_frames
from dit_jax.diffusion.paths import PathConfig, interpolate, level, on_grid, rates
from dit_jax.diffusion.predictions import (
    SMALLEST_T,
    Estimate,
    Prediction,
    clean_and_noise,
    prediction_of,
    squared_error_factor,
    velocity_of,
)
from dit_jax.diffusion.problem import Variance
from dit_jax.diffusion.times import TimeConfig, draw_time
from dit_jax.types import PAD, Batch, DenoiserInputs, Target

OF_FRAMES, OF_LEVELS = 4, 5
"""Set a segment's random numbers for these apart from its others."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The objective.

    Raises:
        ValueError: for values out of range, and for combinations that are not defined.
    """

    prediction: Literal["velocity", "x0", "eps", "v"] = "velocity"
    """What the network's output means. Predict x0 where a patch has more numbers than the model has
    width (Li & He 2025, "Back to Basics"); eps is DDPM's, v that of Salimans & Ho 2022."""
    time: TimeConfig = TimeConfig()
    ceilings: CeilingConfig = CeilingConfig()
    caption_dropout: float = 0.1
    """Probability that a segment is trained without its caption and its fields, for guidance."""
    min_t: float = 0.05
    """Floor of sigma (t, for rectified flow) in the velocity loss of predicted x0, whose error is
    divided by it: a higher one tells a young model to mind the whole picture before the last of the
    noise."""
    path: PathConfig = PathConfig()
    loss: Literal["velocity", "prediction"] = "velocity"
    """Of what the squared error is taken: the velocity, or whatever is predicted."""
    weighting: Literal["none", "min_snr", "snr", "truncated_snr"] = "none"
    """Of the squared error by noise level, told as weights of the error of x0: min(SNR, gamma) (Hang
    et al. 2023); SNR, which is eps's own error; max(SNR, 1) (Salimans & Ho 2022)."""
    min_snr_gamma: float = 5.0
    variance: Variance = "fixed_small"
    """Of ancestral sampling. learned_range: the network has two outputs for each number, and the
    second is trained by the variational bound (Nichol & Dhariwal 2021)."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(
                f"diffusion.caption_dropout is {self.caption_dropout}: it is in [0, 1)."
            )
        if not 0 < self.min_t < 1:
            raise ValueError(f"diffusion.min_t is {self.min_t}: it is between 0 and 1.")
        if not self.min_snr_gamma > 0:
            raise ValueError(
                f"diffusion.min_snr_gamma is {self.min_snr_gamma}: it is above 0 (5 is usual)."
            )
        if self.path.discrete:
            self._check_discrete()
        elif self.variance == "learned_range":
            raise ValueError(
                "diffusion.variance 'learned_range' bounds the steps of a discrete chain, and "
                f"path.kind is {self.path.kind!r}: make it 'ddpm', or the variance 'fixed_small'."
            )
        if self.prediction == "eps" and self.path.ends_in_noise:
            raise ValueError(
                f"diffusion.prediction 'eps' says nothing of x0 where no signal is left, as at t = 1 "
                f"of path.kind {self.path.kind!r} (zero_terminal_snr {self.path.zero_terminal_snr}): "
                "predict 'v' or 'x0'" + (" or 'velocity'." if not self.path.discrete else ".")
            )

    def _check_discrete(self) -> None:
        for name in ("prediction", "loss"):
            if getattr(self, name) == "velocity":
                remedy = "'eps', 'v' or 'x0'" if name == "prediction" else "'prediction'"
                raise ValueError(
                    f"diffusion.{name} is 'velocity', which the discrete path.kind 'ddpm' does not "
                    f"have: make it {remedy}."
                )
        if self.time.distribution != "uniform":
            raise ValueError(
                f"diffusion.time.distribution is {self.time.distribution!r}, and path.kind 'ddpm' "
                "draws its indices uniformly: set it to 'uniform'."
            )


def sample_keys(key: jax.Array, sample_ids: UInt[Array, "b n"]) -> jax.Array:
    """A random key for each segment, made of its sample's identity alone."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, sample_ids)


def per_segment(values: jax.Array, segment_ids: Int[Array, "b l"]) -> jax.Array:
    """Spreads ``[b, n, ...]`` values of segments over their tokens: ``[b, l, ...]``."""
    slots = jnp.maximum(segment_ids - 1, 0)
    return jax.vmap(lambda row, slot: row[slot])(values, slots)


def token_noise(
    keys: jax.Array,
    segment_ids: Int[Array, "b l"],
    token_ids: Int[Array, "b l"],
    dim: int,
) -> Float[Array, "b l p"]:
    """Standard normal noise of each token, from its segment's key and its index in the segment."""

    def draw(segment_key: jax.Array, index: Int[Array, ""]) -> Float[Array, "p"]:
        return jax.random.normal(jax.random.fold_in(segment_key, index), (dim,))

    return jax.vmap(jax.vmap(draw))(per_segment(keys, segment_ids), token_ids)


def noise_batch(
    config: DiffusionConfig, key: jax.Array, batch: Batch
) -> tuple[DenoiserInputs, Target]:
    """Draws times, ceilings, noise and dropout for every segment of a batch.

    On a discrete path all levels are on its grid: indices are uniform where times are.
    """
    keys = sample_keys(key, batch.sample_ids)
    split = jax.vmap(jax.vmap(lambda k: jax.random.split(k, 4)))(keys)
    time_keys, ceiling_keys, noise_keys, drop_keys = (split[:, :, i] for i in range(4))

    draw_times = jax.vmap(jax.vmap(lambda k, n: draw_time(config.time, k, n)))
    t = on_grid(config.path, draw_times(time_keys, batch.num_tokens), up=True)
    draw_patterns = jax.vmap(jax.vmap(lambda k, f: draw_pattern(config.ceilings, k, f)))
    patterns, given = draw_patterns(ceiling_keys, batch.num_frames)
    given = on_grid(config.path, given, up=False)

    held = _held(config.ceilings, keys, patterns, batch)
    groups = jnp.stack([t, jnp.minimum(t, given)], -1)
    group = held.astype(batch.segment_ids.dtype)
    if config.ceilings.independent:
        groups, group = _independent(config, keys, patterns, batch, groups, group)
    slots = jnp.maximum(batch.segment_ids - 1, 0)
    group_t = groups.reshape(t.shape[0], -1)
    group_ids = config.ceilings.groups * slots + group
    tau = jnp.take_along_axis(group_t, group_ids, 1)
    eps = token_noise(noise_keys, batch.segment_ids, batch.token_ids, batch.tokens.shape[-1])
    dropout = jax.vmap(jax.vmap(lambda k: jax.random.bernoulli(k, config.caption_dropout)))
    dropped = dropout(drop_keys).astype(jnp.float32)
    inputs = DenoiserInputs(
        tokens=interpolate(config.path, batch.tokens, eps, tau),
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        group_ids=group_ids,
        group_t=group_t,
        text=batch.text,
        text_segment_ids=drop_captions(batch.text_segment_ids, dropped),
        dropped=dropped,
        token_fields=batch.token_fields,
        segment_fields=batch.segment_fields,
    )
    return inputs, Target(eps=eps, tau=tau, generated=~held)


def _held(
    config: CeilingConfig, keys: jax.Array, patterns: Pattern, batch: Batch
) -> Bool[Array, "b l"]:
    """Whether each token is given; a number of its own is drawn for a frame where key frames are."""

    def draw(segment_key: jax.Array, frame: Int[Array, ""]) -> Float[Array, ""]:
        of_frames = jax.random.fold_in(segment_key, OF_FRAMES)
        return jax.random.uniform(jax.random.fold_in(of_frames, frame))

    chance = jnp.ones(batch.frame_ids.shape)
    if config.keyframes:
        chance = jax.vmap(jax.vmap(draw))(per_segment(keys, batch.segment_ids), batch.frame_ids)
    mine = jax.tree.map(lambda x: per_segment(x, batch.segment_ids), patterns)
    return held_frames(batch.frame_ids, mine, chance)


def _independent(
    config: DiffusionConfig,
    keys: jax.Array,
    patterns: Pattern,
    batch: Batch,
    groups: Float[Array, "b n 2"],
    group: Int[Array, "b l"],
) -> tuple[Float[Array, "b n g"], Int[Array, "b l"]]:
    """The levels of every segment's groups, and each token's group among them, where frames of some
    segments have levels of their own."""
    count = config.ceilings.levels

    def draw(segment_key: jax.Array, tokens: Int[Array, ""]) -> Float[Array, "g"]:
        of_levels = jax.random.split(jax.random.fold_in(segment_key, OF_LEVELS), count)
        return jax.vmap(lambda k: draw_time(config.time, k, tokens))(of_levels)

    own = on_grid(config.path, jax.vmap(jax.vmap(draw))(keys, batch.num_tokens), up=True)
    shared = jnp.concatenate([groups, jnp.repeat(groups[..., :1], count - 2, -1)], -1)
    levels = jnp.where(patterns.independent[..., None], own, shared)
    mine = per_segment(patterns.independent, batch.segment_ids)
    return levels, jnp.where(mine, batch.frame_ids % count, group)


def drop_captions(
    text_segment_ids: Int[Array, "b s"], dropped: Float[Array, "b n"]
) -> Int[Array, "b s"]:
    """Hides all but the first token of the captions to drop: what is left is the empty prompt."""
    before = jnp.pad(text_segment_ids[:, :-1], ((0, 0), (1, 0)))
    first = text_segment_ids != before
    hide = (per_segment(dropped, text_segment_ids) > 0) & ~first
    return jnp.where(hide, PAD, text_segment_ids)


def split_output(
    config: DiffusionConfig, output: Float[Array, "b l _"], dim: int
) -> tuple[Float[Array, "b l p"], Float[Array, "b l p"] | None]:
    """The prediction, and the fraction of a learned variance where there is one.

    A network with two outputs for each number of which the second is not asked for (SiT's) has it
    ignored.

    Raises:
        ValueError: where the network has not as many outputs as are asked for.
    """
    learned, found = config.variance == "learned_range", output.shape[-1]
    if found not in ((2 * dim,) if learned else (dim, 2 * dim)):
        raise ValueError(
            f"the network gives {found} numbers a token, and diffusion.variance {config.variance!r} "
            f"needs {2 * dim if learned else dim} for its patches of {dim}: "
            "let the model learn sigma, or set the variance to 'fixed_small'."
        )
    return output[..., :dim], output[..., dim:] if learned else None


def predicted_velocity(
    config: DiffusionConfig,
    output: Float[Array, "b l p"],
    xt: Float[Array, "b l p"],
    tau: Float[Array, "b l"],
    min_t: float = SMALLEST_T,
) -> Float[Array, "b l p"]:
    """The network's prediction as a velocity; ``min_t`` bounds the division by sigma.

    Raises:
        ValueError: on a discrete path, which has none.
    """
    return velocity_of(config.path, config.prediction, output, xt, tau, min_t)


def estimate(
    config: DiffusionConfig,
    prediction: Float[Array, "b l p"],
    xt: Float[Array, "b l p"],
    tau: Float[Array, "b l"],
    fraction: Float[Array, "b l p"] | None = None,
) -> Estimate:
    """What solvers ask of a prediction: of the velocity on continuous paths (see ``guided_kind``),
    of what the network itself predicts on a discrete one."""
    kind = guided_kind(config)
    x0, eps = clean_and_noise(config.path, kind, prediction, xt, tau)
    velocity = None if config.path.discrete else prediction
    return Estimate(x0, eps, velocity, fraction)


def guided_kind(config: DiffusionConfig) -> Prediction:
    """In which space guidance is taken: of velocities where the path has them."""
    return config.prediction if config.path.discrete else "velocity"


def token_weight(config: DiffusionConfig, tau: Float[Array, "b l"]) -> Float[Array, "b l"]:
    """The weight of each token's squared error, by its noise level; of level 0 it is any number.

    Weights of the error of x0, divided by what that error is multiplied by in the space of the loss.
    For a loss of eps, v and x0, min_snr is min(SNR, gamma) / SNR, / (SNR + 1) and itself. On
    continuous paths sigma is held above min_t, for SNR has no bound there.
    """
    if config.weighting == "none":
        return jnp.ones_like(tau)
    floor = config.min_t if not config.path.discrete else 1 / config.path.timesteps
    tau = jnp.maximum(tau, floor)
    at = level(config.path, tau)
    by = None if config.path.discrete else rates(config.path, tau)
    snr = jnp.square(at.alpha / at.sigma)
    space: Prediction = "velocity" if config.loss == "velocity" else config.prediction
    factor = squared_error_factor(config.path, space, at, by)
    if config.weighting == "min_snr":
        wanted = jnp.minimum(snr, config.min_snr_gamma)
    else:
        wanted = snr if config.weighting == "snr" else jnp.maximum(snr, 1)
    return wanted / factor


def token_loss(
    config: DiffusionConfig,
    output: Float[Array, "b l _"],
    inputs: DenoiserInputs,
    target: Target,
    batch: Batch,
) -> tuple[Float[Array, "b l"], Float[Array, "b l"]]:
    """The loss of every token, and the weight (0 or 1) it has in that of the batch.

    Given tokens, with noise or without, and padding have weight 0: no step of a solver asks for what
    is given. The loss of a batch is the weighted mean over its tokens. ``output`` is ``[b, l, p]``,
    or ``[b, l, 2p]`` with a variance.

    Raises:
        ValueError: where the network has not as many outputs as are asked for.
    """
    x0, xt, tau = batch.tokens, inputs.tokens, target.tau
    predicted, fraction = split_output(config, output, x0.shape[-1])
    truth = prediction_of(config.path, config.prediction, x0, target.eps, tau)
    if config.loss == "velocity":
        wanted = predicted_velocity(config, truth, xt, tau, config.min_t)
        found = predicted_velocity(config, predicted, xt, tau, config.min_t)
    else:
        wanted, found = truth, predicted
    error = token_weight(config, tau) * jnp.square(found - wanted).mean(-1)
    if fraction is not None:
        frozen = jax.lax.stop_gradient(predicted)
        guess, _ = clean_and_noise(config.path, config.prediction, frozen, xt, tau)
        error = error + bound(config.path, x0, xt, guess, fraction, tau).mean(-1)
    weight = (batch.segment_ids != PAD) & target.generated
    return jnp.where(weight, error, 0.0), weight.astype(jnp.float32)
