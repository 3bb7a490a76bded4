"""Text to video: captioned clips, packed, and a transformer that learns to make them.

This is where the rooms meet: a sample becomes patches, positions and text tokens; a batch becomes
noise levels, a prediction and a loss; the averaged parameters become clips.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax.config import DataConfig, VideoRun
from dit_jax.data import (
    Augment,
    Loader,
    Reader,
    Tokenized,
    TransformConfig,
    check_fits,
    check_tokenized,
    checked_reader,
    choose_caption,
    crop,
    flip,
    open_source,
)
from dit_jax.diffusion import DiffusionConfig, MaskConfig, noise_batch, sample_keys, token_loss
from dit_jax.model import (
    ByteEncoderConfig,
    Field,
    Fields,
    ModelConfig,
    TextStatesConfig,
    TextToVideo,
    check_fields,
    field_tokens,
    forward_flops,
    no_attention,
    patchify,
    positions,
    prepare_fields,
)
from dit_jax.parallel import (
    DEFAULT_ATTENTION,
    AttentionConfig,
    batch_shards,
    choose_attention,
    choose_dot_general,
    local_rows,
    make_constrain,
    platform,
    token_multiple,
    ulysses_size,
)
from dit_jax.sampling import Generator, Request, make_clips, to_float
from dit_jax.training import Evaluation, Evaluator, Parts, Task, Work
from dit_jax.training.cases import Cases, write_sheet
from dit_jax.training.evaluators import LEVELS
from dit_jax.training.frozen import check_codec, encoded, open_codec, open_for_data, with_states
from dit_jax.types import PAD, Batch, Codec, DenoiserInputs, Params, Runtime, Sample, Source, Totals

AS_THEY_ARE = TransformConfig()


def make_augment(config: DataConfig) -> Augment | None:
    """What is drawn anew for a sample in every epoch: its caption, its mirror image."""
    mixes = [one.caption_mix for one in getattr(config.source, "record_sets", ())]
    if not any(mixes):
        return flip if config.transform.flip else None

    def augment(sample: Sample, rng: np.random.Generator) -> Sample:
        sample = choose_caption(sample, rng, mixes[sample.get("part", 0)])
        return flip(sample, rng) if config.transform.flip else sample

    return augment


def make_model(
    config: ModelConfig, mesh: Mesh, attention: AttentionConfig = DEFAULT_ATTENTION
) -> TextToVideo:
    """The model, told how to attend and how to lie on the mesh."""
    heads, tensor = config.dit.heads, mesh.shape["tensor"]
    if heads % tensor:
        raise ValueError(
            f"mesh.tensor {tensor} does not divide the transformer's {heads} heads, each lying "
            f"on one device: make it {math.gcd(heads, tensor)}, or spread tokens (mesh.context)."
        )
    return TextToVideo(
        config.on(platform(mesh)),
        Runtime(
            attention=choose_attention(mesh, attention),
            constrain=make_constrain(mesh),
            dot_general=choose_dot_general(mesh),
            block_dot_general=choose_dot_general(mesh, config.matmul),
        ),
    )


def check_layout(config: VideoRun, mesh: Mesh) -> None:
    """Raises ``ValueError`` where batches of the config cannot be laid out over the mesh."""
    packing, parts, context = config.data.packing, batch_shards(mesh), mesh.shape["context"]
    accumulate = config.optimizer.accumulate
    if packing.rows // accumulate % parts:
        each = f" in each of optimizer.accumulate {accumulate} parts" if accumulate > 1 else ""
        raise ValueError(
            f"data.packing.rows {packing.rows}: {packing.rows // accumulate} rows{each} do not divide "
            f"over mesh.data x mesh.fsdp = {parts}. Make rows a multiple of {accumulate * parts}, or "
            "spread tokens (mesh.context) instead."
        )
    multiple = token_multiple(mesh, config.attention)
    if packing.row_tokens % multiple:
        raise ValueError(
            f"data.packing.row_tokens {packing.row_tokens} do not divide over mesh.context {context}: "
            f"make them a multiple of {multiple}."
        )
    if context > 1:
        ulysses_size(config.attention, context, config.model.dit.heads // mesh.shape["tensor"])


def tokenize(
    model: ModelConfig,
    sample: Sample,
    transform: TransformConfig = AS_THEY_ARE,
    codec: Codec | None = None,
    time_stride: int | None = None,
) -> Tokenized:
    """A sample as clean patches, positions, text tokens and the fields that the model reads.

    Pixels pass through ``codec`` if there is one. ``time_stride`` is that of the codec that made the
    data, if they are latents.
    """
    strides = (1, 1, 1) if codec is None else codec.strides

    def grid(video: np.ndarray) -> np.ndarray:
        """Pixels as what the model generates; latents as they are."""
        if video.dtype != np.uint8:
            return video
        return to_float(video) if codec is None else _encoded(codec, to_float(video), sample)

    beside = {name: crop(transform, v) for name, v in sample.get("pixel_fields", {}).items()}
    sample = {**sample, "video": crop(transform, sample["video"]), "pixel_fields": beside}
    for name, conditioner in model.conditioners.items():
        sample = conditioner.derive(name, sample)
    video, fps = grid(sample["video"]), sample["fps"]
    if sample["video"].dtype == np.uint8:
        fps, time_stride = fps / strides[0], strides[0]
    places, frame_ids = positions(model.patch, *video.shape[:3], fps=fps)
    token_fields = field_tokens(
        model.patch,
        time_stride or 1,
        (video.shape[0], video.shape[1], video.shape[2]),
        {k: v for k, v in sample.get("frame_fields", {}).items() if k in model.conditioners},
        {k: grid(v) for k, v in sample.get("pixel_fields", {}).items() if k in model.conditioners},
    )
    segment_fields = dict(sample.get("segment_fields", {}), fps=fps)
    check_fields(model, token_fields, segment_fields, "the sample")
    kinds = {name: one.field(model) for name, one in model.conditioners.items()}
    kinds["fps"] = Field("segment", ())
    return {
        "tokens": patchify(model.patch, video),
        "positions": places,
        "frame_ids": frame_ids,
        "text": model.text_tokens(sample["caption"], sample.get("text_states")),
        "token_fields": {k: v.astype(kinds[k].dtype) for k, v in token_fields.items()},
        "segment_fields": {
            k: np.asarray(v, kinds[k].dtype) for k, v in segment_fields.items() if k in kinds
        },
    }


def caption_length(model: ModelConfig, sample: Sample) -> tuple[int, int]:
    """How long a sample's caption is, in bytes or text states, and how much of it is read."""
    text = model.text
    if isinstance(text, ByteEncoderConfig):
        return text.length(sample["caption"]) - 1, text.max_bytes
    if isinstance(text, TextStatesConfig):
        return len(sample.get("text_states", ())), text.max_tokens - 1
    return 0, 0


def check_record_size(config: VideoRun, frames: int, height: int, width: int, pixels: bool) -> None:
    """Raises ``ValueError`` if a record of this stored size cannot be packed."""
    patch, codec = config.model.patch, config.codec
    size = (frames, height, width)
    if pixels:
        if (side := config.data.transform.crop) is not None:
            height = width = side
        size = codec.latent_size(frames, height, width)
    packing = config.data.packing
    check_fits(packing, patch.num_tokens(*size), 0, " x ".join(map(str, (frames, height, width))))


def _encoded(codec: Codec, video: np.ndarray, sample: Sample) -> np.ndarray:
    """A clip's latents; raises ``ValueError`` with its caption where it has none."""
    try:
        return np.asarray(codec.encode(video), np.float32)
    except ValueError as error:
        raise ValueError(
            f"the clip {sample['caption'][:60]!r} cannot be encoded: {error} Or leave such clips out "
            "(data.transform crops pictures, not lengths)."
        ) from error


def init_params(model: TextToVideo, key: jax.Array) -> Params:
    """Fresh parameters that carry their logical axes (the shapes do not depend on the batch)."""
    # Attention has no parameters, and its kernels do not take the single token given here.
    model = model.clone(runtime=dataclasses.replace(model.runtime, attention=no_attention))
    ids = jnp.zeros((1, 1), jnp.int32)
    tokens = jnp.zeros((1, 1, model.config.patch.dim))
    config, text = model.config, model.config.text
    fields = {name: one.field(config) for name, one in config.conditioners.items()}

    def zeros(of: str) -> dict[str, jax.Array]:
        return {k: jnp.zeros((1, 1, *f.shape), f.dtype) for k, f in fields.items() if f.of == of}

    keys = jax.random.split(key, (1, 1))
    given = Fields(zeros("token"), {"fps": jnp.ones((1, 1)), **zeros("segment")})
    given = prepare_fields(config.conditioners, keys, ids, ids, given, False)
    inputs = DenoiserInputs(
        tokens=tokens,
        positions=jnp.zeros((1, 1, 3)),
        segment_ids=ids,
        group_ids=ids,
        group_t=jnp.zeros((1, 1)),
        text=jnp.zeros((1, 1, text.dim)) if isinstance(text, TextStatesConfig) else ids,
        text_segment_ids=ids,
        dropped=jnp.zeros((1, 1)),
        token_fields=given.tokens,
        segment_fields=given.segments,
    )
    return model.init(key, inputs)


def batch_loss(
    model: TextToVideo,
    config: DiffusionConfig,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
    step: jax.Array | None = None,
    time: jax.Array | None = None,
) -> tuple[jax.Array, Totals]:
    """Sum of the tokens' losses, and the sum of their weights; the step does not matter. ``time`` is
    every segment's noise level, if it is not drawn."""
    del frozen, step
    inputs, target = noise_batch(config, key, batch, time)
    tokens, segments = prepare_fields(
        model.config.conditioners,
        sample_keys(key, batch.sample_ids),
        batch.segment_ids,
        batch.token_ids,
        Fields(batch.token_fields, batch.segment_fields),
        train=True,
    )
    inputs = dataclasses.replace(inputs, token_fields=tokens, segment_fields=segments)
    output: Any = model.apply(params, inputs)
    error, weight = token_loss(config, output, inputs, target, batch)
    loss = error.sum()
    return loss, Totals(loss, weight.sum(), {})


def batch_work(model: ModelConfig, batch: Batch) -> Work:
    """What training on a (local, NumPy) batch takes."""
    segments = np.arange(batch.num_tokens.shape[1]) + 1
    letters = (np.asarray(batch.text_segment_ids)[:, None] == segments[:, None]).sum(-1)
    flops = 3 * forward_flops(model, np.asarray(batch.num_tokens), letters).sum()
    return Work(float((batch.segment_ids != PAD).sum()), float(batch.segment_ids.size), flops)


def build_text_to_video(config: VideoRun, mesh: Mesh) -> Task:
    """The task of a config on a mesh; opens the data, and makes nothing else yet."""
    check_layout(config, mesh)
    source = open_source(config.data.source)
    packing = config.data.packing
    codec = open_codec(config, mesh)
    check_codec(codec, source)
    if (encoder := open_for_data(config, source)) is not None:
        source = encoded(source, encoder)
    to_tokens = partial(
        tokenize,
        config.model,
        transform=config.data.transform,
        codec=codec,
        time_stride=config.codec.t,
    )

    def check_first(sample: Sample, name: str) -> bool:
        first = to_tokens(sample)
        check_tokenized(packing, first, name)
        return sample["video"].dtype == np.uint8

    pixels = Reader(source).first(check_first)
    if config.data.transform.flip and not pixels:
        raise ValueError(
            "data.transform.flip is set and the data are latents, which cannot be mirrored: write both "
            "when they are made (scripts/images_to_latents.py --flip), and unset it."
        )
    check_size = partial(check_record_size, config, pixels=pixels)
    reader = checked_reader(
        source, check_size, config.data.bad_records, config.data.max_bad_records
    )

    def to_tokens_counted(sample: Sample) -> Tokenized:
        length, most = caption_length(config.model, sample)
        if length > most:
            reader.note_cut(sample["caption"], length, most)
        return to_tokens(sample)

    model = make_model(config.model, mesh, config.attention)
    generator = Generator(model, config.diffusion, config.sampling)
    cases = Cases(config, codec)
    wanted = with_states(cases.requests, encoder)
    augment = make_augment(config.data)
    decode = None if codec is None else codec.decode
    kinds = {name: one.field(config.model).of for name, one in config.model.conditioners.items()}
    token_fields = [name for name, of in kinds.items() if of == "token"]
    segment_fields = ["fps", *(name for name, of in kinds.items() if of == "segment")]

    def sample(params: Params, requests: Sequence[Request], mean: bool = False) -> list[np.ndarray]:
        return make_clips(generator, params, requests, config.model, mesh, mean, decode)

    def sheet(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
        path = directory / f"samples_{step:07d}.png"
        write_sheet(sample(ema, wanted[: config.log.draw_count]), path)
        return Evaluation(picture=path)

    def report(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
        clips = sample(ema, wanted[: config.evaluation.prompts], True)
        write_sheet(clips, directory / "samples.png")
        return Evaluation(cases.measure(clips), directory / "samples.png")

    evaluators = (
        [Evaluator("samples", config.log.draw_every, sheet)] if config.log.draw_every else []
    )
    if cases.measurable:
        evaluators.append(Evaluator("report", 0, report))
    load = partial(Loader, config=packing, token_fields=token_fields, segment_fields=segment_fields)
    rows = local_rows(mesh, packing.rows)

    def held_out() -> Batch:
        held = held_out_source(config)
        held = held if encoder is None else encoded(held, encoder)
        # Its bad records are left out as those of training are.
        loader = load(Reader(held, len(held)), to_tokens, seed=0, rows=rows)
        batch = next(loader)
        loader.close()
        return batch

    # Every token generated and every caption read: else the draws of these would be noise.
    plain = dataclasses.replace(
        config.diffusion, masks=MaskConfig.only(none=1.0), caption_dropout=0.0
    )

    def loss_at(params: Params, frozen: Params, batch: Batch, key: jax.Array, level: jax.Array):
        return batch_loss(model, plain, params, frozen, batch, key, time=level)

    parts = Parts(config, mesh, rows, loss_at, LEVELS, held_out, sample)
    return Task(
        name="text_to_video",
        init=partial(init_params, model),
        loss=partial(batch_loss, model, config.diffusion),
        loader=lambda rows: load(
            reader, to_tokens_counted, seed=config.seed, rows=rows, augment=augment
        ),
        rows=packing.rows,
        work=partial(batch_work, config.model),
        evaluators=(*evaluators, *(one.build(parts) for one in config.evaluators)),
    )


def held_out_source(config: VideoRun) -> Source:
    """Samples that training does not see: of the split that is named for it, or those that the source
    says; if it says none, its own."""
    shown, split = config.data.source, config.evaluation.records_split
    shown = getattr(shown, "shown_set", shown)  # Of a mixture, one of its sets.
    if split is not None:
        return open_source(dataclasses.replace(shown, split=split))
    source: Any = open_source(shown)
    return source.eval_set() if hasattr(source, "eval_set") else source
