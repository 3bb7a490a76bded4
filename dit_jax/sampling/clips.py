"""Requests to clips: batches of them over the mesh, tokens put together to pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dit_jax.models import ModelConfig, unpatchify
from dit_jax.parallel import batch_shards, global_batch, token_multiple
from dit_jax.sampling.generate import Generator, Request, check_request, text_condition
from dit_jax.sampling.media import to_uint8
from dit_jax.types import Params

Decode = Callable[[np.ndarray], np.ndarray]
"""Latents ``[t, h, w, c]`` to pixels ``[t, h, w, 3]``, float in [-1, 1]."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


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
    sizes = [model.patch.num_tokens(r.frames, r.height, r.width) for r in requests]
    length = _round_up(max(sizes), token_multiple(mesh))
    shards = batch_shards(mesh)
    config = generator.config
    if config.cfg_scale != 1 and config.cfg_interval == (0.0, 1.0) and shards % 2 == 0:
        shards //= 2  # every step has two rows for each clip
    rows = _round_up(min(generator.config.batch, len(requests)), shards)
    gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    clips: list[np.ndarray] = []
    batches = -(-len(requests) // rows)
    with tqdm(
        total=batches * generator.config.steps,
        unit="step",
        desc="sampling",
        disable=not progress or jax.process_index() != 0,
        dynamic_ncols=True,
    ) as bar:
        for first in range(0, len(requests), rows):
            part = list(requests[first : first + rows])
            # A short last batch is filled up, so that all batches run the same compiled step.
            full = part + [dataclasses.replace(part[-1])] * (rows - len(part))
            condition = text_condition(full, model, length)
            placed = global_batch(mesh, condition, tuple(range(rows)), rows)
            tokens = np.asarray(gather(generator(params, placed, bar.update)))
            for request, row in zip(part, tokens, strict=False):
                size = (request.frames, request.height, request.width)
                clip = unpatchify(model.patch, row[: model.patch.num_tokens(*size)], *size)
                clips.append(to_uint8(clip if decode is None else decode(clip)))
    return clips
