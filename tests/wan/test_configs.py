"""The configs of Wan, and what is known of their steps without weights."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dit_jax.config import VideoRun, load_config
from dit_jax.lora import LoraRun
from dit_jax.parallel import MeshConfig, make_mesh
from dit_jax.plan.abstract import train_step
from tests.runs import ROOT

# Parameters of the published models in billions, and of the adapters in millions.
CONFIGS = {
    "wan_lora": (1.419, 39.3),
    "wan_lora_prior": (1.419, 39.3),
    "wan_lora_5b": (5.000, 71.8),
    "wan_lora_14b": (14.288, 133.7),
    "wan_lora_a14b": (14.288, 133.7),
    "wan_finetune": (1.419, None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_step_is_known_without_the_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # Where no run is.
    config = load_config(str(ROOT / "configs" / f"{name}.py"), VideoRun)
    step = train_step(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    state, batch, frozen = step.arguments
    base, adapters = CONFIGS[name]
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(frozen)]
    if isinstance(config, LoraRun):
        assert sum(sizes) / 1e9 == pytest.approx(base, abs=1e-3)
        assert step.parameters / 1e6 == pytest.approx(adapters, abs=0.05)
        matrices = [x for x in jax.tree.leaves(frozen) if len(x.shape) > 2]
        assert {x.dtype for x in matrices} == {jnp.dtype(jnp.bfloat16)}
        # Adapters, their averages and two moments: all that is kept from step to step.
        assert step.state and sum(step.state.values()) == pytest.approx(16 * step.parameters, 0.01)
    else:
        assert not sizes and step.parameters / 1e9 == pytest.approx(base, abs=1e-3)
        # Float32 parameters, no averages, two moments in bfloat16.
        assert step.state and sum(step.state.values()) == pytest.approx(8 * step.parameters, 0.01)
    text = batch.text.shape
    assert text == (1, 8 * 512, 4096)
    assert jax.tree.leaves(state)
