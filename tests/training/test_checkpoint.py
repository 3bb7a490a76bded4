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
from dit_jax.training import (
    CheckpointConfig,
    Checkpointer,
    TrainState,
    open_run,
)

SPREAD = (1, 2, 2, 2)
DATA = {"0": {"next": 3, "parent": {"counter": 12}}, "1": {"next": 4, "parent": {"counter": 13}}}
SINGLE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
CONFIG = dataclasses.replace(VideoRun(), seed=5, steps=77)


@pytest.fixture(scope="module")
def taken():
    """``taken(state)`` reuses a state's memory, as the train step does."""
    return jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)


@pytest.fixture(scope="module")
def saved(rig, taken, tmp_path_factory):
    """A run of eight devices, saved after a step, and its state on the host."""
    directory = tmp_path_factory.mktemp("run")
    one = rig(*SPREAD)
    rng = np.random.default_rng(1)
    host = jax.tree.map(
        # Counters are one, and moments no zeros.
        lambda x: (
            np.full_like(x, 1) if x.ndim == 0 else x + rng.normal(size=x.shape).astype(x.dtype)
        ),
        jax.device_get(one.state()),
    )
    host = dataclasses.replace(host, skipped=np.int32(0))
    state = jax.device_put(host, one.shardings)
    checkpointer = Checkpointer(directory, CheckpointConfig())
    checkpointer.save(state, DATA, to_dict(CONFIG), 1)
    # The state's memory is reused at once, as the training loop does, while it is being written.
    taken(state)
    checkpointer.wait()
    checkpointer.close()
    return directory, host


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


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
        given = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(initial=str(path)))
        state = init_from(given, fresh, one.shapes, one.shardings)
        assert_equal(jax.device_get(state.params), host.ema)
        assert_equal(jax.device_get(state.ema), host.ema)
        assert_equal(jax.device_get(state.opt_state), opt_state)
        assert int(state.step) == 0
        taken(state)  # Both are given up to the step: they must not be the same memory.


def changed(config: VideoRun, name: str, value: object) -> VideoRun:
    """The config with a field, by its dotted name, set."""
    first, *rest = name.split(".")
    inner = changed(getattr(config, first), ".".join(rest), value) if rest else value
    return dataclasses.replace(config, **{first: inner})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.dit.heads", 12),
        ("model.dit.qk_norm", False),
        ("model.dit.rotary", False),
        ("model.dit.time_scale", -1.0),
        ("model.dit.time_divisor", 127),
        ("model.dit.absolute_positions", "thw"),
        ("model.dit.window", 8),
        ("model.patch.reference_fps", 8.0),
        ("diffusion.prediction", "x0"),
        ("diffusion.path.timesteps", 500),
    ],
)
def test_a_run_does_not_begin_with_parameters_that_mean_something_else(
    saved, rig, monkeypatch, name, value
):
    one = rig(1, 1, 1, 1)
    config = changed(changed(CONFIG, "checkpoint.initial", str(saved[0])), name, value)
    monkeypatch.setattr(Checkpointer, "restore_ema", None)  # nothing is read before
    with pytest.raises(ValueError, match=f"' is a run with {name} = .*: set it as there"):
        init_from(config, one.state(), one.shapes, one.shardings)


def test_a_run_begins_with_what_is_computed_otherwise():
    config = changed(CONFIG, "model.dit.remat", "full")
    config = changed(config, "model.dtype", "bfloat16")
    config = changed(config, "diffusion.caption_dropout", 0.2)
    check_same(config, CONFIG, MEANING, MAY_DIFFER, "", "")


def test_averages_need_no_other_item(saved, rig, tmp_path, monkeypatch):
    """The run may be named by a relative path."""
    directory, expected = saved
    shutil.copytree(directory, tmp_path / "run")
    for item in ("params", "opt", "data"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "1" / item)
    one = rig(1, 1, 1, 1)
    monkeypatch.chdir(tmp_path)
    checkpointer, step = open_run(Path("run"))
    monkeypatch.chdir("/")  # It was named from where the run was opened.
    assert step == 1
    ema = checkpointer.restore_ema(step, one.shapes.ema, one.shardings.ema)
    checkpointer.close()
    assert_equal(jax.device_get(ema), expected.ema)
    pairs = zip(jax.tree.leaves(ema), jax.tree.leaves(expected.params), strict=True)
    assert all(np.any(a != b) for a, b in pairs)


def test_config_comes_back(saved):
    checkpointer, step = open_run(saved[0])
    stored = checkpointer.config(step)
    checkpointer.close()
    assert stored == to_dict(CONFIG) == json.loads(json.dumps(stored))
    assert from_dict(VideoRun, stored) == CONFIG


# What is kept.


def small(value: int) -> TrainState:
    leaf = {"w": jax.numpy.full((2,), float(value))}
    count = jax.numpy.int32(value)
    return TrainState(count, count, leaf, leaf, leaf)


def save(directory: Path, config: CheckpointConfig, steps) -> Checkpointer:
    checkpointer = Checkpointer(directory, config)
    for step in steps:
        checkpointer.save(small(step), {}, {"at": step}, step)
    checkpointer.wait()
    return checkpointer


def test_old_checkpoints_go(tmp_path):
    checkpointer = save(tmp_path, CheckpointConfig(max_to_keep=2, keep_period=3), range(3, 7))
    assert checkpointer.steps() == [3, 5, 6] and checkpointer.latest() == 6
    checkpointer.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [3, 5, 6]


def test_saving_a_step_again_changes_nothing(tmp_path):
    checkpointer = save(tmp_path, CheckpointConfig(), [])
    assert checkpointer.latest() is None and checkpointer.steps() == []
    checkpointer.close()
    checkpointer = save(tmp_path, CheckpointConfig(), [3])
    checkpointer.save(small(8), {}, {"at": 8}, 3)
    checkpointer.wait()
    assert checkpointer.steps() == [3] and checkpointer.config(3) == {"at": 3}
    checkpointer.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("two")
    save(directory, CheckpointConfig(), [2, 4]).close()
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
    checkpointer = save(run, CheckpointConfig(), [6])
    assert checkpointer.steps() == [2, 4, 6] and checkpointer.config(6) == {"at": 6}
    checkpointer.close()


# Errors.


def test_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoints: give the output directory of a"):
        open_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no finished checkpoint yet: wait for the first save"):
        open_run(tmp_path)


def test_checkpoint_of_another_model_is_refused(two, rig):
    one = rig(1, 1, 1, 1)
    checkpointer, step = open_run(two, 2)
    assert step == 2 and checkpointer.config(2) == {"at": 2}
    with pytest.raises(ValueError, match="checkpoints/2' cannot be read .* of another model"):
        checkpointer.restore_ema(step, one.shapes.ema, one.shardings.ema)
    # A parameter of another size: both are named.
    wide = {"w": jax.ShapeDtypeStruct((3,), np.float32)}
    with pytest.raises(
        ValueError, match=r"checkpoints/2' cannot be read .*(\(3,\).*\(2,\)|\(2,\).*\(3,\))"
    ):
        checkpointer.restore_ema(step, wide, jax.tree.map(lambda _: SINGLE, wide))
    checkpointer.close()


@pytest.mark.parametrize("item", ["params", "ema", "opt", "data", "data/metadata"])
def test_damaged_checkpoint_is_refused(saved, rig, tmp_path, item):
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    path = run / "checkpoints" / "1" / item
    path.write_text("{") if path.is_file() else shutil.rmtree(path)
    one = rig(1, 1, 1, 1)
    checkpointer = Checkpointer(run, CheckpointConfig())
    with pytest.raises(
        ValueError, match=r"checkpoints/1' cannot be read .* There are the steps \[1\]"
    ):
        checkpointer.restore(1, one.shapes, one.shardings)
    checkpointer.close()
