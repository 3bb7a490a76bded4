"""Every solver beside Diffusers' scheduler of the same name, step by step, on the same outputs.

The "network" is a fixed smooth function of x and of the step; both sides are given its outputs at their
own x, so that every later step would show a difference of an earlier one. Diffusers' tables of alphas
are replaced by ours in float64 (they are compared in test_paths), and its float32 casts undone as
far as it lets: what is left is its levels, which it keeps in float32.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import DiffusionConfig, PathConfig, TimeConfig
from dit_jax.diffusion.objective import estimate
from dit_jax.diffusion.paths import alphas_cumprod, betas
from dit_jax.diffusion.solvers import SolverConfig, noise_levels, start_history, step
from tests.optional import optional

torch, diffusers = optional("torch"), optional("diffusers")
if torch is None or diffusers is None:
    pytest.skip("no second implementation", allow_module_level=True)

# Of how the other implementation uses NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (1, 3, 8)
CHAINS = {
    "linear": PathConfig("ddpm"),
    "scaled_linear": PathConfig("ddpm", betas="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": PathConfig("ddpm", betas="cosine"),
}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network(x: np.ndarray, step: int, outputs: int = 1) -> np.ndarray:
    """Something smooth that depends on every number of x and on the step."""
    shifted = np.roll(x, 1, axis=-1)
    mean = 0.6 * np.tanh(x + 0.1 * step) + 0.3 * np.cos(2 * shifted - 0.2 * step)
    return np.concatenate([mean, np.sin(x + step)], -1) if outputs == 2 else mean


def initial() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE)


def noise_of(step: int) -> np.ndarray:
    return np.random.default_rng(100 + step).normal(size=SHAPE)


def objective(path, prediction, variance="fixed_small"):
    if not path.discrete:
        return DiffusionConfig(prediction)
    time = TimeConfig("uniform")
    return DiffusionConfig(prediction, time, path=path, loss="prediction", variance=variance)


def ours(solver, config, levels, outputs=1):
    """x after every step; heun's second evaluation counts as a step of the network's."""
    x, calls = jnp.asarray(initial()), []
    caps = jnp.ones(SHAPE[:2])
    solver = solver if isinstance(solver, SolverConfig) else SolverConfig(solver)

    def denoiser(x, t):
        output = jnp.asarray(network(np.asarray(x), len(calls), outputs))
        calls.append(t)
        fraction = output[..., SHAPE[-1] :] if outputs == 2 else None
        return estimate(config, output[..., : SHAPE[-1]], x, jnp.minimum(t, caps), fraction)

    levels = jnp.asarray(levels, jnp.float64)
    history, found = start_history(solver.name, x, levels[0]), []
    for i, (t, t_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        with jax.disable_jit(solver.name == "heun"):  # its second evaluation is in a branch
            noise = functools.partial(lambda i: jnp.asarray(noise_of(i)), i)
            x, history = step(solver, config.path, caps, denoiser, x, history, t, t_next, noise)
        found.append(np.asarray(x))
    return np.stack(found)


def scheduler(kind, path, prediction, **options):
    """Diffusers' scheduler on our chain, in float64 where it has a choice."""
    given = dict(
        num_train_timesteps=path.timesteps,
        trained_betas=betas(path),
        prediction_type=PREDICTIONS[prediction],
        **options,
    )
    if kind in ("DDPMScheduler", "DDIMScheduler"):
        given["clip_sample"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(diffusers.schedulers, kind)(**given)
    made.alphas_cumprod = torch.tensor(alphas_cumprod(path), dtype=torch.float64)
    made.one = made.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return made


def theirs(made, x, evaluations=1, scale=None, outputs=1, **given):
    """x after every step of a scheduler; ``scale(i)`` is what x is divided by in its own variable."""
    found, x = [], torch.tensor(x)
    for call, t in enumerate(made.timesteps):
        seen = made.scale_model_input(x, t) if scale is not None else x
        output = network(seen.numpy().astype(np.float64), call, outputs)
        if outputs == 2:
            output = np.moveaxis(output, -1, 1)  # torch's channels come second
        arguments = {name: value(call) for name, value in given.items()}
        if outputs == 2:
            moved = x.movedim(-1, 1)
            x = made.step(torch.tensor(output), t, moved, **arguments).prev_sample.movedim(1, -1)
        else:
            x = made.step(torch.tensor(output), t, x, **arguments).prev_sample
        if scale is None:
            found.append(x.numpy())
        else:
            # Divided by sqrt(1 + sigma^2), as for the network: to the variable of unit variance.
            found.append((x / (1 + made.sigmas[made.step_index].double() ** 2) ** 0.5).numpy())
    return np.stack(found)


def corrected(there):
    """Of every step the second half; the last has but one."""
    return np.concatenate([there[1:-1:2], there[-1:]])


def assert_alike(here, there):
    assert here.shape == there.shape and len(here) > 4
    assert np.abs(there[-1] - there[0]).max() > 0.1
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        # A network that is no denoiser leads x as far as 90 where little signal is left, and what
        # Diffusers keeps in float32 is as precise as the largest of its numbers.
        atol = TOLERANCE * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=f"step {i} of {len(here)}")


@pytest.fixture
def drawn(monkeypatch):
    """The ancestral scheduler draws its own noise: it is given ours."""
    from diffusers.schedulers import scheduling_ddpm

    count = iter(range(1000))

    def draw(shape, **_):
        made = torch.tensor(noise_of(next(count)))
        return made if made.shape == shape else made.movedim(-1, 1)[:, : shape[1]]

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", draw)


@pytest.mark.parametrize(
    ("variance", "prediction", "spacing", "steps"),
    [
        ("fixed_small", "eps", "trailing", 10),
        ("fixed_small", "v", "linspace", 7),
        ("fixed_large", "eps", "linspace", 7),
        ("learned_range", "eps", "linspace", 7),
    ],
)
def test_ddpm(drawn, prediction, spacing, steps, variance):
    path, outputs = CHAINS["linear"], 2 if variance == "learned_range" else 1
    made = scheduler("DDPMScheduler", path, prediction, variance_type=variance)
    made.register_to_config(timestep_spacing=spacing)
    made.set_timesteps(steps)
    levels = noise_levels(path, spacing, steps)
    assert np.array_equal(np.round(levels[:-1] * 1000) - 1, made.timesteps.numpy())
    config = objective(path, prediction, variance)
    here = ours(SolverConfig("ddpm", variance), config, levels, outputs)
    there = theirs(made, initial(), outputs=outputs)
    assert_alike(here, there)


@pytest.mark.parametrize(
    ("chain", "prediction", "eta"),
    [("linear", "eps", 1.0), ("scaled_linear", "v", 0.0), ("cosine", "v", 1.0)],
)
def test_ddim(chain, prediction, eta):
    path = CHAINS[chain]
    made = scheduler("DDIMScheduler", path, prediction, timestep_spacing="trailing")
    made.set_timesteps(10)
    levels = noise_levels(path, "trailing", 10)
    here = ours(SolverConfig("ddim", eta=eta), objective(path, prediction), levels)
    noise = {"eta": lambda _: eta, "variance_noise": lambda i: torch.tensor(noise_of(i))}
    assert_alike(here, theirs(made, initial(), **(noise if eta else {})))


def test_ddim_from_no_signal_at_all():
    path = PathConfig("ddpm", betas="scaled_linear", zero_terminal_snr=True)
    made = scheduler("DDIMScheduler", path, "v", timestep_spacing="trailing")
    made.set_timesteps(10)
    levels = noise_levels(path, "trailing", 10)
    for name in ("ddim", "euler"):  # of which the second is the first, on the discrete path
        assert_alike(ours(name, objective(path, "v"), levels), theirs(made, initial()))


MULTISTEP = {"dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}


@pytest.mark.parametrize(
    ("chain", "spacing", "prediction"),
    [("linear", "trailing", "eps"), ("scaled_linear", "theirs", "x0")],
)
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep(name, chain, spacing, prediction):
    path, steps = CHAINS[chain], 10
    given = {"timestep_spacing": "trailing"} if spacing == "trailing" else {}
    made = scheduler(MULTISTEP[name], path, prediction, **given)
    made.set_timesteps(steps)
    if spacing == "theirs":
        # Their linspace has one point more, at index 0, which it leaves out.
        levels = np.append((made.timesteps.numpy() + 1) / path.timesteps, 0.0)
    else:
        levels = noise_levels(path, spacing, steps)
    here = ours(name, objective(path, prediction), levels)
    assert_alike(here, theirs(made, initial()))


@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_on_a_flow(name):
    given = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    made = getattr(diffusers.schedulers, MULTISTEP[name])(**given)
    made.set_timesteps(10)
    levels = made.sigmas.double().numpy()
    assert levels[0] > 0.99 and levels[-1] == 0
    assert_alike(ours(name, objective(PathConfig(), "velocity"), levels), theirs(made, initial()))


@pytest.mark.parametrize(("name", "prediction"), [("euler", "eps"), ("heun", "v")])
def test_euler_and_heun_in_the_ratio_of_noise_to_signal(name, prediction):
    path = CHAINS["scaled_linear"]
    kind = {"euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler"}[name]
    made = scheduler(kind, path, prediction, timestep_spacing="trailing")
    made.set_timesteps(10)
    levels = noise_levels(path, "trailing", 10)
    here = ours(name, objective(path, prediction), levels)
    # Their x is x / alpha.
    first = float(made.sigmas[0])
    there = theirs(made, initial() * (1 + first**2) ** 0.5, scale=True)
    assert_alike(here, corrected(there) if name == "heun" else there)


@pytest.mark.parametrize("shift", [None, 3.0])
def test_flow_match_euler(shift):
    made = diffusers.schedulers.FlowMatchEulerDiscreteScheduler(shift=shift or 1.0)
    if shift is None:  # with a shorter last step
        made.set_timesteps(10)
        levels = noise_levels(PathConfig(), "linear", 10, last=1e-3)
    else:
        made.set_timesteps(sigmas=list(np.linspace(1, 0, 11)[:-1]))
        levels = noise_levels(PathConfig(), "linear", 10, shift)
    np.testing.assert_allclose(made.sigmas.numpy(), levels, rtol=1e-6, atol=1e-7)  # float32
    here = ours("euler", objective(PathConfig(), "velocity"), levels)
    assert_alike(here, theirs(made, initial()))


def test_flow_match_heun():
    made = diffusers.schedulers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    made.set_timesteps(10)
    # Each level but the first and the last stands twice; its own least level is shifted twice.
    levels = np.append(made.sigmas[::2].double().numpy(), 0.0)
    here = ours("heun", objective(PathConfig(), "velocity"), levels)
    assert_alike(here, corrected(theirs(made, initial())))
