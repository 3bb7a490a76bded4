"""Several processes: joining each other, ending together, and each making its own part of a batch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh

from dit_jax.parallel.cluster import Place, find_place
from dit_jax.parallel.lifeline import Lifeline, delay_aborts
from dit_jax.parallel.rules import batch_sharding
from dit_jax.types import ALONG_TOKENS

INVITATION = "dit_jax/lifeline"
"""Where the coordination service keeps how to reach process 0's lifeline."""
A_WEEK = 7 * 24 * 3600 * 1000
"""In milliseconds; a process that dies ends those that wait."""


@contextlib.contextmanager
def joined(
    flags: Mapping[str, str | None] | None, prog: str, user_errors: type[Exception] = ValueError
) -> Iterator[None]:
    """What is done inside is done by all processes of the run: they begin, fail and end together.

    ``flags`` are those of ``take_process_flags``. A process that is alone notices nothing: errors are
    its caller's. Among several, an error inside ends the process here, because the way out through the
    interpreter would wait for the others: with exit status 2, which launchers do not start again, for
    ``user_errors``, which are printed as ``prog``'s; else with 1. A verb whose errors of the user are
    all ``InputError`` gives that, and any other ``ValueError`` is then a failure like others.

    Raises:
        InputError: if flags or environment make no sense.
        SystemExit: with status 1, if the others are not there in time.
    """
    try:
        lifeline = initialize(flags)
    except ConnectionError as error:
        raise SystemExit(f"{prog}: error: {error}") from error
    if lifeline is None:
        yield
        return
    try:
        yield
        jax.distributed.shutdown()  # returns when all have come here
    except BaseException as error:
        lifeline.fail(error, prog, isinstance(error, user_errors))
    lifeline.close()


def initialize(flags: Mapping[str, str | None] | None = None) -> Lifeline | None:
    """Joins the other processes of the run, if ``find_place`` says that there are any.

    CPU processes talk by gloo. From then on the death of any of them ends this one, too.

    Raises:
        InputError: if flags or environment make no sense.
        ConnectionError: if the others are not there in time; starting all again may help.
    """
    place = find_place(flags)
    if place is None:
        return None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.coordinator,
            num_processes=place.count,
            process_id=place.index,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
        )
    except RuntimeError as error:
        raise ConnectionError(
            f"process {place.index} of {place.count} could not join the others at "
            f"{place.coordinator} ({error}): start them all, with the same address, and a port that is "
            "free on the host of process 0."
        ) from error
    delay_aborts()
    return _start_lifeline(place)


def _start_lifeline(place: Place) -> Lifeline:
    """Connects every process with process 0, by way of the coordination service's store."""
    lifeline = Lifeline(place.index, place.count)
    client = distributed.global_state.client
    assert client is not None
    if place.index == 0:
        client.key_value_set(INVITATION, lifeline.listen())
        return lifeline
    host = place.coordinator.rpartition(":")[0]
    try:
        lifeline.join(host, client.blocking_key_value_get(INVITATION, 60_000))
    except OSError as error:
        print(
            f"{lifeline.name} cannot reach process 0 at {host} by TCP ({error}): if it dies, "
            "the others learn of it from JAX alone, a minute later. Allow connections between hosts.",
            file=sys.stderr,
        )
    return lifeline


def tell_all(name: str, text: str) -> str:
    """What process 0 says, on every process; what the others give is ignored. A name serves once.

    However long process 0 takes to come here, the others wait: a collective would give up.
    """
    client = distributed.global_state.client
    if client is None:
        return text
    if jax.process_index() == 0:
        client.key_value_set(f"dit_jax/{name}", text)
        return text
    return client.blocking_key_value_get(f"dit_jax/{name}", A_WEEK)


def wait_for_all(name: str) -> None:
    """Returns when every process has come here, however long that takes. A name serves once."""
    client = distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(f"dit_jax/{name}", A_WEEK)


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

    Fields of tokens (``types.ALONG_TOKENS``) are spread over ``context`` too, where it divides them.
    """
    place = {row: i for i, row in enumerate(rows)}

    def put(path: Any, field: np.ndarray) -> jax.Array:
        of_tokens = path[-1].name in ALONG_TOKENS
        along_tokens = of_tokens and field.shape[1] % mesh.shape["context"] == 0
        sharding = batch_sharding(mesh, field.ndim, along_tokens, rows=total)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = range(*index[0].indices(total))
            local = field[place[wanted[0]] : place[wanted[-1]] + 1]
            return local[(slice(None), *index[1:])]

        return jax.make_array_from_callback((total, *field.shape[1:]), sharding, part)

    return jax.tree_util.tree_map_with_path(put, batch)
