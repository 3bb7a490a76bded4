"""The loss of a chain with learned variances, against its definition written anew with NumPy and SciPy.

The posterior comes from Bayes' rule (a product of two Gaussians) instead of the published
coefficients, and every number is computed alone in float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from dit_jax.diffusion import DiffusionConfig, PathConfig, TimeConfig, token_loss
from dit_jax.diffusion.objective import decoder_nll, variational_bound
from dit_jax.types import Target
from tests.denoiser import struct
from tests.diffusion.packed import Clip, pack

CHAIN = PathConfig("ddpm")
CONFIG = DiffusionConfig(
    "eps", TimeConfig("uniform"), path=CHAIN, loss="prediction", variance="learned_range"
)
PLAIN = dataclasses.replace(CONFIG, variance="fixed_small")
BETA = np.linspace(1e-4, 0.02, 1000)
KEPT = np.cumprod(1 - BETA)
# The decoder's, the first that has a posterior, and some more.
INDICES = [0, 1, 2, 10, 50, 150, 450, 750, 999]
DIM = 6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def bayes(i, x0, xt):
    """Mean and variance of q(x_(i-1) | x_i, x0): x_(i-1) given x0, times x_i given x_(i-1)."""
    prior_mean, prior_variance = np.sqrt(KEPT[i - 1]) * x0, 1 - KEPT[i - 1]
    factor = np.sqrt(1 - BETA[i])
    precision = 1 / prior_variance + factor**2 / BETA[i]
    return (prior_mean / prior_variance + factor * xt / BETA[i]) / precision, 1 / precision


def defined(i, x0, xt, eps, output, fraction):
    """(mse, bound) of one number, as DiT trains them."""
    guess = (xt - np.sqrt(1 - KEPT[i]) * output) / np.sqrt(KEPT[i])
    small = bayes(max(i, 1), x0, xt)[1]
    part = (fraction + 1) / 2
    variance = np.exp(part * np.log(BETA[i]) + (1 - part) * np.log(small))
    if i == 0:
        scale = np.sqrt(variance)
        above = 1.0 if x0 > 0.999 else ndtr((x0 + 1 / 255 - guess) / scale)
        below = 0.0 if x0 < -0.999 else ndtr((x0 - 1 / 255 - guess) / scale)
        nats = -np.log(max(above - below, 1e-12))
    else:
        mean, other = bayes(i, x0, xt)[0], bayes(i, guess, xt)[0]
        nats = 0.5 * (np.log(variance / small) + (small + (mean - other) ** 2) / variance - 1)
    return (output - eps) ** 2, nats / np.log(2)


@pytest.fixture(scope="module")
def case():
    """One token at each index; x0 within [-1, 1], both ends among them."""
    rng = np.random.default_rng(0)
    shape = (1, len(INDICES), DIM)
    x0 = np.clip(rng.normal(0, 0.7, shape), -1, 1)
    x0[:, 0, :2] = -1.0, 1.0
    eps = rng.normal(size=shape)
    # A guess that is not far off, as after some training: at index 0 the bins would all be empty.
    output = eps + 0.3 * rng.normal(size=shape)
    fraction = rng.uniform(-1.2, 1.2, shape)
    kept = KEPT[INDICES][None, :, None]
    xt = np.sqrt(kept) * x0 + np.sqrt(1 - kept) * eps
    return x0, eps, xt, output, fraction, (np.array([INDICES]) + 1) / CHAIN.timesteps


def noised(x0, xt, eps, tau, segment_ids=1):
    """Inputs, target and batch of the tokens of one row."""
    batch = pack([[Clip(0, 1, tau.size)]], tau.size, 1)
    ids = segment_ids * batch.segment_ids
    batch = dataclasses.replace(batch, tokens=x0, segment_ids=ids)
    of_rows = {"positions": batch.positions, "segment_ids": ids, "token_ids": batch.token_ids}
    inputs = struct(of_rows, tokens=xt, group_ids=0 * ids, group_t=tau[:, :1])
    return jax.tree.map(jnp.asarray, (inputs, Target(eps, tau, generated=tau > 0), batch))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1, has_aux=True)
def gradient(config, output, arrays):
    """The gradient of the loss, and the loss and the weight of every token."""
    error, weight = token_loss(config, output, *arrays)
    return error.sum(), (error, weight)


def test_the_loss_at_every_index_is_the_published_one(case):
    x0, eps, xt, output, fraction, tau = case
    both = jnp.asarray(np.concatenate([output, fraction], -1))
    arrays = noised(x0, xt, eps, tau)
    slope, (error, weight) = gradient(CONFIG, both, arrays)
    assert np.array_equal(weight, np.ones_like(tau))
    for at, i in enumerate(INDICES):
        numbers = [
            [float(a[0, at, d]) for a in (x0, xt, eps, output, fraction)] for d in range(DIM)
        ]
        mse, bits = np.mean([defined(i, *one) for one in numbers], axis=0)
        # float64, through differences of cumulative distributions at index 0.
        np.testing.assert_allclose(float(error[0, at]), mse + bits, rtol=1e-8, err_msg=f"index {i}")
        assert abs(bits) > 1e-6  # so that the sum tells
    # The bound teaches variances only; without one the second half is ignored.
    alone, (error, _) = gradient(PLAIN, both, arrays)
    assert np.array_equal(slope[..., :DIM], alone[..., :DIM])
    assert not alone[..., DIM:].any() and (np.abs(slope[..., DIM:]) > 0).all()
    np.testing.assert_allclose(error, ((output - eps) ** 2).mean(-1), rtol=1e-12)
    with pytest.raises(AssertionError, match="6 outputs a token"):
        token_loss(CONFIG, jnp.asarray(output), *arrays)


def test_conditioning_tokens_and_padding_have_no_part_and_no_gradient(case):
    x0, eps, xt, output, fraction, tau = case
    tau, ids = tau.copy(), np.ones(tau.shape, np.int32)
    tau[0, 3], ids[0, 5:7] = 0.0, 0
    both = jnp.asarray(np.concatenate([output, fraction], -1))
    slope, (error, weight) = gradient(CONFIG, both, noised(x0, xt, eps, tau, ids))
    out = np.isin(np.arange(len(INDICES)), [3, 5, 6])
    assert not np.asarray(error)[0, out].any() and np.array_equal(weight[0], ~out)
    assert np.isfinite(slope).all() and not np.asarray(slope)[0, out].any()


def test_a_perfect_network_has_the_entropy_of_the_posterior_only(case):
    x0, _, xt, output, fraction, tau = (jnp.asarray(a) for a in case)
    bound = jax.jit(functools.partial(variational_bound, CHAIN))
    bits = np.asarray(bound(x0, xt, x0, jnp.full_like(x0, -1.0), tau))
    np.testing.assert_allclose(bits[:, 1:], 0, atol=1e-12)
    assert (bits[:, 0] > 0).all()
    # In float32: means of two terms that all but cancel, over variances of 1e-4 and more.
    args = [jnp.asarray(a, jnp.float32) for a in (x0, xt, x0 + 0.1 * output, fraction, tau)]
    exact, out = bound(*(a.astype(jnp.float64) for a in args)), bound(*args)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact, rtol=1e-2, atol=1e-4)


def test_the_probabilities_of_all_values_sum_to_one():
    values = jnp.asarray(np.linspace(-1, 1, 256))
    nll = decoder_nll(values, jnp.full(256, 0.1234), jnp.full(256, np.log(0.002)))
    # The bins of 1e-12 or less are counted as so many.
    np.testing.assert_allclose(np.exp(-np.asarray(nll)).sum(), 1, atol=1e-9)
