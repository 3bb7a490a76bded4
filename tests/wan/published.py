"""Small Wan transformers of Diffusers' class with random weights, and ours on the same inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange

from dit_jax.model import ModelConfig, TextToVideo, patchify, positions, unpatchify
from dit_jax.parallel import xla_attention
from dit_jax.types import Runtime
from dit_jax.wan.conditioners import LATENTS, STATES
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
