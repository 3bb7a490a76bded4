"""Runs of several processes: how they find each other, share a batch, and end together.

``jax.distributed`` joins the processes and watches them by heartbeats. If one dies, JAX aborts all
others (SIGABRT, status 134), also those that wait inside a collective, with a message that names its
number. An error that a process can still report takes a shorter way: a key in JAX's coordination
service that all processes poll.
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
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.files import InputError, explain, refuse_if
from dit_jax.parallel.mesh import batch_sharding, batch_shards, keep_programs, platform
from dit_jax.types import is_token_field

FLAGS = ("--coordinator", "--num-processes", "--process-id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PROCESS_HELP = (
    "A run of several processes: give each --coordinator HOST:PORT (of process 0), --num-processes N "
    "and --process-id I, or the same in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. "
    "Under srun and mpirun, on TPU pods and in Kubernetes jobs they find each other; --num-processes 1 "
    "makes one stay alone there."
)
# A process that sent no heartbeat for so long is dead. A thread of JAX's own sends them, which no
# Python code holds up.
HEARTBEAT_SECONDS = 30
POLL_SECONDS = 1.0
FAILURE = "dit_jax/failure"


def take_process_flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits a command line into what is not about processes and the values of ``FLAGS``."""
    # These are no part of a run's config: the same run may go on with other processes.
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
    # TPU VMs set no variable: chips up to v4 are the first kind of device, later ones the second.
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    # The host of a TPU may prepare data by itself.
    may_use_tpu = "tpu" in env.get("JAX_PLATFORMS", "tpu")
    return may_use_tpu and ("TPU_WORKER_HOSTNAMES" in env or bool(chips))


def slurm_gpus() -> list[int] | None:
    """The GPUs of a Slurm task; None leaves it to JAX, which gives each task of a node one of them."""
    env = os.environ
    if "SLURM_STEP_NODELIST" not in env or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else int(env.get("SLURM_GPUS_ON_NODE", "0"))
    # JAX's choice is wrong for a task that Slurm bound to its GPU, or that has its node to itself.
    alone = int(env.get("SLURM_NTASKS", "1")) <= int(env.get("SLURM_STEP_NUM_NODES", "1"))
    return list(range(count)) if count == 1 or alone else None


def initialize(flags: Mapping[str, Any] | None = None, prog: str = "dit_jax") -> bool:
    """Joins the other processes of the run; returns False if there are none.

    ``flags`` are those of ``take_process_flags``; without any the cluster says where it belongs.
    """
    flags = flags or take_process_flags([])[1]
    address, count, index = place = [flags[flag] for flag in FLAGS]
    explicit = place != [None] * 3
    if count == 1 or not (explicit or in_cluster()):
        return False
    who = "this process"
    options: dict[str, Any] = {"local_device_ids": slurm_gpus()}
    if explicit:
        who = f"--coordinator {address}, --num-processes {count}, --process-id {index}"
        host, _, port = (address or "").rpartition(":")
        wrong = not host or not port.isdecimal() or None in place or not 0 <= index < count
        rule = "give all three, HOST:PORT of process 0 and 0 <= process-id < num-processes"
        refuse_if([(wrong, f"{who}: {rule} (or set {', '.join(VARIABLES)}).")])
        options = {"coordinator_address": address, "num_processes": count, "process_id": index}
        options["cluster_detection_method"] = "deactivate"
    options["heartbeat_timeout_seconds"] = HEARTBEAT_SECONDS
    # At the end, processes with nothing left to do wait for process 0, which may write media for long.
    options["shutdown_timeout_seconds"] = 24 * 3600
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        # Without the package kubernetes a pod does not know the others, and must not train alone.
        alone = os.environ.get("JOB_COMPLETION_INDEX", "0") == "0"
        if alone and str(error) == "coordinator_address should be defined.":
            return False  # no cluster after all
        raise InputError(
            f"the cluster does not say which process this is ({error}): give {', '.join(FLAGS)}, or "
            "--num-processes 1 to stay alone; Kubernetes jobs need the package kubernetes."
        ) from error
    except (OSError, RuntimeError) as error:  # status 1: starting all again may help
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

    If there is one process, errors are the caller's. Among several, an error ends the process with exit
    status 2, which launchers do not start again, for ``user_errors``, and with 1 for any other.
    """
    if not initialize(flags, prog):
        # Of several processes the first alone keeps programs: the others would come later, by what they
        # compile, to a collective that does not wait for long. A shared directory is theirs to name.
        keep_programs()
        yield
        return
    client, done, index = coordination(), threading.Event(), jax.process_index()

    def watch_for_failure() -> None:
        # It polls: a call that blocks can't be ended. If the service is gone, JAX ends this process.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while not done.wait(POLL_SECONDS):
                for _, value in client.key_value_dir_get(FAILURE):
                    status, message = json.loads(value)
                    sys.stderr.write(f"\n{message}\n")
                    os._exit(status)

    watcher = threading.Thread(target=watch_for_failure, daemon=True)
    watcher.start()
    try:
        yield
        jax.distributed.shutdown()  # returns when all processes have come here
        done.set()
        watcher.join()
    except BaseException as error:
        # Gloo's errors are sometimes ValueErrors.
        of_collective = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        status = 2 if isinstance(error, user_errors) and not of_collective else 1
        # Every message is one write, lest processes that end together mix their lines.
        trace = "".join(traceback.format_exception(error))
        sys.stderr.write(f"{prog}: error: {error}\n" if status == 2 else trace)
        if of_collective:
            # A collective fails at once if another process dies. Which one it was is known only when
            # its heartbeats have been missed for long enough: JAX then writes it and ends this process.
            sys.stderr.write(f"Did another process die? JAX tells within {HEARTBEAT_SECONDS} s.\n")
            time.sleep(HEARTBEAT_SECONDS + 10)
        done.set()
        text = f"process {index} of {jax.process_count()} failed"
        message = json.dumps((status, f"{text} ({type(error).__name__}: {explain(error)})."))
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # as after the shutdown
            client.key_value_set(f"{FAILURE}/{index}", message)
        if index == 0:
            time.sleep(3 * POLL_SECONDS)  # the service ends with process 0: let the others hear
        # Not through the interpreter, whose end would wait for the others.
        os._exit(status)


def coordination() -> Any:
    """The client of JAX's coordination service: keys with values and barriers of a run's processes."""
    from orbax.checkpoint import multihost  # JAX does not export it.

    return multihost.get_jax_distributed_client()


def local_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """The rows of a global batch that lie, wholly or in part, on this process's devices."""
    shards = batch_shards(mesh)
    rule = f"do not divide over mesh.data x mesh.fsdp = {shards}: make data.packing.rows a multiple"
    message = f"{rows} rows {rule}, or spread tokens (mesh.context) instead."
    refuse_if([(rows % shards > 0, message)])
    indices = batch_sharding(mesh, 1, tokens=False).addressable_devices_indices_map((rows,))
    parts: Any = (index[0] for index in indices.values() if index)
    return tuple(sorted({row for part in parts for row in range(*part.indices(rows))}))


def global_batch(mesh: Mesh, batch: Any, rows: tuple[int, ...], total: int) -> Any:
    """Global arrays of a batch, of which this process holds the rows ``rows`` as NumPy arrays; token
    fields (``types.TOKENS``) are sharded over ``context`` too, if it divides them."""

    def put(of_tokens: bool, field: np.ndarray) -> jax.Array:
        along_tokens = of_tokens and field.shape[1] % mesh.shape["context"] == 0
        sharding = batch_sharding(mesh, field.ndim, along_tokens, rows=total)

        def shard(index: Any) -> np.ndarray:
            first, end, _ = index[0].indices(total)  # of the global batch; rows of a device adjoin
            start = rows.index(first)
            return field[start : start + end - first][(slice(None), *index[1:])]

        return jax.make_array_from_callback((total, *field.shape[1:]), sharding, shard)

    placed = jax.tree.map(put, is_token_field(batch), batch)
    # A CPU computes in the main thread, whose memory is kept (`tune_cpu`), what waits for nothing.
    return jax.block_until_ready(placed) if platform(mesh) == "cpu" else placed
