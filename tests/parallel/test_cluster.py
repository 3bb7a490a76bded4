"""Which process this is, from flags, variables and what clusters set; no cluster is asked."""

import os
import sys
import types

import pytest
from jax._src import clusters

from dit_jax import sample, train
from dit_jax.parallel import cluster
from dit_jax.parallel.cluster import FLAGS, VARIABLES, Place, find_place, take_process_flags

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "gpu[007-010],gpu12",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
"""What srun tells the third of four tasks, one on each node."""
PORT = 65535 - 2**12 + 1 + 1234


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    prefixes = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROC")
    for name in os.environ:
        if name.startswith((*prefixes, "JOB_COMPLETION", "KUBERNETES_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


def set_all(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_alone_without_anything():
    assert find_place() is None and find_place(dict.fromkeys(FLAGS)) is None


def test_flags_win_over_variables_and_these_over_the_cluster(monkeypatch):
    set_all(monkeypatch, STEP)
    assert find_place() == Place(f"gpu007:{PORT}", 4, 2)
    set_all(monkeypatch, dict(zip(VARIABLES, ("host:1", "3", "1"), strict=True)))
    assert find_place() == Place("host:1", 3, 1)
    flags = dict(zip(FLAGS, ("[::1]:8476", "2", "0"), strict=True))
    assert find_place(flags) == Place("[::1]:8476", 2, 0)
    # One process by itself, wherever it is.
    assert find_place({"--num-processes": "1"}) is None
    monkeypatch.delenv(VARIABLES[0])
    monkeypatch.delenv(VARIABLES[2])
    monkeypatch.setenv(VARIABLES[1], "1")
    assert find_place() is None


@pytest.mark.parametrize("names", [FLAGS, VARIABLES])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", None, None), "{1}, {2} is not set, but {0} is: set all three"),
        ((None, "2", "0"), "{0} is not set, but {1}, {2} is"),
        (("host:1", "two", "0"), "{1}='two' and {2}='0' must be whole numbers"),
        (("host:1", "2", "2"), "{2}=2 is not in 0..1 ({1}=2)"),
        (("host:1", "2", "-1"), "{2}=-1 is not in 0..1 ({1}=2)"),
        (("host", "2", "0"), "{0}='host' must be the host and port of process 0, such as"),
        ((":8476", "2", "0"), "{0}=':8476' must be the host and port"),
        (("host:port", "2", "0"), "{0}='host:port' must be the host and port"),
        (("host:99999", "2", "0"), "{0}='host:99999' must be the host and port"),
    ],
)
def test_incomplete_or_wrong_places_are_refused(monkeypatch, names, values, message):
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    if names is VARIABLES:
        set_all(monkeypatch, given)
        given = {}
    with pytest.raises(ValueError) as error:
        find_place(given)
    assert message.format(*names) in str(error.value)


def test_flags_are_taken_from_the_command_line():
    line = ["--config", "c.py", "--coordinator", "h:1", "--steps", "3", "--num_processes=2"]
    rest, flags = take_process_flags([*line, "--process-id", "1"])
    assert rest == ["--config", "c.py", "--steps", "3"]
    assert flags == {"--coordinator": "h:1", "--num-processes": "2", "--process-id": "1"}
    # No abbreviations: what is not whole belongs to the config.
    assert take_process_flags(["--process", "1"]) == (["--process", "1"], dict.fromkeys(FLAGS))


@pytest.mark.parametrize("verb", [train, sample])
def test_help_tells_of_the_flags(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        verb.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in FLAGS)


# Slurm.


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("localhost", "localhost"), ("n1,n2", "n1"), ("n[3,5-6]", "n3"), ("gpu-a[01-16]", "gpu-a01")],
)
def test_first_node_of_a_slurm_step_coordinates(monkeypatch, nodes, host):
    set_all(monkeypatch, STEP | {"SLURM_STEP_NODELIST": nodes})
    assert find_place() == Place(f"{host}:{PORT}", 4, 2)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "9000")
    assert find_place() == Place(f"{host}:9000", 4, 2)


def test_shells_in_allocations_are_alone(monkeypatch):
    """SLURM_NTASKS counts what the allocation has room for."""
    # salloc's shell is a step of one task;
    set_all(monkeypatch, STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert find_place() is None
    # the script of sbatch is in no step;
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    assert find_place() is None
    # and `srun --ntasks=1` starts one task.
    set_all(monkeypatch, STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"})
    assert find_place() is None


@pytest.mark.parametrize(
    ("nodes", "visible", "devices"),
    [
        ("8", None, None),  # alone on its node: all GPUs
        ("1", None, (5,)),  # one of eight on its node
        ("1", "0,1,2,3,4,5,6,7", (5,)),
        ("1", "5", None),  # Slurm has bound it to its own
    ],
)
def test_gpus_of_a_slurm_task(monkeypatch, nodes, visible, devices):
    tasks = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "5"}
    set_all(monkeypatch, STEP | tasks | {"SLURM_STEP_NUM_NODES": nodes})
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    place = find_place()
    assert place is not None and place.devices == devices
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "3")  # said by the user
    assert find_place() == Place(place.coordinator, 8, 2)


def test_what_a_cluster_says_wrongly_is_refused(monkeypatch):
    set_all(monkeypatch, STEP | {"SLURM_PROCID": "three"})
    with pytest.raises(ValueError, match="Slurm says that this is one process of several, but not"):
        find_place()


# TPUs and Kubernetes. JAX resolves names and asks the cluster; here it finds what is set.


@pytest.fixture
def tpu(monkeypatch):
    module = sys.modules["jax._src.clusters.cloud_tpu_cluster"]
    monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(
        clusters.GkeTpuCluster, "wait_for_coordinator", classmethod(lambda *_: None)
    )
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "")
    monkeypatch.setattr(module, "get_tpu_env_value_from_metadata", lambda key: None)
    return monkeypatch


def test_pods_of_a_tpu_slice(tpu):
    set_all(tpu, {"TPU_WORKER_HOSTNAMES": "a-0,a-1,a-2,a-3", "TPU_WORKER_ID": "3"})
    assert find_place() == Place("a-0:8482", 4, 3)
    tpu.setenv("JAX_PLATFORMS", "cpu")  # preparing data on a TPU's host, by itself
    assert find_place() is None


def test_pods_of_several_tpu_slices(tpu):
    set_all(tpu, {"TPU_WORKER_HOSTNAMES": "b-0,b-1", "TPU_WORKER_ID": "1"})
    set_all(tpu, {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"})
    tpu.setenv("MEGASCALE_COORDINATOR_ADDRESS", "a-0.jobset")
    assert find_place() == Place("a-0.jobset:8482", 6, 5)


def test_tpu_of_one_host_is_alone(tpu):
    set_all(tpu, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    assert find_place() is None


def test_kubernetes_jobs(monkeypatch):
    set_all(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="JOB_COMPLETION_INDEX=1 says that this pod is one of sev"):
        find_place()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert find_place() is None

    kind = clusters.K8sCluster
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(kind, "is_env_present", classmethod(lambda _: True))
    monkeypatch.setattr(kind, "get_process_count", classmethod(lambda _: 2))
    monkeypatch.setattr(kind, "get_process_id", classmethod(lambda _: 1))
    monkeypatch.setattr(kind, "get_coordinator_address", classmethod(lambda *_: "job-0.job:55527"))
    assert find_place() == Place("job-0.job:55527", 2, 1)
    # A pod that belongs to no indexed job is alone.
    monkeypatch.delenv("JOB_COMPLETION_INDEX")
    assert find_place() is None


def test_a_server_that_does_not_answer_is_no_wrong_input(monkeypatch):
    """Its error ends a process with the status after which launchers start it again."""

    def refuse():
        raise OSError("metadata.google.internal: timed out")

    set_all(monkeypatch, STEP)
    monkeypatch.setattr(clusters.SlurmCluster, "get_process_count", refuse)
    with pytest.raises(ConnectionError, match="timed out"):
        find_place()
