"""The run of a codec: windows of clips, and a causal autoencoder that learns to give them back.

When training ends, the latents' shift and scale are measured over training windows, and the averaged
parameters are written with them as a folder that ``codec.path`` takes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.codec.causal_autoencoder import (
    CausalAutoencoder,
    CausalAutoencoderConfig,
    autoencoder_flops,
    param_shapes,
)
from dit_jax.codec.codec import TileConfig, VideoCodec, clip_constrain, clip_sharding, part_step
from dit_jax.codec.crops import ClipBatch, CropConfig, CropLoader, check_window, cut
from dit_jax.codec.folders import load_codec, write_codec
from dit_jax.codec.measures import WINDOW, reconstruction_report, resize_baseline, side_by_side
from dit_jax.codec.reconstruction_loss import ReconstructionLoss, ReconstructionLossConfig
from dit_jax.codec.vgg import load_vgg
from dit_jax.config import Run
from dit_jax.data import RecordsConfig, ShapesConfig, open_source
from dit_jax.data.packing import Reader, checked_reader, first_sample
from dit_jax.files import refuse_if
from dit_jax.model.flops import traced_flops
from dit_jax.parallel import batch_sharding, batch_shards, platform
from dit_jax.sampling import to_float, to_uint8
from dit_jax.training import Evaluation, Evaluator, Parts, Task, Work, everything
from dit_jax.types import FrameGrid, NonNegativeInt, Params, PositiveInt, Source, Totals

Clips = Sequence[np.ndarray]
FOLDER = "codec"
"""Of the finished codec, in a run's output."""
CLIPS_SHOWN = 6

# ---------------------------------------------------------------------------------------------------
# The config
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CodecDataConfig:
    """What is trained on, and the windows cut out of it."""

    source: Any = ShapesConfig()
    crop: CropConfig = CropConfig(height=16, width=16)
    bad_records: Literal["skip", "refuse"] = "skip"
    """As in a model's run: clips smaller than a window, or that cannot be read, are left out."""
    max_bad_records: NonNegativeInt = 1000
    """Records that may be left out in the middle of a run, besides those known before it."""


@dataclasses.dataclass(frozen=True)
class CodecEvaluationConfig:
    """What a run measures when it is done: windows of held-out clips, and what comes back of them."""

    clips: NonNegativeInt = 96
    """Windows; 0 measures nothing."""
    records_split: str | None = None
    """For recorded data: the split they are cut out of; unset, that of the training data. Of moving
    shapes they are of those combinations that training never draws."""
    frames: PositiveInt | None = None
    """Frames of these windows, if they are others than in training."""
    statistics: PositiveInt = 256
    """Training windows over which the latents' mean and deviation are taken."""


@dataclasses.dataclass(frozen=True)
class CodecRun(Run):
    """A run of training: a causal autoencoder of video. When it is done, the folder ``codec`` in its
    output is what ``codec.path`` of other runs takes."""

    ROWS = "data.crop.rows"

    data: CodecDataConfig = CodecDataConfig()
    model: CausalAutoencoderConfig = CausalAutoencoderConfig()
    loss: ReconstructionLossConfig = ReconstructionLossConfig()
    evaluation: CodecEvaluationConfig = CodecEvaluationConfig()
    tiles: TileConfig = TileConfig()
    """In what parts the finished codec takes clips."""

    def constraints(self) -> Iterator[tuple[bool, str]]:
        yield from super().constraints()
        crop, model, evaluation = self.data.crop, self.model, self.evaluation
        (time, space, _), size = model.stride, (crop.height, crop.width)
        name = f"data.crop.height, width = {crop.height}, {crop.width}"
        message = f"{name}: give multiples of the model's stride in space, {space}."
        yield any(side % space for side in size), message
        each = {"data.crop.frames": crop.frames, "evaluation.frames": evaluation.frames or 1}
        for field, frames in each.items():
            rule = f"the model's stride in time is {time}, so give 1 + {time}n."
            yield (frames - 1) % time > 0, f"{field} is {frames}: {rule}"
        message = (
            f"{name}: SSIM, which is measured at the end, looks at windows of {WINDOW} x {WINDOW} "
            "pixels. Make them larger, or set evaluation.clips to 0."
        )
        yield evaluation.clips > 0 and min(size) < WINDOW, message
        split, shapes = evaluation.records_split, isinstance(self.data.source, ShapesConfig)
        message = (
            f"evaluation.records_split is {split!r}, and the data are moving shapes, which have "
        )
        yield split is not None and shapes, f"{message}none: leave it unset."
        message = "model.shift and model.scale are measured when training ends: leave them empty."
        yield bool(model.shift or model.scale), message
        yield model.channels != 3, f"model.channels is {model.channels}: clips have 3."

    def build(self, mesh: Mesh) -> Task:
        crop, time, log = self.data.crop, self.model.stride[0], self.log
        shards, accumulate = batch_shards(mesh), self.optimizer.accumulate
        each = f" in each of optimizer.accumulate {accumulate} parts" if accumulate > 1 else ""
        message = (
            f"data.crop.rows {crop.rows}: {crop.rows // accumulate} windows{each} do not divide over "
            f"mesh.data x mesh.fsdp = {shards}. Make rows a multiple of {accumulate * shards}, or "
            "spread the windows themselves (mesh.context) instead."
        )
        refuse_if([(crop.rows // accumulate % shards > 0, message)])
        source, held = open_source(self.data.source), open_source(held_out(self))
        rng = np.random.default_rng
        for one in (source, held):
            first_sample(one, lambda sample, name: cut(crop, time, sample, rng(0), name))
        check, limit = partial(check_window, crop), self.data.max_bad_records
        reader = checked_reader(source, check, self.data.bad_records, limit)
        loss, plain = make_loss(self, mesh), dataclasses.replace(crop, flip=False)
        of_batch = partial(batch_loss, loss)
        count = max(self.evaluation.clips, CLIPS_SHOWN)
        clips = windows(self, held, count, 1, self.evaluation.frames)

        def held_loader(rows: tuple[int, ...]) -> CropLoader:
            return CropLoader(Reader(held, len(held), quiet=True), plain, time, 0, rows)

        evaluators = [
            Evaluator("report", 0, lambda ema, _, __, path: report(self, source, clips, ema, path)),
            Evaluator("samples", log.draw_every, partial(sheet, self, clips)),
        ]
        parts = Parts(self, mesh, of_batch, (0.0,), held_loader)
        return Task(
            name="codec",
            init=loss.init,
            loss=of_batch,
            loader=lambda rows: CropLoader(reader, crop, time, self.seed, rows),
            rows=crop.rows,
            work=partial(batch_work, self),
            evaluators=(
                *evaluators[: 2 if log.draw_every else 1],
                *(one.build(parts) for one in self.evaluators),
            ),
            trainable=loss.trainable if loss.network else everything,
            load_frozen=loss.load_frozen,
        )

    # What `plan` asks a run that is not a model's for.

    @property
    def parts(self) -> int:
        """Parts in which clips of ``data.crop`` are encoded or decoded."""
        latents = FrameGrid(self.model.stride[0]).latents(self.data.crop.frames)
        return -(-latents // self.tiles.frames)

    def abstract_task(self, mesh: Mesh) -> dict[str, Any]:
        """The fields of ``plan``'s task on a mesh; no data are opened. Tokens are latents."""
        crop, loss = self.data.crop, make_loss(self, mesh)
        size = (crop.frames, crop.height, crop.width)

        def array(*shape: int, dtype: Any) -> Any:
            sharding = batch_sharding(mesh, len(shape), False)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        video = array(crop.rows, *size, 3, dtype=jnp.uint8)
        return dict(
            init=loss.init,
            loss=partial(batch_loss, loss),
            batch=ClipBatch(video, array(crop.rows, dtype=jnp.int32)),
            tokens=float(crop.rows * math.prod(latent_size(self, *size))),
            flops=3 * crop.rows * sum(autoencoder_flops(self.model, *size)),
            trainable=loss.trainable,
        )

    def abstract_part(
        self, mesh: Mesh, what: Literal["encode", "decode"]
    ) -> tuple[Any, tuple[Any, ...], float]:
        """A jitted function that encodes or decodes one part of clips as large as ``data.crop``, not
        the first, its arguments without contents, and its flops."""
        crop, encodes = self.data.crop, what == "encode"
        _, h, w = latent_size(self, crop.frames, crop.height, crop.width)
        constrain = clip_constrain(mesh, h, w)
        compute = self.model.computation(platform(mesh), constrain=constrain)
        model = CausalAutoencoder(self.model, compute)
        whole, over = NamedSharding(mesh, PartitionSpec()), clip_sharding(mesh, crop.rows, h, w)

        def place(tree: Any, over: NamedSharding) -> Any:
            shape = jax.ShapeDtypeStruct
            return jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=over), tree)

        def clips(frames: int) -> jax.ShapeDtypeStruct:
            size = (crop.height, crop.width, 3) if encodes else (h, w, self.model.latent_channels)
            return jax.ShapeDtypeStruct((crop.rows, frames, *size), jnp.float32)

        def step(params: Any, cache: Any, x: jax.Array, first: bool = False) -> Any:
            return part_step(model, params, cache, x, what, first)

        params, frames = param_shapes(self.model), self.tiles.frames
        _, left = jax.eval_shape(partial(step, first=True), params, None, clips(1))
        part = clips(frames * self.model.stride[0] if encodes else frames)
        layouts = (over, jax.tree.map(lambda _: over, left))
        jitted = jax.jit(step, donate_argnums=1, out_shardings=layouts)
        arguments = (place(params, whole), place(left, over), place(part, over))
        return jitted, arguments, traced_flops(jax.make_jaxpr(step)(*arguments))


def run_of_codec(config: CausalAutoencoderConfig, output: str) -> CodecRun:
    """The config of a run that fine-tunes a codec, on data to be named, in windows of 256 pixels or
    more. The latents' shift and scale are measured again when it ends."""
    time, space, _ = config.stride
    side = math.ceil(256 / space) * space
    crop = CropConfig(frames=1 + 4 * time, height=side, width=side)
    data = CodecDataConfig(source=RecordsConfig(path="clips"), crop=crop)
    model = dataclasses.replace(config, shift=(), scale=())
    return CodecRun(output=output, data=data, model=model)


# ---------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------


def make_loss(config: CodecRun, mesh: Mesh) -> ReconstructionLoss:
    """The autoencoder, laid out over the mesh, and what it is trained with."""
    crop, terms, whole = config.data.crop, config.loss, NamedSharding(mesh, PartitionSpec())
    _, h, w = latent_size(config, crop.frames, crop.height, crop.width)
    # Kernels are made whole before they are used. If their channels lie over fsdp and context, and
    # clips over data, fsdp and context, XLA (of jax 0.10.2) makes convolutions with wrong numbers,
    # without a warning, if all three are above 1.
    gather = partial(jax.lax.with_sharding_constraint, shardings=whole)
    constrain, device = clip_constrain(mesh, h, w), platform(mesh)
    compute = config.model.computation(device, constrain=constrain, gather=gather)
    network = None
    if terms.perceptual:
        assert terms.vgg is not None
        network = load_vgg(terms.vgg, terms.lpips, dtype=compute.dtype)
        smallest = network.config.smallest
        message = (
            f"data.crop of {crop.height} x {crop.width} pixels is too small for loss.perceptual: VGG "
            f"takes at least {smallest} of each. Make the windows larger."
        )
        refuse_if([(min(crop.height, crop.width) < smallest, message)])
    return ReconstructionLoss(CausalAutoencoder(config.model, compute), terms, network)


def batch_loss(
    loss: ReconstructionLoss, params: Params, frozen: Params, batch: ClipBatch, key: Any, step: Any
) -> tuple[jax.Array, Totals]:
    """The loss of all clips together, and what it is made of."""
    video = batch.video.astype(jnp.float32) / 127.5 - 1
    mask = jnp.arange(video.shape[1]) < batch.num_frames[:, None]
    totals = loss(params, frozen, video, mask, key, step)
    return totals.loss, totals


def latent_size(config: CodecRun, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns of clips of so many pixels."""
    time, space, _ = config.model.stride
    return 1 + (frames - 1) // time, height // space, width // space


def batch_work(config: CodecRun, batch: ClipBatch) -> Work:
    """What training on a (local, NumPy) batch takes; tokens are latents."""
    clips, *size = batch.video.shape[:4]
    count, h, w = latent_size(config, *size)
    latents = (1 + (np.asarray(batch.num_frames) - 1) // config.model.stride[0]).sum() * h * w
    flops = 3 * clips * sum(autoencoder_flops(config.model, *size))
    return Work(float(latents), float(clips * count * h * w), flops)


# ---------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------


def held_out(config: CodecRun) -> Any:
    """The clips that are measured: of a split, if one is named, and of moving shapes those that
    training never draws."""
    source, split = config.data.source, config.evaluation.records_split
    source = getattr(source, "shown_set", source)
    if isinstance(source, ShapesConfig):
        split = "held_out"
    return source if split is None else dataclasses.replace(source, split=split)


def windows(
    config: CodecRun, source: Source, count: int, seed: int, frames: int | None = None
) -> list[np.ndarray]:
    """So many windows of clips evenly over the source, at random places; not mirrored."""
    crop = config.data.crop
    crop = dataclasses.replace(crop, flip=False, frames=frames or crop.frames)
    time, out, total = config.model.stride[0], [], len(source)
    reader = Reader(source, total)
    for i in range(count):
        rng = np.random.default_rng((config.seed, seed, i))
        index = i * total // count if count < total else i % total
        element = partial(lambda rng, sample, name: cut(crop, time, sample, rng, name), rng)
        # If a clip cannot be used, the next one is.
        tries = (reader.use((index + number) % total, element) for number in range(total))
        out += itertools.islice((window for window in tries if window is not None), 1)
    return out


def shown(clips: Clips) -> list[np.ndarray]:
    """Those that pictures show, evenly from all."""
    count = min(CLIPS_SHOWN, len(clips))
    return [clips[i * len(clips) // count] for i in range(count)]


def write_sheet(clips: Clips, back: Clips, path: Path) -> Path:
    """Writes a picture of some clips beside what came back of them."""
    return side_by_side(shown(clips), back, path, scale=max(128 // max(clips[0].shape[1:3]), 1))


def gathered(params: Params) -> Params:
    """The autoencoder's parameters, whole, on every process's host."""
    ours = nn.unbox(params["params"]["autoencoder"])
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, ours)
    return multihost_utils.process_allgather(ours, tiled=True)


def sheet(
    config: CodecRun, clips: Clips, ema: Params, frozen: Params, step: int, directory: Path
) -> Evaluation:
    """Draws what comes back of held-out clips."""
    variables, path = {"params": gathered(ema)}, directory / f"samples_{step:07d}.png"
    if jax.process_index() == 0:
        apply = jax.jit(CausalAutoencoder(config.model, config.model.computation()).apply)
        back = [apply(variables, to_float(clip)[None]) for clip in shown(clips)]
        write_sheet(clips, [to_uint8(np.asarray(video)[0]) for video in back], path)
    return Evaluation(picture=path)


def latent_statistics(config: CausalAutoencoderConfig, params: Params, clips: Clips) -> Any:
    """Mean and standard deviation of each channel over all latents of the clips."""
    # Without shift and scale, and every clip as a whole.
    whole = TileConfig(size=2**16, frames=2**16)
    codec = VideoCodec("", "", config, jax.device_put(params), whole)
    latents = [codec.encode(to_float(clip)).reshape(-1, config.latent_channels) for clip in clips]
    z = np.concatenate(latents).astype(np.float64)
    return z.mean(0), np.maximum(z.std(0), 1e-6)


def report(
    config: CodecRun, source: Source, clips: Clips, ema: Params, directory: Path
) -> Evaluation:
    """Writes the codec's folder, and measures it on ``clips``, if that is asked for, as others read
    it."""
    params, clips = gathered(ema), clips[: config.evaluation.clips]
    if jax.process_index() != 0:
        return Evaluation({})
    training = windows(config, source, config.evaluation.statistics, 2)
    params = {"params": params}
    shift, std = latent_statistics(config.model, params, training)
    finished = dataclasses.replace(
        config.model,
        shift=tuple(float(np.float32(x)) for x in shift),
        scale=tuple(float(np.float32(1 / x)) for x in std),
    )
    folder = directory / FOLDER
    write_codec(folder, finished, params)
    if not clips:
        return Evaluation({})
    codec = load_codec(folder, config.tiles)
    latents = [codec.encode(to_float(clip)) for clip in clips]
    back = [to_uint8(codec.decode(z)) for z in latents]
    picture = write_sheet(clips, shown(back), directory / "samples.png")
    scalars = reconstruction_report(clips, back)
    scalars["resize_psnr"] = resize_baseline(clips, latents)
    (directory / "codec.json").write_text(json.dumps({"hash": codec.hash, **scalars}, indent=2))
    return Evaluation(scalars, picture)
