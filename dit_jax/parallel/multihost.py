"""Several processes: finding each other, and each making its own part of a batch."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.parallel.rules import batch_sharding

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
NUM_PROCESSES = "JAX_NUM_PROCESSES"
PROCESS_ID = "JAX_PROCESS_ID"


def initialize() -> None:
    """Joins the other processes of the run where the environment says that there are any.

    ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID`` name them; without these the process is alone. CPU processes talk by gloo.
    """
    given = {name: os.environ.get(name) for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    if not any(given.values()):
        return
    if missing := [name for name, value in given.items() if not value]:
        raise ValueError(
            f"{', '.join(missing)} is not set, but "
            f"{', '.join(name for name, value in given.items() if value)} is: set all three for a run "
            "of several processes, or none for one."
        )
    try:
        count, index = int(given[NUM_PROCESSES] or ""), int(given[PROCESS_ID] or "")
    except ValueError as error:
        raise ValueError(
            f"{NUM_PROCESSES}={given[NUM_PROCESSES]!r} and {PROCESS_ID}={given[PROCESS_ID]!r} must be "
            "whole numbers."
        ) from error
    if not 0 <= index < count:
        raise ValueError(
            f"{PROCESS_ID}={index} is not in 0..{count - 1} ({NUM_PROCESSES}={count})."
        )
    host, _, port = (given[COORDINATOR] or "").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"{COORDINATOR}={given[COORDINATOR]!r} must be the host and port of process 0, such as "
            "10.0.0.1:8476."
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(f"{host}:{port}", num_processes=count, process_id=index)
    except RuntimeError as error:
        raise ValueError(
            f"process {index} of {count} could not join the others at {host}:{port} ({error}): start "
            "them all, with the same address, and a port that is free on the host of process 0."
        ) from error


def local_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """The rows of a global batch that lie, wholly or in part, on this process's devices.

    Raises:
        ValueError: where the rows do not divide over the mesh.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ValueError(
            f"{rows} rows of a batch do not divide over mesh.data x mesh.fsdp = {parts}: make the "
            f"rows (data.packing.rows) a multiple of {parts}, or spread tokens (mesh.context) instead."
        )
    indices = batch_sharding(mesh, 1, tokens=False).addressable_devices_indices_map((rows,))
    found: set[int] = set()
    for index in indices.values():
        found.update(range(*(index[0] if index else slice(None)).indices(rows)))
    return tuple(sorted(found))


def global_batch(mesh: Mesh, batch: Any, rows: tuple[int, ...], total: int) -> Any:
    """Global arrays of a batch whose rows ``rows`` this process holds as NumPy arrays.

    Fields ``[b, l, ...]`` as long as the row's tokens are spread over ``context`` too.
    """
    length = batch.tokens.shape[1] if hasattr(batch, "tokens") else batch.clean.shape[1]
    place = {row: i for i, row in enumerate(rows)}

    def put(field: np.ndarray) -> jax.Array:
        along_tokens = (
            field.ndim > 1 and field.shape[1] == length and length % mesh.shape["context"] == 0
        )
        sharding = batch_sharding(mesh, field.ndim, along_tokens)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = range(*index[0].indices(total))
            local = field[place[wanted[0]] : place[wanted[-1]] + 1]
            return local[(slice(None), *index[1:])]

        return jax.make_array_from_callback((total, *field.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)
