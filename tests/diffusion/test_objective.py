"""What training asks: noise that belongs to the sample, and a loss that counts what is to be made."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jaxtyping import TypeCheckError
from scipy.special import ndtr

from dit_jax.diffusion import (
    CeilingConfig,
    DiffusionConfig,
    PathConfig,
    TimeConfig,
    drop_captions,
    noise_batch,
    predicted_velocity,
    token_loss,
)
from dit_jax.diffusion.objective import token_weight
from dit_jax.types import PAD, Batch

DIM = 4
CONFIG = DiffusionConfig(
    time=TimeConfig(shift=1.5, reference_tokens=6),
    ceilings=CeilingConfig(
        free=0.2, first=0.2, head=0.1, tail=0.1, ends=0.1, every=0.1, keyframes=0.1, window=0.1
    ),
    caption_dropout=0.5,
)


class Clip(NamedTuple):
    """One sample to pack: its identity, its frames and the tokens of each."""

    id: int
    frames: int
    per_frame: int


GROUPS = CONFIG.ceilings.groups
CLIPS = [Clip(7, 3, 2), Clip(2**32 - 1, 1, 4), Clip(0, 2, 3), Clip(8, 4, 2), Clip(123, 3, 1)]


def pack(rows: list[list[Clip]], length: int, slots: int) -> Batch:
    """Clips side by side; their tokens are a function of their identity."""
    ids = np.zeros((4, len(rows), length), np.int32)
    segment, frame, token, _ = ids
    tokens = np.zeros((len(rows), length, DIM), np.float32)
    sample, count, frames = np.zeros((3, len(rows), slots), np.int64)
    for r, row in enumerate(rows):
        start = 0
        for j, clip in enumerate(row):
            n = clip.frames * clip.per_frame
            span = slice(start, start + n)
            tokens[r, span] = np.random.default_rng(clip.id).normal(size=(n, DIM))
            segment[r, span], token[r, span] = j + 1, np.arange(n)
            frame[r, span] = np.arange(n) // clip.per_frame
            sample[r, j], count[r, j], frames[r, j] = clip.id, n, clip.frames
            start += n
    fields = dict(
        tokens=tokens,
        positions=np.zeros((len(rows), length, 3), np.float32),
        segment_ids=segment,
        frame_ids=frame,
        token_ids=token,
        text=np.ones((len(rows), slots), np.int32),
        text_segment_ids=np.tile(np.arange(1, slots + 1, dtype=np.int32), (len(rows), 1)),
        sample_ids=sample.astype(np.uint32),
        num_tokens=count.astype(np.int32),
        num_frames=frames.astype(np.int32),
    )
    return Batch(**fields)


@struct.dataclass
class Noised:
    """A noised batch: what the denoiser sees, and what its output is measured against."""

    inputs: Any
    target: Any

    @property
    def both(self):
        return self.inputs, self.target

    def __getattr__(self, name):
        if name in ("eps", "tau", "generated"):
            return getattr(self.target, name)
        return getattr(self.inputs, name)


@pytest.fixture(scope="module")
def noise(jit):
    """``noise(config, batch, seed)``, the inputs and the target, as NumPy arrays; compiled once a
    config and shape."""

    @functools.cache
    def compiled(config):
        return jit(lambda key, batch: Noised(*noise_batch(config, key, batch)))

    return lambda config, batch, seed=0: jax.tree.map(
        np.asarray, compiled(config)(jax.random.key(seed), batch)
    )


ARRANGEMENTS = {
    "two rows": pack([CLIPS[:3], CLIPS[3:]], 20, 4),
    "other rows and slots": pack([[CLIPS[4], CLIPS[1], CLIPS[3]], [CLIPS[2], CLIPS[0]]], 20, 4),
    "one row": pack([CLIPS[::-1]], 32, 6),
}


def by_sample(batch, noised, count=GROUPS):
    """What each sample got, by its identity; segments have ``count`` groups."""
    found = {}
    for r, j in np.argwhere(batch.num_tokens > 0):
        at = batch.segment_ids[r] == j + 1
        groups = slice(count * j, count * (j + 1))
        found[int(batch.sample_ids[r, j])] = {
            "tokens": noised.tokens[r, at],
            "eps": noised.eps[r, at],
            "tau": noised.tau[r, at],
            "group": noised.group_ids[r, at] - count * j,
            "group_t": noised.group_t[r, groups],
            "free": noised.generated[r, at],
            "dropped": noised.dropped[r, j],
            "frame": batch.frame_ids[r, at],
            "x0": batch.tokens[r, at],
        }
    return found


# --- noise ---


FORCING = dataclasses.replace(
    CONFIG, ceilings=CeilingConfig.only(free=0.3, keyframes=0.3, independent=0.4, levels=3)
)


@pytest.mark.parametrize("config", [CONFIG, FORCING], ids=["patterns", "independent"])
@pytest.mark.parametrize("name", ["other rows and slots", "one row"])
def test_a_samples_noise_does_not_depend_on_where_it_is_packed(noise, name, config):
    here, there = (
        by_sample(batch, noise(config, batch), config.ceilings.groups)
        for batch in (ARRANGEMENTS["two rows"], ARRANGEMENTS[name])
    )
    assert here.keys() == there.keys() == {clip.id for clip in CLIPS}
    for sample, fields in here.items():
        for key, value in fields.items():
            # The random numbers bit for bit; their sum with the data may be fused in another way.
            if key == "tokens":
                np.testing.assert_allclose(value, there[sample][key], rtol=1e-6, atol=1e-6)
            else:
                assert np.array_equal(value, there[sample][key]), (sample, key)


def test_samples_steps_and_tokens_have_noise_of_their_own(noise):
    batch = ARRANGEMENTS["two rows"]
    one, two = (by_sample(batch, noise(CONFIG, batch, seed)) for seed in (0, 1))
    everything = np.concatenate([f["eps"].ravel() for run in (one, two) for f in run.values()])
    assert len(np.unique(everything)) == everything.size
    times = [f["group_t"][0] for run in (one, two) for f in run.values()]
    assert len(set(times)) == len(times)


def test_noise_levels_are_consistent(noise):
    batch = ARRANGEMENTS["two rows"]
    held = 0
    for seed in range(20):
        for fields in by_sample(batch, noise(CONFIG, batch, seed)).values():
            free_t, given_t = fields["group_t"]
            assert 0 < free_t <= 1 and 0 <= given_t <= min(free_t, CONFIG.ceilings.max_noise)
            assert np.array_equal(fields["tau"], fields["group_t"][fields["group"]])
            tau = fields["tau"][:, None].astype(np.float64)
            expected = (1 - tau) * fields["x0"] + tau * fields["eps"]
            np.testing.assert_allclose(fields["tokens"], expected, atol=1e-6)  # float32
            # All tokens of a frame are given, or none; and something is left to make.
            frames = [set(fields["group"][fields["frame"] == f]) for f in set(fields["frame"])]
            assert all(len(groups) == 1 for groups in frames) and {0} in frames
            assert len(frames) > 1 or frames == [{0}]
            held += {1} in frames
    assert held > 20


def test_frames_have_levels_of_their_own_where_asked(noise):
    """Diffusion forcing, and beside it segments of one level, whose other groups stand there too."""
    batch = pack([[Clip(8 * r + j, 5, 2) for j in range(8)] for r in range(16)], 80, 8)
    noised = noise(FORCING, batch)
    own = 0
    for fields in by_sample(batch, noised, 3).values():
        np.testing.assert_array_equal(fields["tau"], fields["group_t"][fields["group"]])
        if len(set(fields["group_t"].tolist())) == 3:
            own += 1
            np.testing.assert_array_equal(fields["group"], fields["frame"] % 3)
            assert fields["free"].all() and (fields["tau"] > 0).all()
        else:
            t, given, third = fields["group_t"]
            assert third == t and given <= t
            np.testing.assert_array_equal(fields["group"], ~fields["free"])
    # 128 draws of probability 0.4, within 4.5 standard deviations.
    assert abs(own - 51.2) < 4.5 * (128 * 0.4 * 0.6) ** 0.5


def test_independent_levels_are_distributed_as_times_are(noise):
    config = dataclasses.replace(
        CONFIG,
        time=TimeConfig("uniform"),
        ceilings=CeilingConfig.only(independent=1.0, levels=8),
    )
    batch = pack([[Clip(8 * r + j, 8, 1) for j in range(8)] for r in range(32)], 64, 8)
    levels = noise(config, batch).tau.reshape(-1, 8)
    # 2048 uniform numbers: Kolmogorov and Smirnov, as below; and frames are not correlated.
    sorted_levels = np.sort(levels.ravel())
    n = levels.size
    assert np.abs(sorted_levels - (np.arange(n) + 0.5) / n).max() < 2.23 / n**0.5
    correlation = np.corrcoef(levels.T) - np.eye(8)
    assert np.abs(correlation).max() < 4.5 / len(levels) ** 0.5


def test_noise_is_standard_normal(noise):
    batch = pack([[Clip(r, 4, 64)] for r in range(8)], 256, 1)
    eps = np.sort(noise(CONFIG, batch).eps.ravel().astype(np.float64))
    n = eps.size
    assert n == 8 * 256 * DIM
    distance = np.abs(ndtr(eps) - (np.arange(n) + 0.5) / n).max()
    # Kolmogorov and Smirnov: passed by chance less often than once in 10^4.
    assert distance < 2.23 / n**0.5
    # Neighbouring tokens and numbers are not correlated: within 4.5 standard deviations.
    field = noise(CONFIG, batch).eps
    for axis in range(3):
        product = field * np.roll(field, 1, axis)
        assert abs(product.mean()) < 4.5 / product.size**0.5


def test_captions_are_dropped_as_often_as_asked(noise):
    batch = pack([[Clip(64 * r + j, 1, 1) for j in range(64)] for r in range(64)], 64, 64)
    for rate in (0.0, 0.1):
        config = DiffusionConfig(caption_dropout=rate)
        dropped = noise(config, batch).dropped
        assert set(np.unique(dropped)) <= {0.0, 1.0}
        # 4096 draws, within 4.5 standard deviations.
        assert abs(dropped.mean() - rate) <= 4.5 * (rate * (1 - rate) / 4096) ** 0.5


def test_dropping_leaves_the_first_token_of_the_dropped(jit):
    ids = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 0, 0, 0]], np.int32)
    drop = jit(drop_captions)

    def dropped(*which):
        flags = np.zeros((2, 4), np.float32)
        for r, j in which:
            flags[r, j] = 1
        return np.asarray(drop(ids, flags)).tolist()

    assert dropped() == ids.tolist()
    assert dropped((0, 0)) == [[1, 0, 0, 2, 3, 3, 0, 0], ids[1].tolist()]
    assert dropped((0, 2), (1, 1)) == [[1, 1, 1, 2, 3, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]]
    # A caption of one token is empty already; an empty slot has none.
    assert dropped((0, 1), (1, 0), (0, 3)) == ids.tolist()


# --- the loss ---

HELD = dataclasses.replace(CONFIG, ceilings=CeilingConfig.only(first=1.0, noisy=0.0), min_t=0.2)


@pytest.fixture(scope="module")
def case(noise):
    """A batch whose first frames are given without noise, its noise, and some network's output."""
    batch = ARRANGEMENTS["two rows"]
    output = np.random.default_rng(9).normal(size=batch.tokens.shape).astype(np.float32)
    return batch, noise(HELD, batch), output


@pytest.fixture(scope="module")
def loss(jit):
    @functools.cache
    def compiled(prediction):
        config = dataclasses.replace(HELD, prediction=prediction)
        return jit(lambda output, noised, batch: token_loss(config, output, *noised.both, batch))

    return lambda prediction, *args: map(np.asarray, compiled(prediction)(*args))


def test_the_loss_of_a_velocity_by_hand(loss, case):
    batch, noised, output = case
    error, weight = loss("velocity", output, noised, batch)
    expected = np.square(output - (noised.eps - batch.tokens)).mean(-1)
    np.testing.assert_allclose(error, expected * weight, rtol=1e-5)  # float32


def test_the_loss_of_clean_patches_by_hand(loss, case):
    batch, noised, output = case
    error, weight = loss("x0", output, noised, batch)
    # Both velocities are (x_t - x0) / t, with t at least 0.2: x_t cancels.
    scale = np.maximum(noised.tau, 0.2)
    expected = np.square(output - batch.tokens).mean(-1) / scale**2
    # float32 differences of numbers up to 4 / 0.2.
    np.testing.assert_allclose(error, expected * weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_weights_are_those_of_tokens_to_make(loss, case, prediction):
    batch, noised, output = case
    error, weight = loss(prediction, output, noised, batch)
    made = (batch.segment_ids != PAD) & (noised.tau > 0)
    assert weight.dtype == np.float32 and np.array_equal(weight, made.astype(np.float32))
    assert (error[made] > 0).all() and not error[~made].any()
    # The case holds all three: padding, given frames and frames to make.
    assert (batch.segment_ids == PAD).any()
    assert ((batch.segment_ids != PAD) & (noised.tau == 0)).sum() == 2 + 3 + 2 + 1
    assert made.sum() == 4 + 4 + 3 + 6 + 2


def test_what_is_given_with_noise_has_no_loss(noise, loss):
    config = dataclasses.replace(
        HELD, ceilings=CeilingConfig.only(first=1.0, noisy=1.0, max_noise=1.0)
    )
    batch = ARRANGEMENTS["two rows"]
    noised = noise(config, batch)
    output = np.random.default_rng(9).normal(size=batch.tokens.shape).astype(np.float32)
    error, weight = loss("x0", output, noised, batch)
    frames = np.concatenate([[c.frames] * c.frames * c.per_frame for c in CLIPS])
    held = (batch.frame_ids == 0)[batch.segment_ids != PAD] & (frames > 1)
    tau = noised.tau[batch.segment_ids != PAD]
    assert held.sum() == 2 + 3 + 2 + 1 and (tau[held] > 0).all()
    np.testing.assert_array_equal(weight[batch.segment_ids != PAD], ~held)
    assert not error[batch.segment_ids != PAD][held].any()


def test_a_perfect_prediction_has_no_loss(loss, case):
    batch, noised, _ = case
    assert not next(loss("velocity", noised.eps - batch.tokens, noised, batch)).any()
    assert not next(loss("x0", batch.tokens, noised, batch)).any()


def test_clean_patches_and_velocities_say_the_same(loss, case):
    batch, noised, velocity = case
    x0 = noised.tokens - noised.tau[..., None] * velocity
    ours, same = (
        next(loss("x0", x0, noised, batch)),
        next(loss("velocity", velocity, noised, batch)),
    )
    far = noised.tau >= HELD.min_t
    assert far.sum() > 5
    np.testing.assert_allclose(ours[far], same[far], rtol=1e-4)  # float32, divided by 0.2


def test_a_predicted_velocity_is_the_output_or_leads_to_it(case):
    _, noised, output = case
    xt, tau = jnp.asarray(noised.tokens), jnp.asarray(noised.tau)
    same = predicted_velocity(HELD, jnp.asarray(output), xt, tau)
    assert np.array_equal(same, output)
    config = dataclasses.replace(HELD, prediction="x0")
    velocity = np.asarray(predicted_velocity(config, jnp.asarray(output), xt, tau))
    # One step of length tau ends at the predicted patches, however small tau is: float32.
    ends = noised.tokens - noised.tau[..., None] * velocity
    moving = noised.tau > 0
    np.testing.assert_allclose(ends[moving], output[moving], atol=1e-5)
    low = np.full_like(noised.tau, 1e-3)
    velocity = np.asarray(predicted_velocity(config, jnp.asarray(output), xt, jnp.asarray(low)))
    np.testing.assert_allclose(noised.tokens - 1e-3 * velocity, output, atol=1e-5)
    # What is held stays finite, and is given its bound by the caller if there is one.
    held = predicted_velocity(config, jnp.asarray(output), xt, jnp.asarray(0 * low), 0.5)
    np.testing.assert_allclose(held, 2 * (noised.tokens - output), rtol=1e-6)
    assert np.isfinite(predicted_velocity(config, jnp.asarray(output), xt, 0 * tau)).all()


# --- weights by noise level ---

CHAIN = PathConfig("ddpm")
OF_CHAIN = functools.partial(
    DiffusionConfig, time=TimeConfig("uniform"), path=CHAIN, loss="prediction"
)


def snr_of(index):
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[index]
    return kept / (1 - kept)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_published_weight_of_each_prediction(gamma):
    """Hang et al. 2023, section 3.4: of x0, eps and v."""
    index = np.array([[0, 5, 50, 200, 400, 700, 999]])
    tau, snr = jnp.asarray((index + 1) / 1000, jnp.float32), snr_of(index)
    least = np.minimum(snr, gamma)
    for prediction, wanted in (("x0", least), ("eps", least / snr), ("v", least / (snr + 1))):
        config = OF_CHAIN(prediction, weighting="min_snr", min_snr_gamma=gamma)
        # alpha and sigma of float32, squared.
        np.testing.assert_allclose(token_weight(config, tau), wanted, rtol=2e-5, err_msg=prediction)


def test_other_weights_by_hand():
    index = np.array([[0, 50, 400, 999]])
    tau, snr = jnp.asarray((index + 1) / 1000, jnp.float32), snr_of(index)
    weights = {
        ("snr", "x0"): snr,
        ("snr", "eps"): 1 + 0 * snr,
        ("snr", "v"): snr / (snr + 1),
        ("truncated_snr", "x0"): np.maximum(snr, 1),
        ("truncated_snr", "eps"): np.maximum(1, 1 / snr),
        ("truncated_snr", "v"): np.maximum(snr, 1) / (snr + 1),
        ("none", "eps"): 1 + 0 * snr,
    }
    for (weighting, prediction), wanted in weights.items():
        found = token_weight(OF_CHAIN(prediction, weighting=weighting), tau)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, err_msg=f"{weighting} {prediction}")


def test_weights_of_a_flow_are_of_the_error_that_its_velocity_makes_in_x0():
    tau = jnp.array([[0.1, 0.3, 0.5, 0.9, 1.0]])
    snr = ((1 - tau) / tau) ** 2
    for prediction in ("velocity", "x0", "v"):
        config = DiffusionConfig(prediction, weighting="min_snr")
        # (x_t - x0) / t: the squared error of x0 over t^2.
        wanted = jnp.minimum(snr, 5) * tau**2
        np.testing.assert_allclose(token_weight(config, tau), wanted, rtol=1e-5)
    config = DiffusionConfig("x0", loss="prediction", weighting="min_snr")
    np.testing.assert_allclose(token_weight(config, tau), jnp.minimum(snr, 5), rtol=1e-5)


WEIGHTED = [
    OF_CHAIN("eps", weighting="min_snr"),
    OF_CHAIN("v", weighting="truncated_snr"),
    dataclasses.replace(OF_CHAIN("v"), path=PathConfig("ddpm", zero_terminal_snr=True)),
    DiffusionConfig("v", loss="prediction", weighting="min_snr"),
    DiffusionConfig("x0", path=PathConfig("gvp"), weighting="snr"),
    DiffusionConfig("velocity", path=PathConfig("vp")),
    DiffusionConfig("eps", path=PathConfig("vp"), weighting="min_snr"),
]


@pytest.mark.parametrize("config", WEIGHTED, ids=lambda c: f"{c.path.kind}-{c.prediction}")
def test_a_samples_loss_does_not_depend_on_its_neighbours(config, noise, jit):
    """Of every objective: the loss of a sample's tokens, wherever it is packed; and all is finite."""
    config = dataclasses.replace(config, ceilings=CONFIG.ceilings)
    found = []
    for name in ("two rows", "one row"):
        batch = ARRANGEMENTS[name]
        noised = noise(config, batch)
        output = np.sin(3 * noised.tokens)

        def total(output, noised, batch):
            error, weight = token_loss(config, output, *noised.both, batch)
            return error.sum(), (error, weight)

        gradient, (error, weight) = jit(jax.grad(total, has_aux=True))(output, noised, batch)
        assert np.isfinite(gradient).all() and np.isfinite(error).all()
        assert not np.asarray(gradient)[np.asarray(weight) == 0].any()
        cells = zip(*np.nonzero(batch.num_tokens), strict=True)
        found.append(
            {
                int(batch.sample_ids[r, j]): np.asarray(error)[r, batch.segment_ids[r] == j + 1]
                for r, j in cells
            }
        )
    for sample, error in found[0].items():
        # float32; v and its weights divide by what may be 0.03.
        np.testing.assert_allclose(error, found[1][sample], rtol=2e-4, atol=1e-6)
        assert (error >= 0).all()


def test_levels_of_a_chain_are_on_its_grid_and_uniform(noise):
    config = dataclasses.replace(OF_CHAIN("eps"), ceilings=CONFIG.ceilings)
    batch = pack([[Clip(64 * r + j, 2, 1) for j in range(64)] for r in range(64)], 128, 64)
    noised = noise(config, batch)
    index = noised.group_t.astype(np.float64) * 1000
    np.testing.assert_allclose(index, np.round(index), atol=1e-3)  # float32 of 1000
    free = np.round(index[:, ::2]).ravel()
    assert free.min() >= 1 and free.max() == 1000
    # 4096 draws in 10 bins of 409.6: within 4.5 standard deviations.
    counts = np.histogram(free, np.arange(0.5, 1001, 100))[0]
    assert (np.abs(counts - 409.6) < 4.5 * 409.6**0.5).all()
    kept = np.append(1.0, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    at = kept[np.round(noised.tau * 1000).astype(int)][..., None]
    wanted = np.sqrt(at) * batch.tokens + np.sqrt(1 - at) * noised.eps
    np.testing.assert_allclose(noised.tokens, wanted, atol=1e-5)  # float32


@pytest.mark.parametrize("path", ["gvp", "vp"])
def test_the_velocity_loss_of_interpolants_by_hand(path, noise):
    config = DiffusionConfig("velocity", path=PathConfig(path), time=TimeConfig("uniform"))
    batch = ARRANGEMENTS["two rows"]
    noised = noise(config, batch)
    t = noised.tau.astype(np.float64)[..., None]
    if path == "gvp":
        turn = np.pi / 2
        velocity = turn * (np.cos(turn * t) * noised.eps - np.sin(turn * t) * batch.tokens)
    else:
        alpha = np.exp(-0.25 * 19.9 * t**2 - 0.05 * t)
        falls = -alpha * (0.5 * 19.9 * t + 0.05)
        with np.errstate(divide="ignore", invalid="ignore"):
            rises = -alpha * falls / np.sqrt(1 - alpha**2)
            velocity = falls * batch.tokens + rises * noised.eps
    given = jax.tree.map(jnp.asarray, (0 * batch.tokens, *noised.both, batch))
    error, weight = token_loss(config, *given)
    made = np.asarray(weight) > 0
    wanted = np.square(velocity).mean(-1)[made]
    np.testing.assert_allclose(np.asarray(error)[made], wanted, rtol=1e-4)  # float32


# --- types and errors ---


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_no_dtype_is_promoted_silently(prediction):
    config, batch = dataclasses.replace(CONFIG, prediction=prediction), ARRANGEMENTS["two rows"]

    def everything(key, batch):
        noised = Noised(*noise_batch(config, key, batch))
        return noised, token_loss(config, noised.eps, *noised.both, batch)

    with jax.numpy_dtype_promotion("strict"):
        noised, (error, weight) = jax.eval_shape(everything, jax.random.key(0), batch)
    assert noised.group_ids.dtype == jnp.int32
    floats = (noised.tokens, noised.eps, noised.tau, noised.group_t, noised.dropped, error, weight)
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_a_wrong_shape_is_caught():
    batch = ARRANGEMENTS["two rows"]
    noised = jax.eval_shape(
        lambda key, batch: Noised(*noise_batch(CONFIG, key, batch)), jax.random.key(0), batch
    )
    trace = functools.partial(jax.eval_shape, functools.partial(token_loss, CONFIG))
    trace(noised.eps, *noised.both, batch)
    with pytest.raises(TypeCheckError, match="parameter 'output'"):
        trace(jax.ShapeDtypeStruct((2, 20), jnp.float32), *noised.both, batch)
    with pytest.raises(TypeCheckError, match="parameter 'dropped'"):
        jax.eval_shape(
            drop_captions, batch.text_segment_ids, jax.ShapeDtypeStruct((1, 4), jnp.float32)
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"caption_dropout": 1.0}, "caption_dropout is 1.0"),
        ({"caption_dropout": -0.1}, "caption_dropout is -0.1"),
        ({"min_t": 0.0}, "min_t is 0.0"),
        ({"min_t": 1.0}, "min_t is 1.0"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma is 0.0"),
        ({"path": CHAIN}, "prediction is 'velocity', which the discrete path.kind 'ddpm' does not"),
        ({"path": CHAIN, "prediction": "eps"}, "loss is 'velocity'.*make it 'prediction'"),
        (
            {"path": CHAIN, "prediction": "eps", "loss": "prediction"},
            "distribution is 'logit_normal', and path.kind 'ddpm' draws its indices uniformly",
        ),
        ({"prediction": "eps"}, "'eps' says nothing of x0.*predict 'v' or 'x0' or 'velocity'"),
        (
            {
                "path": PathConfig("ddpm", zero_terminal_snr=True),
                "prediction": "eps",
                "loss": "prediction",
                "time": TimeConfig("uniform"),
            },
            "'eps' says nothing of x0.*zero_terminal_snr True",
        ),
        ({"variance": "learned_range"}, "'learned_range' bounds the steps of a discrete chain"),
    ],
)
def test_nonsense_objectives_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**fields)
