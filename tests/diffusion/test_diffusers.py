"""Solvers beside Diffusers' schedulers, step by step, on the same outputs.

The "network" is a fixed smooth function of x and of the step; both sides are given its outputs at their
own x, so that every later step would show a difference of an earlier one. Diffusers' tables of alphas
are replaced by ours in float64 (they are compared in test_paths), and its float32 casts undone as
far as it lets: what is left is its levels, which it keeps in float32.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import DiffusionConfig, PathConfig, TimeConfig
from dit_jax.diffusion.objective import estimate
from dit_jax.diffusion.paths import alphas_cumprod, betas
from dit_jax.diffusion.solvers import SolverConfig, noise_levels, start_history, step

# Of how the other implementation uses NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS, SHAPE = 10, (1, 3, 8)
LINEAR, FLOW = PathConfig("ddpm"), PathConfig()
SCALED = PathConfig("ddpm", betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO = PathConfig("ddpm", betas="scaled_linear", zero_terminal_snr=True)
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
CLIP = {"clip_sample": False}
MULTISTEP = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.fixture(autouse=True)
def float64():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("diffusers", reason="no second implementation")
    with jax.enable_x64(True):
        yield


def network(x: np.ndarray, step: int) -> np.ndarray:
    """Something smooth that depends on every number of x and on the step."""
    return 0.6 * np.tanh(x + 0.1 * step) + 0.3 * np.cos(2 * np.roll(x, 1, axis=-1) - 0.2 * step)


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE)


def ours(solver, path, prediction, levels):
    """x after every step."""
    chain = {"time": TimeConfig("uniform"), "path": path, "loss": "prediction"}
    config = DiffusionConfig(prediction, **(chain if path.discrete else {}))
    caps = jnp.ones(SHAPE[:2])
    x, levels, found = jnp.asarray(normal(0)), jnp.asarray(levels, jnp.float64), []
    history = start_history(solver.name, x, levels[0])
    for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):

        def denoiser(x, t, i=i):
            output = jnp.asarray(network(np.asarray(x), i))
            return estimate(config, output, x, jnp.minimum(t, caps), None)

        def noise(i=i):
            return jnp.asarray(normal(100 + i))

        x, history = step(solver, path, caps, denoiser, x, history, t, t_next, noise)
        found.append(np.asarray(x))
    return np.stack(found)


def theirs(kind, solver, path, prediction, options, monkeypatch):
    """The same of a scheduler of Diffusers, and its levels."""
    import torch
    from diffusers import schedulers
    from diffusers.schedulers import scheduling_ddpm

    if path.discrete:
        options = {"timestep_spacing": "trailing", "trained_betas": betas(path)} | options
        options["prediction_type"] = PREDICTIONS[prediction]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(schedulers, kind)(**options)
    if path.discrete:
        scheduler.alphas_cumprod = torch.tensor(alphas_cumprod(path), dtype=torch.float64)
        scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(STEPS)
    # The ancestral scheduler draws noise of its own.
    noise = (torch.tensor(normal(100 + i)) for i in range(STEPS))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(noise))
    found, x = [], torch.tensor(normal(0))
    for i, t in enumerate(scheduler.timesteps):
        output = torch.tensor(network(x.numpy().astype(np.float64), i))
        eta = {"eta": 1.0, "variance_noise": next(noise)} if solver.eta else {}
        x = scheduler.step(output, t, x, **eta).prev_sample
        found.append(x.numpy())
    return np.stack(found), getattr(scheduler, "sigmas", None)


@pytest.mark.parametrize(
    ("solver", "path", "prediction", "kind", "options"),
    [
        (SolverConfig("ddpm"), LINEAR, "eps", "DDPMScheduler", CLIP),
        (SolverConfig("ddim", eta=1), LINEAR, "eps", "DDIMScheduler", CLIP),
        (SolverConfig("ddim"), ZERO, "v", "DDIMScheduler", CLIP),
        (SolverConfig("euler"), ZERO, "v", "DDIMScheduler", CLIP),  # On the chain it is ddim.
        (SolverConfig("dpmpp_2m"), LINEAR, "eps", "DPMSolverMultistepScheduler", {}),
        (SolverConfig("unipc"), SCALED, "x0", "UniPCMultistepScheduler", {}),
        (SolverConfig("dpmpp_2m"), FLOW, "velocity", "DPMSolverMultistepScheduler", MULTISTEP),
        (SolverConfig("unipc"), FLOW, "velocity", "UniPCMultistepScheduler", MULTISTEP),
        (SolverConfig("euler"), FLOW, "velocity", "FlowMatchEulerDiscreteScheduler", {}),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "kind", None)),
)
def test_every_step_is_that_of_diffusers(solver, path, prediction, kind, options, monkeypatch):
    there, sigmas = theirs(kind, solver, path, prediction, options, monkeypatch)
    levels = noise_levels(path, "trailing", STEPS) if path.discrete else sigmas.double().numpy()
    if kind.startswith("FlowMatch"):  # With a shorter last step; float32.
        np.testing.assert_allclose(
            levels, noise_levels(path, "linear", STEPS, last=1e-3), atol=1e-7
        )
    here = ours(solver, path, prediction, levels)
    assert np.abs(there[-1] - there[0]).max() > 0.1
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        # A network that is no denoiser leads x as far as 90 where little signal is left, and what
        # Diffusers keeps in float32 is as precise as the largest of its numbers.
        atol = 1e-5 * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=f"step {i}")
