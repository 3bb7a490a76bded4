"""Small Wan transformers of Diffusers' class with random weights, and ours on the same inputs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from flax import traverse_util

from dit_jax import interop
from dit_jax.codec.folders import autoencoder_from_wan
from dit_jax.codec.folders import wan_map as codec_map
from dit_jax.model import ModelConfig, TextToVideo, patchify, positions, unpatchify
from dit_jax.parallel import xla_attention
from dit_jax.text.folders import t5_from_transformers, t5_map
from dit_jax.types import Runtime
from dit_jax.wan import transformer as wan
from dit_jax.wan.conditioners import LATENTS, STATES
from tests.codecs import random_params
from tests.denoiser import struct
from tests.interop.published import diffusers, torch

HEADS, DIM, TEXT, IMAGE = 2, 12, 16, 20
SIZES: dict[str, Any] = dict(num_attention_heads=HEADS, attention_head_dim=DIM, num_layers=2)
SIZES |= dict(text_dim=TEXT, ffn_dim=40)
OF_IMAGES = dict(in_channels=36, image_dim=IMAGE, added_kv_proj_dim=HEADS * DIM)
LAYOUTS: dict[str, dict[str, Any]] = {
    "2.1 T2V": {},
    "2.1 I2V": OF_IMAGES,
    "2.1 FLF2V": OF_IMAGES | dict(pos_embed_seq_len=514),
    "2.2 TI2V": dict(in_channels=48, out_channels=48),
    "2.2 T2V": {},  # and a second of the same sizes
    "2.2 I2V": dict(in_channels=36),
}
SIZE = (3, 4, 6)  # latent frames, rows, columns
CLIPS = 2


def random_wan(layout: str, seed: int = 0, **changes: Any) -> Any:
    """A model of Diffusers' class; every branch is seen in the output."""
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(**SIZES | LAYOUTS[layout] | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.05 * torch.randn_like(parameter))
    return model


def random_inputs(layout: str) -> dict[str, np.ndarray]:
    """Of clips: noised latents, noise levels (in TI2V the first frame is clean), text and images."""
    rng, sizes = np.random.default_rng(1), SIZES | LAYOUTS[layout]
    channels = sizes.get("out_channels", 16)
    extra = sizes.get("in_channels", 16) - channels

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(CLIPS, *shape)).astype(np.float32)

    inputs = dict(latents=normal(channels, *SIZE), t=np.array([0.9, 0.313], np.float32))
    inputs |= dict(text=normal(512, TEXT))
    if extra:
        inputs[LATENTS] = normal(extra, *SIZE)
    if "image_dim" in sizes:
        inputs[STATES] = normal(sizes.get("pos_embed_seq_len", 257), IMAGE)
    return inputs


def theirs(model: Any, layout: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Diffusers' velocities ``[b, c, t, h, w]``."""
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    latents = given["latents"]
    if LATENTS in given:
        latents = torch.cat([latents, given[LATENTS]], 1)
    images = given.get(STATES)
    if layout == "2.1 FLF2V":
        images = images.reshape(2 * CLIPS, 257, IMAGE)
    t = 1000 * given["t"]
    if layout == "2.2 TI2V":
        t = (torch.arange(SIZE[0] * 6)[None] >= 6) * t[:, None]
    with torch.no_grad():
        return model(latents, t, given["text"], images, return_dict=False)[0].numpy()


def denoise(
    model: ModelConfig, params: Any, layout: str, inputs: dict[str, np.ndarray]
) -> np.ndarray:
    """Our model's on both clips, as segments of one row."""
    patch, (frames, h, w) = model.patch, SIZE

    def tokens(name: str) -> np.ndarray:
        clips = rearrange(inputs[name], "b c t h w -> b t h w c")
        sized = dataclasses.replace(patch, channels=clips.shape[-1])
        return np.concatenate([patchify(sized, clip) for clip in clips])[None]

    places, frame_ids = positions(patch, frames, h, w, patch.reference_fps)
    segment_ids = np.repeat(np.arange(1, CLIPS + 1, dtype=np.int32), len(places))[None]
    group_ids, t = segment_ids - 1, inputs["t"]
    if layout == "2.2 TI2V":  # The first frames have a noise cap of 0.
        kept = np.tile(frame_ids == 0, CLIPS)
        group_ids, t = np.where(kept, group_ids + CLIPS, group_ids), np.append(t, [0, 0])
    given = struct(
        tokens=tokens("latents"),
        positions=np.tile(places, (CLIPS, 1))[None],
        segment_ids=segment_ids,
        group_ids=group_ids,
        group_t=t[None].astype(np.float32),
        text=inputs["text"].reshape(1, -1, TEXT),
        text_segment_ids=np.repeat(np.arange(1, CLIPS + 1, dtype=np.int32), 512)[None],
        dropped=np.ones((1, CLIPS), np.float32),  # Images are read all the same.
        token_fields={LATENTS: tokens(LATENTS)} if LATENTS in inputs else {},
        segment_fields={STATES: inputs[STATES][None]} if STATES in inputs else {},
    )
    module = TextToVideo(dataclasses.replace(model, dtype="float32"), Runtime(xla_attention))
    out = np.split(np.asarray(jax.jit(module.apply)(params, given))[0], CLIPS)
    clips = [unpatchify(patch, one, frames, h, w) for one in out]
    return rearrange(np.stack(clips), "b t h w c -> b c t h w")


def save(model: Any, folder: Path, **options: Any) -> Path:
    """The folder that Diffusers writes."""
    model.save_pretrained(folder, **options)
    return folder


def random_file(layout: str, seed: int = 0) -> tuple[wan.WanFile, Any]:
    """A model and random parameters of ours, without PyTorch."""
    file = wan.WanFile(wan.model_of(wan.Settings(**SIZES | LAYOUTS[layout])))
    rng, tree = np.random.default_rng(seed), {}
    for entry in file.table("diffusers").entries:
        tree[entry.path] = 0.1 * rng.normal(size=entry.shape).astype(np.float32)
    return file, {"params": traverse_util.unflatten_dict(tree)}


def write_diffusers(folder: Path, layout: str, seed: int = 0) -> Path:
    file, params = random_file(layout, seed)
    interop.write_folder(folder, file.config_json(), file.table("diffusers").export(params))
    return folder


def write_authors(folder: Path, layout: str, seed: int = 0) -> Path:
    """The authors' folder: their keys in two shards, and their ``config.json``."""
    file, params = random_file(layout, seed)
    arrays = file.table("safetensors").export(params)
    folder.mkdir(parents=True)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    placed = {key: names[i % 2] for i, key in enumerate(arrays)}
    for name in names:
        shard = {key: arrays[key] for key, place in placed.items() if place == name}
        interop.write_safetensors(folder / name, shard)
    index = json.dumps({"metadata": {}, "weight_map": placed})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    about = {"_class_name": "WanModel", "num_heads": HEADS, "dim": HEADS * DIM}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def write_pipeline(folder: Path, layout: str, **scheduler: Any) -> Path:
    """Diffusers' folder of a pipeline: of two experts if its transformer is one of two."""
    parts = {"transformer": "diffusers", "vae": "diffusers", "text_encoder": "transformers"}
    write_diffusers(folder / "transformer", layout)
    if two := layout in ("2.2 T2V", "2.2 I2V"):
        write_diffusers(folder / "transformer_2", layout, seed=1)
        parts["transformer_2"] = "diffusers"
    z = 48 if layout == "2.2 TI2V" else 16
    vae = {"z_dim": z, "base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    vae |= {"latents_mean": [0.0] * z, "latents_std": [1.0] * z, "_class_name": "AutoencoderKLWan"}
    config = autoencoder_from_wan(vae)
    arrays = codec_map(config).export(random_params(config))
    interop.write_folder(folder / "vae", vae, arrays)
    write_text_encoder(folder / "text_encoder", TEXT)
    for name, values in {
        "scheduler/scheduler_config.json": scheduler,
        "model_index.json": {"_class_name": "WanPipeline", "image_encoder": [None, None]}
        | {name: [library, "-"] for name, library in parts.items()}
        | ({"boundary_ratio": 0.9} if two else {}),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return folder


def write_text_encoder(folder: Path, dim: int) -> None:
    """A tiny UMT5, without its tokenizer."""
    sizes = dict(vocab_size=16, d_model=dim, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    values = {"model_type": "umt5", "feed_forward_proj": "gated-gelu"} | sizes
    table = t5_map(t5_from_transformers(values, "in"))
    arrays = {
        key: np.ones(entry.layout.their_shape, np.float32)
        for entry in table.entries
        for key in entry.keys
    }
    folder.mkdir(parents=True)
    interop.write_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(values))
