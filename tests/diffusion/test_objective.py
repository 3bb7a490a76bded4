"""The objective: noise that belongs to the sample, and a loss that counts generated tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy.special import ndtr

from dit_jax.config import check_types
from dit_jax.diffusion import (
    DiffusionConfig,
    MaskConfig,
    PathConfig,
    TimeConfig,
    noise_batch,
    token_loss,
)
from dit_jax.diffusion.objective import drop_captions
from dit_jax.types import PAD
from tests.diffusion.packed import Clip, pack

CONFIG = DiffusionConfig(
    time=TimeConfig(shift=1.5, reference_tokens=6),
    masks=MaskConfig(
        none=0.2, first=0.2, head=0.1, tail=0.1, ends=0.1, every=0.1, keyframes=0.1, window=0.1
    ),
    caption_dropout=0.5,
)
CHAIN = PathConfig("ddpm")
OF_CHAIN = functools.partial(
    DiffusionConfig, time=TimeConfig("uniform"), path=CHAIN, loss="prediction"
)
CLIPS = [Clip(7, 3, 2), Clip(2**32 - 1, 1, 4), Clip(0, 2, 3), Clip(8, 4, 2), Clip(123, 3, 1)]
TWO_ROWS = pack([CLIPS[:3], CLIPS[3:]], 20, 4)
OTHER_ROWS = pack([[CLIPS[4], CLIPS[1], CLIPS[3]], [CLIPS[2], CLIPS[0]]], 20, 4)


@pytest.fixture(scope="module")
def noise():
    """``noise(config, batch, seed)``: inputs and target as NumPy arrays; compiled once each."""
    compiled = jax.jit(noise_batch, static_argnums=0)
    return lambda config, batch, seed=0: jax.tree.map(
        np.asarray, compiled(config, jax.random.key(seed), batch)
    )


def by_sample(batch, noised):
    """The fields of each sample, by its identity."""
    inputs, target = noised
    out = {}
    for r, j in np.argwhere(batch.num_tokens > 0):
        at = batch.segment_ids[r] == j + 1
        out[int(batch.sample_ids[r, j])] = {
            "tokens": inputs.tokens[r, at],
            "eps": target.eps[r, at],
            "tau": target.tau[r, at],
            "group": inputs.group_ids[r, at] - 2 * j,
            "group_t": inputs.group_t[r, 2 * j : 2 * (j + 1)],
            "dropped": inputs.dropped[r, j],
            "frame": batch.frame_ids[r, at],
            "x0": batch.tokens[r, at],
        }
    return out


# --- noised batches ---


def test_noise_is_that_of_the_first_edition(noise):
    """Training resumes bit for bit: the same key gives the same levels, groups and noise."""
    inputs, target = noise(CONFIG, TWO_ROWS)
    levels = [[0.0142493127, 0.454155415, 0.887208104, 0.080466688, 0.457772076]]
    levels += [[0.0027945756, 0.905125976, 0.0, 0.119098529]]
    for row, expected in enumerate(levels):
        _, first = np.unique(target.tau[row], return_index=True)
        np.testing.assert_allclose(target.tau[row, np.sort(first)], expected, rtol=1e-6)
    groups = ["11000022225554441111", "11000000322111111111"]
    assert ["".join(map(str, row)) for row in inputs.group_ids] == groups
    eps = [0.9225725531578064, -0.26932018995285034, 1.8423110246658325, -0.013438263908028603]
    np.testing.assert_allclose(target.eps[0, 0], eps, rtol=1e-6)
    assert inputs.dropped.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_a_samples_noise_does_not_depend_on_where_it_is_packed(noise):
    here, there = (by_sample(b, noise(CONFIG, b)) for b in (TWO_ROWS, OTHER_ROWS))
    assert here.keys() == there.keys() == {clip.id for clip in CLIPS}
    for sample, fields in here.items():
        for key, value in fields.items():
            # The random numbers bit for bit; their sum with the data may be fused in another way.
            if key == "tokens":
                np.testing.assert_allclose(value, there[sample][key], rtol=1e-6, atol=1e-6)
            else:
                assert np.array_equal(value, there[sample][key]), (sample, key)


def test_samples_steps_and_tokens_have_noise_of_their_own(noise):
    one, two = (by_sample(TWO_ROWS, noise(CONFIG, TWO_ROWS, seed)) for seed in (0, 1))
    everything = np.concatenate([f["eps"].ravel() for run in (one, two) for f in run.values()])
    assert len(np.unique(everything)) == everything.size
    times = [f["group_t"][0] for run in (one, two) for f in run.values()]
    assert len(set(times)) == len(times)


def test_noise_levels_are_consistent(noise):
    conditions = 0
    for seed in range(20):
        for fields in by_sample(TWO_ROWS, noise(CONFIG, TWO_ROWS, seed)).values():
            t, conditioning_t = fields["group_t"]
            assert 0 < t <= 1 and 0 <= conditioning_t <= min(t, CONFIG.masks.max_noise)
            assert np.array_equal(fields["tau"], fields["group_t"][fields["group"]])
            tau = fields["tau"][:, None].astype(np.float64)
            expected = (1 - tau) * fields["x0"] + tau * fields["eps"]
            np.testing.assert_allclose(fields["tokens"], expected, atol=1e-6)  # float32
            # All tokens of a frame condition, or none; and something is left to generate.
            frames = [set(fields["group"][fields["frame"] == f]) for f in set(fields["frame"])]
            assert all(len(groups) == 1 for groups in frames) and {0} in frames
            conditions += {1} in frames
    assert conditions > 20


def test_noise_is_normal_and_levels_of_a_chain_are_on_its_grid_and_uniform(noise):
    config = dataclasses.replace(OF_CHAIN("eps"), masks=CONFIG.masks, caption_dropout=0.1)
    batch = pack([[Clip(64 * r + j, 2, 1) for j in range(64)] for r in range(64)], 128, 64)
    inputs, target = noise(config, batch)
    index = inputs.group_t.astype(np.float64) * 1000
    np.testing.assert_allclose(index, np.round(index), atol=1e-3)  # float32 of 1000
    generated = np.round(index[:, ::2]).ravel()
    assert generated.min() >= 1 and generated.max() == 1000
    # 4096 times in 10 bins of 409.6: within 4.5 standard deviations.
    counts = np.histogram(generated, np.arange(0.5, 1001, 100))[0]
    assert (np.abs(counts - 409.6) < 4.5 * 409.6**0.5).all()
    signal = np.append(1.0, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    at = signal[np.round(target.tau * 1000).astype(int)][..., None]
    expected = np.sqrt(at) * batch.tokens + np.sqrt(1 - at) * target.eps
    np.testing.assert_allclose(inputs.tokens, expected, atol=1e-5)  # float32
    # Kolmogorov and Smirnov: passed by chance less often than once in 10^4.
    eps = np.sort(target.eps.ravel().astype(np.float64))
    n = eps.size
    assert np.abs(ndtr(eps) - (np.arange(n) + 0.5) / n).max() < 2.23 / n**0.5
    # Neighbouring tokens and numbers are not correlated: within 4.5 standard deviations.
    for axis in range(3):
        product = target.eps * np.roll(target.eps, 1, axis)
        assert abs(product.mean()) < 4.5 / product.size**0.5
    # Captions are dropped as often as the config says.
    assert set(np.unique(inputs.dropped)) == {0.0, 1.0}
    assert abs(inputs.dropped.mean() - 0.1) <= 4.5 * (0.1 * 0.9 / 4096) ** 0.5


def test_dropping_leaves_the_first_token_of_the_dropped():
    ids = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 0, 0, 0]], np.int32)

    def dropped(*which):
        flags = np.zeros((2, 4), np.float32)
        for r, j in which:
            flags[r, j] = 1
        return np.asarray(drop_captions(jnp.asarray(ids), jnp.asarray(flags))).tolist()

    assert dropped((0, 0)) == [[1, 0, 0, 2, 3, 3, 0, 0], ids[1].tolist()]
    assert dropped((0, 2), (1, 1)) == [[1, 1, 1, 2, 3, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]]
    # A caption of one token is empty already; an empty slot has none.
    assert dropped() == dropped((0, 1), (1, 0), (0, 3)) == ids.tolist()


# --- the loss ---

FIRST = dataclasses.replace(CONFIG, masks=MaskConfig.only(first=1.0, noisy=0.0), min_t=0.2)
OUTPUT = np.random.default_rng(9).normal(size=TWO_ROWS.tokens.shape).astype(np.float32)


compiled_loss = jax.jit(token_loss, static_argnums=0)


def loss(prediction, output, noised):
    config = dataclasses.replace(FIRST, prediction=prediction)
    return map(np.asarray, compiled_loss(config, output, *noised, TWO_ROWS))


def test_the_loss_by_hand(noise):
    noised = inputs, target = noise(FIRST, TWO_ROWS)  # first frames condition without noise
    x0, tau, real = TWO_ROWS.tokens, target.tau, TWO_ROWS.segment_ids != PAD
    generated = real & (tau > 0)
    assert generated.sum() == 4 + 4 + 3 + 6 + 2 and (real & ~generated).sum() == 2 + 3 + 2 + 1
    velocity, weight = loss("velocity", OUTPUT, noised)
    assert weight.dtype == np.float32 and np.array_equal(weight, generated.astype(np.float32))
    expected = np.square(OUTPUT - (target.eps - x0)).mean(-1)
    np.testing.assert_allclose(velocity, expected * weight, rtol=1e-5)  # float32
    # Both velocities are (x_t - x0) / t, with t at least 0.2: x_t cancels.
    error, weight = loss("x0", OUTPUT, noised)
    expected = np.square(OUTPUT - x0).mean(-1) / np.maximum(tau, 0.2) ** 2
    # float32 differences of numbers up to 4 / 0.2.
    np.testing.assert_allclose(error, expected * weight, rtol=1e-4, atol=1e-5)
    # A perfect prediction has no loss.
    assert not next(loss("velocity", target.eps - x0, noised)).any()
    assert not next(loss("x0", x0, noised)).any()


def test_conditioning_tokens_with_noise_have_no_loss(noise):
    noised = inputs, target = noise(CONFIG, TWO_ROWS)
    error, weight = loss("x0", OUTPUT, noised)
    real = TWO_ROWS.segment_ids != PAD
    conditions = real & (inputs.group_ids % 2 == 1)  # the second group of each segment
    assert (target.tau[conditions] > 0).any()
    np.testing.assert_array_equal(weight, real & ~conditions)
    assert not error[conditions].any()


OBJECTIVES = [
    dataclasses.replace(OF_CHAIN("v"), path=PathConfig("ddpm", zero_terminal_snr=True)),
    DiffusionConfig("x0"),
]


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda c: f"{c.path.kind}-{c.prediction}")
def test_a_samples_loss_does_not_depend_on_its_neighbours(config, noise):
    """The loss of a sample's tokens is the same wherever it is packed, and all is finite."""
    config = dataclasses.replace(config, masks=CONFIG.masks)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_of(output, inputs, target, batch):
        error, weight = token_loss(config, output, inputs, target, batch)
        return error.sum(), (error, weight)

    losses = []
    for batch in (TWO_ROWS, OTHER_ROWS):
        noised = noise(config, batch)
        output = np.sin(3 * noised[0].tokens)
        gradient, (error, weight) = jax.tree.map(np.asarray, gradient_of(output, *noised, batch))
        assert np.isfinite(gradient).all() and np.isfinite(error).all() and (error >= 0).all()
        assert not gradient[weight == 0].any()
        losses.append(
            {
                batch.sample_ids[r, j]: error[r, batch.segment_ids[r] == j + 1]
                for r, j in np.argwhere(batch.num_tokens > 0)
            }
        )
    for sample, error in losses[0].items():
        # float32; velocities of x0 divide by 0.05.
        np.testing.assert_allclose(error, losses[1][sample], rtol=2e-4, atol=1e-6)


# --- types and errors ---


@pytest.mark.usefixtures("checked")
def test_dtypes_and_shapes_are_checked():
    config = dataclasses.replace(CONFIG, prediction="x0")

    def everything(key, batch):
        inputs, target = noise_batch(config, key, batch)
        return inputs, target, token_loss(config, target.eps, inputs, target, batch)

    # No dtype is promoted silently.
    with jax.numpy_dtype_promotion("strict"):
        inputs, target, losses = jax.eval_shape(everything, jax.random.key(0), TWO_ROWS)
    assert inputs.group_ids.dtype == jnp.int32
    floats = (inputs.tokens, inputs.group_t, inputs.dropped, target.eps, target.tau, *losses)
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    trace = functools.partial(jax.eval_shape, functools.partial(token_loss, config))
    with pytest.raises(TypeCheckError, match="parameter 'output'"):
        trace(jax.ShapeDtypeStruct((2, 20), jnp.float32), inputs, target, TWO_ROWS)
    with pytest.raises(AssertionError, match="3 outputs a token"):
        trace(jax.ShapeDtypeStruct((2, 20, 3), jnp.float32), inputs, target, TWO_ROWS)


ZERO = {"path": PathConfig("ddpm", zero_terminal_snr=True), "time": TimeConfig("uniform")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_t": 0.0}, "min_t is 0.0"),
        ({"path": CHAIN}, "prediction is 'velocity'"),
        ({"path": CHAIN, "prediction": "eps"}, "loss is 'velocity'"),
        ({"path": CHAIN, "prediction": "eps", "loss": "prediction"}, "'logit_normal'"),
        ({"prediction": "eps"}, "prediction is 'eps'"),
        ({"prediction": "eps", "loss": "prediction", **ZERO}, "zero_terminal_snr True"),
        ({"variance": "learned_range"}, "variance is 'learned_range'"),
    ],
)
def test_objectives_that_are_not_defined_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_types(DiffusionConfig(**fields), "diffusion")
