"""Text to video: captioned clips, packed, and a transformer that learns to generate them.

This is where the rooms meet: a sample becomes patches, positions and text tokens; a batch becomes
noise levels, a prediction and a loss; the averaged parameters become clips.

The frozen networks around the model, its codec and text encoder, are opened by their configs (what
makes latents and states is in satellites) and known by the hashes of their weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax import data, parallel
from dit_jax import model as models
from dit_jax.config import DataConfig, Run, VideoRun
from dit_jax.data import packing, records
from dit_jax.data.shapes import render
from dit_jax.diffusion import DiffusionConfig, MaskConfig, noise_batch, sample_keys, token_loss
from dit_jax.files import refuse_if
from dit_jax.sampling import Generation, Generator, Request, make_clips, to_float
from dit_jax.training.step import abstract_params
from dit_jax.training.task import LEVELS, Evaluation, Evaluator, Parts, Task, Work, write_sheet
from dit_jax.types import (
    PAD,
    Batch,
    Codec,
    Params,
    PixelCodec,
    Runtime,
    Sample,
    Source,
    TextEncoder,
    Totals,
)

UNCHANGED = data.TransformConfig()

# ---------------------------------------------------------------------------------------------------
# Prompts, as far as they need a text encoder
# ---------------------------------------------------------------------------------------------------


def with_states(requests: Sequence[Request], encoder: TextEncoder | None) -> list[Request]:
    """Requests with the states of their prompts and negative prompts, if they lack them."""
    if encoder is None:
        return list(requests)
    texts = [r.prompt for r in requests if r.text_states is None]
    texts += [r.negative for r in requests if r.negative_states is None]
    texts = list(dict.fromkeys(texts))
    states: dict[str, Any] = dict(zip(texts, encoder.encode(texts), strict=True))
    out = []
    for r in requests:
        text, negative = r.text_states, r.negative_states
        text = states[r.prompt] if text is None else text
        negative = states[r.negative] if negative is None else negative
        out.append(dataclasses.replace(r, text_states=text, negative_states=negative))
    return out


def prompt_length(config: VideoRun) -> tuple[Callable[[str], int], int] | None:
    """How the model counts a prompt, and how much of one it reads, in bytes or tokens; None for a model
    of classes, and for one of states without their encoder."""
    text, counted = config.model.text, config.text_encoder.length()
    if isinstance(text, models.ByteEncoderConfig):
        return lambda prompt: text.length(prompt) - 1, text.max_bytes
    begins = text.begins if isinstance(text, models.TextStatesConfig) else 1
    return counted and (counted[0], min(counted[1], text.max_tokens - begins))


def cut_note(config: VideoRun, texts: Sequence[str]) -> str | None:
    """A warning of texts of which the model does not read all: how many, and the first."""
    length, limit = prompt_length(config) or (len, math.inf)
    cut = [text for text in dict.fromkeys(texts) if length(text) > limit]
    if not cut:
        return None
    unit = "bytes" if isinstance(config.model.text, models.ByteEncoderConfig) else "tokens"
    return (
        f"{len(cut)} of {len(set(texts))} texts are longer than the {limit} {unit} that the model "
        f"reads, and cut there. The first has {length(cut[0])}: {cut[0][:200]!r}"
    )


# ---------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------


def make_augment(config: DataConfig) -> packing.Augment | None:
    """What is drawn anew for a sample in every epoch: its caption, its mirror image."""
    mixes = [one.caption_mix for one in getattr(config.source, "record_sets", ())]
    if not any(mixes):
        return records.flip if config.transform.flip else None

    def augment(sample: Sample, rng: np.random.Generator) -> Sample:
        sample = records.choose_caption(sample, rng, mixes[sample.get("part", 0)])
        return records.flip(sample, rng) if config.transform.flip else sample

    return augment


def to_latents(codec: Codec | None, video: np.ndarray) -> np.ndarray:
    """What the model generates, of pixels uint8: latents, or float pixels; latents as they are."""
    if video.dtype != np.uint8:
        return video
    return np.asarray((codec or PixelCodec()).encode(to_float(video)), np.float32)


def with_fields(
    model: models.ModelConfig, sample: Sample, transform: data.TransformConfig, codec: Codec | None
) -> Sample:
    """The sample cropped, with every field that the model reads: some conditioners derive theirs from
    the clip, and clips beside the clip become what the model generates."""
    beside = {name: data.crop(transform, v) for name, v in sample.get("pixel_fields", {}).items()}
    sample = {**sample, "video": data.crop(transform, sample["video"]), "pixel_fields": beside}
    for name, conditioner in model.conditioners.items():
        sample = conditioner.derive(name, sample)
    frames, pixels = sample.get("frame_fields", {}), sample.get("pixel_fields", {})
    frames = {k: v for k, v in frames.items() if k in model.conditioners}
    pixels = {k: to_latents(codec, v) for k, v in pixels.items() if k in model.conditioners}
    return {**sample, "frame_fields": frames, "pixel_fields": pixels}


def tokenize(
    model: models.ModelConfig,
    sample: Sample,
    transform: data.TransformConfig = UNCHANGED,
    codec: Codec | None = None,
    time_stride: int | None = None,
) -> data.Tokenized:
    """A sample as clean patches, positions, text tokens and the fields that the model reads.

    Pixels pass through ``codec`` if there is one. ``time_stride`` is that of the codec that made the
    data, if they are latents.
    """
    sample = with_fields(model, sample, transform, codec)
    video, fps = to_latents(codec, sample["video"]), sample["fps"]
    if sample["video"].dtype == np.uint8:
        time_stride = (codec or PixelCodec()).strides[0]
        fps = fps / time_stride
    t, h, w, _ = video.shape
    places, frame_ids = models.positions(model.patch, t, h, w, fps=fps)
    fields = sample.get("frame_fields", {}), sample.get("pixel_fields", {})
    per_token = models.field_tokens(model.patch, time_stride or 1, (t, h, w), *fields)
    per_clip = dict(sample.get("segment_fields", {}), fps=fps)
    per_token, per_clip = models.check_fields(model, per_token, per_clip, "the sample")
    return {
        "tokens": models.patchify(model.patch, video),
        "positions": places,
        "frame_ids": frame_ids,
        "text": model.text.tokens(sample["caption"], sample.get("text_states")),
        "token_fields": per_token,
        "segment_fields": {**per_clip, "fps": np.asarray(fps, np.float32)},
    }


def held_out_source(config: VideoRun) -> Source:
    """Samples that training does not see: of ``data.eval_split``, or those that the source says; if it
    says none, its own."""
    shown, split = config.data.source, config.data.eval_split
    shown = getattr(shown, "shown_set", shown)  # Of a mixture, one of its sets.
    if split is not None and isinstance(shown, data.RecordsConfig):
        shown = dataclasses.replace(shown, split=split)
    source: Any = data.open_source(shown)
    return source.eval_set() if hasattr(source, "eval_set") else source


def eval_requests(
    config: VideoRun, codec: Codec | None, count: int
) -> tuple[list[Request], list[np.ndarray]]:
    """At most ``count`` requests for held-out prompts, or classes in turn, and the true clips uint8 as
    far as the data are pixels."""
    source, sizes, latents = config.data.source, config.sampling, config.codec
    size, transform = (sizes.frames, sizes.height, sizes.width), config.data.transform
    labels = config.model.conditioners.get("label")
    alone = (
        isinstance(config.model.text, models.NoTextConfig) and len(config.model.conditioners) == 1
    )
    if isinstance(source, data.ShapesConfig):  # Drawn at the size of sampling.
        transform, scenes = UNCHANGED, data.held_out_scenes(count, config.seed, *size)
        clips = ((render(scene), data.caption(scene)) for scene in scenes)
        held: Any = [{"video": v, "caption": text, "fps": source.fps} for v, text in clips]
    elif alone and isinstance(labels, models.ClassLabels):
        grid, fps = latents.latent_size(*size), latents.latent_fps(sizes.fps)
        fields = [{"label": i % labels.classes} for i in range(count)]
        return [Request("", *grid, fps, i, segment_fields=one) for i, one in enumerate(fields)], []
    else:
        held = held_out_source(config)
    requests, true = [], []
    for i in range(min(len(held), count)):
        sample: Any = with_fields(config.model, held[i], transform, codec)
        video, fps, grid = sample["video"], sample["fps"], sample["video"].shape[:3]
        if video.dtype == np.uint8:
            grid, fps = latents.latent_size(*grid), latents.latent_fps(fps)
            true.append(video)
        names = ("text_states", "segment_fields", "frame_fields", "pixel_fields")
        more: Any = {name: sample[name] for name in names if name in sample}
        more["time_stride"] = latents.t
        t, h, w = grid
        requests.append(Request(sample["caption"], t, h, w, fps, i, **more))
    return requests, true


# ---------------------------------------------------------------------------------------------------
# The model and its loss
# ---------------------------------------------------------------------------------------------------


def make_model(
    config: models.ModelConfig,
    mesh: Mesh,
    attention: parallel.AttentionConfig = parallel.DEFAULT_ATTENTION,
) -> models.TextToVideo:
    """The model, with the attention and the sharding of a mesh."""
    heads, tensor = config.dit.heads, mesh.shape["tensor"]
    message = (
        f"mesh.tensor {tensor} does not divide the transformer's {heads} heads, each lying on one "
        f"device: make it {math.gcd(heads, tensor)}, or spread tokens (mesh.context)."
    )
    refuse_if([(heads % tensor > 0, message)])
    runtime = Runtime(
        attention=parallel.choose_attention(mesh, attention),
        constrain=parallel.make_constrain(mesh),
        dot_general=parallel.choose_dot_general(mesh),
        block_dot_general=parallel.choose_dot_general(mesh, config.matmul),
    )
    return models.TextToVideo(config.on(parallel.platform(mesh)), runtime)


def check_layout(config: VideoRun, mesh: Mesh) -> None:
    """Raises ``InputError`` if batches of the config cannot be laid out over the mesh."""
    rows, tokens = config.data.packing.rows, config.data.packing.row_tokens
    parts, context = config.optimizer.accumulate, mesh.shape["context"]
    shards, multiple = parallel.batch_shards(mesh), parallel.token_multiple(mesh, config.attention)
    undivided = (
        f"data.packing.rows {rows} in optimizer.accumulate {parts} parts do not divide over mesh.data "
        f"x mesh.fsdp = {shards}: make them a multiple of {parts * shards}, or raise mesh.context."
    )
    unspread = (
        f"data.packing.row_tokens {tokens} do not divide over mesh.context {context}: make them a "
        f"multiple of {multiple}."
    )
    refuse_if([(rows // parts % shards > 0, undivided), (tokens % multiple > 0, unspread)])
    if context > 1:
        heads = config.model.dit.heads // mesh.shape["tensor"]
        parallel.ulysses_size(config.attention, context, heads)


def init_params(model: models.TextToVideo, key: jax.Array) -> Params:
    """Fresh parameters that carry their logical axes (the shapes do not depend on the batch)."""
    # Attention has no parameters, and its kernels do not take a single token.
    model = model.clone(runtime=dataclasses.replace(model.runtime, attention=models.no_attention))
    return model.init(key, models.blank_inputs(model.config))


def batch_loss(
    model: models.TextToVideo,
    config: DiffusionConfig,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
    step: jax.Array | None = None,
    time: jax.Array | None = None,
) -> tuple[jax.Array, Totals]:
    """The sum of the tokens' losses and that of their weights; ``time`` is every segment's noise level,
    if it is not drawn."""
    del frozen, step
    keys = sample_keys(key, batch.sample_ids)
    batch = models.prepare_fields(model.config.conditioners, keys, batch, train=True)
    inputs, target = noise_batch(config, key, batch, time)
    output: Any = model.apply(params, inputs)
    error, weight = token_loss(config, output, inputs, target, batch)
    loss = error.sum()
    return loss, Totals(loss, weight.sum(), {})


def batch_work(model: models.ModelConfig, batch: Batch) -> Work:
    """What training on a (local, NumPy) batch takes."""
    segments = np.arange(batch.num_tokens.shape[1]) + 1
    letters = (np.asarray(batch.text_segment_ids)[:, None] == segments[:, None]).sum(-1)  # [b, n]
    flops = 3 * models.forward_flops(model, np.asarray(batch.num_tokens), letters).sum()
    return Work(float((batch.segment_ids != PAD).sum()), float(batch.segment_ids.size), flops)


# ---------------------------------------------------------------------------------------------------
# From an image model to a video model
# ---------------------------------------------------------------------------------------------------


def inflation(config: Run, stored: Run) -> dict[str, str]:
    """The fields in which an image model ``stored`` may differ from the video model ``config`` that
    begins with it, and what is done about each."""
    if not isinstance(config, VideoRun) or not isinstance(stored, VideoRun):
        return {}
    now, before, initial = config.model, stored.model, config.checkpoint.initial
    patches = before.patch.t == 1 and now.patch.t > 1
    message = (
        f"checkpoint.initial {initial!r} is a run with model.patch.t 1, and not {now.patch.t}, of "
        f"diffusion.prediction {config.diffusion.prediction!r}, which says nothing of the noise of the "
        "frames that fill the first patch: set model.patch.t to 1, or take a model that predicts 'x0'."
    )
    refuse_if([(patches and config.diffusion.prediction != "x0", message)])
    out = {}
    if patches:
        out["model.patch.t"] = (
            f"patches of {now.patch.t} frames read the first, and write it in all"
        )
    if (before.dit.absolute_positions, now.dit.absolute_positions) == ("wh", "wht"):
        out["model.dit.absolute_positions"] = "features of time are 0 in the first frame"
    if stored.sampling.frames == 1 and before.patch.reference_fps != now.patch.reference_fps:
        out["model.patch.reference_fps"] = "still images do not know the unit of time"
    return out


def inflate(
    config: VideoRun, read: Callable[[Params, Params], Params], shapes: Params, shardings: Params
) -> Params:
    """The video model's parameters; ``read(shapes, shardings)`` reads those of an image model, whose
    patches have one frame.

    Attention sees all tokens of a clip and rotary positions do not turn at time 0, so only the patches
    change, such that a clip of one frame, which fills a patch repeated, stays what it was. (The mean of
    frames, as in Carreira & Zisserman 2017, "Quo Vadis, Action Recognition?", section 2.4, would have
    less noise than the network is told, for each copy has noise of its own.)
    """
    frames, outputs = config.model.patch.t, 1 + config.model.learned_variance
    mesh = jax.tree.leaves(shardings)[0].mesh
    patch = dataclasses.replace(config.model.patch, t=1)
    image = make_model(dataclasses.replace(config.model, patch=patch), mesh)

    def fill(leaf: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.shape == target.shape:
            return leaf
        if leaf.ndim == 2 and leaf.shape[1] == target.shape[1]:
            # Reads [p, d]: the first frame, and zeros for the others.
            return jnp.pad(leaf, ((0, target.shape[0] - leaf.shape[0]), (0, 0)))
        # Writes [d, p] or [p]: all frames alike, within each output.
        each = leaf.reshape(*leaf.shape[:-1], outputs, 1, -1)
        return jnp.repeat(each, frames, -2).reshape(target.shape)

    # The axis of a patch's numbers is never sharded: the image's parameters lie as the video's.
    params = read(abstract_params(partial(init_params, image), mesh)[0], shardings)
    return jax.jit(lambda p: jax.tree.map(fill, p, shapes), out_shardings=shardings)(params)


# ---------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------


def build_text_to_video(
    config: VideoRun, mesh: Mesh, make: Callable[..., models.TextToVideo] = make_model
) -> Task:
    """The task of a config on a mesh; opens the data, and makes nothing else yet. ``make`` makes the
    model, of what ``make_model`` takes."""
    check_layout(config, mesh)
    limits, transform, text = config.data.packing, config.data.transform, config.model.text
    codec = config.codec.open(config.model.patch.channels, mesh)
    source, encoder = data.open_source(config.data.source), None

    # The encoder is opened for each process alone, as it reads, if captions come without states.
    sets = [one for one in getattr(config.data.source, "record_sets", ()) if one.captioned]
    bare = [one.path for one in sets if one.text_states_key is None]
    if bare or not sets:
        encoder = config.text_encoder.open(text)
    message = (
        f"the model reads states of captions, and the set {', '.join(bare)!r} of data.source has none: "
        "name a feature (text_states_key), give text_encoder.path, or set captioned to False."
    )
    missing = bool(bare) and encoder is None and isinstance(text, models.TextStatesConfig)
    refuse_if([(missing, message)])

    # Sources repeat captions, and every epoch does.
    states_of: Any = lru_cache(1024)(lambda caption: encoder and encoder.encode([caption])[0])

    def to_tokens(sample: Sample, count_cut: bool = False) -> data.Tokenized:
        if encoder is not None and "text_states" not in sample:
            sample = {**sample, "text_states": states_of(sample["caption"])}
        length, limit = text.length(sample["caption"], sample.get("text_states")), text.max_tokens
        if count_cut and length > limit:
            reader.note_cut(sample["caption"], length - 1, limit - 1)
        return tokenize(config.model, sample, transform, codec, config.codec.t)

    def check_first(sample: Sample, name: str) -> bool:
        packing.check_tokenized(limits, to_tokens(sample), name)
        return sample["video"].dtype == np.uint8

    pixels = packing.first_sample(source, check_first)
    message = (
        "data.transform.flip is set and the data are latents, which cannot be mirrored: write both when"
        " they are made (scripts/images_to_latents.py --flip), and unset it."
    )
    refuse_if([(transform.flip and not pixels, message)])

    def check_size(frames: int, height: int, width: int) -> None:
        name, side = f"{frames} x {height} x {width}", transform.crop
        size = frames, side or height, side or width
        size = config.codec.latent_size(*size) if pixels else (frames, height, width)
        packing.check_fits(limits, config.model.patch.num_tokens(*size), 0, name)

    reader = packing.checked_reader(
        source, check_size, config.data.bad_records, config.data.max_bad_records
    )

    kinds = {name: one.field(config.model).of for name, one in config.model.conditioners.items()}
    load = partial(
        data.Loader,
        config=limits,
        token_fields=[name for name, of in kinds.items() if of == "token"],
        segment_fields=["fps", *(name for name, of in kinds.items() if of == "segment")],
    )
    to_counted, augment = partial(to_tokens, count_cut=True), make_augment(config.data)
    train = partial(load, reader, to_counted, seed=config.seed, augment=augment)
    model = make(config.model, mesh, config.attention)

    # What is measured and pictured.
    generator = Generator(model, config.diffusion, config.sampling)
    decode = None if codec is None else codec.decode

    def eval_set(count: int) -> tuple[list[Request], list[np.ndarray]]:
        requests, true = eval_requests(config, codec, count)
        return with_states(requests, encoder), true

    def sample(params: Params, requests: Sequence[Request], progress: bool) -> list[np.ndarray]:
        clips = [Generation((request,)) for request in requests]
        return make_clips(generator, params, clips, mesh, progress, decode)

    def held_out(rows: tuple[int, ...]) -> data.Loader:
        held = held_out_source(config)
        return load(packing.Reader(held, len(held), quiet=True), to_tokens, seed=0, rows=rows)

    # Every token generated and every caption read: else the draws of these would be noise.
    masks = MaskConfig.only(none=1.0)
    plain = dataclasses.replace(config.diffusion, masks=masks, caption_dropout=0.0)

    def loss_at(params: Params, frozen: Params, batch: Batch, key: jax.Array, level: jax.Array):
        return batch_loss(model, plain, params, frozen, batch, key, time=level)

    parts = Parts(config, mesh, loss_at, LEVELS, held_out, eval_set, sample)
    evaluators = [one.build(parts) for one in config.evaluators]
    if config.log.draw_every:
        shown, _ = eval_set(config.log.draw_count)

        def sheet(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
            clips, path = sample(ema, shown, False), directory / f"samples_{step:07d}.png"
            return Evaluation(picture=write_sheet(clips, path))

        evaluators.insert(0, Evaluator("samples", config.log.draw_every, sheet))
    return Task(
        name="text_to_video",
        init=partial(init_params, model),
        loss=partial(batch_loss, model, config.diffusion),
        loader=lambda rows: train(rows=rows),
        rows=limits.rows,
        work=partial(batch_work, config.model),
        evaluators=tuple(evaluators),
    )
