"""Adapters are trained alone, beside a frozen base that is kept in less, and go on bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dit_jax import train
from dit_jax.config import VideoRun, read_config
from dit_jax.files import InputError
from dit_jax.lora import LoraConfig, LoraRun
from dit_jax.lora.adapters import keep_base, merge
from dit_jax.model.flops import traced_flops
from dit_jax.parallel import MeshConfig, make_mesh
from tests.lora.adapted import Steps, adapters_of, base_config, random_adapter, save_base
from tests.runs import arrays, assert_same_run, steps

LAST = 4


def one_mesh() -> Any:
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> VideoRun:
    return save_base(base_config(tmp_path_factory.mktemp("lora") / "base"))


@pytest.fixture(scope="module")
def alone(base: VideoRun) -> Iterator[Steps]:
    """A step on one device."""
    steps = Steps(adapters_of(base, Path(base.output).with_name("one")), one_mesh())
    yield steps
    steps.loader.close()


def output(steps: Steps, params: Any, batch: Any) -> float:
    """The loss of a batch, to all digits."""
    loss = jax.jit(steps.task.loss)
    return float(loss(params, steps.frozen, batch, jax.random.key(0), 0)[0])


def test_fresh_adapter_is_the_base_and_merged_is_unmerged(base: VideoRun, alone: Steps):
    batch, plain = alone.next(), base.build(one_mesh())
    loss = jax.jit(plain.loss)
    rest: Any = ({}, batch, jax.random.key(0), 0)
    expected = float(loss(alone.frozen, *rest)[0])
    fresh = alone.state.params
    assert output(alone, fresh, batch) == expected
    config = adapters_of(base, Path(base.output))
    adapter = random_adapter(config)
    leaves = jax.tree.map(np.asarray, fresh)
    for name, (a, b) in adapter.layers.items():
        node = leaves["params"]
        for part in name.split("/"):
            node = node[part]
        assert node["lora_a"].shape == a.shape and node["lora_b"].shape == b.shape
        node["lora_a"], node["lora_b"] = a, b
    unmerged = output(alone, leaves, batch)
    assert abs(unmerged - expected) > 0.01 * expected
    merged = merge(jax.tree.map(jnp.copy, alone.frozen), [adapter])
    assert float(loss(merged, *rest)[0]) == pytest.approx(unmerged, rel=1e-5)


def test_no_gradient_of_a_kernel_is_made(base: VideoRun, alone: Steps):
    batch = alone.next()
    plain = base.build(one_mesh())
    grad: Any = jax.grad(lambda p: plain.loss(p, {}, batch, jax.random.key(0), 0)[0])
    whole = traced_flops(jax.make_jaxpr(grad)(alone.frozen))
    jaxpr = jax.make_jaxpr(alone.step)(alone.state, batch, alone.frozen)
    # Of the three products of a linear layer two are left: its output and the gradient of its input.
    assert 0.5 * whole < traced_flops(jaxpr) < 0.8 * whole
    # Frozen weights are arguments: none is a constant of the program.
    assert len(jaxpr.jaxpr.invars) == len(jax.tree.leaves((alone.state, batch, alone.frozen)))
    largest = max(x.size for x in jax.tree.leaves(alone.frozen))
    assert max(np.size(one) for one in jaxpr.consts or [0]) < largest / 4


def test_sharded_is_one_device(base: VideoRun, alone: Steps):
    config = adapters_of(base, Path(base.output).with_name("eight"))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    eight = Steps(config, mesh)
    alone = Steps(config, one_mesh())
    whole = {
        path[-3:]: leaf.sharding.shard_shape(leaf.shape)
        for path, leaf in traverse_util.flatten_dict(eight.state.params).items()
    }
    assert whole["mlp", "up", "lora_a"] == (2, 16, 3) and whole["mlp", "up", "lora_b"] == (2, 3, 64)
    assert whole["mlp", "down", "lora_a"] == (2, 64, 3)
    np.testing.assert_allclose(eight.losses(3), alone.losses(3), rtol=1e-5)
    eight.loader.close()
    alone.loader.close()


@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 0.01), ("int8", 0.02), ("fp8", 0.06)])
def test_base_in_less_moves_the_loss_a_little(
    base: VideoRun, alone: Steps, kind: Any, bound: float
):
    config = adapters_of(base, Path(base.output).with_name("less"), base_dtype=kind)
    less, batch = Steps(config, one_mesh()), alone.next()
    expected = output(alone, alone.state.params, batch)
    assert output(less, less.state.params, batch) == pytest.approx(expected, rel=bound)

    def size(frozen: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(frozen["params"]["dit"]["blocks"]))

    # Modulation, a third of so small a model, stays in float32.
    assert size(less.frozen) < 0.7 * size(alone.frozen)
    of_kernel = less.frozen["params"]["dit"]["blocks"]["mlp"]["up"]["kernel"]
    assert of_kernel.dtype.itemsize == (2 if kind == "bfloat16" else 1)
    # What is loaded is what is kept of the float32 weights, but for one step of rounding on the way.
    kept = keep_base(alone.frozen, kind)["params"]["dit"]["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(
        np.asarray(kept, np.float32), np.asarray(of_kernel, np.float32), rtol=0.13, atol=1.01
    )
    first, last = less.losses(2)
    assert np.isfinite([first, last]).all()
    less.loader.close()


def test_run_is_resumed_bit_for_bit_and_keeps_adapters_alone(
    base: VideoRun, tmp_path: Path, one_device: None
):
    whole, again = tmp_path / "whole", tmp_path / "again"
    config = adapters_of(base, whole, dropout=0.2)
    train.train(config)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / str(LAST))
    train.train(dataclasses.replace(config, output=str(again), evaluators=()))
    assert steps(whole) == steps(again) == [2, LAST]
    assert_same_run(whole, again, [LAST])
    found = arrays(whole, LAST)
    parameters = [name for name in found if "'params'" in name]
    assert parameters and all("lora_" in name for name in parameters)
    assert max(x.size for x in found.values()) <= 2 * 3 * 128
    stored = read_config(whole / "config.json")
    assert isinstance(stored, LoraRun) and stored.base_step == 0 and stored.lora.dropout == 0.2


def test_dropout_is_of_training_alone(base: VideoRun):
    config = adapters_of(base, Path(base.output).with_name("drop"), dropout=0.5)
    steps = Steps(config, one_mesh())
    batch = steps.next()
    steps.losses(1)
    params = steps.state.params
    losses = {output(steps, params, batch) for _ in range(2)}
    assert len(losses) == 1  # The same key draws the same.
    (held_out,) = steps.task.evaluators
    a, b = (held_out.evaluate(params, steps.frozen, 1, Path()).scalars for _ in range(2))
    assert a == b
    steps.loader.close()


def test_what_cannot_be_adapted_is_refused(base: VideoRun, tmp_path: Path):
    def refused(match: str, **lora: Any) -> None:
        with pytest.raises(InputError, match=match):
            adapters_of(base, tmp_path, **lora).build(one_mesh())

    refused(r"lora.targets dit/blocks/attn.*layers are .*mlp/down", targets=("dit/blocks/attn*",))
    refused(r"lora.rank 33 .* at most 16", rank=33)
    refused(r"lora.ranks names nope", ranks={"nope": 2})
    with pytest.raises(InputError, match=r"model.dit.depth = 2, and the config 3"):
        config = adapters_of(base, tmp_path)
        dit = dataclasses.replace(config.model.dit, depth=3)
        model = dataclasses.replace(config.model, dit=dit)
        dataclasses.replace(config, model=model).with_hashes()
    # A base that holds adapters itself.
    own = adapters_of(base, tmp_path / "own")
    from tests.lora.adapted import save_adapter

    save_adapter(own, random_adapter(own))
    with pytest.raises(InputError, match="merge them first"):
        adapters_of(own, tmp_path / "nested")
    assert LoraConfig(rank=8).scale == 1 and LoraConfig(rank=8, alpha=4.0).scale == 0.5
