"""Batches put together from rows, and places of processes.

Several real processes are in tests/test_multiprocess.py.
"""

import dataclasses
import os
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from flax import struct
from jax._src.distributed import State

from dit_jax.files import InputError
from dit_jax.parallel import MeshConfig, global_batch, joined, local_rows, make_mesh, multihost
from dit_jax.parallel.multihost import FLAGS, VARIABLES, initialize, take_process_flags
from dit_jax.types import TOKENS, Batch

MESHES = [(1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 2, 2)]


@struct.dataclass
class Fields:
    """As batches and the sampler's inputs."""

    clean: np.ndarray = struct.field(metadata=TOKENS)
    named: dict[str, np.ndarray] = struct.field(metadata=TOKENS)
    text: np.ndarray
    counts: dict[str, np.ndarray]


@pytest.mark.parametrize("length", [16, 7])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_assembled_arrays_equal_the_batch(sizes, length):
    """A length that context does not divide stays whole."""

    def numbers(*shape):  # that all differ, so that each tells its place
        return np.arange(8 * np.prod(shape), dtype=np.float32).reshape(8, *shape)

    mesh, (data, fsdp, context, _) = make_mesh(MeshConfig(*sizes)), sizes
    batch = Fields(numbers(length, 6), {"a": numbers(length)}, numbers(12), {"b": numbers(4)})
    rows = local_rows(mesh, 8)
    assert rows == tuple(range(8))  # this process has all devices
    placed = global_batch(mesh, batch, rows, 8)
    pairs = zip(jax.tree.leaves(batch), jax.tree.leaves(placed), strict=True)
    for (value, array), of_tokens in zip(pairs, (True, True, False, False), strict=True):
        np.testing.assert_array_equal(array, value)
        parts = context if of_tokens and length % context == 0 else 1
        for part in array.addressable_shards:  # each has what its index says, and no more
            np.testing.assert_array_equal(part.data, value[part.index])
            assert part.data.shape[:2] == (8 // (data * fsdp), value.shape[1] // parts)


def test_fields_of_batches_that_lie_along_tokens():
    names = {field.name for field in dataclasses.fields(Batch) if field.metadata.get("tokens")}
    ids = {"segment_ids", "frame_ids", "token_ids"}
    assert names == {"tokens", "positions", "token_fields"} | ids


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="6 rows .* 4"):
        local_rows(make_mesh(MeshConfig(2, 2, 2, 1)), 6)
    # A mesh of some of the devices: still all rows, for every row has a part here.
    mesh = make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4])
    assert local_rows(mesh, 6) == (0, 1, 2, 3, 4, 5)


# Which process of a run this is. JAX's own detection of clusters is taken as it is: here its caller.

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "gpu[007-010],gpu12",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
"""What srun sets for the third of four tasks, one on each node."""
ALONE = "coordinator_address should be defined."
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.fixture
def joining(monkeypatch):
    """A machine without a cluster; `jax.distributed.initialize` notes how it is called."""
    prefixes = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROC")
    for name in os.environ:
        if name.startswith((*prefixes, "JOB_COMPLETION", "KUBERNETES_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


def set_all(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def place(call):
    return tuple(call.get(n) for n in ("coordinator_address", "num_processes", "process_id"))


def test_alone_nothing_is_joined(joining):
    assert not initialize() and not initialize(dict.fromkeys(FLAGS)) and not joining
    # Errors pass: the verb prints them.
    with pytest.raises(ValueError, match="no rows"), joined(None, "prog"):
        raise ValueError("no rows")


def test_flags_win_over_variables_and_these_over_the_cluster(joining, monkeypatch):
    set_all(monkeypatch, STEP)
    assert initialize() and place(joining[-1]) == (None, None, None)  # JAX reads the cluster
    set_all(monkeypatch, dict(zip(VARIABLES, ("host:1", "3", "1"), strict=True)))
    assert initialize() and place(joining[-1]) == ("host:1", 3, 1)
    _, flags = take_process_flags(["--coordinator", "[::1]:8476", "--process-id", "2"])
    assert initialize(flags) and place(joining[-1]) == ("[::1]:8476", 3, 2)
    assert joining[-1]["cluster_detection_method"] == "deactivate"
    # One process by itself, wherever it is.
    assert not initialize(take_process_flags(["--num-processes", "1"])[1])
    monkeypatch.setenv(VARIABLES[1], "1")
    assert not initialize() and len(joining) == 3


@pytest.mark.parametrize(
    "values",
    [
        *[("host:1", None, None), (None, 2, 0), ("host:1", 2, 2), ("host:1", 2, -1)],
        *[("host", 2, 0), ("host:port", 2, 0)],
    ],
    ids=str,
)
def test_incomplete_or_wrong_places_are_refused(joining, values):
    flags = dict(zip(FLAGS, values, strict=True))
    with pytest.raises(InputError) as error:
        initialize(flags)
    assert all(f"{flag} {value}" in str(error.value) for flag, value in flags.items())


def test_flags_are_taken_from_the_command_line(joining):
    line = ["--config", "c.py", "--coordinator", "h:1", "--steps", "3", "--num_processes=2"]
    rest, flags = take_process_flags([*line, "--process-id", "1"])
    assert rest == ["--config", "c.py", "--steps", "3"]
    assert flags == {"--coordinator": "h:1", "--num-processes": 2, "--process-id": 1}
    assert all(flag in multihost.PROCESS_HELP for flag in FLAGS)
    # No abbreviations: what is not whole belongs to the config.
    assert take_process_flags(["--process", "1"]) == (["--process", "1"], dict.fromkeys(FLAGS))
    with pytest.raises(SystemExit) as ended:
        take_process_flags(["--num-processes", "two"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        (STEP, True),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # salloc's shell, or `srun --ntasks=1`
        ({"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "4"}, False),  # the script of sbatch
        ({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}, True),
        (POD, False),
        (POD | {"JOB_COMPLETION_INDEX": "1"}, True),
        (POD | {"JAX_PLATFORMS": "tpu,cpu", "TPU_WORKER_HOSTNAMES": "a-0,a-1"}, True),
        (POD | {"TPU_WORKER_HOSTNAMES": "a-0,a-1"}, False),  # it prepares data, by itself
    ],
)
def test_clusters_that_jax_is_asked_about(joining, monkeypatch, variables, asked):
    set_all(monkeypatch, {"JAX_PLATFORMS": "cpu"} | variables)
    assert initialize() == asked == len(joining)


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        # Alone on its node: all GPUs.
        ({"SLURM_STEP_NUM_NODES": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        # One of eight on its node: JAX takes its own.
        ({"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, None),
        # Slurm has bound it to one, the first that it sees.
        ({"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "5"}, [0]),
        ({"SLURM_STEP_NUM_NODES": "8", "SLURM_GPUS_ON_NODE": "2"}, [0, 1]),
    ],
)
def test_gpus_of_a_slurm_task(joining, monkeypatch, variables, devices):
    tasks = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "5"}
    set_all(monkeypatch, STEP | tasks | variables)
    assert initialize() and joining[-1]["local_device_ids"] == devices
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "3")  # set by the user: JAX reads it
    assert initialize() and joining[-1]["local_device_ids"] is None


def test_jax_says_so_where_there_is_no_cluster():
    with pytest.raises(ValueError) as error:
        State().initialize(cluster_detection_method="deactivate")
    assert str(error.value) == ALONE


@pytest.mark.parametrize(
    ("variables", "error", "outcome"),
    [
        ({}, ValueError(ALONE), False),
        (STEP, ValueError("invalid literal for int(): 'three'"), InputError),
        # Without the package kubernetes a pod cannot know the others, and must not train alone.
        (POD | {"JOB_COMPLETION_INDEX": "1"}, ValueError(ALONE), InputError),
        # What launchers start again: a server or processes that may be there the next time.
        (STEP, OSError("metadata.google.internal: timed out"), SystemExit),
        (STEP, RuntimeError("DEADLINE_EXCEEDED"), SystemExit),
    ],
)
def test_what_jax_cannot_do(joining, monkeypatch, variables, error, outcome):
    def refuse(**options):
        raise error

    set_all(monkeypatch, {"JAX_PLATFORMS": "tpu"} | variables)
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setattr(multihost.glob, "glob", lambda pattern: [pattern])  # a TPU's devices
    if outcome is False:
        assert not initialize()
        return
    flags = dict(zip(FLAGS, ("host:1", 2, 1), strict=True)) if outcome is SystemExit else None
    with pytest.raises(outcome, match=str(error).split(":")[0]) as ended, joined(flags, "prog"):
        pass
    if flags:  # Python prints a text and ends with status 1.
        assert "host:1" in ended.value.code and "--process-id 1" in ended.value.code


@pytest.mark.parametrize(
    ("user_errors", "error", "status"),
    [
        ((), ValueError("rows"), 2),
        ((), OSError("disk full"), 1),
        ((InputError,), InputError("rows"), 2),
        ((InputError,), ValueError("from the middle of a run"), 1),
    ],
)
def test_only_errors_of_the_user_end_with_2(monkeypatch, user_errors, error, status):
    monkeypatch.setattr(multihost, "initialize", lambda flags, prog: True)
    monkeypatch.setattr(multihost, "coordination", Mock())
    monkeypatch.setattr(multihost.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(multihost.os, "_exit", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit), joined(None, "prog", *user_errors):
        raise error
    multihost.os._exit.assert_called_once_with(status)
