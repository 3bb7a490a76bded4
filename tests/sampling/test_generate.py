"""Sampling as a whole: levels, guidance, noise and solvers in one compiled step.

The model is a stand-in whose outputs are a formula, so that samples can be made again in NumPy; what
it is given is what the transformer would be.
"""

import dataclasses
import functools
import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import check_types
from dit_jax.diffusion import DiffusionConfig, PathConfig, TimeConfig
from dit_jax.diffusion.paths import alphas_cumprod
from dit_jax.diffusion.solvers import SOLVERS
from dit_jax.sampling import Generator, SamplingConfig
from dit_jax.sampling.request import SamplerInputs
from dit_jax.sampling.sampler import Experts

pytestmark = pytest.mark.usefixtures("quickly")
DIM, CHANNELS, TOKENS = 8, 4, 5
CHAIN = DiffusionConfig("eps", TimeConfig("uniform"), path=PathConfig("ddpm"), loss="prediction")
LEARNED = dataclasses.replace(CHAIN, variance="learned_range")
FLOW = DiffusionConfig()
PLAIN = SamplingConfig(steps=4, cfg_scale=1.0)


class StandIn:
    """Gives 0.5 x + sin(level) of each token, and more where the text is not empty."""

    def __init__(self, outputs=1, compute=jnp.float32):
        self.outputs = outputs
        patch = types.SimpleNamespace(channels=CHANNELS)
        self.config = types.SimpleNamespace(
            patch=patch, compute_dtype=lambda: compute, conditioners={}
        )
        self.rows = []

    def apply(self, params, inputs, *ids, method=None, encoded=True):
        if method == "encode_text":
            return inputs.astype(jnp.float32) * (ids[0] > 0)[..., None]
        x, text, ids = inputs.tokens, inputs.text, inputs.text_segment_ids
        self.rows.append(x.shape[0])
        level = jnp.take_along_axis(inputs.group_t, inputs.group_ids, 1)[..., None]
        read = ((text[..., 0] * (ids > 0)).sum(1) - text[:, 0, 0])[:, None, None]
        mean = params * x + jnp.sin(level) + read * jnp.cos(jnp.arange(DIM, dtype=x.dtype))
        if self.outputs == 1:
            return mean
        return jnp.concatenate([mean, jnp.broadcast_to(jnp.tanh(read), x.shape)], -1)


def condition(seeds=(1, 2), words=(0.3, 0.7), ceilings=None):
    """Rows of one segment: a first token of text that all share, and one word each."""
    b = len(seeds)
    full = (b, TOKENS)
    text = np.stack([[[0.1], [word]] for word in words]).astype(np.float32)
    free = np.ones(full, np.float32) if ceilings is None else np.float32([ceilings] * b)
    levels = np.unique(free[0])
    return SamplerInputs(
        tokens=jnp.asarray(np.where(free[..., None] < 1, np.ones((*full, DIM)), 0), jnp.float32),
        noise_caps=jnp.asarray(free),
        group_ids=jnp.asarray(np.searchsorted(levels, free).astype(np.int32)),
        group_t=jnp.asarray(np.tile(levels, (b, 1))),
        dropped=jnp.zeros((b, 1)),
        positions=jnp.zeros((*full, 3)),
        segment_ids=jnp.ones(full, jnp.int32),
        token_ids=jnp.asarray(np.tile(np.arange(TOKENS, dtype=np.int32), (b, 1))),
        text=jnp.asarray(text),
        text_segment_ids=jnp.ones((b, 2), jnp.int32),
        seeds=jnp.asarray(np.array(seeds, np.uint32)[:, None]),
    )


def fresh(diffusion=FLOW, outputs=1, **fields):
    return Generator(StandIn(outputs), diffusion, dataclasses.replace(PLAIN, **fields))


generator = functools.cache(fresh)
"""The same, compiled once."""


def made(diffusion=FLOW, given=None, outputs=1, **fields):
    given = condition() if given is None else given
    return np.asarray(generator(diffusion, outputs, **fields)(jnp.float32(0.5), given))


def output(x, level, word):
    return 0.5 * x + np.sin(level) + word * np.cos(np.arange(DIM))


def begin(diffusion=FLOW, given=None):
    one = generator(diffusion)
    given = condition() if given is None else given
    return np.asarray(one.begin(given, np.float32(1))[0], np.float64)


WORDS = np.array([0.3, 0.7])[:, None, None]


# --- samples by hand ---


def by_hand(found, scale, heun=False):
    """Compares with four steps of Euler or Heun, guided by ``scale(level)``."""

    def velocity(x, t):
        with_text, without = output(x, t, WORDS), output(x, t, 0)
        return without + scale(t) * (with_text - without)

    x, levels = begin(), np.linspace(1, 0, 5)
    for t, t_next in itertools.pairwise(levels):
        slope = velocity(x, t)
        if heun and t_next:
            slope = (slope + velocity(x + (t_next - t) * slope, t_next)) / 2
        x = x + (t_next - t) * slope
    np.testing.assert_allclose(found, x, atol=1e-5)  # float32


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_euler_with_guidance_by_hand(scale):
    by_hand(made(cfg_scale=scale), lambda t: scale)


def test_a_second_model_takes_over_at_low_noise_levels_with_its_own_guidance():
    experts = Experts(jnp.float32(0.5), jnp.float32(0.2), below=0.5, cfg_scale=2.0)
    found = np.asarray(generator(cfg_scale=3.0)(experts, condition()))

    def velocity(x, t):
        # At the boundary itself the first model still computes, as in Wan 2.2.
        factor, scale = (0.5, 3.0) if t >= 0.5 else (0.2, 2.0)
        with_text, without = (output(x, t, word) + (factor - 0.5) * x for word in (WORDS, 0))
        return without + scale * (with_text - without)

    x = begin()
    for t, t_next in itertools.pairwise(np.linspace(1, 0, 5)):
        x = x + (t_next - t) * velocity(x, t)
    np.testing.assert_allclose(found, x, atol=1e-5)  # float32


def test_ddpm_with_the_conditionals_variance_and_three_of_four_channels():
    """DiT's sampler, but for its noise: the stand-in's variance is told by the text alone."""
    fields = dict(cfg_scale=3.0, cfg_channels=3, solver="ddpm", spacing="linspace")
    outcome = made(LEARNED, outputs=2, **fields)
    one = generator(LEARNED, 2, **fields)
    levels = one.levels(TOKENS)
    assert np.round(levels * 1000).astype(int).tolist() == [1000, 667, 334, 1, 0]
    kept = np.append(1.0, alphas_cumprod(LEARNED.path))
    x = np.asarray(one.begin(condition(), levels[0])[0], np.float64)
    first = np.arange(DIM) % CHANNELS < 3
    for i, (now, after) in enumerate(([1000, 667], [667, 334], [334, 1], [1, 0])):
        with_text, without = output(x, now / 1000, WORDS), output(x, now / 1000, 0)
        eps = np.where(first, without + 3.0 * (with_text - without), with_text)
        a, b = kept[now], kept[after]
        beta = 1 - a / b
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        x = (np.sqrt(b) * beta * x0 + np.sqrt(a / b) * (1 - b) * x) / (1 - a)
        if after:
            part = (np.tanh(WORDS) + 1) / 2
            log_variance = part * np.log(beta) + (1 - part) * np.log(beta * (1 - b) / (1 - a))
            noise = np.asarray(one._noise(condition(), jnp.int32(i)))
            x = x + np.exp(0.5 * log_variance) * noise
    # x0 is as large as 100 where no denoiser is at work: float32.
    np.testing.assert_allclose(outcome, x, rtol=1e-3, atol=1e-3)


def test_sits_outputs_of_a_variance_are_ignored():
    plain = made(cfg_scale=3.0, solver="sde")
    np.testing.assert_allclose(made(cfg_scale=3.0, solver="sde", outputs=2), plain, atol=1e-6)


# --- the interval, and what is computed ---


def test_steps_outside_the_interval_are_made_once():
    one = fresh(cfg_scale=3.0, cfg_interval=(0.3, 0.8))
    found = np.asarray(one(jnp.float32(0.5), condition()))
    # The stand-in is traced once with text and without (levels 0.75 and 0.5), once with text alone.
    assert sorted(one.model.rows) == [2, 4]
    by_hand(found, lambda t: 3.0 if 0.3 < t <= 0.8 else 1.0)


def test_an_interval_may_end_within_a_step_of_heun():
    """The step from 0.5 to 0.25 is guided at its first evaluation alone."""
    found = made(solver="heun", cfg_scale=3.0, cfg_interval=(0.3, 1.0))
    by_hand(found, lambda t: 3.0 if t > 0.3 else 1.0, heun=True)


@pytest.mark.parametrize("solver", ["unipc", "heun"])
def test_all_steps_run_one_compiled_step(solver):
    one = fresh(solver=solver, steps=6, cfg_scale=2.0)
    one(jnp.float32(0.5), condition())
    assert one.step._cache_size() == 1
    assert one.model.rows == [4] * SOLVERS[solver].evaluations


# --- whose noise ---


@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
def test_a_sample_does_not_depend_on_its_batch(solver):
    fields = dict(solver=solver, eta=0.5, cfg_scale=2.0)
    together = made(**fields)
    alone = made(given=condition((2,), (0.7,)), **fields)
    np.testing.assert_allclose(together[1:], alone, atol=1e-6)  # float32
    other = made(given=condition((1, 3)), **fields)
    np.testing.assert_allclose(together[0], other[0], atol=1e-6)
    assert np.abs(together[1] - other[1]).max() > 0.1


def test_every_step_and_token_has_noise_of_its_own():
    one = generator(solver="ddpm")
    drawn = [np.asarray(one._noise(condition(), jnp.int32(i))) for i in range(3)]
    drawn.append(np.asarray(one.begin(condition(), np.float32(1))[0]))
    assert len(np.unique(drawn)) == np.size(drawn)


# --- modes and levels ---


CASES = [*((name, FLOW) for name in SOLVERS), ("ddpm", CHAIN), ("unipc", CHAIN)]


@pytest.mark.parametrize(
    ("solver", "diffusion"), CASES, ids=lambda v: v if isinstance(v, str) else v.path.kind
)
def test_given_tokens_stay_as_they_are(solver, diffusion):
    given = condition(ceilings=[0.0, 1.0, 0.0, 0.4, 1.0])
    out = made(diffusion, given, solver=solver, cfg_scale=2.0)
    assert (out[:, [0, 2]] == 1).all() and (out[:, [1, 3, 4]] != 1).all()
    assert np.isfinite(out).all()


def test_levels_follow_the_training_shift_or_their_own():
    shifted = dataclasses.replace(FLOW, time=TimeConfig(shift=3.0))
    np.testing.assert_allclose(generator(shifted).levels(7), [1, 0.9, 0.75, 0.5, 0], rtol=1e-6)
    plain = generator(shifted, shift=1.0).levels(7)
    np.testing.assert_allclose(plain, [1, 0.75, 0.5, 0.25, 0], rtol=1e-6)
    grown = dataclasses.replace(FLOW, time=TimeConfig(shift=1.0, reference_tokens=4))
    assert np.array_equal(generator(grown).levels(36), generator(shifted).levels(1))
    trailing = generator(CHAIN, spacing="trailing").levels(7)
    np.testing.assert_allclose(trailing, [1, 0.75, 0.5, 0.25, 0], rtol=1e-6)
    last = generator(FLOW, last_step=0.1, steps=3).levels(7)
    np.testing.assert_allclose(last, [1, 0.55, 0.1, 0], rtol=1e-6)


# --- errors ---


@pytest.mark.parametrize(
    ("diffusion", "fields", "message"),
    [
        (CHAIN, {"solver": "sde"}, "solver is 'sde'.* 'ddpm'"),
        (FLOW, {"spacing": "trailing"}, "spacing is 'trailing'.* 4 steps"),
        (CHAIN, {"spacing": "trailing", "shift": 2.0}, "spacing is 'trailing'.* shift"),
        (CHAIN, {"spacing": "linspace", "steps": 1001}, "'linspace'.* 1001 steps .* of 1000"),
        (FLOW, {"cfg_channels": 5}, "cfg_channels is 5.* at most 4"),
        (FLOW, {"eta": 2.0}, "sampling.eta is 2.0"),
        (FLOW, {"sde_strength": -1.0}, "sampling.sde_strength is -1.0"),
        (FLOW, {"last_step": 1.0}, "sampling.last_step is 1.0"),
        (FLOW, {"last_step": 0.1, "steps": 1}, "sampling.last_step is 0.1.* single step"),
        (FLOW, {"cfg_interval": (0.5, 0.5)}, "sampling.cfg_interval is"),
        (FLOW, {"cfg_interval": (0.0, 1.5)}, "sampling.cfg_interval is"),
        (FLOW, {"cache_threshold": float("nan")}, "sampling.cache_threshold is nan"),
        (FLOW, {"cache_threshold": 0.1, "solver": "heun"}, "cache_threshold is 0.1.* 'heun'"),
    ],
)
def test_what_a_model_cannot_be_asked_is_refused_at_once(diffusion, fields, message):
    with pytest.raises(ValueError, match=message):
        check_types(SamplingConfig(**fields), "sampling")
        generator(diffusion, **fields)


def test_a_network_without_variances_cannot_be_sampled_with_learned_ones():
    with pytest.raises(AssertionError, match="8 outputs a token"):
        made(LEARNED, solver="ddpm")
