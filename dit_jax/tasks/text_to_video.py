"""Text to video: captioned clips, packed, and a transformer that learns to make them.

This is where the rooms meet: a sample becomes patches, positions and text tokens; a batch becomes
noise levels, a prediction and a loss; the averaged parameters become clips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax.config import Config, DataConfig
from dit_jax.data import (
    Loader,
    MovingShapes,
    RecordsSource,
    ShapesConfig,
    Tokenized,
    caption,
    check_fits,
    held_out_scenes,
)
from dit_jax.diffusion import DiffusionConfig, drop_captions, noise_batch, velocity_loss
from dit_jax.evaluation import mean_psnr, prompt_following
from dit_jax.models import (
    ModelConfig,
    TextToVideo,
    byte_tokens,
    forward_flops,
    patchify,
    positions,
)
from dit_jax.parallel import choose_attention, choose_dot_general, make_constrain
from dit_jax.sampling import Generator, Request, contact_sheet, make_clips, to_float, write_png
from dit_jax.training import Task, Work
from dit_jax.types import PAD, PackedBatch, Params, Sample, Source

FRAMES_SHOWN = 5
CLIPS_SHOWN = 24
SHEET_SCALE = 3


def make_source(config: DataConfig) -> Source:
    """Opens the data; raises ``ValueError`` where it is absent, foreign or empty."""
    if isinstance(config.source, ShapesConfig):
        return MovingShapes(config.source)
    return RecordsSource(config.source)


def make_model(config: ModelConfig, mesh: Mesh) -> TextToVideo:
    """The model, told how to attend and how to lie on the mesh."""
    return TextToVideo(
        config, choose_attention(mesh), make_constrain(mesh), choose_dot_general(mesh)
    )


def tokenize(model: ModelConfig, sample: Sample) -> Tokenized:
    """A sample as clean patches, positions and text tokens."""
    video = to_float(sample["video"])
    places, frame_ids = positions(model.patch, *video.shape[:3], fps=sample["fps"])
    return {
        "tokens": patchify(model.patch, video),
        "positions": places,
        "frame_ids": frame_ids,
        "text": byte_tokens(sample["caption"], model.text.max_bytes),
    }


def init_params(model: TextToVideo, key: jax.Array) -> Params:
    """Fresh parameters that carry their logical axes (the shapes do not depend on the batch)."""
    ids = jnp.zeros((1, 1), jnp.int32)
    tokens = jnp.zeros((1, 1, model.config.patch.dim))
    return model.init(key, tokens, jnp.zeros((1, 1, 3)), ids, ids, jnp.zeros((1, 1)), ids, ids)


def batch_loss(
    model: TextToVideo, config: DiffusionConfig, params: Params, batch: PackedBatch, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum of the tokens' velocity errors, and the sum of their weights."""
    noised = noise_batch(config, key, batch)
    output: Any = model.apply(
        params,
        noised.tokens,
        batch.positions,
        batch.segment_ids,
        noised.group_ids,
        noised.group_t,
        batch.text,
        drop_captions(batch.text_segment_ids, noised.dropped),
    )
    error, weight = velocity_loss(config, output, noised, batch)
    return error.sum(), weight.sum()


def batch_work(model: ModelConfig, batch: PackedBatch) -> Work:
    """What training on a (local, NumPy) batch takes."""
    segments = np.arange(batch.num_tokens.shape[1]) + 1
    letters = (np.asarray(batch.text_segment_ids)[:, None] == segments[:, None]).sum(-1)
    flops = 3 * forward_flops(model, np.asarray(batch.num_tokens), letters).sum()
    return Work(float((batch.segment_ids != PAD).sum()), float(batch.segment_ids.size), flops)


class Cases:
    """Prompts that a run shows and is measured on, with the truth where there is one."""

    def __init__(self, config: Config) -> None:
        self._config = config
        source, count = config.data.source, config.evaluation.prompts
        self._scenes: list[Any] = []
        self._true: list[np.ndarray] = []
        if isinstance(source, ShapesConfig):
            made = config.sampling
            shown = max(count, config.log.draw_count)
            self._scenes = held_out_scenes(shown, config.seed, made.frames, made.height, made.width)
            sizes = [(caption(s), s.frames, s.height, s.width, source.fps) for s in self._scenes]
        else:
            split = config.evaluation.records_split
            held = RecordsSource(dataclasses.replace(source, split=split or source.split))
            samples = [held[i] for i in range(min(len(held), max(count, config.log.draw_count)))]
            self._true = [s["video"] for s in samples] if split else []
            sizes = [(s["caption"], *s["video"].shape[:3], s["fps"]) for s in samples]
        self.requests = [Request(*size, seed=i) for i, size in enumerate(sizes)]

    def measure(self, clips: list[np.ndarray]) -> dict[str, float]:
        """The judge's verdict on moving shapes; the distance to the truth on recorded clips."""
        if self._scenes:
            return prompt_following(clips, self._scenes[: len(clips)])
        return {"psnr": mean_psnr(clips, self._true[: len(clips)]), "count": len(clips)}

    @property
    def measurable(self) -> bool:
        return bool(self._scenes or self._true) and self._config.evaluation.prompts > 0


def build(config: Config, mesh: Mesh) -> Task:
    """The task of a config on a mesh; opens the data, and makes nothing else yet."""
    source = make_source(config.data)
    if len(source) < 1:
        raise ValueError("the dataset is empty: check data.source's path, split and filters.")
    packing = config.data.packing
    if packing.row_tokens % mesh.shape["context"]:
        raise ValueError(
            f"data.packing.row_tokens {packing.row_tokens} do not divide over mesh.context "
            f"{mesh.shape['context']}: make them a multiple of it."
        )
    first = tokenize(config.model, source[0])
    check_fits(packing, len(first["tokens"]), len(first["text"]), "the first sample")
    model = make_model(config.model, mesh)
    generator = Generator(model, config.diffusion, config.sampling)
    cases = Cases(config)

    def draw(params: Params, path: Path) -> None:
        requests = cases.requests[: config.log.draw_count]
        clips = make_clips(generator, params, requests, config.model, mesh)
        _sheet(clips, path)

    def report(params: Params, directory: Path) -> Mapping[str, float]:
        if not cases.measurable:
            return {}
        requests = cases.requests[: config.evaluation.prompts]
        clips = make_clips(generator, params, requests, config.model, mesh, progress=True)
        _sheet(clips[:CLIPS_SHOWN], directory / "samples.png")
        return cases.measure(clips)

    return Task(
        name="text_to_video",
        init=partial(init_params, model),
        loss=partial(batch_loss, model, config.diffusion),
        loader=lambda rows: Loader(
            source, partial(tokenize, config.model), packing, config.seed, rows
        ),
        rows=packing.rows,
        work=partial(batch_work, config.model),
        draw=draw,
        report=report,
    )


def _sheet(clips: list[np.ndarray], path: Path) -> None:
    if jax.process_index() == 0:
        write_png(path, contact_sheet(clips, FRAMES_SHOWN, SHEET_SCALE))
