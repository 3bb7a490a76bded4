"""The noise levels that solvers visit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import PathConfig, levels_of, sigma_schedule
from dit_jax.diffusion.paths import alphas_cumprod, level, time_of

CHAIN, STRAIGHT, VP = PathConfig("ddpm"), PathConfig(), PathConfig("vp")


@pytest.mark.parametrize("shift", [0.3, 1.0, 1.5, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_linear_levels_fall_from_one_to_zero(steps, shift):
    sigmas = sigma_schedule(steps, shift)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == np.float32
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
    assert (np.diff(sigmas) < 0).all()
    t = np.linspace(1, 0, steps + 1)
    np.testing.assert_allclose(sigmas, shift * t / (1 + (shift - 1) * t), rtol=1e-6)  # float32
    for path in (STRAIGHT, VP, CHAIN):
        assert np.array_equal(levels_of(path, "linear", steps, shift), sigmas)


def test_linear_levels_by_hand():
    assert sigma_schedule(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sigma_schedule(2, 3.0).tolist() == [1.0, 0.75, 0.0]
    # A shorter last step, as SiT's: 250 levels down to it, and 0.
    found = levels_of(STRAIGHT, "linear", 250, last=0.04)
    np.testing.assert_allclose(found, np.append(np.linspace(1, 0.04, 250), 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "steps", "indices"),
    [
        ("trailing", 4, [999, 749, 499, 249]),
        ("trailing", 3, [999, 666, 332]),
        ("leading", 4, [750, 500, 250, 0]),
        ("leading", 3, [666, 333, 0]),
        ("linspace", 4, [999, 666, 333, 0]),
        ("linspace", 1, [999]),
        ("trailing", 1000, list(range(999, -1, -1))),
    ],
)
def test_indices_of_the_chain_by_hand(spacing, steps, indices):
    levels = levels_of(CHAIN, spacing, steps)
    assert levels.dtype == np.float32 and levels[-1] == 0
    np.testing.assert_allclose(levels[:-1] * 1000 - 1, indices, atol=1e-4)  # float32 of 1000


def test_linspace_is_how_the_code_of_dit_respaces():
    """250 of 1000: one index after another, a fraction at a time (Nichol & Dhariwal 2021)."""
    stride, at, taken = 999 / 249, 0.0, []
    for _ in range(250):
        taken.append(round(at))
        at += stride
    levels = levels_of(CHAIN, "linspace", 250)
    assert np.round(levels[:-1] * 1000 - 1).astype(int).tolist() == taken[::-1]


@pytest.mark.parametrize("path", [CHAIN, VP], ids=lambda path: path.kind)
def test_karras_levels_are_even_in_the_seventh_root_of_the_ratio(path):
    levels = levels_of(path, "karras", 9).astype(np.float64)
    assert levels[0] == 1 and levels[-1] == 0 and (np.diff(levels) < 0).all()
    if path.discrete:
        kept = alphas_cumprod(path)
        ratios = np.sqrt((1 - kept) / kept)
        index = levels[:-1] * 1000 - 1
        found = np.exp(np.interp(index, np.arange(1000), np.log(ratios)))
        assert abs(index[-1]) < 1e-4
    else:
        log_alpha = -0.25 * levels[:-1] ** 2 * 19.9 - 0.5 * levels[:-1] * 0.1
        found = np.sqrt(np.expm1(-2 * log_alpha))
        np.testing.assert_allclose(levels[-2], 1e-3, rtol=1e-6)
    steps = np.diff(found ** (1 / 7))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)  # levels are float32
    assert levels_of(path, "karras", 1).tolist() == [1, 0]


@pytest.mark.parametrize(
    "path",
    [STRAIGHT, VP, PathConfig("gvp"), CHAIN, PathConfig("ddpm", zero_terminal_snr=True)],
    ids=["straight", "vp", "gvp", "ddpm", "zero"],
)
def test_the_time_of_a_ratio_is_the_inverse_of_the_path(path):
    with jax.enable_x64(True):
        t = np.concatenate([[0, 2e-4, 0.9995], np.linspace(0.0013, 0.98, 50)])
        at = level(path, jnp.asarray(t))
        np.testing.assert_allclose(time_of(path, np.asarray(at.sigma / at.alpha)), t, atol=1e-9)
    if path.ends_in_noise:
        np.testing.assert_allclose(time_of(path, np.array([np.inf])), [1])


@pytest.mark.parametrize("steps", [0, -3])
def test_a_schedule_has_steps(steps):
    with pytest.raises(ValueError, match=f"{steps} solver steps: at least 1"):
        sigma_schedule(steps)
    with pytest.raises(ValueError, match=f"{steps} solver steps"):
        levels_of(CHAIN, "trailing", steps)


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        (STRAIGHT, ("trailing", 10), "'trailing' chooses indices of path.kind 'ddpm'"),
        (STRAIGHT, ("karras", 10), "'karras' divides by the signal left at t = 1"),
        (PathConfig("ddpm", zero_terminal_snr=True), ("karras", 10), "use 'linear', or 'trailing'"),
        (CHAIN, ("leading", 10, 2.0), "takes no shift"),
        (CHAIN, ("leading", 10, 1.0, 0.1), "no last_step"),
        (CHAIN, ("linspace", 1001), "1001 solver steps of a chain of 1000"),
        (STRAIGHT, ("linear", 1, 1.0, 0.1), "1 solver step goes from 1 to 0"),
    ],
)
def test_levels_that_a_path_does_not_have_are_refused(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        levels_of(path, *arguments)
