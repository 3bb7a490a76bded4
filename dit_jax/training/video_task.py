"""Text to video: captioned clips, packed, and a transformer that learns to generate them.

This is where the rooms meet: a sample becomes patches, positions and text tokens; a batch becomes
noise levels, a prediction and a loss; the averaged parameters become clips.

The frozen networks around the model, its codec and text encoder, are opened by their configs (what
makes latents and states is in satellites) and known by hashes, on which the data, the folders and the
config of a run must agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
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
    MixedSource,
    MixtureConfig,
    Reader,
    RecordsConfig,
    RecordsSource,
    ShapesConfig,
    Tokenized,
    TransformConfig,
    caption,
    check_fits,
    check_tokenized,
    checked_reader,
    choose_caption,
    crop,
    flip,
    held_out_scenes,
    open_source,
    render,
)
from dit_jax.diffusion import DiffusionConfig, MaskConfig, noise_batch, sample_keys, token_loss
from dit_jax.files import InputError
from dit_jax.model import (
    ByteEncoderConfig,
    ClassLabels,
    Field,
    Fields,
    ModelConfig,
    NoTextConfig,
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
from dit_jax.training.task import LEVELS, write_sheet
from dit_jax.types import (
    PAD,
    Batch,
    Codec,
    DenoiserInputs,
    Params,
    Runtime,
    Sample,
    Source,
    TextEncoder,
    Totals,
)

AS_THEY_ARE = TransformConfig()
CAPTIONS_KEPT = 1024
"""States that are kept while data are read whose captions are encoded on the way."""


# ---------------------------------------------------------------------------------------------------
# The codec
# ---------------------------------------------------------------------------------------------------


def open_codec(config: VideoRun, mesh: Mesh | None = None) -> Codec | None:
    """The codec of a run; without a folder pixels are their own, and latents have none."""
    return config.codec.open(config.model.patch.channels, mesh)


def with_hashes(config: VideoRun) -> VideoRun:
    """The config with the hashes of its codec and text encoder, as far as these are known: of the data,
    or else of the folders. Raises ``ValueError`` if data, folders and config name different ones."""
    codec = config.codec
    sets = [RecordsSource(one) for one in getattr(config.data.source, "record_sets", ())]
    hashes = [codec.hash, *(one.codec for one in sets), codec.weights_hash()]
    known = list(dict.fromkeys(one for one in hashes if one))
    if len(known) > 1:
        raise InputError(
            f"codec.hash {codec.hash!r}, the latents of the data and the codec {codec.path!r} are not "
            f"of one codec: {', '.join(map(repr, known))}. Give the one that made the latents."
        )
    if known:
        config = dataclasses.replace(config, codec=dataclasses.replace(codec, hash=known[0]))
    if not isinstance(config.model.text, TextStatesConfig):
        return config

    digest = None
    for one in sets:
        if one.config.text_states_key or not isinstance(config.data.source, MixtureConfig):
            digest = check_states(config, one) or digest
    if (own := config.text_encoder.identity()) is not None:
        config = _with_text_hash(config, digest)
        check_encoder(config, *own, f"text_encoder.path {config.text_encoder.path!r} is")
        digest = own[1]
    return _with_text_hash(config, digest)


def _with_text_hash(config: VideoRun, digest: str | None) -> VideoRun:
    encoder = dataclasses.replace(config.text_encoder, hash=digest or config.text_encoder.hash)
    return dataclasses.replace(config, text_encoder=encoder)


def check_codec(codec: Codec | None, source: Source) -> None:
    """Raises ``ValueError`` if the latents of the data are another codec's."""
    for records in getattr(source, "record_sets", ()):
        if codec is not None and records.codec not in (None, codec.hash):
            raise InputError(
                f"the latents of {records.config.path!r} were made by the codec {records.codec!r}, "
                f"and codec.path is {codec.hash!r} ({codec.name}): give the one that made them."
            )


def to_latents(codec: Codec | None, video: np.ndarray, caption: str = "") -> np.ndarray:
    """Pixels uint8 as what the model generates: latents, or float pixels; latents as they are."""
    if video.dtype != np.uint8 or codec is None:
        return video if video.dtype != np.uint8 else to_float(video)
    try:
        return np.asarray(codec.encode(to_float(video)), np.float32)
    except ValueError as error:
        raise ValueError(
            f"the clip {caption[:60]!r} cannot be encoded: {error} Or leave such clips out "
            "(data.transform crops pictures, not lengths)."
        ) from error


# ---------------------------------------------------------------------------------------------------
# The text encoder
# ---------------------------------------------------------------------------------------------------


def check_encoder(config: VideoRun, name: str | None, digest: str | None, what: str) -> None:
    """Raises ``ValueError`` if an encoder is another than the config's: by the hashes, or if one is
    unknown by the names."""
    text, expected = config.model.text, config.text_encoder.hash
    assert isinstance(text, TextStatesConfig)
    if expected is not None and digest is not None:
        other = expected != digest
    else:
        other = name is not None and name != text.encoder
    if other:
        raise InputError(
            f"{what} the encoder {name!r} ({digest or 'no hash'}), and the model reads states of "
            f"{text.encoder!r} ({expected or 'no hash'}): give the one that it is trained on "
            "(text_encoder.path, data.source), or name it (model.text.encoder)."
        )


def check_states(config: VideoRun, records: RecordsSource) -> str | None:
    """The hash of the encoder whose states the records have, if it is known and the config's."""
    name, digest = records.text_encoder_name, records.text_encoder
    check_encoder(config, name, digest, f"the states of {records.config.path!r} were made by")
    return digest


def open_text_encoder(config: VideoRun, mesh: Mesh | None = None) -> TextEncoder | None:
    """The encoder at ``config.text_encoder.path``, if there is one: spread over a mesh, for all
    processes together, or on a device of this process."""
    path, text = config.text_encoder.path, config.model.text
    if not isinstance(text, TextStatesConfig):
        return None

    def check(name: str, digest: str, dim: int) -> None:
        if dim != text.dim:
            raise InputError(
                f"text_encoder.path {path!r} makes states of {dim} numbers, and the model reads "
                f"{text.dim} (model.text.dim): make them the same."
            )
        check_encoder(config, name, digest, f"text_encoder.path {path!r} is")

    return config.text_encoder.open(mesh, check)


def open_for_data(config: VideoRun, source: Source) -> TextEncoder | None:
    """The encoder if the data have captions without states: for each process alone, as it reads."""
    states = isinstance(config.model.text, TextStatesConfig)
    read = [records for records in getattr(source, "record_sets", ()) if records.config.captioned]
    bare = [records.config.path for records in read if records.config.text_states_key is None]
    for records in read:
        if states and records.config.text_states_key is not None:
            check_states(config, records)
    if states and bare and isinstance(source, MixedSource) and config.text_encoder.path is None:
        raise InputError(
            f"the model reads states of captions, and the set {bare[0]!r} of data.source has none: "
            "name their feature (text_states_key), give the encoder (text_encoder.path), or set "
            "captioned to False."
        )
    return None if read and not bare else open_text_encoder(config)


def encoded(source: Source, encoder: TextEncoder | None) -> Source:
    """A source whose samples have states: made by the encoder, if there is one, if they lack them."""
    if encoder is None:
        return source
    if isinstance(source, MixedSource):
        return MixedSource([encoded(part, encoder) for part in source.parts], source.weights)
    if isinstance(source, RecordsSource):
        if source.config.text_states_key is not None or not source.config.captioned:
            return source
    return EncodedSource(source, encoder)


class EncodedSource:
    """A source whose samples get the states of their captions, of all that may be drawn."""

    def __init__(self, source: Source, encoder: TextEncoder) -> None:
        self._source = source
        self._states = lru_cache(CAPTIONS_KEPT)(lambda caption: encoder.encode([caption])[0])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = {**self._source[index]}
        sample["text_states"] = self._states(sample["caption"])
        if captions := sample.get("captions"):
            states = {name: self._states(text) for name, text in captions.items() if text}
            sample["captions_states"] = states
        return sample


def with_states(requests: Sequence[Request], encoder: TextEncoder | None) -> list[Request]:
    """Requests with the states of their prompts and negative prompts: made by the encoder, if there is
    one, if they lack them."""
    if encoder is None:
        return list(requests)
    bare = [r.prompt for r in requests if r.text_states is None]
    bare += [r.negative for r in requests if r.negative and r.negative_states is None]
    bare = list(dict.fromkeys(bare))
    states: dict[str, Any] = dict(zip(bare, encoder.encode(bare), strict=True))
    out = []
    for r in requests:
        text = states[r.prompt] if r.text_states is None else r.text_states
        negative = r.negative_states
        if r.negative and negative is None:
            negative = states[r.negative]
        out.append(dataclasses.replace(r, text_states=text, negative_states=negative))
    return out


def prompt_length(config: VideoRun) -> tuple[Callable[[str], int], int] | None:
    """How the model counts a prompt, and how much of one it reads, in bytes or tokens; None for a model
    of classes, and for one of states without their encoder."""
    text = config.model.text
    if isinstance(text, ByteEncoderConfig):
        return lambda prompt: text.length(prompt) - 1, text.max_bytes
    counted = config.text_encoder.length() if isinstance(text, TextStatesConfig) else None
    if counted is None:
        return None
    length, most = counted
    return length, min(most, text.max_tokens - 1)  # One stands for the beginning.


def cut_note(config: VideoRun, texts: Sequence[str]) -> str | None:
    """A warning of texts of which the model does not read all: how many, and the first."""
    texts = list(dict.fromkeys(texts))
    if not texts or (counted := prompt_length(config)) is None:
        return None
    length, limit = counted
    cut = [text for text in texts if length(text) > limit]
    if not cut:
        return None
    unit = "bytes" if isinstance(config.model.text, ByteEncoderConfig) else "tokens"
    return (
        f"{len(cut)} of {len(texts)} texts are longer than the {limit} {unit} that the model "
        f"reads, and cut there. The first has {length(cut[0])}: {cut[0][:200]!r}"
    )


def check_reads(config: VideoRun, run: str) -> None:
    """Raises ``ValueError`` if the model of a run reads states, and no encoder makes them."""
    text = config.model.text
    if isinstance(text, TextStatesConfig) and config.text_encoder.path is None:
        raise InputError(
            f"the model of {run!r} reads prompts as states of the text encoder {text.encoder!r}: give "
            "--text-encoder, its folder."
        )


# ---------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------


def make_augment(config: DataConfig) -> Augment | None:
    """What is drawn anew for a sample in every epoch: its caption, its mirror image."""
    mixes = [one.caption_mix for one in getattr(config.source, "record_sets", ())]
    if not any(mixes):
        return flip if config.transform.flip else None

    def augment(sample: Sample, rng: np.random.Generator) -> Sample:
        sample = choose_caption(sample, rng, mixes[sample.get("part", 0)])
        return flip(sample, rng) if config.transform.flip else sample

    return augment


def with_fields(
    model: ModelConfig, sample: Sample, transform: TransformConfig, codec: Codec | None
) -> Sample:
    """The sample cropped, with every field that the model reads: some conditioners derive theirs from
    the clip, and clips beside the clip become what the model generates."""
    beside = {name: crop(transform, v) for name, v in sample.get("pixel_fields", {}).items()}
    sample = {**sample, "video": crop(transform, sample["video"]), "pixel_fields": beside}
    for name, conditioner in model.conditioners.items():
        sample = conditioner.derive(name, sample)
    pixels = {
        name: to_latents(codec, video, sample["caption"])
        for name, video in sample.get("pixel_fields", {}).items()
        if name in model.conditioners
    }
    frames = {k: v for k, v in sample.get("frame_fields", {}).items() if k in model.conditioners}
    return {**sample, "frame_fields": frames, "pixel_fields": pixels}


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
    sample = with_fields(model, sample, transform, codec)
    video, fps = to_latents(codec, sample["video"], sample["caption"]), sample["fps"]
    if sample["video"].dtype == np.uint8:
        time_stride = 1 if codec is None else codec.strides[0]
        fps = fps / time_stride
    places, frame_ids = positions(model.patch, *video.shape[:3], fps=fps)
    token_fields = field_tokens(
        model.patch,
        time_stride or 1,
        (video.shape[0], video.shape[1], video.shape[2]),
        sample.get("frame_fields", {}),
        sample.get("pixel_fields", {}),
    )
    segment_fields = dict(sample.get("segment_fields", {}), fps=fps)
    check_fields(model, token_fields, segment_fields, "the sample")
    kinds = {name: one.field(model) for name, one in model.conditioners.items()}
    kinds["fps"] = Field("segment", ())
    return {
        "tokens": patchify(model.patch, video),
        "positions": places,
        "frame_ids": frame_ids,
        "text": model.text.tokens(sample["caption"], sample.get("text_states")),
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


def held_out_source(config: VideoRun) -> Source:
    """Samples that training does not see: of ``data.eval_split``, or those that the source says; if it
    says none, its own."""
    shown, split = config.data.source, config.data.eval_split
    shown = getattr(shown, "shown_set", shown)  # Of a mixture, one of its sets.
    if split is not None and isinstance(shown, RecordsConfig):
        shown = dataclasses.replace(shown, split=split)
    source: Any = open_source(shown)
    return source.eval_set() if hasattr(source, "eval_set") else source


def eval_requests(
    config: VideoRun, codec: Codec | None, count: int
) -> tuple[list[Request], list[np.ndarray]]:
    """At most ``count`` requests for held-out prompts, or classes in turn, and the true clips uint8 as
    far as the data are pixels."""
    source, sizes, latents = config.data.source, config.sampling, config.codec
    source, size = getattr(source, "shown_set", source), (sizes.frames, sizes.height, sizes.width)
    labels, text = config.model.conditioners.get("label"), config.model.text
    alone = isinstance(text, NoTextConfig) and len(config.model.conditioners) == 1
    if alone and isinstance(labels, ClassLabels) and not isinstance(source, ShapesConfig):
        grid, fps = latents.latent_size(*size), latents.latent_fps(sizes.fps)
        fields = [{"label": i % labels.classes} for i in range(count)]
        return [Request("", *grid, fps, i, segment_fields=one) for i, one in enumerate(fields)], []

    def samples() -> Iterator[Sample]:
        if isinstance(source, ShapesConfig):
            for scene in held_out_scenes(count, config.seed, *size):
                yield {"video": render(scene), "caption": caption(scene), "fps": source.fps}
        else:
            held = held_out_source(config)
            yield from (held[i] for i in range(min(len(held), count)))

    # Shapes are drawn at the size of sampling.
    transform = AS_THEY_ARE if isinstance(source, ShapesConfig) else config.data.transform
    requests, true = [], []
    for i, sample in enumerate(samples()):
        sample = with_fields(config.model, sample, transform, codec)
        video, fps = sample["video"], sample["fps"]
        t, h, w, _ = video.shape
        if video.dtype == np.uint8:
            (t, h, w), fps = latents.latent_size(t, h, w), latents.latent_fps(fps)
            true.append(video)
        requests.append(
            Request(
                sample["caption"],
                t,
                h,
                w,
                fps,
                i,
                sample.get("text_states"),
                segment_fields=sample.get("segment_fields", {}),
                frame_fields=sample.get("frame_fields", {}),
                pixel_fields=sample.get("pixel_fields", {}),
                time_stride=latents.t,
            )
        )
    return requests, true


# ---------------------------------------------------------------------------------------------------
# The model and its loss
# ---------------------------------------------------------------------------------------------------


def make_model(
    config: ModelConfig, mesh: Mesh, attention: AttentionConfig = DEFAULT_ATTENTION
) -> TextToVideo:
    """The model, with the attention and the sharding of a mesh."""
    heads, tensor = config.dit.heads, mesh.shape["tensor"]
    if heads % tensor:
        raise InputError(
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
    """Raises ``ValueError`` if batches of the config cannot be laid out over the mesh."""
    packing, parts, context = config.data.packing, batch_shards(mesh), mesh.shape["context"]
    accumulate = config.optimizer.accumulate
    if packing.rows // accumulate % parts:
        each = f" in each of optimizer.accumulate {accumulate} parts" if accumulate > 1 else ""
        raise InputError(
            f"data.packing.rows {packing.rows}: {packing.rows // accumulate} rows{each} do not divide "
            f"over mesh.data x mesh.fsdp = {parts}. Make rows a multiple of {accumulate * parts}, or "
            "spread tokens (mesh.context) instead."
        )
    multiple = token_multiple(mesh, config.attention)
    if packing.row_tokens % multiple:
        raise InputError(
            f"data.packing.row_tokens {packing.row_tokens} do not divide over mesh.context {context}: "
            f"make them a multiple of {multiple}."
        )
    if context > 1:
        ulysses_size(config.attention, context, config.model.dit.heads // mesh.shape["tensor"])


def init_params(model: TextToVideo, key: jax.Array) -> Params:
    """Fresh parameters that carry their logical axes (the shapes do not depend on the batch)."""
    # Attention has no parameters, and its kernels do not take a single token.
    model = model.clone(runtime=dataclasses.replace(model.runtime, attention=no_attention))
    ids = jnp.zeros((1, 1), jnp.int32)
    tokens = jnp.zeros((1, 1, model.config.patch.dim))
    config, text = model.config, model.config.text
    fields = {name: one.field(config) for name, one in config.conditioners.items()}

    def zeros(of: str) -> dict[str, jax.Array]:
        return {k: jnp.zeros((1, 1, *f.shape), f.dtype) for k, f in fields.items() if f.of == of}

    keys = jax.random.split(key, (1, 1))
    blank = Fields(zeros("token"), {"fps": jnp.ones((1, 1)), **zeros("segment")})
    blank = prepare_fields(config.conditioners, keys, ids, ids, blank, False)
    inputs = DenoiserInputs(
        tokens=tokens,
        positions=jnp.zeros((1, 1, 3)),
        segment_ids=ids,
        group_ids=ids,
        group_t=jnp.zeros((1, 1)),
        text=jnp.zeros((1, 1, text.dim)) if isinstance(text, TextStatesConfig) else ids,
        text_segment_ids=ids,
        dropped=jnp.zeros((1, 1)),
        token_fields=blank.tokens,
        segment_fields=blank.segments,
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
    source, packing, conditioners = (
        open_source(config.data.source),
        config.data.packing,
        config.model.conditioners,
    )
    codec = open_codec(config, mesh)
    check_codec(codec, source)
    encoder = open_for_data(config, source)
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
        raise InputError(
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

    kinds = {name: one.field(config.model).of for name, one in conditioners.items()}
    load = partial(
        Loader,
        config=packing,
        token_fields=[name for name, of in kinds.items() if of == "token"],
        segment_fields=["fps", *(name for name, of in kinds.items() if of == "segment")],
    )
    model, rows = make_model(config.model, mesh, config.attention), local_rows(mesh, packing.rows)

    # What is measured and pictured.
    generator = Generator(model, config.diffusion, config.sampling)
    decode = None if codec is None else codec.decode

    def eval_set(count: int) -> tuple[list[Request], list[np.ndarray]]:
        requests, true = eval_requests(config, codec, count)
        return with_states(requests, encoder), true

    def sample(params: Params, requests: Sequence[Request], progress: bool) -> list[np.ndarray]:
        return make_clips(generator, params, requests, config.model, mesh, progress, decode)

    def held_out() -> Batch:
        held = encoded(held_out_source(config), encoder)
        # Its bad records are left out as those of training are.
        loader = load(Reader(held, len(held), quiet=True), to_tokens, seed=0, rows=rows)
        batch = next(loader)
        loader.close()
        return batch

    # Every token generated and every caption read: else the draws of these would be noise.
    plain = dataclasses.replace(
        config.diffusion, masks=MaskConfig.only(none=1.0), caption_dropout=0.0
    )

    def loss_at(params: Params, frozen: Params, batch: Batch, key: jax.Array, level: jax.Array):
        return batch_loss(model, plain, params, frozen, batch, key, time=level)

    evaluators = []
    if config.log.draw_every:
        shown, _ = eval_set(config.log.draw_count)

        def sheet(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
            path = directory / f"samples_{step:07d}.png"
            write_sheet(sample(ema, shown, False), path)
            return Evaluation(picture=path)

        evaluators.append(Evaluator("samples", config.log.draw_every, sheet))
    parts = Parts(config, mesh, rows, loss_at, LEVELS, held_out, eval_set, sample)
    return Task(
        name="text_to_video",
        init=partial(init_params, model),
        loss=partial(batch_loss, model, config.diffusion),
        loader=lambda rows: load(
            reader,
            to_tokens_counted,
            seed=config.seed,
            rows=rows,
            augment=make_augment(config.data),
        ),
        rows=packing.rows,
        work=partial(batch_work, config.model),
        evaluators=(*evaluators, *(one.build(parts) for one in config.evaluators)),
    )
