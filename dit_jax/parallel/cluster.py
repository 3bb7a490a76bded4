"""Which process of a run this one is: by flags, by the environment, or by the cluster it runs in.

What Slurm, Open MPI, TPU pods and Kubernetes say is read by JAX's own detection, the classes behind
``jax.distributed.initialize``. It is asked here, and not there, because it takes a shell inside an
allocation of four tasks for the first of four processes and waits for the others, and gives each
process of a Slurm job one GPU even where it is alone on its node.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence

from jax._src import clusters

from dit_jax.files import InputError

FLAGS = ("--coordinator", "--num-processes", "--process-id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PORT = "JAX_COORDINATOR_PORT"
PROCESS_HELP = (
    "A run of several processes: give each --coordinator HOST:PORT (of process 0), --num-processes N "
    "and --process-id I, or the same in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. "
    "Under srun and mpirun, on TPU pods and in Kubernetes jobs they find each other; --num-processes 1 "
    "makes one stay alone there."
)
DETECTION_SECONDS = 300
"""How long JAX's detection waits for the name of process 0 to be known."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among those of its run."""

    coordinator: str
    """host:port of process 0."""
    count: int
    index: int
    devices: tuple[int, ...] | None = None
    """The GPUs of the host that are this process's; None: all it sees."""


def take_process_flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """The command line without the flags of ``PROCESS_HELP``, and what these say.

    They are no part of a run's config: the same run goes on with other processes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in FLAGS:
        parser.add_argument(flag, "--" + flag[2:].replace("-", "_"), dest=flag)
    found, rest = parser.parse_known_args(list(arguments))
    return rest, vars(found)


def find_place(flags: Mapping[str, str | None] | None = None) -> Place | None:
    """This process's place, or None if it is alone. Flags win over variables, these over the cluster.

    Raises:
        InputError: if what is said is incomplete or makes no sense.
        ConnectionError: if the cluster's server does not answer.
    """
    flags = flags or {}
    for given in ({name: flags.get(name) for name in FLAGS}, _variables()):
        if any(given.values()):
            place = _explicit(given)
            break
    else:
        place = _detected()
    return place if place and place.count > 1 else None


def _variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in VARIABLES}


def _explicit(given: dict[str, str | None]) -> Place | None:
    """The place that three flags or three variables name; a count of 1 may stand alone."""
    address_name, count_name, index_name = given
    address, count_text, index_text = given.values()
    if count_text == "1" and not address and not index_text:
        return None
    if missing := [name for name, value in given.items() if not value]:
        raise InputError(
            f"{', '.join(missing)} is not set, but "
            f"{', '.join(name for name, value in given.items() if value)} is: set all three for a run "
            "of several processes, or none for one."
        )
    try:
        count, index = int(count_text or ""), int(index_text or "")
    except ValueError as error:
        raise InputError(
            f"{count_name}={count_text!r} and {index_name}={index_text!r} must be whole numbers."
        ) from error
    if not 0 <= index < count:
        raise InputError(f"{index_name}={index} is not in 0..{count - 1} ({count_name}={count}).")
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"{address_name}={address!r} must be the host and port of process 0, such as "
            "10.0.0.1:8476."
        )
    return Place(f"{host}:{port}", count, index)


def _detected() -> Place | None:
    """The place that the cluster gives this process, if it is part of one."""
    for kind, present in _KINDS.items():
        if not present():
            continue
        try:
            if (count := kind.get_process_count()) == 1:
                return None
            return Place(
                kind.get_coordinator_address(DETECTION_SECONDS, os.environ.get(PORT)),
                count,
                kind.get_process_id(),
                _slurm_devices() if kind is clusters.SlurmCluster else None,
            )
        except (ArithmeticError, LookupError, OSError, RuntimeError, ValueError) as error:
            # A server that does not answer may do so when the process is started again.
            failure = ConnectionError if isinstance(error, OSError) else InputError
            raise failure(
                f"{kind.__name__.removesuffix('Cluster')} says that this is one process of several, "
                f"but not which ({type(error).__name__}: {error}): give {', '.join(FLAGS)}, or "
                "--num-processes 1 to stay alone."
            ) from error
    return None


def _in_slurm_step() -> bool:
    """Whether ``srun`` started this process beside others.

    The script of ``sbatch`` has no step, and the shell of ``salloc`` a step of one task, while
    ``SLURM_NTASKS`` counts the tasks that the allocation has room for.
    """
    return clusters.SlurmCluster.is_env_present() and os.environ.get("SLURM_STEP_NUM_TASKS") != "1"


def _slurm_devices() -> tuple[int, ...] | None:
    """One GPU for each process where a node has several processes that see the same GPUs."""
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")
    bound = len(visible) == 1 and visible[0].isdecimal()  # by --gpus-per-task
    if int(os.environ["SLURM_NTASKS"]) <= nodes or bound or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    return (int(os.environ["SLURM_LOCALID"]),)


def _wants_tpu() -> bool:
    return "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")


def _in_kubernetes_job() -> bool:
    """Whether this is a pod of an indexed job that JAX can ask the cluster about.

    Without the ``kubernetes`` package it cannot: the manifest names the place instead, in the three
    variables. A pod that is not the first and knows no other must not train by itself.
    """
    index = os.environ.get("JOB_COMPLETION_INDEX")
    if index is None or "KUBERNETES_SERVICE_HOST" not in os.environ:
        return False
    if importlib.util.find_spec("kubernetes"):
        return clusters.K8sCluster.is_env_present()
    if index != "0":
        raise InputError(
            f"JOB_COMPLETION_INDEX={index} says that this pod is one of several: set "
            f"{', '.join(VARIABLES)} in the manifest, or install the 'kubernetes' package."
        )
    return False


_KINDS: dict[type[clusters.ClusterEnv], Callable[[], bool]] = {
    clusters.OmpiCluster: clusters.OmpiCluster.is_env_present,
    clusters.SlurmCluster: _in_slurm_step,
    clusters.GkeTpuCluster: lambda: _wants_tpu() and clusters.GkeTpuCluster.is_env_present(),
    clusters.GceTpuCluster: lambda: _wants_tpu() and clusters.GceTpuCluster.is_env_present(),
    clusters.K8sCluster: _in_kubernetes_job,
}
"""JAX's kinds of clusters, in its order, and when one of them holds processes of ours."""
