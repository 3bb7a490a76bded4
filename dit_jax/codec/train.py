"""The codec's task: windows of clips, and a causal autoencoder that learns to give them back.

When training ends, the latents' shift and scale are measured over training windows, and the averaged
parameters are written with them as a folder that ``codec.path`` takes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.codec.causal_autoencoder import CausalAutoencoder, autoencoder_flops, param_shapes
from dit_jax.codec.codec import clip_sharding, make_clip_constrain, make_gather, part_step
from dit_jax.codec.crops import ClipBatch, CropConfig, CropLoader, check_window, cut
from dit_jax.codec.folders import load_codec, write_codec
from dit_jax.codec.measures import reconstruction_report, resize_baseline, side_by_side
from dit_jax.codec.reconstruction_loss import ReconstructionLoss
from dit_jax.codec.run import FOLDER, CodecRun
from dit_jax.codec.vgg import load_vgg
from dit_jax.data import ShapesConfig, open_source
from dit_jax.data.packing import Reader, checked_reader, first_sample
from dit_jax.files import refuse_if
from dit_jax.model.flops import traced_flops
from dit_jax.parallel import batch_sharding, batch_shards, platform
from dit_jax.sampling import to_float, to_uint8
from dit_jax.training import Evaluation, Evaluator, Parts, Task, Work, everything
from dit_jax.types import FrameGrid, Params, Source, Totals

CLIPS_SHOWN = 6

# ---------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------


def build_codec(config: CodecRun, mesh: Mesh) -> Task:
    """The task of a codec's run on a mesh; opens the data, and initialises nothing yet."""
    crop, evaluation, time = config.data.crop, config.evaluation, config.model.stride[0]
    shards, accumulate = batch_shards(mesh), config.optimizer.accumulate
    each = f" in each of optimizer.accumulate {accumulate} parts" if accumulate > 1 else ""
    message = (
        f"data.crop.rows {crop.rows}: {crop.rows // accumulate} windows{each} do not divide over "
        f"mesh.data x mesh.fsdp = {shards}. Make rows a multiple of {accumulate * shards}, or spread "
        "the windows themselves (mesh.context) instead."
    )
    refuse_if([(crop.rows // accumulate % shards > 0, message)])
    source, held = open_source(config.data.source), open_source(held_out(config))
    for part in (source, held):
        rng = np.random.default_rng(0)
        first_sample(part, lambda sample, name, rng=rng: cut(crop, time, sample, rng, name))
    reader = checked_reader(
        source, partial(check_window, crop), config.data.bad_records, config.data.max_bad_records
    )
    loss = make_loss(config, mesh)
    plain = dataclasses.replace(crop, flip=False)
    longer = dataclasses.replace(plain, frames=evaluation.frames or crop.frames)
    clips = windows(config, longer, held, max(evaluation.clips, CLIPS_SHOWN), 1)

    def sheet(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
        whole, path = gathered(ema), directory / f"samples_{step:07d}.png"
        if jax.process_index() == 0:
            model = CausalAutoencoder(config.model, config.model.computation())
            apply, variables = jax.jit(model.apply), {"params": nn.unbox(whole)}
            back = [apply(variables, to_float(clip)[None]) for clip in shown(clips)]
            compare(clips, [to_uint8(np.asarray(video)[0]) for video in back], path)
        return Evaluation(picture=path)

    def report(ema: Params, frozen: Params, step: int, directory: Path) -> Evaluation:
        whole = gathered(ema)
        if jax.process_index() != 0:
            return Evaluation({})
        training = windows(config, plain, source, evaluation.statistics, 2)
        scalars = conclude(config, whole, training, clips[: evaluation.clips], directory)
        return Evaluation(scalars, directory / "samples.png" if scalars else None)

    evaluators = [Evaluator("report", 0, report)]
    if config.log.draw_every:
        evaluators.append(Evaluator("samples", config.log.draw_every, sheet))

    def held_loader(rows: tuple[int, ...]) -> CropLoader:
        return CropLoader(Reader(held, len(held), quiet=True), plain, time, 0, rows)

    parts = Parts(config, mesh, partial(batch_loss, loss), (0.0,), held_loader)
    return Task(
        name="codec",
        init=loss.init,
        loss=partial(batch_loss, loss),
        loader=lambda rows: CropLoader(reader, crop, time, config.seed, rows),
        rows=crop.rows,
        work=partial(batch_work, config),
        evaluators=(*evaluators, *(one.build(parts) for one in config.evaluators)),
        trainable=loss.trainable if loss.network else everything,
        load_frozen=loss.load_frozen,
    )


def make_loss(config: CodecRun, mesh: Mesh) -> ReconstructionLoss:
    """The autoencoder, laid out over the mesh, and what it is trained with."""
    crop, terms, stride = config.data.crop, config.loss, config.model.stride[1]
    constrain = make_clip_constrain(mesh)(crop.height // stride, crop.width // stride)
    compute = config.model.computation(
        platform(mesh), constrain=constrain, gather=make_gather(mesh)
    )
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


def batch_work(config: CodecRun, batch: ClipBatch) -> Work:
    """What training on a (local, NumPy) batch takes; tokens are latents."""
    time, space, _ = config.model.stride
    b, t, h, w = batch.video.shape[:4]
    frame = (h // space) * (w // space)
    latents = (1 + (np.asarray(batch.num_frames) - 1) // time).sum() * frame
    flops = 3 * b * sum(autoencoder_flops(config.model, t, h, w))
    return Work(float(latents), float(b * (1 + (t - 1) // time) * frame), flops)


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
    config: CodecRun, crop: CropConfig, source: Source, count: int, seed: int
) -> list[np.ndarray]:
    """So many windows of clips evenly over the source, at random places."""
    time, out, total = config.model.stride[0], [], len(source)
    reader = Reader(source, total)
    for i in range(count):
        rng = np.random.default_rng((config.seed, seed, i))
        index = i * total // count if count < total else i % total
        for number in range(total):  # If a clip cannot be used, the next one is.
            window = reader.use(
                (index + number) % total,
                lambda sample, name, rng=rng: cut(crop, time, sample, rng, name),
            )
            if window is not None:
                out.append(window)
                break
    return out


def shown(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Those that pictures show, evenly from all."""
    count = min(CLIPS_SHOWN, len(clips))
    return [clips[i * len(clips) // count] for i in range(count)]


def compare(clips: Sequence[np.ndarray], back: Sequence[np.ndarray], path: Path) -> None:
    """Writes a picture of some clips beside what came back of them."""
    side_by_side(shown(clips), back, path, scale=max(128 // max(clips[0].shape[1:3]), 1))


def gathered(params: Params) -> Params:
    """The autoencoder's parameters, whole, on every process's host."""
    ours = params["params"]["autoencoder"]
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, ours)
    return multihost_utils.process_allgather(ours, tiled=True)


def latent_statistics(
    model: CausalAutoencoder, params: Params, clips: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all latents of the clips."""

    @jax.jit
    def moments(variables: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoded: Any = model.apply(variables, video, method="encode")
        z = encoded[0].astype(jnp.float32).reshape(-1, model.config.latent_channels)
        return z.mean(0), (z**2).mean(0)

    variables = {"params": jax.tree.map(jnp.asarray, params)}
    each = [jax.device_get(moments(variables, to_float(clip)[None])) for clip in clips]
    latents = np.array([1 + (len(clip) - 1) // model.config.stride[0] for clip in clips])
    mean, square = (
        np.average(np.array(part, np.float64), 0, latents) for part in zip(*each, strict=True)
    )
    return mean, np.sqrt(np.maximum(square - mean**2, 1e-12))


def conclude(
    config: CodecRun,
    params: Params,
    training: Sequence[np.ndarray],
    clips: Sequence[np.ndarray],
    directory: Path,
) -> dict[str, float]:
    """Writes the codec's folder, and measures it on ``clips``, if there are any, as others read it."""
    model = CausalAutoencoder(config.model, config.model.computation())
    shift, std = latent_statistics(model, params, training)
    finished = dataclasses.replace(
        config.model,
        shift=tuple(float(np.float32(x)) for x in shift),
        scale=tuple(float(np.float32(1 / x)) for x in std),
    )
    folder = directory / FOLDER
    write_codec(folder, finished, {"params": params})
    if not clips:
        return {}
    codec = load_codec(folder, config.tiles)
    back = [to_uint8(codec.decode(codec.encode(to_float(clip)))) for clip in clips]
    compare(clips, shown(back), directory / "samples.png")
    report = reconstruction_report(clips, back)
    report["resize_psnr"] = resize_baseline(clips, finished.stride, finished.latent_channels)
    (directory / "codec.json").write_text(json.dumps({"hash": codec.hash, **report}, indent=2))
    return report


# ---------------------------------------------------------------------------------------------------
# Without data or devices, for `plan`
# ---------------------------------------------------------------------------------------------------


def abstract_codec_task(config: CodecRun, mesh: Mesh) -> dict[str, Any]:
    """See ``CodecRun.abstract_task``. Tokens are latents."""
    crop, (time, space, _) = config.data.crop, config.model.stride
    loss, size = make_loss(config, mesh), (crop.frames, crop.height, crop.width)

    def array(*shape: int, dtype: Any) -> Any:
        sharding = batch_sharding(mesh, len(shape), False)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    latents = FrameGrid(time).latents(crop.frames) * crop.height * crop.width // space**2
    return dict(
        init=loss.init,
        loss=partial(batch_loss, loss),
        batch=ClipBatch(
            array(crop.rows, *size, 3, dtype=jnp.uint8), array(crop.rows, dtype=jnp.int32)
        ),
        tokens=float(crop.rows * latents),
        flops=3 * crop.rows * sum(autoencoder_flops(config.model, *size)),
        trainable=loss.trainable,
    )


def abstract_codec_part(
    config: CodecRun, mesh: Mesh, what: str
) -> tuple[Any, tuple[Any, ...], float]:
    """See ``CodecRun.abstract_part``: one part, not the first, of clips as large as ``data.crop``."""
    crop, (time, space, _) = config.data.crop, config.model.stride
    h, w, frames = crop.height // space, crop.width // space, config.tiles.frames
    constrain = make_clip_constrain(mesh)(h, w)
    model = CausalAutoencoder(
        config.model, config.model.computation(platform(mesh), constrain=constrain)
    )
    whole, over = NamedSharding(mesh, PartitionSpec()), clip_sharding(mesh, crop.rows, h, w)

    def place(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def clips(frames: int) -> jax.ShapeDtypeStruct:
        encodes = what == "encode"
        size = (crop.height, crop.width, 3) if encodes else (h, w, config.model.latent_channels)
        return jax.ShapeDtypeStruct((crop.rows, frames, *size), jnp.float32)

    def step(params: Any, cache: Any, x: jax.Array, first: bool = False) -> Any:
        return part_step(model, params, cache, x, what, first)

    params = param_shapes(config.model)
    _, left = jax.eval_shape(partial(step, first=True), params, None, clips(1))
    part = clips(frames * time if what == "encode" else frames)
    layouts = (over, jax.tree.map(lambda _: over, left))
    jitted = jax.jit(step, donate_argnums=1, out_shardings=layouts)
    arguments = (place(params, whole), place(left, over), place(part, over))
    return jitted, arguments, traced_flops(jax.make_jaxpr(step)(*arguments))
