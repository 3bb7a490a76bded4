"""Requests to clips: batches of them over the mesh, tokens put together to pixels."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dit_jax.model import ModelConfig, PatchConfig, unpatchify
from dit_jax.parallel import batch_shards, global_batch, token_multiple
from dit_jax.sampling.condition import (
    Request,
    check_request,
    check_request_fields,
    make_inputs,
)
from dit_jax.sampling.generate import Generator
from dit_jax.sampling.media import to_uint8
from dit_jax.types import Params

CONTEXT = 8
"""Latents of a loop's end that are decoded before its beginning."""

Decode = Callable[[np.ndarray], np.ndarray]
"""Latents ``[t, h, w, c]`` to pixels ``[t, h, w, 3]``, float in [-1, 1]."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """The same on every process; compiled once, however often clips are made."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def make_clips(
    generator: Generator,
    params: Params,
    requests: Sequence[Request],
    model: ModelConfig,
    mesh: Mesh,
    progress: bool = False,
    decode: Decode | None = None,
) -> list[np.ndarray]:
    """Makes every request's clip, uint8 ``[t, h, w, 3]``; the same on every process.

    The sizes of requests count latents where ``decode`` makes pixels of what the model makes. Requests
    of any sizes share batches; all are checked before the first is made.
    """
    for request in requests:
        check_request(request, model.patch)
    kinds = [generator.steps_of(request) for request in requests]
    batches = (
        -(-count // clips_at_once(generator, count, mesh))
        for count in collections.Counter(kinds).values()
    )
    with tqdm(
        total=sum(batches) * generator.config.steps,
        unit="step",
        desc="sampling",
        disable=not progress or jax.process_index() != 0,
        dynamic_ncols=True,
    ) as bar:
        rows = make_rows(generator, params, requests, model, mesh, bar.update)
        return [
            to_uint8(_pixels(request, row, model.patch, decode))
            for request, row in zip(requests, rows, strict=True)
        ]


def clips_at_once(generator: Generator, count: int, mesh: Mesh) -> int:
    """Rows of the batches in which so many requests are made."""
    config, shards = generator.config, batch_shards(mesh)
    if config.cfg_scale != 1 and config.cfg_interval == (0.0, 1.0) and shards % 2 == 0:
        shards //= 2  # every step has two rows for each clip
    return _round_up(min(config.batch, count), shards)


def make_rows(
    generator: Generator,
    params: Params,
    requests: Sequence[Request],
    model: ModelConfig,
    mesh: Mesh,
    on_step: Callable[[], object] = lambda: None,
    together: Sequence[Request] = (),
) -> Iterator[np.ndarray]:
    """Rows ``[l, p]`` that begin with the clean tokens of each request; the same on every process.

    Requests share batches as far as they share steps (``Generator.steps_of``).

    Args:
        on_step: called after each step of the solver.
        together: requests of other calls that are to be made by the same compiled step.
    """
    for request in requests:
        check_request_fields(request, model)
    kinds = [generator.steps_of(request) for request in requests]
    if len(set(kinds)) > 1:
        found: dict[int, np.ndarray] = {}
        for kind in dict.fromkeys(kinds):
            places = [i for i, one in enumerate(kinds) if one == kind]
            alike = [requests[i] for i in places]
            rows = make_rows(generator, params, alike, model, mesh, on_step, together)
            found |= zip(places, rows, strict=True)
        yield from (found[i] for i in range(len(requests)))
        return
    every = [*requests, *together]
    length = max(request.num_tokens(model.patch) for request in every)
    length = _round_up(length, token_multiple(mesh))
    rows = clips_at_once(generator, len(requests), mesh)
    gather = _gather(mesh)
    for first in range(0, len(requests), rows):
        part = list(requests[first : first + rows])
        # A short last batch is filled up, so that all batches run the same compiled step.
        full = part + [dataclasses.replace(part[-1])] * (rows - len(part))
        condition = make_inputs(full, model, length, every)
        placed = global_batch(mesh, condition, tuple(range(rows)), rows)
        yield from np.asarray(gather(generator(params, placed, on_step)))[: len(part)]


def _pixels(
    request: Request, row: np.ndarray, patch: PatchConfig, decode: Decode | None
) -> np.ndarray:
    """A request's clip, float in [-1, 1], of a row that begins with its tokens."""
    frames, height, width = request.size
    tokens = row[: request.num_tokens(patch)]
    if not request.loop:
        clip = unpatchify(patch, tokens, frames, height, width)
        return clip if decode is None else decode(clip)
    _, h, w = patch.grid(1, height, width)
    clip = unpatchify(patch, np.concatenate([tokens[: h * w], tokens]), frames + 1, height, width)
    clip = clip[1:]
    return clip if decode is None else _decode_loop(decode, clip)


def _decode_loop(decode: Decode, latents: np.ndarray) -> np.ndarray:
    """A loop's pixels: what comes before its first latent is its end, also for a causal decoder."""
    before = latents[np.arange(-CONTEXT, 0) % len(latents)]
    made = decode(np.concatenate([before, latents]))
    stride = (len(made) - 1) // (CONTEXT + len(latents) - 1)
    return made[-stride * len(latents) :]
