"""Checkpoints: exact on any mesh, apart by item, kept by rule, and errors that name the remedy."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dit_jax.config import VideoRun, from_dict, to_dict
from dit_jax.train import MAY_DIFFER, MEANING, check_same, init_from
from dit_jax.training import CheckpointConfig, Checkpointer, TrainState, open_run
from tests.runs import changed

SPREAD = (1, 2, 2, 2)
DATA = {"0": {"next": 3, "parent": {"counter": 12}}, "1": {"next": 4, "parent": {"counter": 13}}}
CONFIG = dataclasses.replace(VideoRun(), seed=5, steps=77)


@pytest.fixture(scope="module")
def taken():
    """``taken(state)`` reuses a state's memory, as the train step does."""
    return jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)


@pytest.fixture(scope="module")
def saved(rig, taken, tmp_path_factory):
    """A run of eight devices, saved after a step, and its state on the host."""
    directory, one = tmp_path_factory.mktemp("run"), rig(*SPREAD)
    rng = np.random.default_rng(1)

    def moved(x):
        """Counters are one, and moments no zeros."""
        return x + (rng.normal(size=x.shape).astype(x.dtype) if x.ndim else np.ones_like(x))

    host = jax.tree.map(moved, jax.device_get(one.state()))
    host = dataclasses.replace(host, skipped=np.int32(0))
    state = jax.device_put(host, one.shardings)
    checkpointer = Checkpointer(directory, CheckpointConfig())
    checkpointer.save(state, DATA, to_dict(CONFIG), 1)
    # The state's memory is reused at once, as the training loop does, while it is being written.
    taken(state)
    checkpointer.wait()
    checkpointer.close()
    return directory, host


def copy_without(directory, run, *items):
    shutil.copytree(directory, run)
    for item in items:
        shutil.rmtree(run / "checkpoints" / "1" / item)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sizes", [SPREAD, (1, 1, 1, 1)], ids=str)
def test_restore_is_exact_on_any_number_of_devices(saved, rig, sizes):
    directory, expected = saved
    one = rig(*sizes)
    checkpointer = Checkpointer(directory, CheckpointConfig())
    assert checkpointer.latest() == 1
    state, data = checkpointer.restore(1, one.shapes, one.shardings)
    checkpointer.close()
    assert_equal(jax.device_get(state), expected)
    assert data == DATA
    assert (int(state.step), int(state.skipped), int(state.opt_state[1][0].count)) == (1, 0, 1)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(one.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        assert len(leaf.sharding.device_set) == np.prod(sizes)


def test_a_run_begins_with_the_average_of_another(saved, rig, taken, tmp_path):
    directory, host = saved
    # Weights alone, as a converted run has them, are enough.
    alone = Checkpointer(tmp_path, CheckpointConfig())
    alone.save_weights(jax.device_put(host.ema, rig(*SPREAD).shardings.ema), to_dict(CONFIG))
    alone.wait()
    alone.close()
    one = rig(1, 1, 1, 1)
    for path in (directory, tmp_path):
        fresh = one.state()
        opt_state = jax.device_get(fresh.opt_state)
        config = changed(CONFIG, {"checkpoint.initial": str(path)})
        state = init_from(config, fresh, one.shapes, one.shardings)
        assert_equal(jax.device_get(state.params), host.ema)
        assert_equal(jax.device_get(state.ema), host.ema)
        assert_equal(jax.device_get(state.opt_state), opt_state)
        assert int(state.step) == 0
        taken(state)  # Both are given up to the step: they must not be the same memory.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.dit.heads", 12),
        ("model.dit.absolute_positions", "thw"),
        ("model.patch.reference_fps", 8.0),
        ("diffusion.prediction", "x0"),
        ("diffusion.path.timesteps", 500),
    ],
)
def test_a_run_does_not_begin_with_parameters_that_mean_something_else(
    saved, rig, monkeypatch, name, value
):
    one = rig(1, 1, 1, 1)
    config = changed(CONFIG, {"checkpoint.initial": str(saved[0]), name: value})
    monkeypatch.setattr(Checkpointer, "restore_ema", None)  # nothing is read before
    with pytest.raises(ValueError, match=f"' is a run with {name} = .*: set it as there"):
        init_from(config, one.shapes, one.shapes, one.shardings)


def test_a_run_begins_with_what_is_computed_otherwise():
    free = {"model.dit.remat": "full", "model.dtype": "bfloat16", "diffusion.caption_dropout": 0.2}
    check_same(changed(CONFIG, free), CONFIG, MEANING, MAY_DIFFER, "", "")


def test_averages_need_no_other_item(saved, rig, tmp_path, monkeypatch):
    """The run may be named by a relative path."""
    directory, expected = saved
    copy_without(directory, tmp_path / "run", "params", "opt", "data")
    one = rig(1, 1, 1, 1)
    monkeypatch.chdir(tmp_path)
    checkpointer, step = open_run(Path("run"))
    monkeypatch.chdir("/")  # It was named from where the run was opened.
    ema = checkpointer.restore_ema(step, one.shapes.ema, one.shardings.ema)
    stored = checkpointer.config(step)
    checkpointer.close()
    assert step == 1 and stored == to_dict(CONFIG) == json.loads(json.dumps(stored))
    assert from_dict(VideoRun, stored) == CONFIG
    assert_equal(jax.device_get(ema), expected.ema)
    pairs = zip(jax.tree.leaves(ema), jax.tree.leaves(expected.params), strict=True)
    assert all(np.any(a != b) for a, b in pairs)


# What is kept.


def save(directory: Path, config: CheckpointConfig, *steps: int) -> Checkpointer:
    """Saves small states."""
    checkpointer = Checkpointer(directory, config)
    for step in steps:
        leaf, count = {"w": jax.numpy.full((2,), float(step))}, jax.numpy.int32(step)
        checkpointer.save(TrainState(count, count, leaf, leaf, leaf), {}, {"at": step}, step)
    checkpointer.wait()
    return checkpointer


def test_old_checkpoints_go_and_saving_a_step_again_changes_nothing(tmp_path):
    config = CheckpointConfig(max_to_keep=2, keep_period=3)
    checkpointer = save(tmp_path, config)
    assert checkpointer.latest() is None and checkpointer.steps() == []
    checkpointer.close()
    checkpointer = save(tmp_path, config, 3, 4, 5, 6)
    leaf, count = {"w": jax.numpy.zeros(2)}, jax.numpy.int32(6)
    checkpointer.save(TrainState(count, count, leaf, leaf, leaf), {}, {"at": 8}, 6)
    checkpointer.wait()
    assert checkpointer.steps() == [3, 5, 6] and checkpointer.latest() == 6
    assert checkpointer.config(6) == {"at": 6}
    checkpointer.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [3, 5, 6]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("two")
    save(directory, CheckpointConfig(), 2, 4).close()
    return directory


def test_interrupted_save_is_ignored(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    # As a killed process leaves it: the directory gets its final name when all is written.
    partial = run / "checkpoints" / f"6{ocp.utils.TMP_DIR_SUFFIX}123"
    shutil.copytree(run / "checkpoints" / "4", partial)
    shutil.rmtree(partial / "opt")
    assert ocp.utils.is_tmp_checkpoint(partial)
    checkpointer, step = open_run(run)
    assert step == 4 and checkpointer.steps() == [2, 4] and checkpointer.latest() == 4
    checkpointer.close()
    with pytest.raises(ValueError, match=r"no checkpoint of step 6: there are \[2, 4\]"):
        open_run(run, 6)
    # The run can save that step.
    checkpointer = save(run, CheckpointConfig(), 6)
    assert checkpointer.steps() == [2, 4, 6] and checkpointer.config(6) == {"at": 6}
    checkpointer.close()


# Errors.


def test_checkpoint_of_another_model_is_refused(two, rig):
    one = rig(1, 1, 1, 1)
    checkpointer, step = open_run(two, 2)
    assert step == 2 and checkpointer.config(2) == {"at": 2}
    wide = {"w": jax.ShapeDtypeStruct((3,), np.float32)}
    of_wide = {"w": jax.sharding.SingleDeviceSharding(jax.devices()[0])}
    for shapes, shardings, sizes in (
        (one.shapes.ema, one.shardings.ema, ""),
        (wide, of_wide, r"shape.*\(\d,\).*\(\d,\)"),  # Both are named.
    ):
        with pytest.raises(ValueError, match=f"checkpoints/2' cannot .*{sizes}.* another model"):
            checkpointer.restore_ema(step, shapes, shardings)
    checkpointer.close()


@pytest.mark.parametrize("item", ["params", "ema", "opt", "data", None])
def test_damaged_checkpoint_is_refused(saved, rig, tmp_path, item):
    copy_without(saved[0], tmp_path / "run", *([item] if item else []))
    if not item:
        (tmp_path / "run" / "checkpoints" / "1" / "data" / "metadata").write_text("{")
    one = rig(1, 1, 1, 1)
    checkpointer = Checkpointer(tmp_path / "run", CheckpointConfig())
    with pytest.raises(ValueError, match=r"checkpoints/1' cannot .* There are the steps \[1\]"):
        checkpointer.restore(1, one.shapes, one.shardings)
    checkpointer.close()
