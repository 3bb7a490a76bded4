"""Runs of several processes: how they find each other, share a batch, and end together.

``jax.distributed`` joins the processes and watches them by heartbeats. If one dies, JAX aborts all
others (SIGABRT, status 134) with a message that names its number. That needs nothing of Python, so
it also ends processes that wait inside a collective. An error that a process can still report takes
a shorter way: a key in JAX's coordination service that all processes poll.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

# JAX exports neither the key-value store nor the barrier of its coordination service. A collective
# can't replace them: on CPUs it gives up after 30 s, and process 0 may be busy for longer than that.
from jax._src.distributed import global_state
from jax.sharding import Mesh

from dit_jax.files import InputError
from dit_jax.parallel.mesh import batch_sharding, batch_shards
from dit_jax.types import is_token_field

FLAGS = ("--coordinator", "--num-processes", "--process-id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PROCESS_HELP = (
    "A run of several processes: give each --coordinator HOST:PORT (of process 0), --num-processes N "
    "and --process-id I, or the same in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. "
    "Under srun and mpirun, on TPU pods and in Kubernetes jobs they find each other; --num-processes 1 "
    "makes one stay alone there."
)
HEARTBEAT_SECONDS = 30
"""A process that sent no heartbeat for so long is dead. They are sent by a thread of JAX's own, which
no Python code holds up."""
POLL_SECONDS = 1.0
DAY_SECONDS = 24 * 3600
FAILURE = "dit_jax/failure"


def take_process_flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits a command line into what is not about processes and the values of ``FLAGS``.

    The flags are no part of a run's config, because the same run may go on with other processes.
    Environment variables stand in for flags that are missing.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, variable, kind in zip(FLAGS, VARIABLES, (str, int, int), strict=True):
        both = (flag, "--" + flag[2:].replace("-", "_"))
        parser.add_argument(*both, dest=flag, type=kind, default=os.environ.get(variable) or None)
    values, rest = parser.parse_known_args(list(arguments))
    return rest, vars(values)


def in_cluster() -> bool:
    """Whether JAX's cluster detection should be asked for this process's place in a run."""
    env = os.environ
    if "OMPI_MCA_orte_hnp_uri" in env:
        return True
    if "SLURM_STEP_NODELIST" in env:
        # SLURM_NTASKS, which JAX reads, counts what the allocation has room for. The shell of salloc
        # is a step of one task in it, and would wait for the others.
        return env.get("SLURM_STEP_NUM_TASKS") != "1"
    if "KUBERNETES_SERVICE_HOST" in env and "TPU_WORKER_HOSTNAMES" not in env:
        return "JOB_COMPLETION_INDEX" in env
    if "tpu" not in env.get("JAX_PLATFORMS", "tpu"):
        return False  # the host of a TPU may prepare data by itself
    # TPU VMs set no variable: chips up to v4 are the first kind of device, later ones the second.
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return "TPU_WORKER_HOSTNAMES" in env or bool(devices)


def slurm_gpus() -> list[int] | None:
    """The GPUs of a Slurm task: None leaves it to JAX, which gives each task of a node one of them.

    That is wrong for a task that has its node to itself, and for one that Slurm bound to its GPU.
    """
    env = os.environ
    if "SLURM_STEP_NODELIST" not in env or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else int(env.get("SLURM_GPUS_ON_NODE", "0"))
    alone = int(env.get("SLURM_NTASKS", "1")) <= int(env.get("SLURM_STEP_NUM_NODES", "1"))
    return list(range(count)) if count == 1 or alone else None


def initialize(flags: Mapping[str, Any] | None = None, prog: str = "dit_jax") -> bool:
    """Joins the other processes of the run; returns False if there are none.

    ``flags`` are those of ``take_process_flags``; without any the cluster says where it belongs. Ends
    with status 1 if the others are not there in time, because starting all again may help.
    """
    flags = flags or take_process_flags([])[1]
    place: list[Any] = [flags.get(flag) for flag in FLAGS]
    address, count, index = place
    explicit = any(value is not None for value in place)
    if (explicit and count == 1) or not (explicit or in_cluster()):
        return False
    options: dict[str, Any] = {"local_device_ids": slurm_gpus()}
    if explicit:
        host, _, port = (address or "").rpartition(":")
        if not host or not port.isdecimal() or None in place or not 0 <= index < count:
            raise InputError(
                f"--coordinator {address}, --num-processes {count}, --process-id {index} (or "
                f"{', '.join(VARIABLES)}): a run of several processes needs all three, HOST:PORT of "
                "process 0 and 0 <= process-id < num-processes."
            )
        options = {"coordinator_address": address, "num_processes": count, "process_id": index}
        options |= {"cluster_detection_method": "deactivate"}
    # At the end, processes with nothing left to do wait for process 0, which may write media for long.
    options["shutdown_timeout_seconds"] = DAY_SECONDS
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        pod = os.environ.get("JOB_COMPLETION_INDEX", "0")
        if str(error) == "coordinator_address should be defined." and pod == "0":
            return False  # no cluster after all
        raise InputError(
            f"the cluster does not say which process this is ({error}): give {', '.join(FLAGS)}, or "
            "--num-processes 1 to stay alone. In Kubernetes jobs, install the package kubernetes."
        ) from error
    except (OSError, RuntimeError) as error:
        who = f"process {index} of {count} at {address}" if explicit else "this process"
        raise SystemExit(
            f"{prog}: error: {who} could not join the others ({error}): start them all, with the "
            "same address, and a port that is free on the host of process 0."
        ) from error
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    return True


@contextlib.contextmanager
def joined(
    flags: Mapping[str, Any] | None, prog: str, user_errors: type[Exception] = ValueError
) -> Iterator[None]:
    """Makes the processes of a run begin, fail and end together while the body runs.

    If there is one process, errors are the caller's. Among several, an error inside ends the process
    here, because the way out through the interpreter would wait for the others: with exit status 2,
    which launchers do not start again, for ``user_errors``, and with 1 for any other.
    """
    if not initialize(flags, prog):
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch_for_failure, args=(done,), daemon=True)
    watcher.start()
    try:
        yield
        jax.distributed.shutdown()  # returns when all processes have come here
    except BaseException as error:
        _fail(error, prog, isinstance(error, user_errors), done)
    done.set()
    watcher.join()


def _watch_for_failure(done: threading.Event) -> None:
    """Ends this process when another reports an error. It polls: a call that blocks can't be ended."""
    assert global_state.client is not None
    while not done.wait(POLL_SECONDS):
        try:
            failures = global_state.client.key_value_dir_get(FAILURE)
        except jax.errors.JaxRuntimeError:  # the service is gone: JAX ends this process
            return
        for _, value in failures:
            status, message = json.loads(value)
            sys.stderr.write(f"\n{message}\n")
            os._exit(status)


def _fail(error: BaseException, prog: str, user_error: bool, done: threading.Event) -> NoReturn:
    """Ends this process, and with it the others, because of an error in this one.

    Every message is one write, lest processes that end together mix their lines.
    """
    # Gloo's errors are sometimes ValueErrors.
    of_collective = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    user_error = user_error and not of_collective
    if user_error:
        sys.stderr.write(f"{prog}: error: {error}\n")
    else:
        traceback.print_exception(error)
    if of_collective:
        # A collective fails at once if another process dies. Which one it was is known only when its
        # heartbeats have been missed for long enough: JAX then writes it and ends this process.
        sys.stderr.write(f"Did another process die? JAX tells within {HEARTBEAT_SECONDS} s.\n")
        time.sleep(HEARTBEAT_SECONDS + 10)
    done.set()
    status, index = 2 if user_error else 1, jax.process_index()
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    text = f"process {index} of {jax.process_count()} failed ({type(error).__name__}: {reason})."
    client = global_state.client
    if client is not None:  # it is None if the error came after the shutdown
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{FAILURE}/{index}", json.dumps((status, text)))
        if index == 0:
            time.sleep(3 * POLL_SECONDS)  # the service ends with process 0: let the others hear
    os._exit(status)


def broadcast(name: str, text: str) -> str:
    """Returns process 0's text on every process, however long it takes. A name serves once."""
    client = global_state.client
    if client is None:
        return text
    if jax.process_index() == 0:
        client.key_value_set(f"dit_jax/{name}", text)
    return client.blocking_key_value_get(f"dit_jax/{name}", 7 * DAY_SECONDS * 1000)


def barrier(name: str) -> None:
    """Returns when every process has come here, however long that takes. A name serves once."""
    if global_state.client is not None:
        global_state.client.wait_at_barrier(f"dit_jax/{name}", 7 * DAY_SECONDS * 1000)


def local_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """The rows of a global batch that lie, wholly or in part, on this process's devices."""
    if rows % (shards := batch_shards(mesh)):
        raise ValueError(
            f"{rows} rows do not divide over mesh.data x mesh.fsdp = {shards}: make data.packing.rows "
            f"a multiple of {shards}, or spread tokens (mesh.context) instead."
        )
    indices = batch_sharding(mesh, 1, tokens=False).addressable_devices_indices_map((rows,))
    slices = (index[0] if index else slice(None) for index in indices.values())
    return tuple(sorted({row for part in slices for row in range(*part.indices(rows))}))


def global_batch(mesh: Mesh, batch: Any, rows: tuple[int, ...], total: int) -> Any:
    """Global arrays of a batch, of which this process holds the rows ``rows`` as NumPy arrays.

    Token fields (``types.TOKENS``) are sharded over ``context`` too, if it divides them.
    """
    place = {row: i for i, row in enumerate(rows)}

    def put(of_tokens: bool, field: np.ndarray) -> jax.Array:
        along_tokens = of_tokens and field.shape[1] % mesh.shape["context"] == 0
        sharding = batch_sharding(mesh, field.ndim, along_tokens, rows=total)

        def shard(index: Any) -> np.ndarray:
            held = range(*index[0].indices(total))
            return field[place[held[0]] : place[held[-1]] + 1][(slice(None), *index[1:])]

        return jax.make_array_from_callback((total, *field.shape[1:]), sharding, shard)

    return jax.tree.map(put, is_token_field(batch), batch)
