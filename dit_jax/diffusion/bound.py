"""The variational bound of a discrete chain, by which its variances are learned.

Nichol & Dhariwal 2021: the variance of p(x_(i-1) | x_i) lies between that of the posterior given x0,
beta~_i, and beta_i, at a fraction that the network gives for every number (eq. 15). A term of the bound
is KL(q(x_(i-1) | x_i, x0) || p), and at index 0 the negative log-likelihood of x0 itself, as one of 256
values in [-1, 1] (Ho et al. 2020, eq. 13); both in bits. beta~_0 is 0, and beta~_1 stands for it.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from dit_jax.diffusion.paths import PathConfig, alphas_cumprod, betas

HALF_BIN = 1 / 255
SMALLEST_PROBABILITY = 1e-12


@functools.cache
def posterior(config: PathConfig) -> Float[np.ndarray, "i 4"]:
    """Of each index: the coefficients of x0 and x_t in the mean of q(x_(i-1) | x_i, x0) (Ho et al.
    2020, eq. 7), log beta~_i and log beta_i; float64."""
    beta, kept = betas(config), alphas_cumprod(config)
    before = np.append(1.0, kept[:-1])
    small = beta * (1 - before) / (1 - kept)
    small[0] = small[1]
    of_x0 = np.sqrt(before) * beta / (1 - kept)
    of_xt = np.sqrt(1 - beta) * (1 - before) / (1 - kept)
    return np.stack([of_x0, of_xt, np.log(small), np.log(beta)], -1)


def normal_kl(
    mean: Float[Array, "*b"],
    log_variance: Float[Array, "*b"],
    other_mean: Float[Array, "*b"],
    other_log_variance: Float[Array, "*b"],
) -> Float[Array, "*b"]:
    """KL(N || other N) of each number, in nats."""
    apart = jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
    ratio = log_variance - other_log_variance
    return 0.5 * (jnp.exp(ratio) - 1 - ratio + apart)


def decoder_nll(
    x0: Float[Array, "*b"], mean: Float[Array, "*b"], log_scale: Float[Array, "*b"]
) -> Float[Array, "*b"]:
    """-log of the probability of the bin around x0, in nats; the outermost bins have no end."""
    wide = jnp.exp(-log_scale)
    above, below = wide * (x0 - mean + HALF_BIN), wide * (x0 - mean - HALF_BIN)
    # The difference is taken in the lower tail, where it loses no digits.
    flip = below > 0
    high, low = jnp.where(flip, -below, above), jnp.where(flip, -above, below)
    inside = norm.cdf(high) - norm.cdf(low)
    p = jnp.where(x0 < -0.999, norm.cdf(above), jnp.where(x0 > 0.999, norm.cdf(-below), inside))
    return -jnp.log(jnp.maximum(p, SMALLEST_PROBABILITY))


def bound(
    config: PathConfig,
    x0: Float[Array, "b l p"],
    xt: Float[Array, "b l p"],
    guess: Float[Array, "b l p"],
    fraction: Float[Array, "b l p"],
    tau: Float[Array, "b l"],
) -> Float[Array, "b l p"]:
    """The term of the bound at each token's index, in bits of each number.

    Args:
        guess: x0 as predicted; the caller stops its gradient where only variances are to be learned.
        fraction: -1 for the smallest variance, 1 for the largest.
        tau: on the grid of the path; at data (0) the term is that of index 0.
    """
    index = jnp.round(tau * config.timesteps).astype(jnp.int32) - 1
    table = jnp.asarray(posterior(config), x0.dtype)[jnp.maximum(index, 0)]
    of_x0, of_xt, small, large = (table[..., i, None] for i in range(4))
    part = (fraction + 1) / 2
    log_variance = part * large + (1 - part) * small
    truth, mean = of_x0 * x0 + of_xt * xt, of_x0 * guess + of_xt * xt
    kl = normal_kl(truth, jnp.broadcast_to(small, mean.shape), mean, log_variance)
    first = decoder_nll(x0, mean, 0.5 * log_variance)
    return jnp.where(index[..., None] <= 0, first, kl) / math.log(2)
