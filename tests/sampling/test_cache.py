"""Feature caching: which steps run the blocks, what others make, and that no clip minds its batch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.diffusion import DiffusionConfig, solvers
from dit_jax.model import ByteEncoderConfig, DiTConfig, ModelConfig, PatchConfig, TextToVideo
from dit_jax.model.dit import denoise_and_keep, first_modulation, time_features
from dit_jax.parallel import MeshConfig, global_batch, make_mesh
from dit_jax.sampling import Generator, Request, SamplingConfig, make_inputs
from dit_jax.training.video_task import init_params, make_model
from dit_jax.types import DenoiserInputs
from tests.denoiser import struct

pytestmark = pytest.mark.usefixtures("quickly")
MODEL = ModelConfig(
    dit=DiTConfig(width=32, depth=2, heads=2, pooled_text=True),
    patch=PatchConfig(t=1, h=4, w=4, channels=3, reference_fps=8.0),
    text=ByteEncoderConfig(width=16, depth=1, heads=2, max_bytes=15),
)
SAMPLING = SamplingConfig(steps=6, cfg_scale=2.0, fps=8.0)
REQUESTS = [Request("a red circle", 2, 8, 8, 8.0, 1), Request("a cross", 3, 8, 8, 8.0, 2)]


@functools.cache
def model_on(fsdp: int = 1, **dit: Any) -> tuple[Any, TextToVideo, Any]:
    """A mesh, the model on it, and parameters none of which is zero."""
    mesh = make_mesh(MeshConfig(1, fsdp, 1, 1), jax.devices()[:fsdp])
    config = dataclasses.replace(MODEL, dit=dataclasses.replace(MODEL.dit, **dit))
    model = make_model(config, mesh)
    shapes = nn.unbox(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return mesh, model, jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), shapes)


@functools.cache
def generator(fsdp: int, **fields: Any) -> Generator:
    model = model_on(fsdp)[1]
    return Generator(model, DiffusionConfig(), dataclasses.replace(SAMPLING, **fields))


def placed(requests: Any = REQUESTS, fsdp: int = 1) -> Any:
    """Their condition on a mesh."""
    rows = tuple(range(len(requests)))
    return global_batch(model_on(fsdp)[0], make_inputs(requests, MODEL, 12), rows, len(rows))


def made(requests: Any = REQUESTS, fsdp: int = 1, **fields: Any) -> np.ndarray:
    params = model_on(fsdp)[2]
    return np.asarray(generator(fsdp, **fields)(params, placed(requests, fsdp)))


def plan(**fields: Any) -> list[bool]:
    one = generator(1, **fields)
    return one.plan(model_on()[2], one.levels(12))


@functools.cache
def between() -> float:
    """A threshold that skips some steps and not others, and that no sum of changes is near."""
    one = generator(1, cache_threshold=1.0)
    changes = np.asarray(one.changes(model_on()[2], one.levels(12)))[:-1]
    return float(1.5 * changes.mean())


# --- the plan ---


def test_blocks_run_where_the_changes_since_they_ran_reach_the_threshold():
    def planned(threshold: float, steps: int = 8, **fields: Any) -> list[bool]:
        config = dataclasses.replace(SAMPLING, cache_threshold=threshold, **fields)
        one = Generator(model_on()[1], DiffusionConfig(), config)
        one.changes = lambda *_: [0.1, 0.05, 0.1, 0.3, 0.01, 0.01, 0.01, 9.0][:steps]
        return one.plan({}, np.linspace(1, 0, steps + 1))

    assert planned(0.15) == [True, False, True, False, True, False, False, True]
    assert planned(1e-6) == [True] * 8 and sum(planned(1e6)) == 2 and planned(0.1, 1) == [True]
    # Levels 1 to 1/8: guidance is on from the third to the sixth.
    guided = planned(1e6, cfg_interval=(0.3, 0.8))
    assert guided == [True, False, True, False, False, False, True, True]


@pytest.mark.parametrize("dit", [{"modulation": "shared"}, {"window": 4}], ids=["shared", "window"])
def test_changes_are_of_what_the_first_block_is_modulated_with(dit: dict[str, Any]):
    _, model, params = model_on(**dit)
    levels = np.float32([0.9, 0.4, 0.1])
    of_dit, config = params["params"]["dit"], model.config.dit
    features = np.asarray(time_features(jnp.asarray(levels)[None]))[0]

    def linear(layer: Any, x: np.ndarray) -> np.ndarray:
        return x @ layer["kernel"] + layer["bias"]

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    condition = linear(of_dit["time"]["out"], silu(linear(of_dit["time"]["up"], features)))
    blocks = of_dit["blocks"]
    blocks = jax.tree.map(lambda leaf: leaf[0], blocks["layer_0"] if "window" in dit else blocks)
    whole = (of_dit if "modulation" in dit else blocks)["modulation"]["linear"]
    made = linear(whole, silu(condition)) + blocks.get("modulation_table", 0)
    found = np.concatenate([made[:, :32], 1 + made[:, 32:64]], 1)
    got = first_modulation(config, of_dit, jnp.asarray(levels))
    np.testing.assert_allclose(got, found, rtol=1e-4, atol=1e-4)  # float32
    change = abs(found[1:] - found[:-1]).mean(1) / abs(found[:-1]).mean(1)
    got = Generator(model, DiffusionConfig(), SAMPLING).changes(params, levels)
    np.testing.assert_allclose(got, change, rtol=1e-4)


# --- what is made ---


def test_reusing_a_residual_at_the_same_input_gives_the_same_output():
    _, model, params = model_on()
    rng = np.random.default_rng(1)
    condition = make_inputs(REQUESTS, MODEL)
    x = rng.normal(size=condition.tokens.shape).astype(np.float32)
    text = rng.normal(size=(2, MODEL.text.max_tokens, 16)).astype(np.float32)

    def given(x: np.ndarray, level: float) -> DenoiserInputs:
        return struct(
            tokens=x,
            positions=condition.positions,
            segment_ids=condition.segment_ids,
            group_ids=condition.group_ids,
            group_t=np.full((2, 1), level, np.float32),
            text=text,
            text_segment_ids=condition.text_segment_ids,
        )

    output, residual = jax.jit(functools.partial(denoise_and_keep, model))(params, given(x, 0.6))
    denoise = jax.jit(functools.partial(model.apply, encoded=True))
    np.testing.assert_allclose(denoise(params, given(x, 0.6)), output, atol=1e-5)
    again = denoise(params, given(x, 0.6), residual=residual)
    np.testing.assert_allclose(again, output, atol=1e-5)
    # The last layer is told the new level, and the new input is what the residual is added to.
    other = denoise(params, given(x + 1, 0.2), residual=residual)
    assert np.abs(other - output).max() > 0.1


def test_the_planned_steps_run_the_blocks_and_two_are_compiled(monkeypatch: pytest.MonkeyPatch):
    traced, kept, traced_step = [], [], solvers.step
    fields: Any = {"cache_threshold": between(), "solver": "unipc"}  # which has a history
    one, runs = generator(1, **fields), plan(**fields)
    step = one.step
    assert 2 < sum(runs) < 6

    def counted(*given: Any, keep: bool = False, **more: Any) -> Any:
        kept.append(keep)
        return step(*given, keep=keep, **more)

    monkeypatch.setattr(one, "step", counted)
    monkeypatch.setattr(solvers, "step", lambda *given: (traced.append(0), traced_step(*given))[1])
    clips = made(**fields)
    assert kept == runs
    # A clip does not depend on its neighbours.
    other = made([REQUESTS[0], Request("", 1, 8, 8, 8.0, 9)], **fields)
    assert len(traced) == 2
    np.testing.assert_array_equal(clips[0], other[0])
    assert np.abs(clips[1] - other[1]).max() > 0.1


def test_a_mesh_makes_what_one_device_makes_and_a_tiny_threshold_reuses_nothing():
    one, many = (made(fsdp=fsdp, cache_threshold=between()) for fsdp in (1, 2))
    np.testing.assert_allclose(many, one, atol=1e-4)  # sums in another order, six steps long
    assert plan() == plan(cache_threshold=1e-6) == [True] * 6
    # The same sums, compiled beside one more output.
    whole = made()
    np.testing.assert_allclose(made(cache_threshold=1e-6), whole, atol=2e-5)
    assert 1e-3 < np.abs(one - whole).max()
