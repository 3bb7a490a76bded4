"""The codec's task: windows of clips, and a causal autoencoder that learns to give them back.

When training ends, the latents' shift and scale are measured over training windows, and the averaged
parameters are written with them as a folder that ``codec.path`` takes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dit_jax.codec.causal_autoencoder import CausalAutoencoder, CausalAutoencoderConfig
from dit_jax.codec.crops import ClipBatch, CropConfig, CropLoader, check_window, cut
from dit_jax.codec.flops import autoencoder_flops
from dit_jax.codec.folders import load_codec, write_codec
from dit_jax.codec.measures import reconstruction_report, resize_baseline, side_by_side
from dit_jax.codec.reconstruction_loss import ReconstructionLoss
from dit_jax.codec.run import CodecRun
from dit_jax.codec.sharding import make_clip_constrain, make_gather
from dit_jax.codec.vgg_files import load_vgg
from dit_jax.data import RecordsConfig, ShapesConfig, open_source
from dit_jax.data.packing import Reader, checked_reader, first_sample
from dit_jax.parallel import batch_shards, platform
from dit_jax.sampling import to_float, to_uint8
from dit_jax.training import Evaluation, Evaluator, Parts, Task, Work, everything
from dit_jax.types import Params, Source, Totals

FOLDER = "codec"
"""Of the finished codec, in a run's output."""
CLIPS_SHOWN = 6


def build_codec(config: CodecRun, mesh: Mesh) -> Task:
    """The task of a codec's run on a mesh; opens the data, and makes nothing else yet."""
    check_codec_layout(config, mesh)
    source, held = open_source(config.data.source), open_source(_held_out(config))
    crop, model = config.data.crop, config.model
    for part in (source, held):
        first_sample(
            part,
            lambda sample, name: cut(crop, model.stride[0], sample, np.random.default_rng(0), name),
        )
    check_size = partial(check_window, crop)
    reader = checked_reader(
        source, check_size, config.data.bad_records, config.data.max_bad_records
    )
    loss = make_loss(config, mesh)
    windows = HeldOut(config, source, held)

    def sheet(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
        clips, path = shown(windows.held), directory / f"samples_{step:07d}.png"
        whole = gathered(ema)
        if jax.process_index() == 0:
            back = reconstruct(loss.model, whole, clips)
            side_by_side(clips, back, path, scale=_scale(clips))
        return Evaluation(picture=path)

    def report(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
        scalars = conclude(loss.model, windows, ema, directory)
        return Evaluation(scalars, directory / "samples.png" if scalars else None)

    evaluators = [Evaluator("report", 0, report)]
    if config.log.draw_every:
        evaluators.append(Evaluator("samples", config.log.draw_every, sheet))

    def held_out(rows: tuple[int, ...]) -> CropLoader:
        plain = dataclasses.replace(crop, flip=False)
        return CropLoader(Reader(held, len(held), quiet=True), plain, model.stride[0], 0, rows)

    parts = Parts(config, mesh, partial(batch_loss, loss), (0.0,), held_out)
    return Task(
        name="codec",
        init=loss.init,
        loss=partial(batch_loss, loss),
        loader=lambda rows: CropLoader(reader, crop, model.stride[0], config.seed, rows),
        rows=crop.rows,
        work=partial(batch_work, model),
        evaluators=(*evaluators, *(one.build(parts) for one in config.evaluators)),
        trainable=loss.trainable if loss.network else everything,
        load_frozen=loss.load_frozen,
    )


def check_codec_layout(config: CodecRun, mesh: Mesh) -> None:
    """Raises ``ValueError`` where batches of the config cannot be laid out over the mesh."""
    rows, parts, accumulate = config.rows, batch_shards(mesh), config.optimizer.accumulate
    if rows // accumulate % parts:
        each = f" in each of optimizer.accumulate {accumulate} parts" if accumulate > 1 else ""
        raise ValueError(
            f"data.crop.rows {rows}: {rows // accumulate} windows{each} do not divide over mesh.data x "
            f"mesh.fsdp = {parts}. Make rows a multiple of {accumulate * parts}, or spread the windows "
            "themselves (mesh.context) instead."
        )


def make_loss(config: CodecRun, mesh: Mesh) -> ReconstructionLoss:
    """The autoencoder, laid out over the mesh, and what it is trained with."""
    crop, wanted = config.data.crop, config.loss
    stride = config.model.stride[1]
    lay = make_clip_constrain(mesh)(crop.height // stride, crop.width // stride)
    compute = config.model.computation(platform(mesh), constrain=lay, gather=make_gather(mesh))
    network = None
    if wanted.perceptual:
        assert wanted.vgg is not None
        network = load_vgg(wanted.vgg, wanted.lpips, dtype=compute.dtype)
        if min(crop.height, crop.width) < network.config.smallest:
            raise ValueError(
                f"data.crop of {crop.height} x {crop.width} pixels is too small for loss.perceptual: "
                f"VGG takes at least {network.config.smallest} of each. Make the windows larger."
            )
    return ReconstructionLoss(CausalAutoencoder(config.model, compute), wanted, network)


def batch_loss(
    loss: ReconstructionLoss,
    params: Params,
    frozen: Params,
    batch: ClipBatch,
    key: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, Totals]:
    """The loss of all clips together, and what it is made of."""
    video = batch.video.astype(jnp.float32) / 127.5 - 1
    mask = jnp.arange(video.shape[1]) < batch.num_frames[:, None]
    totals = loss(params, frozen, video, mask, key, step)
    return totals.loss, totals


def batch_work(model: CausalAutoencoderConfig, batch: ClipBatch) -> Work:
    """What training on a (local, NumPy) batch takes; tokens are latents."""
    time, space, _ = model.stride
    b, t, h, w = batch.video.shape[:4]
    frame = (h // space) * (w // space)
    latents = (1 + (np.asarray(batch.num_frames) - 1) // time).sum() * frame
    flops = 3 * b * sum(autoencoder_flops(model, t, h, w))
    return Work(float(latents), float(b * (1 + (t - 1) // time) * frame), flops)


def _held_out(config: CodecRun) -> ShapesConfig | RecordsConfig:
    """The clips that are measured: of a split, if one is named, and of moving shapes those that
    training never draws."""
    source, split = (
        getattr(config.data.source, "shown_set", config.data.source),
        config.evaluation.records_split,
    )
    if isinstance(source, ShapesConfig):
        return dataclasses.replace(source, split="held_out")
    return source if split is None else dataclasses.replace(source, split=split)


class HeldOut:
    """Windows that a finished codec is measured on, and those for its latents' statistics."""

    def __init__(self, config: CodecRun, source: Source, held: Source) -> None:
        self.config = config
        given = config.evaluation
        crop = dataclasses.replace(config.data.crop, flip=False)
        longer = dataclasses.replace(crop, frames=given.frames or crop.frames)
        count = max(given.clips, CLIPS_SHOWN)
        self.held = self._windows(longer, held, count, 1)
        self._source, self._crop = source, crop

    def training(self) -> list[np.ndarray]:
        """Training windows."""
        return self._windows(self._crop, self._source, self.config.evaluation.statistics, 2)

    def _windows(self, crop: CropConfig, source: Source, count: int, seed: int) -> list[np.ndarray]:
        """Evenly over the source, at random places."""
        time, windows = self.config.model.stride[0], []
        reader = Reader(source, len(source))
        for i in range(count):
            rng = np.random.default_rng((self.config.seed, seed, i))
            index = i * len(source) // count if count < len(source) else i % len(source)
            for number in range(len(source)):  # If a clip cannot be used, the next one is.
                window = reader.use(
                    (index + number) % len(source),
                    lambda sample, name, rng=rng: cut(crop, time, sample, rng, name),
                )
                if window is not None:
                    windows.append(window)
                    break
        return windows


def shown(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Those that pictures show, evenly from all."""
    count = min(CLIPS_SHOWN, len(clips))
    return [clips[i * len(clips) // count] for i in range(count)]


def gathered(params: Params) -> Params:
    """The autoencoder's parameters, whole, on every process's host."""
    ours = params["params"]["autoencoder"]
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, ours)
    return multihost_utils.process_allgather(ours, tiled=True)


def reconstruct(
    model: CausalAutoencoder, params: Params, clips: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """What comes back of clips uint8, each by itself; on one device."""
    there_and_back = jax.jit(CausalAutoencoder(model.config, model.config.computation()).apply)
    variables = {"params": jax.tree.map(jnp.asarray, nn.unbox(params))}
    made = (there_and_back(variables, to_float(clip)[None]) for clip in clips)
    return [to_uint8(np.asarray(video)[0]) for video in made]


def latent_statistics(
    model: CausalAutoencoder, params: Params, clips: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all latents of the clips."""
    alone = CausalAutoencoder(model.config, model.config.computation())

    @jax.jit
    def sums(variables: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoded: Any = alone.apply(variables, video, method="encode")
        z = encoded[0].astype(jnp.float32).reshape(-1, model.config.latent_channels)
        return z.mean(0), (z**2).mean(0)

    variables = {"params": jax.tree.map(jnp.asarray, params)}
    found = [jax.device_get(sums(variables, to_float(clip)[None])) for clip in clips]
    latents = np.array([1 + (len(clip) - 1) // model.config.stride[0] for clip in clips])
    mean, square = (
        np.average(np.array(part, np.float64), 0, latents) for part in zip(*found, strict=True)
    )
    return mean, np.sqrt(np.maximum(square - mean**2, 1e-12))


def conclude(
    model: CausalAutoencoder, windows: HeldOut, params: Params, directory: Path
) -> Mapping[str, float]:
    """Writes the codec's folder and measures it as others will read it."""
    config = windows.config
    whole = gathered(params)
    if jax.process_index() != 0:
        return {}
    shift, std = latent_statistics(model, whole, windows.training())
    finished = dataclasses.replace(
        model.config,
        shift=tuple(float(np.float32(x)) for x in shift),
        scale=tuple(float(np.float32(1 / x)) for x in std),
    )
    folder = directory / FOLDER
    write_codec(folder, finished, {"params": whole})
    if not config.evaluation.clips:
        return {}
    codec = load_codec(folder, config.tiles)
    clips = windows.held[: config.evaluation.clips]
    back = [to_uint8(codec.decode(codec.encode(to_float(clip)))) for clip in clips]
    pairs = shown(clips), shown(back)
    side_by_side(*pairs, directory / "samples.png", scale=_scale(clips))
    report = dict(reconstruction_report(clips, back))
    report["resize_psnr"] = resize_baseline(clips, finished.stride, finished.latent_channels)
    (directory / "codec.json").write_text(json.dumps({"hash": codec.hash, **report}, indent=2))
    return report


def _scale(clips: Sequence[np.ndarray]) -> int:
    return max(128 // max(clips[0].shape[1:3]), 1)
