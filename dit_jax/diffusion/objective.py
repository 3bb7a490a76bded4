"""The training objective: noised batches, and the loss of every token.

The error of a prediction y' of y, in the space of velocities or of what is predicted, is::

    error = |y' - y|^2 / p                                                                    (1)

With a learned variance on the discrete chain, one term of the variational bound is added, in bits
(Nichol & Dhariwal 2021, eq. 15 and 16; they call the fraction v)::

    q(x_(i-1) | x_i, x0) = N(a x0 + b x_i, beta~_i)               Ho et al. 2020, eq. 7       (2)
    p(x_(i-1) | x_i)     = N(a x0' + b x_i, exp(f log beta_i + (1 - f) log beta~_i))          (3)
    bound_i = KL(q || p),  bound_0 = -log p(x0)                   of 256 bins: eq. 13         (4)

All randomness of a segment comes from its sample's identity and the step's key, never from the place
in which it was packed: a sample's loss depends neither on its neighbours nor on the devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int, UInt

from dit_jax.diffusion import paths
from dit_jax.diffusion.masks import MaskConfig, conditioning_mask, sample_mask
from dit_jax.diffusion.paths import Estimate, PathConfig, Prediction, TimeConfig, Variance, on_grid
from dit_jax.types import PAD, Batch, DenoiserInputs, Fraction, Range, Target, per_segment, require

# Sets a segment's random numbers of frames apart from those of ``split(key, 4)``.
OF_FRAMES = 4
HALF_BIN, SMALLEST_PROBABILITY = 1 / 255, 1e-12
Tokens = Float[Array, "b l p"]
ByToken = Float[Array, "b l"]
Ids = Int[Array, "b l"]
Numbers = Float[Array, "*b"]
Output = Float[Array, "b l _"]


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The objective."""

    # Of the network. x0 if a patch has more numbers than the model has width (Li & He 2025, "Back to
    # Basics").
    prediction: Literal["velocity", "x0", "eps", "v"] = "velocity"
    time: TimeConfig = TimeConfig()
    masks: MaskConfig = MaskConfig()
    # Probability that a segment is trained without its caption and its fields, for guidance.
    caption_dropout: Fraction = 0.1
    # Floor of t in the velocity loss of predicted x0, whose error is divided by t: a higher one lets a
    # young model learn the whole picture before the last of the noise.
    min_t: Annotated[float, Range(0, 1, True, True)] = 0.05
    path: PathConfig = PathConfig()
    # The space of the squared error: velocities, or whatever is predicted.
    loss: Literal["velocity", "prediction"] = "velocity"
    # Of ancestral sampling. learned_range: the network has two outputs for each number, and the second
    # is trained by (4).
    variance: Variance = "fixed_small"

    def __post_init__(self) -> None:
        chain, uniform = self.path.discrete, self.time.distribution == "uniform"
        path = f"for the path {self.path.kind!r} (zero_terminal_snr {self.path.zero_terminal_snr})"
        of_x0 = not (self.path.ends_in_noise and self.prediction == "eps")
        require(
            "diffusion.",
            self,
            ("prediction", not chain or self.prediction != "velocity", f"eps, v or x0 {path}"),
            ("loss", not chain or self.loss != "velocity", f"'prediction' {path}"),
            ("prediction", of_x0, f"v or x0 {path}"),
            ("variance", chain or self.variance != "learned_range", f"'fixed_small' {path}"),
            ("time.distribution", not chain or uniform, f"'uniform' {path}"),
        )


# --- Noised batches ---


def each(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps a function over segments or tokens: over the first two axes of its arguments."""
    return jax.vmap(jax.vmap(function))


def sample_keys(key: jax.Array, sample_ids: UInt[Array, "b n"]) -> jax.Array:
    """A random key for each segment, from its sample's identity alone."""
    return each(lambda sample_id: jax.random.fold_in(key, sample_id))(sample_ids)


def token_noise(keys: jax.Array, segment_ids: Ids, token_ids: Ids, dim: int) -> Tokens:
    """Standard normal noise of each token, from its segment's key and its index in the segment."""
    noise = each(lambda key, index: jax.random.normal(jax.random.fold_in(key, index), (dim,)))
    return noise(per_segment(keys, segment_ids), token_ids)


def noise_batch(
    config: DiffusionConfig, key: jax.Array, batch: Batch, time: jax.Array | None = None
) -> tuple[DenoiserInputs, Target]:
    """Samples times, masks, noise and dropout for every segment of a batch; with ``time``, every
    segment has that noise level. On the discrete chain all levels are on its grid."""
    masks, path, ids = config.masks, config.path, batch.segment_ids

    def sample_segment(key: jax.Array, tokens: jax.Array, frames: jax.Array) -> Any:
        time_key, mask_key, noise_key, drop_key = jax.random.split(key, 4)
        t = paths.sample_time(config.time, time_key, tokens) if time is None else time
        t = jnp.asarray(t, jnp.float32)
        t, mask = on_grid(path, t, up=True), sample_mask(masks, mask_key, frames)
        # Modulation groups: generated tokens at t, conditioning tokens at min(t, cap).
        levels = jnp.stack([t, jnp.minimum(t, on_grid(path, mask.cap, up=False))])
        dropped = jax.random.bernoulli(drop_key, config.caption_dropout)
        return levels, mask, noise_key, dropped.astype(jnp.float32)

    keys = sample_keys(key, batch.sample_ids)
    sample = each(sample_segment)(keys, batch.num_tokens, batch.num_frames)
    levels, mask, noise_keys, dropped = sample  # [b, n, 2], the rest [b, n]

    chance, fold = jnp.ones(ids.shape), jax.random.fold_in
    if masks.keyframes:
        uniform = each(lambda key, frame: jax.random.uniform(fold(fold(key, OF_FRAMES), frame)))
        chance = uniform(per_segment(keys, ids), batch.frame_ids)
    mask = jax.tree.map(lambda x: per_segment(x, ids), mask)
    conditions = conditioning_mask(masks, mask, batch.frame_ids, chance)
    group_ids = 2 * jnp.maximum(ids - 1, 0) + conditions.astype(ids.dtype)
    group_t = levels.reshape(len(levels), -1)  # [b, 2 n]
    tau = jnp.take_along_axis(group_t, group_ids, 1)

    eps = token_noise(noise_keys, ids, batch.token_ids, batch.tokens.shape[-1])
    inputs = DenoiserInputs(
        tokens=paths.interpolate(path, batch.tokens, eps, tau),
        positions=batch.positions,
        segment_ids=ids,
        token_ids=batch.token_ids,
        group_ids=group_ids,
        group_t=group_t,
        text=batch.text,
        text_segment_ids=drop_captions(batch.text_segment_ids, dropped),
        dropped=dropped,
        token_fields=batch.token_fields,
        segment_fields=batch.segment_fields,
    )
    return inputs, Target(eps=eps, tau=tau, generated=~conditions)


def drop_captions(
    text_segment_ids: Int[Array, "b s"], dropped: Float[Array, "b n"]
) -> Int[Array, "b s"]:
    """Hides all but the first token of dropped captions: what is left is the empty prompt."""
    before = jnp.pad(text_segment_ids[:, :-1], ((0, 0), (1, 0)))
    hide = (per_segment(dropped, text_segment_ids) > 0) & (text_segment_ids == before)
    return jnp.where(hide, PAD, text_segment_ids)


# --- The network's output ---


def split_output(config: DiffusionConfig, output: Output, dim: int) -> tuple[Tokens, Tokens | None]:
    """The prediction, and the fraction of a learned variance (or None)."""
    learned = config.variance == "learned_range"
    # SiT's published networks have a second output for each number that no one trained.
    outputs = (2 * dim,) if learned else (dim, 2 * dim)
    assert output.shape[-1] in outputs, f"{output.shape[-1]} outputs a token, not {outputs}"
    return output[..., :dim], output[..., dim:] if learned else None


def estimate(
    config: DiffusionConfig, prediction: Tokens, xt: Tokens, tau: ByToken, fraction: Tokens | None
) -> Estimate:
    """What solvers need of a prediction in the space of guidance: a velocity on the straight path, and
    what the network predicts on the chain."""
    chain = config.path.discrete
    kind: Prediction = config.prediction if chain else "velocity"
    x0, eps = paths.clean_and_noise(config.path, kind, prediction, xt, tau)
    return Estimate(x0, eps, None if chain else prediction, fraction)


# --- The loss ---


def token_loss(
    config: DiffusionConfig, output: Output, inputs: DenoiserInputs, target: Target, batch: Batch
) -> tuple[ByToken, ByToken]:
    """The loss of every token, and its weight in the mean over the batch: 1, or 0 of conditioning
    tokens and padding. With a learned variance, ``output`` is ``[b, l, 2p]``."""
    path, kind, tau = config.path, config.prediction, target.tau
    x0, xt = batch.tokens, inputs.tokens
    predicted, fraction = split_output(config, output, x0.shape[-1])
    actual, expected = predicted, paths.prediction_of(path, kind, x0, target.eps, tau)
    if config.loss == "velocity":
        actual, expected = (
            paths.velocity_of(path, kind, y, xt, tau, config.min_t) for y in (actual, expected)
        )
    error = jnp.square(actual - expected).mean(-1)  # (1)
    if fraction is not None:
        # The bound trains the variance alone: the mean is learned by (1).
        frozen = jax.lax.stop_gradient(predicted)
        guess, _ = paths.clean_and_noise(path, kind, frozen, xt, tau)
        error = error + variational_bound(path, x0, xt, guess, fraction, tau).mean(-1)
    weight = (batch.segment_ids != PAD) & target.generated
    return jnp.where(weight, error, 0.0), weight.astype(jnp.float32)


# --- The variational bound of the discrete chain ---


@functools.cache
def posterior(config: PathConfig) -> Float[np.ndarray, "i 4"]:
    """a, b, log beta~_i and log beta_i of (2) at each index; float64."""
    beta, signal = paths.betas(config), paths.alphas_cumprod(config)
    before = np.append(1.0, signal[:-1])
    small = beta * (1 - before) / (1 - signal)
    small[0] = small[1]  # beta~_0 is 0, of which there is no logarithm
    of_x0 = np.sqrt(before) * beta / (1 - signal)
    of_xt = np.sqrt(1 - beta) * (1 - before) / (1 - signal)
    return np.stack([of_x0, of_xt, np.log(small), np.log(beta)], -1)


def normal_kl(
    mean: Numbers, log_variance: Numbers, other_mean: Numbers, other_log_variance: Numbers
) -> Numbers:
    """KL(N || other N) of each number, in nats."""
    apart = jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
    ratio = log_variance - other_log_variance
    return 0.5 * (jnp.exp(ratio) - 1 - ratio + apart)


def decoder_nll(x0: Numbers, mean: Numbers, log_scale: Numbers) -> Numbers:
    """-log of the probability of the bin around x0, in nats; the outermost bins are unbounded."""
    inverse = jnp.exp(-log_scale)
    above, below = inverse * (x0 - mean + HALF_BIN), inverse * (x0 - mean - HALF_BIN)
    # The difference is taken in the lower tail, where it loses no digits.
    flip = below > 0
    high, low = jnp.where(flip, -below, above), jnp.where(flip, -above, below)
    inside = norm.cdf(high) - norm.cdf(low)
    p = jnp.where(x0 < -0.999, norm.cdf(above), jnp.where(x0 > 0.999, norm.cdf(-below), inside))
    return -jnp.log(jnp.maximum(p, SMALLEST_PROBABILITY))


def variational_bound(
    config: PathConfig, x0: Tokens, xt: Tokens, guess: Tokens, fraction: Tokens, tau: ByToken
) -> Tokens:
    """The term (4) at each token's index, in bits of each number, for ``guess``, x0 as predicted, and
    ``fraction``, 2 f - 1 of (3); at data (tau 0) the term is that of index 0."""
    index = jnp.round(tau * config.timesteps).astype(jnp.int32) - 1
    table = jnp.asarray(posterior(config), x0.dtype)[jnp.maximum(index, 0)]  # [b, l, 4]
    of_x0, of_xt, small, large = (table[..., i, None] for i in range(4))
    f = (fraction + 1) / 2
    log_variance = f * large + (1 - f) * small
    truth, mean = of_x0 * x0 + of_xt * xt, of_x0 * guess + of_xt * xt
    kl = normal_kl(truth, jnp.broadcast_to(small, mean.shape), mean, log_variance)
    first = decoder_nll(x0, mean, 0.5 * log_variance)
    return jnp.where(index[..., None] <= 0, first, kl) / math.log(2)
