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
from scipy import integrate, stats

from dit_jax.diffusion import DiffusionConfig, PathConfig, TimeConfig, token_loss
from dit_jax.diffusion.objective import decoder_nll, normal_kl, posterior, variational_bound
from dit_jax.types import Batch, DenoiserInputs, Target

CHAIN = PathConfig("ddpm")
CONFIG = DiffusionConfig(
    "eps", TimeConfig("uniform"), path=CHAIN, loss="prediction", variance="learned_range"
)
# Of bins of time: the decoder's, the first that has a posterior, and some of every tenth.
INDICES = [0, 1, 2, 10, 50, 99, 150, 250, 350, 450, 550, 650, 750, 850, 950, 999]
DIM = 6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def chain(path=CHAIN):
    beta = np.linspace(path.beta_start, path.beta_end, path.timesteps)
    return beta, np.cumprod(1 - beta)


def bayes(i, x0, xt):
    """Mean and variance of q(x_(i-1) | x_i, x0): x_(i-1) given x0, times x_i given x_(i-1)."""
    beta, kept = chain()
    prior_mean, prior_variance = np.sqrt(kept[i - 1]) * x0, 1 - kept[i - 1]
    factor = np.sqrt(1 - beta[i])
    precision = 1 / prior_variance + factor**2 / beta[i]
    return (prior_mean / prior_variance + factor * xt / beta[i]) / precision, 1 / precision


def defined(i, x0, xt, eps, output, fraction):
    """(mse, bound) of one number, as DiT trains them."""
    beta, kept = chain()
    guess = (xt - np.sqrt(1 - kept[i]) * output) / np.sqrt(kept[i])
    small = bayes(max(i, 1), x0, xt)[1]
    part = (fraction + 1) / 2
    variance = np.exp(part * np.log(beta[i]) + (1 - part) * np.log(small))
    if i == 0:
        scale = np.sqrt(variance)
        above = 1.0 if x0 > 0.999 else stats.norm.cdf(x0 + 1 / 255, guess, scale)
        below = 0.0 if x0 < -0.999 else stats.norm.cdf(x0 - 1 / 255, guess, scale)
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
    eps, output = rng.normal(size=shape), rng.normal(size=shape)
    # A guess that is not far off, as after some training: at index 0 the bins would all be empty.
    output = eps + 0.3 * output
    fraction = rng.uniform(-1.2, 1.2, shape)
    kept = chain()[1][INDICES][None, :, None]
    xt = np.sqrt(kept) * x0 + np.sqrt(1 - kept) * eps
    tau = (np.array([INDICES]) + 1) / CHAIN.timesteps
    return x0, eps, xt, output, fraction, tau


def batch_of(x0, xt, eps, tau, segment_ids=None):
    b, l = tau.shape
    ids = np.ones((b, l), np.int32) if segment_ids is None else segment_ids
    zero = np.zeros((b, 1), np.int32)
    batch = Batch(
        tokens=jnp.asarray(x0),
        positions=jnp.zeros((b, l, 3), jnp.float32),
        segment_ids=jnp.asarray(ids),
        frame_ids=jnp.asarray(0 * ids),
        token_ids=jnp.asarray(np.tile(np.arange(l, dtype=np.int32), (b, 1))),
        text=jnp.asarray(zero),
        text_segment_ids=jnp.asarray(zero),
        sample_ids=jnp.asarray(zero.astype(np.uint32)),
        num_tokens=jnp.asarray(zero),
        num_frames=jnp.asarray(zero),
    )
    inputs = DenoiserInputs(
        tokens=jnp.asarray(xt),
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        token_ids=batch.token_ids,
        group_ids=jnp.asarray(0 * ids),
        group_t=jnp.asarray(tau[:, :1]),
        text=batch.text,
        text_segment_ids=batch.text_segment_ids,
        dropped=jnp.zeros((b, 1), jnp.float32),
    )
    target = Target(jnp.asarray(eps), jnp.asarray(tau), generated=jnp.asarray(tau > 0))
    return inputs, target, batch


@pytest.fixture(scope="module")
def gradient_of(jit):
    """``gradient_of(config, output, noised)``: the gradient of the loss, and the loss by token."""

    @functools.cache
    def compiled(config):
        def total(output, noised):
            error, weight = token_loss(config, output, *noised)
            return error.sum(), (error, weight)

        return jit(jax.grad(total, has_aux=True))

    return lambda config, output, noised: jax.tree.map(np.asarray, compiled(config)(output, noised))


def test_the_loss_at_every_index_is_the_published_one(case, gradient_of):
    x0, eps, xt, output, fraction, tau = case
    both = jnp.asarray(np.concatenate([output, fraction], -1))
    _, (error, weight) = gradient_of(CONFIG, both, batch_of(x0, xt, eps, tau))
    assert np.array_equal(weight, np.ones_like(tau))
    for at, i in enumerate(INDICES):
        terms = [
            defined(i, *(float(a[0, at, d]) for a in (x0, xt, eps, output, fraction)))
            for d in range(DIM)
        ]
        mse, bits = np.mean(terms, axis=0)
        # float64, through differences of cumulative distributions at index 0.
        np.testing.assert_allclose(float(error[0, at]), mse + bits, rtol=1e-8, err_msg=f"index {i}")
        assert abs(bits) > 1e-6  # so that the sum tells


def test_the_bound_teaches_variances_only(case, gradient_of):
    x0, eps, xt, output, fraction, tau = case
    both = jnp.asarray(np.concatenate([output, fraction], -1))
    noised = batch_of(x0, xt, eps, tau)
    gradient, _ = gradient_of(CONFIG, both, noised)
    alone, _ = gradient_of(dataclasses.replace(CONFIG, variance="fixed_small"), both, noised)
    assert np.array_equal(gradient[..., :DIM], alone[..., :DIM])
    assert not alone[..., DIM:].any() and (np.abs(gradient[..., DIM:]) > 0).all()


def test_the_second_half_is_ignored_where_no_variance_is_learned(case):
    x0, eps, xt, output, fraction, tau = case
    noised = batch_of(x0, xt, eps, tau)
    plain = dataclasses.replace(CONFIG, variance="fixed_small")
    both = jnp.asarray(np.concatenate([output, fraction], -1))
    out = token_loss(plain, both, *noised)[0]
    assert np.array_equal(out, token_loss(plain, jnp.asarray(output), *noised)[0])
    np.testing.assert_allclose(out, ((output - eps) ** 2).mean(-1), rtol=1e-12)
    with pytest.raises(AssertionError, match="6 outputs a token"):
        token_loss(CONFIG, jnp.asarray(output), *noised)


def test_conditioning_tokens_and_padding_have_no_part_and_no_gradient(case, gradient_of):
    x0, eps, xt, output, fraction, tau = case
    tau = tau.copy()
    tau[0, 3] = 0.0
    ids = np.ones(tau.shape, np.int32)
    ids[0, 5:7] = 0
    noised = batch_of(x0, xt, eps, tau, ids)
    both = jnp.asarray(np.concatenate([output, fraction], -1))
    gradient, (error, weight) = gradient_of(CONFIG, both, noised)
    out = np.isin(np.arange(len(INDICES)), [3, 5, 6])
    assert not np.asarray(error)[0, out].any() and not np.asarray(weight)[0, out].any()
    assert (np.asarray(weight)[0, ~out] == 1).all()
    assert np.isfinite(gradient).all() and not gradient[0, out].any()


def test_a_perfect_network_has_the_entropy_of_the_posterior_only(case):
    """Where mean and variance are the posterior's, the divergence is 0."""
    x0, _, xt, _, _, tau = (jnp.asarray(a) for a in case)
    bits = np.asarray(variational_bound(CHAIN, x0, xt, x0, jnp.full_like(x0, -1.0), tau))
    np.testing.assert_allclose(bits[:, 1:], 0, atol=1e-12)
    assert (bits[:, 0] > 0).all()


def test_the_posterior_by_bayes():
    table = posterior(CHAIN)
    for i in (1, 2, 500, 999):
        mean, variance = bayes(i, 0.3, -0.8)
        np.testing.assert_allclose(table[i, 0] * 0.3 - table[i, 1] * 0.8, mean, rtol=1e-9)
        np.testing.assert_allclose(np.exp(table[i, 2]), variance, rtol=1e-9)
    np.testing.assert_allclose(table[0, :2], [1, 0], atol=1e-12)
    assert table[0, 2] == table[1, 2]


def test_the_divergence_of_normals_is_its_integral():
    a, b = stats.norm(0.3, 0.5), stats.norm(-0.2, 0.9)
    expected = integrate.quad(lambda x: a.pdf(x) * (a.logpdf(x) - b.logpdf(x)), -6, 6)[0]
    logs = 2 * np.log([0.5, 0.9])
    out = normal_kl(*map(jnp.float64, (0.3, logs[0], -0.2, logs[1])))
    np.testing.assert_allclose(out, expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [0.002, 0.02, 0.3])
def test_the_probabilities_of_all_values_sum_to_one(scale):
    values = jnp.asarray(np.linspace(-1, 1, 256))
    nll = decoder_nll(values, jnp.full(256, 0.1234), jnp.full(256, np.log(scale)))
    # The bins of 1e-12 or less are counted as so many.
    np.testing.assert_allclose(np.exp(-np.asarray(nll)).sum(), 1, atol=1e-9)


def test_float32_is_near_float64(case):
    x0, _, xt, output, fraction, tau = case
    args = [jnp.asarray(a, jnp.float32) for a in (x0, xt, x0 + 0.1 * output, fraction, tau)]
    exact = variational_bound(CHAIN, *(jnp.asarray(np.asarray(a, np.float64)) for a in args))
    out = variational_bound(CHAIN, *args)
    assert out.dtype == jnp.float32
    # Means of two terms that all but cancel, over variances of 1e-4 and more.
    np.testing.assert_allclose(out, exact, rtol=1e-2, atol=1e-4)
