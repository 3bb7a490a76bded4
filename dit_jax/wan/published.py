"""Wan's models by name, as they are published: what is known of them without their weights."""

from __future__ import annotations

from dit_jax.config import VideoRun, read_config
from dit_jax.files import as_path, refuse_if
from dit_jax.interop import codec_tools
from dit_jax.wan.transformer import Settings, WanFile, model_of

PUBLISHED = {
    "2.1-t2v-1.3b": Settings(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "2.1-t2v-14b": Settings(),
    "2.1-i2v-14b": Settings(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    "2.2-ti2v-5b": Settings(
        num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=30
    ),
    # Each of two experts.
    "2.2-t2v-a14b": Settings(),
    "2.2-i2v-a14b": Settings(in_channels=36),
}
"""The settings of each (``config.json`` of Diffusers' folders)."""


def published_run(name: str) -> VideoRun:
    """The config of a run with a published model, by its name; codec and text encoder are unnamed."""
    known = ", ".join(PUBLISHED)
    refuse_if([(name not in PUBLISHED, f"{name!r} is no published model: give one of {known}.")])
    file = WanFile(model_of(PUBLISHED[name]))
    t, h, w = file.strides
    return file.run("runs/wan", codec_tools().LatentCodecConfig(t=t, h=h, w=w))


def base_run(path: str, name: str) -> VideoRun:
    """The config of the run at a path; if it is not there that of a published model, for ``plan``,
    which reads no weights."""
    stored = as_path(path) / "config.json"
    return read_config(stored) if stored.exists() else published_run(name)
